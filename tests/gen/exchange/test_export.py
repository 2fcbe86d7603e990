"""What is exported opens as a dataset, and comes back as it was."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from gen.corpus.documents import (
    CorpusConfig,
    build_documents,
    hash_of,
    hash_text,
    is_held_out,
    load_split,
)
from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer
from gen.exchange.config import ImportConfig
from gen.exchange.export import Export
from gen.exchange.importing import Import
from gen.generations.store import Generation, GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.streams import build_stream
from gen.pipeline import GenerateConfig, generate
from gen.quality.gates import QualityConfig
from tests.conftest import REPOSITORY, ObjectStore, run_with
from trainer.object_store import read

HELD_OUT = 0.3
METHODS = ["faq", "table"]
PRESET = OmegaConf.load(REPOSITORY / "conf" / "generate" / "import" / "megadocs.yaml")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
filled = texts.filter(str.strip)
generations: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    text=texts | st.sampled_from(["", "<think>a</think>b", "<think>a"]),
    model=texts,
    prompt_version=texts,
    temperature=st.floats(0, 2, width=32),
    top_p=st.floats(0, 1, width=32),
    max_tokens=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**31 - 1),
    finish_reason=st.sampled_from(["stop", "length"]),
    prompt_tokens=st.integers(0, 2**31 - 1),
    completion_tokens=st.integers(0, 2**31 - 1),
    cached_tokens=st.integers(0, 2**31 - 1),
    truncated=st.booleans(),
    created_at=st.floats(0, 1e10),
)
# Documents by id with their generations by index.
corpora = st.dictionaries(
    filled,
    st.tuples(filled, st.dictionaries(st.integers(0, 40), generations, max_size=3)),
    min_size=8,
    max_size=16,
).filter(lambda found: len({text for text, _ in found.values()}) == len(found))


def fill(root: Path, corpus: dict[str, tuple[str, dict[int, dict[str, Any]]]]) -> CorpusConfig:
    """Documents, and in each store the generations of the training documents."""
    source = root / "source.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    rows = [{"id": name, "text": text, "of": [1]} for name, (text, _) in corpus.items()]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CorpusConfig("jsonl", str(source), id_column="id", held_out=HELD_OUT)
    build_documents(config, root)
    train = {document.id for document in load_split(root, "train")}
    for method in METHODS:
        store = GenerationStore.of_method(root, method, 0)
        store.claim({"method": method, "model": "m", "prompt": "Rewrite: {text}"})
        found = [
            Generation(
                document_id=name, method=method, index=index, text_hash=hash_text(text), **values
            )
            for name, (text, by_index) in corpus.items()
            if name in train
            for index, values in by_index.items()
        ]
        for writer in range(2):
            store.append(found[writer::2], writer)
    return config


def contents(root: Path) -> tuple[Any, ...]:
    """Documents in their order, and the rows of every store in the order of their keys."""
    stores = [GenerationStore.of_method(root, method, 0).read().to_pylist() for method in METHODS]
    documents = {split: list(load_split(root, split)) for split in ("train", "val")}
    keyed = [sorted(rows, key=lambda row: (row["document_id"], row["index"])) for rows in stores]
    return documents, keyed


def export(root: Path, folder: Path, tokenizer: Tokenizer | None = None) -> str:
    documents = list(load_split(root, "train"))
    vocabulary = None
    if tokenizer is not None:
        tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    return Export(root, folder, documents, tokenizer, vocabulary, QualityConfig()).run()


def import_again(folder: Path, root: Path) -> None:
    columns = OmegaConf.to_container(PRESET)
    assert isinstance(columns, dict)
    config = ImportConfig(
        path=str(folder),
        methods={method: method for method in METHODS},
        **{str(name): value for name, value in columns.items()},
    )
    corpus = CorpusConfig(format="import", held_out=HELD_OUT, path=str(folder))
    Import(config, "unused", corpus, root).run()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(corpora)
def test_importing_an_export_gives_the_same_documents_and_stores(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: dict[str, tuple[str, dict[int, dict[str, Any]]]],
) -> None:
    folder = tmp_path_factory.mktemp("round")
    held_out = [is_held_out(name, HELD_OUT) for name in corpus]
    assume(any(held_out) and not all(held_out))
    assume(any(len(by_index) > 1 for _, by_index in corpus.values()))
    fill(folder / "one", corpus)
    before = contents(folder / "one")
    assume(all(before[1]))
    export(folder / "one", folder / "dataset")
    import_again(folder / "dataset", folder / "two")
    assert contents(folder / "two") == before


def small_corpus() -> dict[str, tuple[str, dict[int, dict[str, Any]]]]:
    given = {
        "model": "m",
        "prompt_version": "v",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 9,
        "seed": 1,
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "truncated": False,
        "created_at": 1.0,
    }
    return {
        f"d{n}": (
            f"Text of document {n}.",
            {index: {**given, "text": f"Rewrite {index} of d{n}."} for index in range(2)},
        )
        for n in range(20)
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """An exported corpus folder with two stores and a stream of both, beside its root."""
    root = tmp_path / "root"
    fill(root, small_corpus())
    documents = list(load_split(root, "train"))
    texts_of = [document.text for document in documents]
    tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, texts_of)
    for kind in ("simple", "stitched"):
        build_stream(
            *(kind, "rephrase", 1, documents, hash_of(documents), tokenizer, vocabulary),
            *(StreamConfig(methods=METHODS), QualityConfig(), root),
        )
    described = export(root, tmp_path / "dataset", tokenizer)
    assert "megadocs-stitched-g2-faq+table: train: 1" in described
    return tmp_path / "dataset"


def test_a_dataset_in_a_bucket_is_the_one_in_a_folder(
    dataset: Path, tmp_path: Path, object_store: ObjectStore
) -> None:
    where = "s3://bucket/datasets/mine"
    config = GenerateConfig(root=str(tmp_path / "root"), export=where)
    generate(config)
    names = [path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file()]
    assert len(names) > 6
    for name in names:
        assert read(f"{where}/{name.as_posix()}") == (dataset / name).read_bytes()
    assert not list((tmp_path / "root").glob(".export*"))
    with pytest.raises(ValueError, match=rf"export={where} is there already"):
        generate(config)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_opens_every_config(dataset: Path, tmp_path: Path, streaming: bool) -> None:
    splits = {
        split: {document.id: document.text for document in load_split(tmp_path / "root", split)}
        for split in ("train", "val")
    }
    for method in METHODS:
        for split, called in (("train", "train"), ("val", "held_out")):
            rows = load_dataset(
                str(dataset), method, split=called, streaming=streaming, cache_dir=str(tmp_path)
            )
            found = list(rows)
            assert {row["id"]: row["text"] for row in found} == splits[split]
            for row in found:
                texts = [generation["text"] for generation in row["generations"]]
                wanted = [f"Rewrite {index} of {row['id']}." for index in range(2)]
                assert texts == (wanted if split == "train" else [])
                assert json.loads(row["metadata"]) == {"of": [1]}
    name = "megadocs-stitched-g2-faq+table"
    for row in load_dataset(
        str(dataset), name, split="train", streaming=streaming, cache_dir=str(tmp_path)
    ):
        starts = [0, *row["member_ends"]]
        members = [row["text"][start:end] for start, end in itertools.pairwise(starts)]
        rewrite, document = f"Rewrite 0 of {row['id']}.", splits["train"][row["document_id"]]
        end = "<|endoftext|>"
        assert members == [rewrite + end, rewrite + end, document]
        assert row["member_kinds"] == ["rephrase", "rephrase", "real"]
        assert row["member_methods"] == [*METHODS, None]


def test_the_card_says_what_is_in_it(dataset: Path) -> None:
    card = (dataset / "README.md").read_text()
    train = len(list(load_split(dataset.parent / "root", "train")))
    assert f"| faq | train | {train} | {2 * train} |" in card
    assert "Rewrite: {text}" in card
    assert "| empty | refusal |" in card
    assert "documents: FILL IN" in card
    assert f"corpus.held_out={HELD_OUT}" in card


def test_datatrove_reads_it(dataset: Path) -> None:
    script = (
        "from datatrove.pipeline.readers import ParquetReader\n"
        f"for d in ParquetReader({str(dataset / 'faq')!r}, glob_pattern='train-*.parquet')():\n"
        "    print(d.id, len(d.text), len(d.metadata['generations']))\n"
    )
    train = list(load_split(dataset.parent / "root", "train"))
    lines = run_with("datatrove", "-c", script).splitlines()
    assert lines == [f"{one.id} {len(one.text)} 2" for one in train]


def test_what_is_not_used_is_not_exported(tmp_path: Path) -> None:
    """A training document that resembles a held-out one, and its rewrites, stay here."""
    names = iter(f"n{number}" for number in range(1000))
    held_out = next(name for name in names if is_held_out(name, HELD_OUT))
    copy = next(name for name in names if not is_held_out(name, HELD_OUT))
    corpus = small_corpus()
    rewrites = corpus["d0"][1]
    corpus |= {
        held_out: ("The same text. " * 20, {}),
        copy: ("The same text. " * 20 + "!", rewrites),
    }
    config = fill(tmp_path / "root", corpus)
    assert copy in {document.id for document in load_split(tmp_path / "root", "train")}
    build_documents(replace(config, near_duplicates="drop"), tmp_path / "root")
    export(tmp_path / "root", tmp_path / "dataset")
    rows = load_dataset(str(tmp_path / "dataset"), "faq", split="train", cache_dir=str(tmp_path))
    used = {document.id for document in load_split(tmp_path / "root", "train")}
    assert copy not in used
    assert {row["id"] for row in rows} == used
    import_again(tmp_path / "dataset", tmp_path / "again")
    documents, _ = contents(tmp_path / "root")
    assert contents(tmp_path / "again")[0] == documents


def test_what_cannot_be_exported_is_refused(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with pytest.raises(ValueError, match="dataset is there already"):
        export(root, dataset)
    store = GenerationStore.of_method(root, "faq", 0)
    last = Generation("d0", "faq", 7, "x", *("m", "v", 1.0, 1.0, 9, 0, "stop", 1, 1, 0, False))
    store.append([last], 0)
    with pytest.raises(ValueError, match=r"simple-g2-faq.table is older than its generations"):
        export(root, tmp_path / "another")
    assert not (tmp_path / "another").exists()
    with pytest.raises(FileNotFoundError, match="holds no generations to export"):
        Export(tmp_path / "empty", tmp_path / "x", [], None, None, QualityConfig()).run()
