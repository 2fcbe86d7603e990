"""Rows that hold a source and its generations become documents and stores."""

import gzip
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from omegaconf import OmegaConf

from gen.corpus.documents import CorpusConfig, hash_of, hash_text, is_held_out, load_split
from gen.exchange import staging
from gen.exchange.config import ImportConfig
from gen.exchange.files import read_rows
from gen.exchange.importing import Import
from gen.generations.status import status
from gen.generations.store import GenerationStore
from gen.quality.gates import QualityConfig, ReportConfig
from gen.quality.report import write_quality_report
from tests.conftest import REPOSITORY, ObjectStore, run_script, run_with
from tests.gen.exchange.conftest import RunImport

FINEPHRASE = Path(__file__).with_name("finephrase")
PRESETS = REPOSITORY / "conf" / "generate" / "import"
ROWS = [
    {
        "id": f"d{number}",
        "text": f"Source text number {number}.",
        "generation": [f"Rewrite {index} of {number}." for index in range(number % 3 + 1)],
    }
    for number in range(30)
]


def store_rows(root: Path, method: str = "rephrase") -> list[dict[str, Any]]:
    """What a store holds, in the order of its keys."""
    rows = GenerationStore.of_method(root, method, 0).read().to_pylist()
    return sorted(rows, key=lambda row: (row["document_id"], row["index"]))


def expected(rows: list[dict[str, Any]], held_out: float = 0.2) -> list[tuple[str, int, str, str]]:
    """Key and text of every generation of the training documents among ``rows``."""
    return sorted(
        (row["id"], index, text, hash_text(row["text"]))
        for row in rows
        if not is_held_out(row["id"], held_out)
        for index, text in enumerate(row["generation"])
    )


def keys_and_texts(root: Path, method: str = "rephrase") -> list[tuple[str, int, str, str]]:
    return [
        (row["document_id"], row["index"], row["text"], row["text_hash"])
        for row in store_rows(root, method)
    ]


def write_rows(rows: list[dict[str, Any]], folder: Path, kind: str) -> Path:
    """The rows in two files of a kind, or one folder of ``datasets``."""
    folder.mkdir()
    if kind == "datasets":
        Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=2)
        return folder
    for part in range(2):
        path, some = folder / f"part-{part}.{kind}", rows[part::2]
        lines = "".join(json.dumps(row) + "\n" for row in some).encode()
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(some), path, row_group_size=4)
        elif kind == "arrow":
            table = pa.Table.from_pylist(some)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
        elif kind == "jsonl.gz":
            half = len(lines) // 2  # two members, as parallel compressors write
            path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
        elif kind == "jsonl.zst":
            compress = zstandard.ZstdCompressor().compress
            half = len(lines) // 2
            path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
        else:
            path.write_bytes(lines)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow", "datasets", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_format_gives_the_same_documents_and_generations(
    tmp_path: Path, run_import: RunImport, kind: str
) -> None:
    folder = write_rows(ROWS, tmp_path / "files", kind)
    record = run_import(folder)["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    documents = {
        split: {document.id: document.text for document in load_split(tmp_path / "root", split)}
        for split in ("train", "val")
    }
    assert documents["train"] | documents["val"] == {row["id"]: row["text"] for row in ROWS}
    assert record["left_out"]["held_out"] == sum(
        len(row["generation"]) for row in ROWS if row["id"] in documents["val"]
    )
    assert not (tmp_path / "root" / "importing").exists()


def test_the_layout_that_datatrove_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real files of datatrove's ParquetWriter; the command itself is run by test_page.py."""
    preset = OmegaConf.to_container(OmegaConf.load(PRESETS / "finephrase.yaml"))
    assert isinstance(preset, dict)
    settings = {str(name): value for name, value in preset.items()}
    config = ImportConfig(path=str(FINEPHRASE), licence="ODC-By-1.0", **settings)
    corpus = CorpusConfig(format="import", path=str(FINEPHRASE))
    Import(config, "unused", corpus, tmp_path).run()
    printed = capsys.readouterr().out
    assert "faq: 36 generations of 36 documents from 2 files" in printed
    assert "  held_out: 4\n" in printed
    for style in ("faq", "math", "table", "tutorial"):
        rows = store_rows(tmp_path, style)
        assert len(rows) == 36
        for row in rows:
            number = int(row["document_id"][-13:-1])
            assert row["text"].startswith(f"{style} {number}: fact {number}.0")
            assert row["finish_reason"] == ("length" if number % 7 == 0 else "stop")
            assert row["completion_tokens"] == len(row["text"].split())
            assert row["model"] == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    told = status(tmp_path)
    assert "generations/faq: 36 generations of 36 documents, 504 tokens, 14% cut off" in told
    assert "imported from 2 files; left out: 4 held_out" in told
    documents = list(load_split(tmp_path, "train"))
    store, page = GenerationStore.of_method(tmp_path, "faq", 0), tmp_path / "faq.html"
    options = hash_of(documents), QualityConfig(), ReportConfig(), page
    gates = write_quality_report(store, documents, *options)
    assert re.search(r"length +5 +13\.89%", gates)
    record = json.loads((tmp_path / "generations" / "faq" / "import.json").read_text())
    assert record["licence"] == "ODC-By-1.0"
    assert [file["rows"] for file in record["files"]] == [20, 20]
    assert all(len(file["sha256"]) == 64 for file in record["files"])
    assert [part["file"] for part in record["parts"]["part-000-000000.parquet"]] == [
        str(FINEPHRASE / "faq" / f"000_00000_{chunk}.parquet") for chunk in range(2)
    ]
    Import(config, "unused", corpus, tmp_path).run()
    assert "faq: all 36 imported generations are there" in capsys.readouterr().out


def test_what_is_kept_of_datatrove_is_what_it_writes(tmp_path: Path) -> None:
    run_with("datatrove", FINEPHRASE.with_name("write_finephrase.py"), tmp_path)
    for kept in FINEPHRASE.rglob("*.parquet"):
        written = pq.read_table(tmp_path / kept.relative_to(FINEPHRASE))
        assert written.equals(pq.read_table(kept), check_metadata=True)
    names = [{path.relative_to(top) for path in top.rglob("*")} for top in (FINEPHRASE, tmp_path)]
    assert names[0] == names[1]


def test_a_glob_an_url_and_one_file_are_places_too(tmp_path: Path, run_import: RunImport) -> None:
    folder = write_rows(ROWS, tmp_path / "files", "jsonl")
    (folder / "README.md").write_text("no rows")
    run_import(f"{folder}/part-0*")
    assert keys_and_texts(tmp_path / "root") == expected(ROWS[::2])
    for name, path in (("file", folder / "part-0.jsonl"), ("url", f"file://{folder}/part-0.jsonl")):
        corpus = CorpusConfig(format="import", held_out=0.2, path=str(path))
        Import(ImportConfig(path=str(path)), "rephrase", corpus, tmp_path / name).run()
        assert keys_and_texts(tmp_path / name) == expected(ROWS[::2])


def test_files_of_a_server_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    """Over HTTP, as an example of what fsspec reaches."""
    write_rows(ROWS, tmp_path / "files", "parquet")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = f"http://127.0.0.1:{server.server_port}/files/"
        corpus = CorpusConfig(format="import", held_out=0.2, path=path)
        record = Import(ImportConfig(path=path), "rephrase", corpus, tmp_path / "root").run()
        server.shutdown()
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    files = record["rephrase"]["files"]
    assert [file["path"] for file in files] == [f"{path}part-{part}.parquet" for part in range(2)]
    assert all(file["size"] > 0 for file in files)


def test_files_in_an_object_store_are_read_as_those_of_a_folder(
    tmp_path: Path, object_store: ObjectStore, run_import: RunImport
) -> None:
    for file in write_rows(ROWS, tmp_path / "files", "parquet").iterdir():
        object_store.upload(file, f"rephrases/{file.name}")
    record = run_import("s3://bucket/rephrases")
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
    names = [f"s3://bucket/rephrases/part-{part}.parquet" for part in range(2)]
    files = record["rephrase"]["files"]
    assert [file["path"] for file in files] == names
    assert [file["rows"] for file in files] == [15, 15]
    shutil.rmtree(tmp_path / "root")
    run_import("s3://bucket/rephrases/part-0*", processes=2)
    assert keys_and_texts(tmp_path / "root") == expected(ROWS[::2])
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(FileNotFoundError, match=r"import.path=s3://bucket/nothing holds no file"):
        run_import("s3://bucket/nothing")
    cut = tmp_path / "files" / "part-1.parquet"
    cut.write_bytes(cut.read_bytes()[:-200])
    object_store.upload(cut, "rephrases/part-1.parquet")
    record = run_import("s3://bucket/rephrases")
    assert record["rephrase"]["left_out"]["unreadable_file"] == 1


def test_an_object_that_does_not_come_stops_the_import_and_loses_no_row(
    tmp_path: Path,
    object_store: ObjectStore,
    run_import: RunImport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = sorted(write_rows(ROWS, tmp_path / "files", "parquet").iterdir())
    for file in files:
        object_store.upload(file, file.name)

    def read_when_it_is_gone(path: str, *arguments: Any) -> Iterator[Any]:
        object_store.delete(files[1].name)
        return read_rows(path, *arguments)

    with monkeypatch.context() as gone:
        gone.setattr(staging, "read_rows", read_when_it_is_gone)
        with pytest.raises(OSError, match=r"same command to go on"):
            run_import("s3://bucket", processes=1)
    object_store.upload(files[1], files[1].name)
    run_import("s3://bucket", processes=1)
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)


def test_a_place_that_cannot_be_reached_is_named(tmp_path: Path, run_import: RunImport) -> None:
    with pytest.raises(OSError, match=r"import.path=http://127.0.0.1:9/x/ cannot be listed: .*127"):
        run_import("http://127.0.0.1:9/x/")


def test_a_corpus_that_is_there_already_takes_what_fits_it(
    tmp_path: Path, run_import: RunImport
) -> None:
    rows = [dict(row) for row in ROWS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows[5:]))
    rows[7]["text"] = "Edited since."
    corpus = CorpusConfig("jsonl", str(tmp_path / "corpus.jsonl"), id_column="id", held_out=0.2)
    record = run_import(write_rows(rows, tmp_path / "files", "parquet"), corpus=corpus)["rephrase"]
    fitting = [row for place, row in enumerate(rows) if place >= 5 and place != 7]
    assert keys_and_texts(tmp_path / "root") == expected(fitting)
    left_out = record["left_out"]
    assert left_out["missing_source"] == sum(len(row["generation"]) for row in rows[:5])
    assert left_out["other_source_text"] == len(rows[7]["generation"])
    assert left_out["source_without_generations"] == 1
    assert "part-1.parquet, row 4: source 'd7'" in record["examples"]["other_source_text"][0]
    assert record["examples"]["source_without_generations"] == ["d7"]


def test_generations_of_one_source_in_several_rows_are_numbered_and_repeats_left_out(
    tmp_path: Path, run_import: RunImport
) -> None:
    """As in MAGA: a row for each genre, the source's text in every one of them."""
    rows = [
        {"raw": f"Source {number}.", "out": f"Genre {genre} of {number}."}
        for genre in (0, 1, 1, 2)
        for number in range(10)
    ]
    settings = {"generation_column": "out", "text_column": "raw", "id_column": None}
    record = run_import(
        write_rows(rows, tmp_path / "files", "parquet"),
        corpus=CorpusConfig(format="import", held_out=0.2),
        **settings,
    )["rephrase"]
    train = {document.id: document.text for document in load_split(tmp_path / "root", "train")}
    assert record["left_out"]["duplicate"] == 10
    assert record["largest_g"] == 3
    # Files take every second row: genres of even numbers stand in the first.
    assert [(row[0], row[1], row[2]) for row in keys_and_texts(tmp_path / "root")] == sorted(
        (name, genre, f"Genre {genre} of {text.removeprefix('Source ')}")
        for name, text in train.items()
        for genre in range(3)
    )


def test_changed_files_and_settings_are_refused(tmp_path: Path, run_import: RunImport) -> None:
    folder = write_rows(ROWS, tmp_path / "files", "jsonl")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps(row) for row in ROWS))
    config = CorpusConfig("jsonl", str(corpus), id_column="id", held_out=0.2)
    run_import(folder, corpus=config)
    with pytest.raises(ValueError, match="model: 'unknown' -> 'm'"):
        run_import(folder, corpus=config, model="m")
    with (folder / "part-1.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"1 files changed.*part-1\.jsonl"):
        run_import(folder, corpus=config)


def test_another_corpus_is_imported_for_again(tmp_path: Path, run_import: RunImport) -> None:
    folder = write_rows(ROWS, tmp_path / "files", "jsonl")
    run_import(folder)
    first = GenerationStore.of_method(tmp_path / "root", "rephrase", 0).fingerprint()
    run_import(folder, corpus=CorpusConfig(format="import", held_out=0.5))
    assert keys_and_texts(tmp_path / "root") == expected(ROWS, 0.5)
    assert GenerationStore.of_method(tmp_path / "root", "rephrase", 0).fingerprint() != first


def test_only_the_files_that_hold_the_first_documents_are_read(
    tmp_path: Path, run_import: RunImport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gen.exchange.staging.UNIT_BYTES", 1)  # a unit for every row group
    folder = write_rows(ROWS, tmp_path / "files", "parquet")
    corpus = CorpusConfig(format="import", held_out=0.2, max_documents=6)
    record = run_import(folder, corpus=corpus, processes=1)["rephrase"]
    assert keys_and_texts(tmp_path / "root") == expected(ROWS[:12:2])
    assert sum(file["rows"] for file in record["files"]) == 8  # two row groups of four


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "generator=import needs import.path=FOLDER"),
        ({"path": "/nowhere"}, "import.path=/nowhere holds no file ending in .parquet"),
        ({"generation_column": "x"}, "rows.jsonl has no column 'x' .*import.generation_column"),
        ({"columns": {"words": "a"}}, "'words', which is no column of a store"),
        ({"columns": {"seed": "s.t"}}, "has no column 's' .*set import.columns.seed"),
        ({"path": "nosuch://a/b"}, "import.path=nosuch://a/b cannot be reached"),
        ({"text_column": None}, "corpus=import needs the sources' texts"),
        ({"text_column": None, "id_column": None}, "must hold their source or name it"),
        ({"sources": "x"}, "two places for the sources"),
        ({"methods": {"a/b": "x"}}, "'a/b' names a folder"),
        ({"methods": {"faq": "faq"}}, "import.methods.faq=.*/faq holds no file"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROWS[0]))
    config = ImportConfig(**{"path": str(rows), **settings})
    corpus = CorpusConfig(format="import", path=config.path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Import(config, "rephrase", corpus, tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.slow
def test_a_misspelt_key_is_one_line(tmp_path: Path) -> None:
    command = ["generate.py", f"root={tmp_path}", "generator=import", "import.pth=a"]
    done = run_script(*command, check=False)
    assert done.returncode == 1
    assert "pth" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["plan.json", "counts-000001.json", "generations-000001.parquet"])
def test_damage_to_what_a_killed_import_had_read_is_read_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(staging, "UNIT_BYTES", 200)
    path = write_rows(ROWS, tmp_path / "files", "parquet")
    config = ImportConfig(str(path), processes=1)
    corpus = CorpusConfig(format="import", path=str(path), held_out=0.2)
    killed = Import(config, "rephrase", corpus, tmp_path / "root")
    assert len(killed.plan.units) > 2
    killed.stage.run(1)
    file = killed.stage.folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    Import(config, "rephrase", corpus, tmp_path / "root").run()
    assert name in caplog.text
    assert keys_and_texts(tmp_path / "root") == expected(ROWS)
