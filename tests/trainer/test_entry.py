"""Mistakes on the command line, and configs of the user's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run_script
from trainer.entry import check_overrides


@pytest.mark.parametrize(
    ("program", "argument", "message"),
    [
        (
            "train",
            "scale=demo",
            r"scale=demo belongs to generate\.py; train\.py takes scale=30m, cpu",
        ),
        ("train", "scale=cpu,demo", r"scale=demo belongs to generate\.py"),
        ("train", "method=faq", r"method= belongs to generate\.py; train\.py has no such choice"),
        ("generate", "recipe=real", r"recipe= belongs to train\.py; generate\.py has no such"),
        ("train", "optimizer.clip_norm=1", r"optimizer\.max_grad_norm=1"),
        ("train", "++runtime.loss=torch", r"is called runtime\.loss_backend now"),
    ],
)
def test_what_is_of_another_program_or_version(program: str, argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_overrides(program, [argument])


@pytest.mark.parametrize("how", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_a_choice_of_ones_own_may_have_any_name(how: str, tmp_path: Path) -> None:
    """``method`` and ``scale=demo`` are generate.py's."""
    for group, name in (("method", "faq"), ("scale", "demo")):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text("# @package _global_\nseed: 7\n")
    arguments = [how.format(tmp_path), "+method=faq", "scale=demo"]
    check_overrides("train", arguments)
    composed = run_script("train.py", *arguments, "--cfg", "job").stdout
    assert "\nseed: 7\n" in composed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train.py", "data.root=file:///data/my%20corpus"],
            "data.root=file:///data/my%20corpus names a path of this machine: write "
            "data.root=/data/my corpus",
        ),
        (["train.py", "output=s3://bucket/runs"], "output=s3://bucket/runs must be a path of"),
        (["generate.py", "root=s3://bucket/corpus"], "root=s3://bucket/corpus must be a path of"),
        (["generate.py", "upload=file:///mnt/x"], "machine: write upload=/mnt/x"),
        (["evaluate.py", "runs=[gs://bucket/run]"], "runs=gs://bucket/run must be a path of"),
        (["evaluate.py", "runs=[a]", "sets=[file:///data/val]"], "machine: write sets=/data/val"),
        (["report.py", "runs=s3://bucket/runs"], "runs=s3://bucket/runs must be a path of"),
    ],
)
def test_a_uri_where_a_path_belongs_is_refused_and_makes_no_folder(
    arguments: list[str], message: str
) -> None:
    done = run_script(*arguments, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(REPOSITORY.glob("*:"))  # such as s3:, where nobody looks


@pytest.mark.parametrize("key", ["misspelt", "data.masc"])  # Hydra itself advises to write +
def test_a_key_that_there_is_not(key: str) -> None:
    done = run_script("train.py", f"+{key}=none", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: train.py has no key {key}; docs/config.md lists all")


@pytest.mark.parametrize("program", ["train.py", "generate.py", "evaluate.py", "report.py"])
def test_help_imports_nothing_that_takes_long(program: str) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['{program}', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{program}', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = ('torch', 'streaming', 'transformers', 'pandas', 'scipy', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_has_no_default_is_asked_for() -> None:
    done = run_script("evaluate.py", check=False)
    assert done.returncode == 1
    assert done.stderr == "error: evaluate.py needs runs; docs/config.md says what to write\n"
