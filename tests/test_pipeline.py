"""The whole way as a user goes it: documents, real generations, streams, training, report."""

from functools import partial
from pathlib import Path

import pytest

from tests.conftest import TINY, run_script

TRAINING = [
    "experiment=demo",
    "model=tiny",
    "data.context_length=64",
    "recipe.epochs=1",
    "runtime.num_threads=1",
]


fresh = partial(run_script, fresh=True)


@pytest.mark.slow
def test_from_documents_to_a_report(corpus_root: Path, tmp_path: Path) -> None:
    again = fresh("generate.py", *TINY, f"root={corpus_root}", "method=rephrase")
    assert "all G=2 generations are there" in again.stdout
    assert again.stdout.count("up to date") == 4  # real, val, simple-g2, stitched-g2
    status = fresh("generate.py", "status", f"root={corpus_root}")
    assert "generations/rephrase: " in status.stdout
    assert "generations/latent-g2: " in status.stdout
    quality = fresh("generate.py", "report", f"root={corpus_root}")
    assert f"report: {corpus_root}/reports/rephrase.html" in quality.stdout

    options = [*TRAINING, f"data.root={corpus_root}", f"output={tmp_path}"]
    fresh("train.py", "--multirun", *options, "recipe=real,simple,stitched,latent")
    runs = sorted(path for path in tmp_path.iterdir() if (path / "result.json").exists())
    assert [run.name.rsplit("-", 1)[0] for run in runs] == [
        "latent-g2",
        "real",
        "simple-g2",
        "stitched-g2",
    ]
    assert list((runs[0] / "tensorboard").iterdir())
    skipped = fresh("train.py", "--multirun", *options, "recipe=real,simple")
    assert skipped.stdout.count("(was finished)") == 2

    both = fresh("evaluate.py", f"runs=[{runs[0]},{runs[1]}]", f"output={tmp_path / 's.json'}")
    assert "nats per token" in both.stdout
    assert (tmp_path / "s.json").exists()
    report = fresh("report.py", f"runs={tmp_path}")
    assert [line.split()[0] for line in report.stdout.splitlines()[1:5]] == [
        "real",
        "latent",
        "simple",
        "stitched",
    ]
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus=text"], "corpus.format=text needs corpus.path"),
        (["method.generation=3"], "generation"),
        (["method.generations=many"], "generations"),
        (["method.generations=0"], "method.generations=0 must be at least 1"),
        (["generator=openai", "generator.model=m"], "needs generator.urls"),
        (["generator=sglang", "generator.sglang.device=tpu"], "is not one of cuda, cpu"),
        (
            ["generator=openai", "generator.urls=[http://127.0.0.1:9]"],
            "generator=openai needs generator.model",
        ),
        (
            ["generator=openai", "generator.model=m", "generator.urls=[http://127.0.0.1:9]"],
            "no server answers at",
        ),
        (["task=everything"], "task=everything is not one of"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run_script("generate.py", *TINY, f"root={tmp_path}", *arguments, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_streams_with_more_generations_than_there_are(corpus_root: Path) -> None:
    done = run_script(
        "generate.py",
        "streams",
        *TINY,
        f"root={corpus_root}",
        "streams.generations=[5]",
        check=False,
    )
    assert done.returncode == 1
    assert "fewer than G=5 generations" in done.stderr
    assert not (corpus_root / "streams" / "stitched-g5").exists()


def test_sglang_that_dies_shows_its_log(tmp_path: Path) -> None:
    """/bin/false stands for an environment without SGLang: it ends before it is healthy."""
    done = run_script(
        "generate.py",
        *TINY,
        f"root={tmp_path}",
        "generator=sglang",
        "generator.sglang.python=/bin/false",
        check=False,
    )
    assert done.returncode == 1
    assert "the SGLang server ended with status 1 before it was healthy" in done.stderr
