"""Quality gates: each on texts that fail it and texts that must not, and what streams leave out."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import LocalDataset

from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer
from gen.generations.failures import Failures
from gen.generations.store import Generation, GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.progress import streams_status
from gen.megadocs.streams import build_stream
from gen.quality import table
from gen.quality.gates import (
    GATES,
    Measures,
    QualityConfig,
    ReportConfig,
    advice,
    gates,
    measure,
    select,
    strip_preamble,
)
from gen.quality.language import SourceLanguage
from gen.quality.report import judge, write_quality_report
from gen.quality.table import columns_of, quality_table
from gen.work import Work

SOURCE = (
    "The lighthouse on the northern cape was built by fishermen after the storm of 1871 had taken "
    "eleven boats in a single night. Its lamp burned whale oil at first, then paraffin, and was "
    "wound by hand every four hours until a motor replaced the last keeper."
)
REWRITE = (
    "After losing eleven vessels to one terrible gale in 1871, the local fishing community raised "
    "a beacon at the tip of the northern headland. Early on it was fuelled with oil from whales "
    "and later with paraffin. Somebody had to turn its clockwork six times a day, until the job "
    "was taken over by an engine."
)
ANOTHER = (
    "A motor winds the lamp today. Before that, keepers did so around the clock, burning paraffin "
    "and, in the first years, whale oil. Fishermen paid for the tower because so many of their "
    "friends had drowned during one night of the great storm."
)
GERMAN = (
    "Der Leuchtturm auf dem nördlichen Kap wurde von Fischern gebaut, nachdem der Sturm von 1871 "
    "in einer einzigen Nacht elf Boote genommen hatte. Die Lampe brannte zuerst mit Tran und wurde "
    "alle vier Stunden von Hand aufgezogen, bis ein Motor den letzten Wärter ersetzte."
)
JAPANESE = "灯台は漁師によって建てられ、嵐の後に十一隻の船が失われたと伝えられている。"
RUSSIAN = "Маяк на северном мысе построили рыбаки после шторма, который погубил одиннадцать лодок."


def failing(*texts: str, reasons: str = "stop", source: str = SOURCE) -> list[set[str]]:
    """Gates that each sibling fails at the default thresholds."""
    measured = measure(source, [(i, text, reasons) for i, text in enumerate(texts)])
    columns = {
        name: np.array([getattr(found, name) for found in measured])
        for name in measured[0].__dataclass_fields__
    }
    failed = gates(columns, QualityConfig())
    assert set(failed) == set(GATES)
    return [{gate for gate in GATES if failed[gate][row]} for row in range(len(texts))]


def test_good_rewrites_pass_every_gate() -> None:
    assert failing(REWRITE, ANOTHER) == [set(), set()]


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ("empty", ""),
        ("empty", "\n -- *** \n"),
        ("refusal", "I'm sorry, but I cannot rewrite this document because it is not there."),
        ("refusal", "As an AI language model, I do not have access to lighthouses."),
        ("refusal", "I cannot provide a rewrite of this."),
        ("refusal", "Please provide the document that you would like me to rewrite."),
        ("preamble", "Here is a rephrased version of the document:\n\n" + REWRITE),
        ("preamble", "Sure! Here's the article, rewritten: " + REWRITE),
        ("preamble", "**Rephrased article:**\n" + REWRITE),
        ("preamble", "Certainly! I would be happy to help.\n\n" + REWRITE),
        ("language", GERMAN),
        ("language", RUSSIAN),
        ("copy", SOURCE),
        ("copy", SOURCE + " Nothing more is known."),
        ("repetition", "The lamp was lit and the lamp was wound. " * 12),
        ("repetition", "和平" * 150),
    ],
)
def test_defects_are_found(gate: str, text: str) -> None:
    assert gate in failing(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        "I cannot swim, said the keeper, and yet I have rowed out every winter since the war.",
        "Here are the results of the vote on the tower: five to four.",
        "Sure-footed goats were the only visitors of the cape.",
        "The text of the plaque reads: to those who did not return.",
    ],
)
def test_ordinary_sentences_are_not_taken_for_chat(text: str) -> None:
    assert not failing(text)[0] & {"refusal", "preamble"}


def test_cut_off_texts_are_known_by_their_finish_reason() -> None:
    assert failing(REWRITE, reasons="length") == [{"length"}]


def test_of_duplicates_the_first_passes() -> None:
    changed = REWRITE.replace("terrible", "dreadful")
    found = failing(REWRITE, ANOTHER, REWRITE.upper(), changed)
    assert [("duplicate" in gates) for gates in found] == [False, False, True, True]


def test_long_varied_prose_is_not_repetition() -> None:
    """This file's own package: 100 kB of ordinary English and code in pieces of 6 kB."""
    root = Path(__file__).parents[2]
    text = "\n".join(path.read_text() for path in sorted((root / "gen").glob("*.py")))
    pieces = [text[start : start + 6000] for start in range(0, 60_000, 6000)]
    assert not any("repetition" in found for found in failing(*pieces, source="x"))


@pytest.mark.parametrize(
    ("source", "text", "other"),
    [
        (SOURCE, REWRITE, False),
        (SOURCE, GERMAN, True),
        (GERMAN, GERMAN.lower(), False),
        (GERMAN, REWRITE, True),
        (RUSSIAN, SOURCE, True),
        (SOURCE, "Short: ok", False),
        (SOURCE, "| 1871 | 11 | boats |\n" * 20, False),
        (SOURCE, "def f(x): return [y ** 2 for y in x if y not in known_values] " * 3, False),
        (
            JAPANESE,
            SOURCE,
            True,
        ),
        (
            JAPANESE,
            "その灯台はかつて鯨油で灯り、のちに石油に変わり、四時間ごとに手で巻かれていた。",
            False,
        ),
    ],
)
def test_languages(source: str, text: str, other: bool) -> None:
    assert SourceLanguage(source).differs(text) is other


def test_a_preamble_is_cut_off_and_nothing_else() -> None:
    for announced in (
        "Here is the rewritten text:\n\n",
        "Sure! Here is a rephrased version in the style of an encyclopedia:\n",
        "Rewritten document: ",
    ):
        assert strip_preamble(announced + REWRITE) == REWRITE
    assert strip_preamble(REWRITE) == REWRITE
    assert strip_preamble("Here is the rewritten text:\n") == "Here is the rewritten text:\n"


def test_a_generation_is_dropped_by_its_first_dropping_gate_and_counted_by_all() -> None:
    failed = {gate: np.zeros(4, dtype=bool) for gate in GATES}
    failed["refusal"][[0, 1]] = True
    failed["length"][[1, 2]] = True
    selection = select(failed, QualityConfig(refusal="drop", length="drop"))
    assert selection.kept.tolist() == [False, False, False, True]
    assert selection.dropped == {"empty": 0, "refusal": 2, "length": 1}
    assert selection.failed == {**dict.fromkeys(GATES, 0), "refusal": 2, "length": 2}
    kept = select(failed, QualityConfig(empty="keep"))
    assert kept.kept.all()
    assert kept.failed == selection.failed


def test_unknown_policies_and_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quality\.copy=strip is not one of keep, drop"):
        QualityConfig(copy="strip").check()
    with pytest.raises(ValueError, match=r"quality\.similarity=2\.0"):
        QualityConfig(similarity=2.0).check()
    QualityConfig(preamble="strip").check()


# ---- of a store ----

DOCUMENTS = [Document(f"d{i}", f"{SOURCE} This is copy number {i}.") for i in range(6)]
BAD = {  # (document, index) -> text
    (0, 1): "",
    (1, 0): "I'm sorry, but I cannot rewrite this.",
    (2, 1): "Here is a rephrased version:\n\n" + ANOTHER,
    (3, 1): REWRITE,
    (4, 0): SOURCE,
    (4, 1): SOURCE,
}


def text_of(document: int, index: int) -> str:
    return BAD.get((document, index), (REWRITE, ANOTHER)[index])


def row(document: int, method: str, index: int) -> Generation:
    text = text_of(document, index)
    return Generation(
        f"d{document}", method, index, text, "m", "v", 1.0, 1.0, 9, 0, "stop", 1, 1, 0, False
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for method in ("rephrase", "latent"):
        store = GenerationStore.of_method(tmp_path, method, 2, method == "latent")
        store.claim({})
        rows = [row(i, method, index) for i in reversed(range(6)) for index in (1, 0)]
        store.append(rows, 0)
    build_tokenizer(TokenizerConfig(vocab_size=320), tmp_path, [SOURCE])
    return tmp_path


def build(root: Path, kind: str, quality: QualityConfig, real: str = "last") -> dict[str, Any]:
    tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    config = StreamConfig(real_document=real)
    method = "latent" if kind == "latent" else "rephrase"
    return build_stream(
        kind, method, 2, DOCUMENTS, "h", tokenizer, vocabulary, config, quality, root
    )


STRICT = QualityConfig(refusal="drop", duplicate="drop", copy="drop", preamble="strip")


def test_streams_leave_out_what_is_dropped_and_say_so(root: Path) -> None:
    counted = build(root, "stitched", QualityConfig(empty="keep"))
    assert counted["judged"]["kept"] == counted["judged"]["generations"] == 12
    assert counted["judged"]["failed"] == {
        **dict.fromkeys(GATES, 0),
        "empty": 1,
        "refusal": 1,
        "preamble": 1,
        "duplicate": 2,
        "copy": 2,
    }
    strict = build(root, "stitched", STRICT)
    judged = strict["judged"]
    assert judged["failed"] == counted["judged"]["failed"]
    assert judged["dropped"] == {"empty": 1, "refusal": 1, "duplicate": 2, "copy": 1}
    assert (judged["kept"], judged["stripped"]) == (7, 1)
    assert strict["config_hash"] != counted["config_hash"]
    dataset = LocalDataset(str(root / "streams" / "stitched-g2"))
    members = [[pair[1] for pair in dataset[i]["provenance"]["members"][:-1]] for i in range(6)]
    assert members == [[0], [1], [0, 1], [0], [], [0, 1]]
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    assert "Here is" not in tokenizer.decode(dataset[2]["tokens"].tolist())
    assert GenerationStore.of_method(root, "rephrase", 2).read().num_rows == 12  # all still there


def test_a_document_without_kept_generations(root: Path) -> None:
    manifest = build(root, "stitched", STRICT, real="absent")
    dataset = LocalDataset(str(root / "streams" / manifest["name"]))
    assert [dataset[i]["id"] for i in range(len(dataset))] == ["d0", "d1", "d2", "d3", "d5"]


def test_the_simple_stream_keeps_its_order(root: Path) -> None:
    def order(quality: QualityConfig) -> list[str]:
        manifest = build(root, "simple", quality)
        dataset = LocalDataset(str(root / "streams" / manifest["name"]))
        return [dataset[i]["id"] for i in range(len(dataset))]

    everything, strict = order(QualityConfig(empty="keep")), order(STRICT)
    gone = ("d0#1", "d1#0", "d3#1", "d4#0", "d4#1")
    left = [name for name in everything if name not in gone]
    assert (len(everything), strict) == (18, left)


def test_a_dropped_thought_leaves_its_cut_closed(root: Path) -> None:
    manifest = build(root, "latent", STRICT)
    sample = LocalDataset(str(root / "streams" / manifest["name"]))[0]
    assert sample["member_kinds"].tolist() == [0, 2, 0, 0]
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    text = tokenizer.decode(sample["tokens"][:-1].tolist())
    assert text.replace(f"<think>{REWRITE}</think>", "") == DOCUMENTS[0].text


def test_the_table_is_made_once_and_again_when_something_changes(root: Path) -> None:
    store = GenerationStore.of_method(root, "rephrase", 2)
    first = quality_table(store, DOCUMENTS, "h")
    path = store.folder / "quality.parquet"
    made = path.stat().st_mtime_ns
    assert quality_table(store, DOCUMENTS, "h").equals(first)
    assert path.stat().st_mtime_ns == made
    rows = pq.read_table(path, columns=["document_id", "index"])
    assert rows["index"].equals(first["index"])
    names = list(zip(rows["document_id"].to_pylist(), rows["index"].to_pylist(), strict=True))
    assert names == [(f"d{i}", index) for i in range(6) for index in (0, 1)]
    quality_table(store, DOCUMENTS, "other documents")
    assert path.stat().st_mtime_ns != made
    store.append([row(9, "rephrase", 0)], 0)
    assert quality_table(store, DOCUMENTS, "h").num_rows == 12  # of a document not asked for


def test_processes_and_writers_measure_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = GenerationStore.of_method(root, "rephrase", 2)
    one = columns_of(quality_table(store, DOCUMENTS, "a", 1))
    monkeypatch.setattr(table, "UNIT_ROWS", (1, 2))  # a document
    monkeypatch.setattr(table, "ROWS_A_PROCESS", 1)

    def as_writer(writer: int) -> pa.Table:
        with Work(1, writer, 3) as work:
            return quality_table(store, DOCUMENTS, "c", None, work)

    found = [columns_of(quality_table(store, DOCUMENTS, "b", 2))]
    with ThreadPoolExecutor(3) as writers:
        found += map(columns_of, writers.map(as_writer, range(3)))
    for other in found:
        for name, column in one.items():
            np.testing.assert_array_equal(column, other[name])
    assert not list(store.folder.glob(".quality*"))


def test_judging_goes_on_where_it_was_cut_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GenerationStore.of_method(root, "rephrase", 2)
    whole = columns_of(quality_table(store, DOCUMENTS, "a"))
    monkeypatch.setattr(table, "UNIT_ROWS", (1, 2))
    measured: list[str] = []

    def until(limit: int) -> Any:
        def measure_some(source: str, siblings: Any) -> list[Measures]:
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append(source)
            return measure(source, siblings)

        return measure_some

    monkeypatch.setattr(table, "measure", until(4))
    with pytest.raises(KeyboardInterrupt):
        quality_table(store, DOCUMENTS, "b", 1)
    assert f"{store.folder}: 8 of 12 generations judged" in streams_status(root)
    (building,) = store.folder.glob(".quality.*.building")
    damaged, *_ = sorted(building.glob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setattr(table, "measure", until(100))
    found = columns_of(quality_table(store, DOCUMENTS, "b", 1))
    assert measured[4:] == [*(one.text for one in DOCUMENTS[4:6]), DOCUMENTS[0].text]
    for name, column in whole.items():
        np.testing.assert_array_equal(column, found[name])
    assert f"{store.folder}: 12 of 12 generations judged" in streams_status(root)


def test_the_manifest_on_disk_has_the_counts(root: Path) -> None:
    manifest = build(root, "stitched", STRICT)
    assert json.loads((root / "streams/stitched-g2/manifest.json").read_text()) == manifest


def test_the_report_shows_counts_samples_and_examples(root: Path) -> None:
    store = GenerationStore.of_method(root, "rephrase", 2)
    path = root / "reports" / "rephrase.html"
    documents = [*DOCUMENTS, Document("<script>", "never rewritten")]
    text = write_quality_report(store, documents, "h", STRICT, ReportConfig(), path)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["copy"] == ["2", "16.67%", "drop", "1"]
    assert rows["kept"] == ["7", "58.33%", "5"]
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    assert "12 generations of 6 of 7 training documents" in " ".join(page.split())
    assert "I&#39;m sorry, but I cannot rewrite this." in page
    assert page.count('<span class="badge">refusal</span>') == 2  # as a sample, as an example
    again = root / "again.html"
    write_quality_report(store, documents, "h", STRICT, ReportConfig(), again)
    assert again.read_text() == page


def test_the_report_says_what_could_not_be_made_and_why(root: Path) -> None:
    store = GenerationStore.of_method(root, "rephrase", 3)
    page = root / "rephrase.html"
    arguments = (store, DOCUMENTS, "h", QualityConfig(), ReportConfig(), page)
    write_quality_report(*arguments)
    assert "No generation failed in the latest job." in page.read_text()
    failures = Failures(store.folder, 0)
    failures.add("d1", 2, "HTTP 500", "internal error")
    failures.add("d2", 2, "empty", "an answer without text")
    failures.add("d3", 2, "HTTP 500", "internal error")
    failures.save()
    write_quality_report(*arguments)
    told = " ".join(page.read_text().split())
    assert "Failed: 2 HTTP 500, 1 empty. d1#2: internal error; d2#2: an answer without" in told


def test_a_reports_texts_are_those_of_their_rows(tmp_path: Path) -> None:
    """Written in any order into several parts, beside generations of another corpus."""
    store = GenerationStore.of_method(tmp_path, "rephrase", 3)
    store.claim({})
    numbered = [(i, index) for i in (4, 0, 6, 5, 1, 3) for index in (2, 0, 1)]
    for start in range(0, len(numbered), 4):
        store.append(
            [
                replace(
                    row(0, "rephrase", 0), document_id=f"d{i}", index=index, text=f"{i}/{index}"
                )
                for i, index in numbered[start : start + 4]
            ],
            0,
        )
    judged = judge(store, DOCUMENTS, "h", STRICT)
    rows = np.array([14, 3, 0, 7])
    for position, text in judged.texts(rows).items():
        document, index = text.split("/")
        assert DOCUMENTS[judged.source[position]].id == f"d{document}"
        assert judged.columns["index"][position] == int(index)
    assert set(judged.texts(rows)) == {0, 3, 7, 14}


def test_a_report_needs_generations_of_these_documents(root: Path) -> None:
    store = GenerationStore.of_method(root, "rephrase", 2)
    with pytest.raises(ValueError, match="holds no generation of these documents"):
        write_quality_report(
            store, [Document("x", "y")], "z", STRICT, ReportConfig(), root / "r.html"
        )
    with pytest.raises(FileNotFoundError, match="holds no generations"):
        write_quality_report(
            GenerationStore(root / "none"), DOCUMENTS, "h", STRICT, ReportConfig(), root / "r.html"
        )


def test_a_gate_that_nearly_always_fires_says_what_to_set() -> None:
    failed = {"length": 47, "copy": 3, "preamble": 48}
    assert advice(failed, 48) == [
        "47 of 48 generations fail the gate 'length': method.max_tokens cuts the generations: "
        "raise it, or leave long documents out with corpus.max_characters",
        "48 of 48 generations fail the gate 'preamble': the model announces its text: "
        "quality.preamble=strip cuts that off",
    ]
    assert advice({"length": 30}, 48) == []
