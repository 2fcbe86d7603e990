"""One flipped bit in any stored file of a corpus or a run is found, or changes nothing at all."""

from __future__ import annotations

import functools
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gen.corpus.documents import build_documents, hash_of, load_split
from gen.corpus.tokenizer import load_tokenizer
from gen.generations.failures import all_failures
from gen.generations.sessions import read_sessions
from gen.generations.status import status
from gen.generations.store import GenerationStore
from gen.pipeline import generate
from gen.quality.table import quality_table
from tests.damage.small_study import corpus_config, generate_config
from tests.damage.user import Undisturbed, User
from trainer.config.evaluate import EvaluateConfig
from trainer.data.mds import MegadocStream
from trainer.evaluation.command import evaluate
from trainer.files import write_sealed
from trainer.run.checkpoint import load_model
from trainer.run.progress import checkpoints, require_whole
from trainer.study.page import environment_line
from trainer.study.runs import read_study

pytestmark = pytest.mark.slow

FLIPS = 500
# They say who is at work and what it does; nothing is read from them once it has ended.
UNREAD = ("*.lock", "process.json")

Reader = Callable[[], object]


def documents(root: Path, source: Path) -> object:
    return [
        build_documents(corpus_config(source), root),
        list(load_split(root, "train")),
        list(load_split(root, "val")),
    ]


def tokenizer(root: Path) -> object:
    loaded, manifest = load_tokenizer(root)
    return [loaded.to_str(), manifest]


def generations(root: Path, train: list[Any]) -> object:
    store = GenerationStore(root / "generations" / "rephrase")
    table: pa.Table = quality_table(store, train, hash_of(train))
    return [
        store.settings(),
        store.read().to_pylist(),
        store.fingerprint(),
        table.to_pylist(),
        all_failures(store.folder),
        read_sessions(store.folder),
        status(root),
    ]


def stream(folder: Path) -> object:
    opened = MegadocStream(folder)
    samples = [opened[place] for place in range(len(opened))]
    return [
        opened.manifest,
        [one.id for one in samples],
        [one.tokens.tolist() for one in samples],
        [one.member_ends.tolist() for one in samples],
        [one.member_kinds.tolist() for one in samples],
        opened.lengths.tolist(),
        opened.member_lengths.tolist(),
    ]


def tokens(root: Path, source: Path) -> object:
    """A stream that is built of them."""
    folder = root / "streams" / "stitched-g2"
    shutil.rmtree(folder)
    generate(replace(generate_config(source, root, "http://nobody"), task="streams"))
    return stream(folder)


def run(folder: Path) -> object:
    """All that evaluation, export and report take from a run."""
    for checkpoint in checkpoints(folder):
        require_whole(checkpoint)
    model, config = load_model(folder)
    study = read_study(folder.parent)
    (found,) = [one for one in study.runs if one.path == folder]
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    results = [found.config, found.result, found.metrics, study.ensembles, study.certificates]
    return [weights, config, *results, environment_line(folder)]


@pytest.fixture
def finished(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    """The study with what an evaluation and a search leave beside it."""
    root = tmp_path / "root"
    shutil.copytree(undisturbed.root, root)
    runs = [str(folder.parent) for folder in sorted((root / "runs").glob("*/result.json"))]
    evaluate(EvaluateConfig(runs=runs[:1], sets=["simple-g2"]))
    evaluate(EvaluateConfig(runs=runs, output=str(root / "runs" / "ensembles" / "both.json")))
    certificate = {"study": ["recipe=real"], "optimum": {"lr": 0.1}, "loss": 5.0, "runs": 3}
    (root / "runs" / "star").mkdir(exist_ok=True)
    write_sealed(root / "runs" / "star" / "ab.json", certificate)
    return root


def readers(root: Path, source: Path) -> Iterator[tuple[Path, Reader]]:
    """Every file that is kept, with what reads it."""
    train = list(load_split(root, "train"))
    (one_run,) = sorted((root / "runs").glob("stitched-*"))
    by_folder: dict[Path, Reader] = {
        root / "documents": functools.partial(documents, root, source),
        root / "tokenizer": functools.partial(tokenizer, root),
        root / "tokens": functools.partial(tokens, root, source),
        root / "generations": functools.partial(generations, root, train),
        one_run: functools.partial(run, one_run),
        root / "runs" / "ensembles": functools.partial(run, one_run),
        root / "runs" / "star": functools.partial(run, one_run),
        **{
            folder: functools.partial(stream, folder)
            for folder in sorted((root / "streams").iterdir())
        },
    }
    for folder, reader in by_folder.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(path.match(pattern) for pattern in UNREAD):
                yield path, reader


def test_a_flipped_bit_in_any_file_is_found_or_harmless(
    finished: Path, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    files = list(readers(finished, user.source))
    kinds = {path.suffix for path, _ in files}
    assert {".parquet", ".mds", ".npy", ".json", ".jsonl", ".yaml", ".distcp", ".sha256"} <= kinds
    whole = {reader: reader() for _, reader in files}
    generator = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(FLIPS):
        file, reader = generator.choice(files)
        intact = files_of(file.parent)
        damaged = bytearray(intact[file])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        caplog.clear()
        try:
            now = reader()
        except (ValueError, OSError) as error:
            said = str(error)
        else:
            warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
            said = "\n".join(one.getMessage() for one in warnings)
            if not said:
                assert now == whole[reader], f"{file} was believed"
        kept = "made again" if is_made_again(file) else "kept"
        outcomes[f"{kept}, {'found' if said else 'harmless'}"] += 1
        if said:
            named = {file.name, file.name.removesuffix(".sha256"), file.parent.name}
            assert any(name in said for name in named), f"{file}: {said}"
        restore(file.parent, intact)
    assert outcomes.total() == FLIPS
    # Harmless beside what is made again: another way to write the same JSON.
    assert outcomes["kept, harmless"] <= 0.1 * outcomes["kept, found"], outcomes
    assert outcomes["kept, found"] > 0.5 * FLIPS, outcomes


def is_made_again(file: Path) -> bool:
    """Whether a file keeps what follows from others, and is written anew where damaged."""
    return "tokens" in file.parts or file.name.startswith("quality.parquet")


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def restore(folder: Path, intact: dict[Path, bytes]) -> None:
    """Undo the damage, and what was written again because of it."""
    now = files_of(folder)
    for path in now.keys() - intact.keys():
        path.unlink()
    for path, content in intact.items():
        if now.get(path) != content:
            path.write_bytes(content)
