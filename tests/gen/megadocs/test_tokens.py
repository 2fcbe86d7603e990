"""The token store: a text is tokenized once; damage and change are noticed."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from streaming import LocalDataset
from tokenizers import Tokenizer

from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer, encode, plain
from gen.generations.store import GenerationStore
from gen.megadocs.tokens import IdReader, Spans, TokenStore, add_part, as_keys, key_of
from tests.gen.megadocs.test_encoding import TEXTS, TOKENIZERS, byte_level, llama_2
from tests.gen.megadocs.test_streams import DOCUMENTS, build, fill
from trainer.files import write_hash


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.ids")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keys_of(texts: list[str]) -> NDArray[np.uint64]:
    return as_keys(key_of(text.encode()) for text in texts)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_ids_are_those_of_the_tokenizer(make: object, tmp_path: Path) -> None:
    content = make().to_str()  # type: ignore[operator]
    tokenizer = plain(Tokenizer.from_str(content))  # of a file, as in a corpus folder
    store = TokenStore(tmp_path, tokenizer)
    add_part(store.folder, TEXTS[:2])
    add_part(store.folder, [*TEXTS[2:], ""])
    store.load()
    wanted = ["not there", *TEXTS, ""]
    spans = Spans.none(len(wanted))
    store.put_spans(spans, np.arange(len(wanted)), store.find(keys_of(wanted)), 0)
    assert (spans.part >= 0).tolist() == [False, *[True] * (len(TEXTS) + 1)]
    reader = IdReader(store.parts)
    for place, ids in enumerate(encode(tokenizer, wanted)):
        if place:
            columns = (spans.part, spans.first, spans.count, spans.checksum)
            found = reader.read(*(int(column[place]) for column in columns))
            assert np.frombuffer(found, dtype="<u4").tolist() == ids
            assert spans.text_bytes[place] == len(wanted[place].encode())
    reader.close()


def test_texts_whose_hashes_begin_alike_are_told_apart(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, byte_level())
    store.high = np.array([1, 7, 7, 7, 9], dtype=np.uint64)
    store.low = np.array([5, 5, 6, 8, 5], dtype=np.uint64)
    store.text = np.arange(5, dtype=np.int32)
    asked = np.array([[7, 8], [7, 5], [7, 9], [9, 5], [1, 5], [9, 6], [10, 0]], dtype=np.uint64)
    assert store.find(asked).tolist() == [3, 1, -1, 4, 0, -1, -1]


def test_tokenizers_do_not_share_ids(tmp_path: Path) -> None:
    stores = [TokenStore(tmp_path, make()) for make in (byte_level, llama_2)]
    add_part(stores[0].folder, TEXTS)
    for store in stores:
        store.load()
    assert [int((store.find(keys_of(TEXTS)) >= 0).sum()) for store in stores] == [5, 0]


def test_other_streams_of_the_same_texts_tokenize_nothing(root: Path) -> None:
    build(root, "stitched")
    tokenized = files(root / "tokens")
    assert tokenized
    build(root, "simple")
    build(root, "stitched", separator="\n\n")
    build(root, "stitched", real_document="first")
    build(root, "real")
    assert files(root / "tokens") == tokenized
    build(root, "latent")  # other texts, and where the documents' tokens start
    assert files(root / "tokens").items() > tokenized.items()


@pytest.mark.parametrize("ending", [".ids", ".keys"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damage_is_noticed_and_the_samples_are_the_same(
    root: Path,
    ending: str,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    undamaged = build(root, "stitched")
    file, _ = sorted((root / "tokens").rglob(f"{'?' * 16}{ending}"))
    stored = bytearray(file.read_bytes())
    stored[100] ^= 4  # in the first page of the keys
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(stored if damage == "changed" else stored[: len(stored) // 2])
    shutil.rmtree(root / "streams")
    capsys.readouterr()
    assert build(root, "stitched") == undamaged
    said = "its texts are tokenized again" in capsys.readouterr().err
    assert said == (damage != "gone" or ending == ".ids")


def test_texts_that_changed_are_tokenized_again(root: Path) -> None:
    build(root, "stitched")
    store = GenerationStore.of_method(root, "rephrase", 2)
    (part,) = store.parts()
    table = pq.read_table(part)
    texts = [text.as_py().upper() for text in table["text"]]
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, "text", pa.array(texts, pa.large_string())), part)
    write_hash(part, part)
    manifest = build(root, "simple", real_document="absent")
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    dataset = LocalDataset(str(root / "streams" / manifest["name"]))
    found = {tokenizer.decode(dataset[n]["tokens"][:-1].tolist()) for n in range(len(dataset))}
    assert found == {f"REWRITE {i} OF {d.id.upper()}." for d in DOCUMENTS for i in range(2)}


def test_without_the_store_it_is_made_again(root: Path) -> None:
    first = build(root, "stitched")
    tokenized = files(root / "tokens")
    shutil.rmtree(root / "tokens")
    shutil.rmtree(root / "streams")
    assert build(root, "stitched") == first
    assert files(root / "tokens") == tokenized
