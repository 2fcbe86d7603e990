"""Several processes build one stream: it is the same for any number, whoever is killed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer
from gen.megadocs.config import StreamConfig
from gen.megadocs.streams import build_stream
from gen.quality.gates import QualityConfig
from gen.work import Unit, Work
from tests.gen.megadocs.test_golden_samples import DOCUMENTS, fill

KINDS = ("simple", "stitched", "latent")
REPOSITORY = Path(__file__).parents[3]


class Killed(BaseException):
    """Ends a build where a signal would."""


class DyingWork(Work):
    """Dies as it prepares its n-th unit; ``lives`` counts down over all of them."""

    lives: int

    def here(self, units: list[Unit], locks: Path, finished: Callable[[Unit], None]) -> list[Unit]:
        held = []
        for unit in units:
            if not self.lives:
                raise Killed
            self.lives -= 1
            held += super().here([unit], locks, finished)
        return held


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder with the streams as one writer makes them."""
    root = tmp_path_factory.mktemp("writers")
    fill(root)
    build_tokenizer(TokenizerConfig(vocab_size=320), root, [d.text for d in DOCUMENTS])
    for kind in KINDS:
        build(root, kind, Work(1))
    return root


def build(root: Path, kind: str, work: Work) -> Path:
    """One stream of many small shards."""
    tokenizer, vocabulary = build_tokenizer(TokenizerConfig(vocab_size=320), root, [])
    config = StreamConfig(missing="allow", missing_share=0.5, shard_bytes=3000)
    manifest = build_stream(
        kind,
        "latent" if kind == "latent" else "rephrase",
        3,
        DOCUMENTS,
        "h",
        tokenizer,
        vocabulary,
        config,
        QualityConfig(),
        root,
        work,
    )
    name: str = manifest["name"]
    return root / "streams" / name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=5),
    st.booleans(),
)
def test_any_writers_in_any_order_make_the_same_stream(
    corpus: Path, kind: str, writers: int, killed: list[tuple[int, int]], tokenized: bool
) -> None:
    """Each of ``killed`` is a writer that dies after so many units; then one finishes."""
    (made,) = (corpus / "streams").glob(f"{kind}-*")
    expected = content(made)
    assert sum(name.endswith(".mds") for name in expected) > 3
    shutil.rmtree(made)
    if not tokenized:
        shutil.rmtree(corpus / "tokens")
    last = killed[-1][0] if killed else 0
    for writer, lives in killed:
        work = DyingWork(1, writer % writers, writers)
        work.lives = lives
        try:
            build(corpus, kind, work)
        except Killed:
            assert not made.exists()
    assert build(corpus, kind, Work(1, last % writers, writers)) == made
    assert content(made) == expected
    assert not list((corpus / "streams").glob(".*"))


# The first of two writers ends itself with SIGKILL inside of its third unit.
SCRIPT = """
import os, signal, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from gen import work
import tests.gen.megadocs.test_writers as t
claimed, units = work.claimed, []

def claimed_until_it_dies(lock, do):
    units.append(lock)
    dies = sys.argv[3] == "0" and len(units) == 3
    return claimed(lock, (lambda: os.kill(os.getpid(), signal.SIGKILL)) if dies else do)

work.claimed = claimed_until_it_dies
t.build(Path(sys.argv[2]), "simple", work.Work(1, int(sys.argv[3]), 2))
"""


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(corpus: Path) -> None:
    (made,) = (corpus / "streams").glob("simple-*")
    expected = content(made)
    shutil.rmtree(made)
    shutil.rmtree(corpus / "tokens")
    commands = [
        [sys.executable, "-c", SCRIPT, str(REPOSITORY), str(corpus), str(writer)]
        for writer in range(2)
    ]
    processes = [subprocess.Popen(command) for command in commands]
    assert processes[1].wait(120) == 0
    assert processes[0].wait(120) in (-signal.SIGKILL, 0)  # 0: too late for a third unit
    assert content(made) == expected
    assert build(corpus, "simple", Work(1, 0, 2)) == made  # the killed one, started again

    shutil.rmtree(made)
    shutil.rmtree(corpus / "tokens")
    assert subprocess.run(commands[0], check=False).returncode == -signal.SIGKILL
    assert subprocess.run(commands[1], check=False).returncode == 0
    assert content(made) == expected


@pytest.mark.slow
def test_the_pool_makes_the_same_stream(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gen.work.WORTH_A_PROCESS", 1)
    (made,) = (corpus / "streams").glob("stitched-*")
    expected = content(made)
    shutil.rmtree(made)
    shutil.rmtree(corpus / "tokens")
    with Work(2) as work:
        assert build(corpus, "stitched", work) == made
        assert work.pool is not None
    assert content(made) == expected


PROGRAM = """
print("imported")
from functools import partial
from pathlib import Path
from gen.work import Unit, Work

if __name__ == "__main__":
    folder = Path({folder!r})
    touch = [partial(partial, (folder / name).touch) for name in "ab"]
    with Work(2) as work:
        work.run([Unit(str(i), 1, one) for i, one in enumerate(touch)], folder, "units", "u", 1)
"""


def test_processes_of_a_pool_do_not_import_the_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(tmp_path)))
    found = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count("imported") == 1
    assert (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()
