"""MDS streams: content, idempotence, SIGKILL at any moment."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import LocalDataset

from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer, encode
from gen.generations.store import Generation, GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.streams import build_stream, name_of
from gen.prompts import MethodConfig
from gen.quality.gates import QualityConfig

DOCUMENTS = [Document(f"d{i}", f"This is document number {i}. " * (i + 1)) for i in range(12)]


def generation(document: Document, method: str, index: int) -> Generation:
    text = f"Rewrite {index} of {document.id}."
    return Generation(
        document.id, method, index, text, "m", "v", 1.0, 1.0, 9, 0, "stop", 1, 1, 0, False
    )


def fill(tmp_path: Path) -> Path:
    """A corpus folder with two generations a document of two methods, and a tokenizer."""
    for method in ("rephrase", "latent"):
        store = GenerationStore.of_method(tmp_path, method, 2, method == "latent")
        store.claim({})
        store.append([generation(d, method, i) for d in DOCUMENTS for i in range(2)], 0)
    build_tokenizer(TokenizerConfig(vocab_size=320), tmp_path, [d.text for d in DOCUMENTS])
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path)


def build(root: Path, kind: str, generations: int = 2, **options: object) -> dict[str, Any]:
    tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    quality = options.pop("quality", QualityConfig())
    config = StreamConfig(**options)  # type: ignore[arg-type]
    assert isinstance(quality, QualityConfig)
    method = "latent" if kind == "latent" else "rephrase"
    return build_stream(
        kind, method, generations, DOCUMENTS, "h", tokenizer, vocabulary, config, quality, root
    )


@pytest.mark.parametrize("kind", ["real", "simple", "stitched", "latent"])
def test_samples_and_manifest_agree(root: Path, kind: str) -> None:
    manifest = build(root, kind)
    folder = root / "streams" / manifest["name"]
    dataset = LocalDataset(str(folder))
    lengths = np.load(folder / "lengths.npy")
    assert len(dataset) == len(lengths) == manifest["samples"]
    assert manifest["tokens"] == lengths.sum()
    assert manifest["real_tokens"] + manifest["synthetic_tokens"] == manifest["tokens"]
    member_lengths: list[int] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        assert len(sample["tokens"]) == sample["member_ends"][-1] == lengths[index]
        assert sample["tokens"][-1] == manifest["eos_id"]
        member_lengths.extend(np.diff([0, *sample["member_ends"]]))
    assert member_lengths == np.load(folder / "member_lengths.npy").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("letter", ["a", "字"])
def test_a_run_of_equal_letters_hangs_nothing(tmp_path: Path, letter: str) -> None:
    """Learning tokens from 200,000 of the second one in one piece took over seven minutes."""
    documents = [Document("run", letter * 200_000), *DOCUMENTS]
    for method in ("rephrase", "latent"):
        store = GenerationStore.of_method(tmp_path, method, 1, method == "latent")
        store.claim({})
        rows = [replace(generation(d, method, 0), text=d.text) for d in documents]
        store.append(rows, 0)
    settings = TokenizerConfig(vocab_size=320)
    tokenizer, vocabulary = build_tokenizer(settings, tmp_path, [d.text for d in documents])
    for kind, method in (("real", "rephrase"), ("stitched", "rephrase"), ("latent", "latent")):
        manifest = build_stream(
            *(kind, method, 1, documents, "h", tokenizer, vocabulary),
            *(StreamConfig(), QualityConfig(), tmp_path),
        )
        dataset = LocalDataset(str(tmp_path / "streams" / manifest["name"]))
        samples = [dataset[place] for place in range(len(dataset))]
        run = [one for one in samples if one["provenance"]["document_id"] == "run"]
        letters = sum(tokenizer.decode(one["tokens"].tolist()).count(letter) for one in run)
        assert letters == (1 if kind == "real" else 2) * 200_000


def test_members_end_with_the_separator(root: Path) -> None:
    tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    for separator in (None, "\n\n"):
        manifest = build(root, "stitched", separator=separator)
        sample = LocalDataset(str(root / "streams" / manifest["name"]))[3]
        end = [vocabulary.eos_id] if separator is None else encode(tokenizer, [separator])[0]
        first, last = sample["member_ends"][0], sample["member_ends"][-1]
        assert sample["tokens"][first - len(end) : first].tolist() == end
        assert sample["tokens"][last - 1] == vocabulary.eos_id
        text = tokenizer.decode(sample["tokens"][: first - len(end)].tolist())
        assert text == "Rewrite 0 of d3."
        texts = sum(len(f"Rewrite 0 of {d.id}.") * 2 + len(d.text) for d in DOCUMENTS)
        assert manifest["bytes"] == texts + len(separator or "") * 2 * len(DOCUMENTS)


def test_latent_is_one_text_with_delimiters(root: Path) -> None:
    tokenizer, _ = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    manifest = build(root, "latent", open_thought="<t>", close_thought="</t>")
    assert manifest["members_are_documents"] is False
    sample = LocalDataset(str(root / "streams" / "latent-g2"))[2]
    text = tokenizer.decode(sample["tokens"][:-1].tolist())
    assert text.count("<t>Rewrite") == 2
    without = text.replace("<t>Rewrite 0 of d2.</t>", "").replace("<t>Rewrite 1 of d2.</t>", "")
    assert without == DOCUMENTS[2].text
    assert sample["member_kinds"].tolist() == [0, 2, 0, 2, 0]


def test_building_again_does_nothing_and_a_change_rebuilds(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(root, "stitched")
    shard = root / "streams" / "stitched-g2" / "shard.00000.mds"
    written = shard.stat().st_mtime_ns
    capsys.readouterr()
    assert build(root, "stitched") == first
    assert "up to date" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == written
    other = build(root, "stitched", separator=" ")
    assert other["config_hash"] != first["config_hash"]
    assert other["content_sha256"] != first["content_sha256"]


def test_a_damaged_stream_is_built_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = build(root, "stitched")
    for name in ("shard.00000.mds", "manifest.json"):
        file = root / "streams" / "stitched-g2" / name
        content = bytearray(file.read_bytes())
        content[70] ^= 4
        file.write_bytes(content)
        capsys.readouterr()
        assert build(root, "stitched") == first
        assert re.search(rf"is built again: .*{name} (is damaged|was ch)", capsys.readouterr().err)


def test_variants_have_names_of_their_own() -> None:
    assert name_of("stitched", "rephrase", 8, StreamConfig()) == "stitched-g8"
    assert name_of("stitched", "faq", 8, StreamConfig(real_document="first")) == (
        "stitched-g8-faq-real-first"
    )
    assert (
        name_of("simple", "rephrase", 8, StreamConfig(real_document="absent"))
        == "simple-g8-no-real"
    )


def test_bad_options_and_missing_generations(root: Path) -> None:
    with pytest.raises(ValueError, match="real_document=middle"):
        build(root, "stitched", real_document="middle")
    with pytest.raises(ValueError, match=r"streams.generations=\[2, 0\] must all be"):
        StreamConfig(generations=[2, 0]).check()
    with pytest.raises(ValueError, match="fewer than G=5"):
        build(root, "stitched", 5)
    with pytest.raises(FileNotFoundError, match="latent-g3 holds no generations"):
        build(root, "latent", 3)


@pytest.mark.slow
def test_sigkill_at_random_moments_leaves_the_same_stream(root: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import tests.gen.megadocs.test_streams as t; print('go', flush=True)\n"
        "t.build(Path(sys.argv[2]), 'stitched', separator='x' * 9)"
    )
    repository = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", script, repository, str(root)]
    streams = root / "streams"
    for seed in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.Random(seed).uniform(0.0, 0.4))
            os.kill(process.pid, signal.SIGKILL)
        finished = streams / "stitched-g2"
        assert not finished.exists() or (finished / "manifest.json").exists()
    disturbed = build(root, "stitched", separator="x" * 9)
    files = {path.name: path.read_bytes() for path in (streams / "stitched-g2").iterdir()}
    assert [path.name for path in streams.iterdir()] == ["stitched-g2"]
    (streams / "stitched-g2" / "manifest.json").unlink()
    assert build(root, "stitched", separator="x" * 9) == disturbed
    assert files == {p.name: p.read_bytes() for p in (streams / "stitched-g2").iterdir()}
    assert json.loads(files["manifest.json"]) == disturbed


@pytest.mark.parametrize("name", ["real-first", "no-real", "faq-no-real"])
def test_a_method_is_not_named_like_the_place_of_the_real_document(name: str) -> None:
    with pytest.raises(ValueError, match="would be taken for the place of the real document"):
        MethodConfig(name=name).check()
