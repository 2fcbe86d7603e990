"""What is broken, missing or odd in somebody's files costs itself alone and is named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gen.corpus.documents import CorpusConfig
from tests.gen.exchange.conftest import RunImport
from tests.gen.exchange.test_importing import ROWS, expected, keys_and_texts, store_rows

GOOD = {"id": "good", "text": "A source.", "generation": ["A rewrite."], "finish": "stop"}
REST = [{**row, "finish": "stop"} for row in ROWS]


def line(**changes: Any) -> bytes:
    """A row in place of the third one, changed; None takes a column away."""
    row = {**GOOD, "id": "odd", "text": "Another source.", **changes}
    return json.dumps({key: row[key] for key in row if row[key] != "absent"}).encode()


ODD_LINES = [
    (b'{"id": "odd", "text": "cut', "broken_row", "not JSON"),
    (b'["a", "list"]', "broken_row", "no object"),
    (b'{"id": "odd", "text": "\xff", "generation": "x"}', "not_utf8", "can't decode byte 0xff"),
    (line(text="absent"), "source_empty", "None"),
    (line(text=" \n"), "source_empty", "' "),
    (line(text={"a": 1}), "source_wrong_type", "{'a': 1}"),
    (line(text="half \ud83d"), "source_not_utf8", "half"),
    (line(id="absent"), "no_id", "None"),
    (line(id=None), "no_id", "None"),
    (line(id={"a": 1}), "no_id", "{'a': 1}"),
    (line(id="\ud83d"), "no_id", "surrogate"),
    (line(generation="absent"), "no_generation", "null"),
    (line(generation=None), "no_generation", "null"),
    (line(generation=[]), "no_generation", "empty list"),
    (line(generation=""), "generation_empty", "''"),
    (line(generation=[" \t"]), "generation_empty", "' "),
    (line(generation=5), "generation_wrong_type", "5"),
    (line(generation={"text": "x"}), "generation_wrong_type", "{'text': 'x'}"),
    (line(generation="half \udc00"), "generation_not_utf8", "half"),
    (line(generation="<think>never ends"), "only_thinking", "never ends"),
    (line(generation="<think>a</think> "), "only_thinking", "<think>"),
]


@pytest.mark.parametrize(("odd", "reason", "detail"), ODD_LINES)
def test_an_odd_line_costs_itself_alone(
    tmp_path: Path, run_import: RunImport, odd: bytes, reason: str, detail: str
) -> None:
    lines = [json.dumps(row).encode() for row in REST]
    lines[2:2] = [odd]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    record = run_import(tmp_path / "rows.jsonl", columns={"finish_reason": "finish"})["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    left_out = record["left_out"]
    left_out.pop("held_out")
    left_out.pop("source_without_generations", None)
    assert left_out == {reason: 1}
    assert record["examples"][reason][0].startswith(f"{tmp_path}/rows.jsonl, row 3: ")
    assert detail in record["examples"][reason][0]


def test_one_bad_generation_of_several_costs_no_other(
    tmp_path: Path, run_import: RunImport
) -> None:
    odd = [None, "first", 7, "", "<think>why</think>second", "first"]
    rows = [json.dumps(row) for row in REST]
    source = next(row for row in REST if row["id"] == expected(ROWS)[0][0])
    rows.append(json.dumps({**source, "generation": odd, "finish": "max_tokens"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    record = run_import(tmp_path / "rows.jsonl", columns={"finish_reason": "finish"})["rephrase"]
    found = [row for row in store_rows(tmp_path / "root") if row["document_id"] == source["id"]]
    assert [row["text"] for row in found] == [*source["generation"], "first", "second"]
    assert [row["finish_reason"] for row in found] == ["stop"] * (len(found) - 2) + ["length"] * 2
    record["left_out"].pop("held_out")
    assert record["left_out"] == {
        **dict.fromkeys(("no_generation", "generation_wrong_type", "generation_empty"), 1),
        "duplicate": 1,
    }


def test_a_carried_value_of_another_type_is_left_empty_and_counted(
    tmp_path: Path, run_import: RunImport
) -> None:
    odd = ["stop", 3, None, {"a": 1}, True]
    rows = [{**row, "finish": odd[place % 5]} for place, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = run_import(tmp_path / "rows.jsonl", columns={"finish_reason": "finish"})["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    assert record["left_out"]["odd_finish_reason"] == sum(
        len(row["generation"]) for place, row in enumerate(ROWS) if place % 5 in (1, 3, 4)
    )


def cut_gzip(path: Path) -> None:
    content = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in REST * 9), 0)
    path.with_suffix(".jsonl.gz").write_bytes(content[:-1000])


def cut_zstandard(path: Path) -> None:
    frame = zstandard.compress(b"".join(json.dumps(row).encode() + b"\n" for row in REST))
    path.with_suffix(".jsonl.zst").write_bytes(frame * 9 + frame[:-100])


def cut_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(REST * 200)
    with pa.ipc.new_stream(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    file = path.with_suffix(".arrow")
    file.write_bytes(file.read_bytes()[:-20_000])


@pytest.mark.parametrize("damage", [cut_gzip, cut_zstandard, cut_arrow])
def test_a_file_that_was_cut_off_gives_what_is_before_the_cut(
    tmp_path: Path, run_import: RunImport, damage: Callable[[Path], None]
) -> None:
    (tmp_path / "files").mkdir()
    damage(tmp_path / "files" / "b")
    (tmp_path / "files" / "c.jsonl").write_text(json.dumps(GOOD))
    record = run_import(tmp_path / "files")["rephrase"]
    good = [GOOD] if "good" in {row[0] for row in keys_and_texts(tmp_path / "root")} else []
    assert keys_and_texts(tmp_path / "root") == expected([*ROWS, *good])
    assert record["left_out"]["truncated_file"] == 1
    assert "/files/b." in record["examples"]["truncated_file"][0]


def parquet(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(REST), path, row_group_size=10, compression="snappy")
    return path


def test_a_parquet_file_without_its_end_is_named(tmp_path: Path, run_import: RunImport) -> None:
    whole, cut = parquet(tmp_path / "files" / "a.parquet"), tmp_path / "files" / "b.parquet"
    cut.write_bytes(whole.read_bytes()[:-30])
    record = run_import(tmp_path / "files")["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    assert record["left_out"]["unreadable_file"] == 1
    assert record["examples"]["unreadable_file"][0].startswith(f"{cut}: ")


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path, run_import: RunImport) -> None:
    path = parquet(tmp_path / "files" / "a.parquet")
    group = pq.read_metadata(path).row_group(1)
    column = next(
        group.column(i)
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == "text"
    )
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(content))
    record = run_import(tmp_path / "files")["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS[:10] + ROWS[20:])
    assert record["left_out"]["damaged_rows"] == 1
    assert "row 11: rows 11 to 20: " in record["examples"]["damaged_rows"][0]


def test_a_text_of_a_parquet_file_that_is_not_utf8_costs_its_row(
    tmp_path: Path, run_import: RunImport
) -> None:
    path = parquet(tmp_path / "files" / "a.parquet")
    text = b"Source text number 4."
    assert path.read_bytes().count(text) == 0  # compressed: so written again without
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    content = path.read_bytes().replace(text, b"Source \xff\xfe\xfd\xfc number 4.")
    path.write_bytes(content)
    record = run_import(tmp_path / "files")["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS[:4] + ROWS[5:])
    assert record["left_out"]["not_utf8"] == 1
    assert record["examples"]["not_utf8"][0].startswith(f"{path}, row 5: ")


def test_empty_files_and_files_of_other_columns_hold_nothing(
    tmp_path: Path, run_import: RunImport
) -> None:
    parquet(tmp_path / "files" / "b.parquet")
    (tmp_path / "files" / "a.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"other": ["x", "y"]}), tmp_path / "files" / "c.parquet")
    record = run_import(tmp_path / "files")["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    assert record["left_out"]["source_empty"] == 2


def test_rows_without_the_number_of_their_generation_are_left_out(
    tmp_path: Path, run_import: RunImport
) -> None:
    rows = [
        {**row, "generation": row["generation"][0], "n": number}
        for row in ROWS
        for number in (3, None, 3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = CorpusConfig(format="import", held_out=0.2)
    record = run_import(tmp_path / "rows.jsonl", corpus=corpus, columns={"index": "n"})["rephrase"]
    firsts = [{**row, "generation": row["generation"][:1]} for row in ROWS]
    wanted = [(row[0], 3, *row[2:]) for row in expected(firsts)]
    assert keys_and_texts(tmp_path / "root") == wanted
    assert record["left_out"]["no_index"] == len(ROWS)
    assert record["left_out"]["duplicate"] == len(ROWS)
