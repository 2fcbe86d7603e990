"""A damaged checkpoint is named and the one before steps in; optional files cost themselves."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.run.test_early import Configure, configured, corpus  # noqa: F401
from trainer.config.evaluate import EvaluateConfig
from trainer.evaluation.command import evaluate
from trainer.files import write_sealed
from trainer.loop import train
from trainer.run.checkpoint import load_model
from trainer.run.inputs import run_dir_of
from trainer.run.progress import checkpoints, read_progress
from trainer.study.report import write_report


def flip(file: Path, generator: random.Random) -> None:
    """Turn one bit of a file around."""
    damaged = bytearray(file.read_bytes())
    damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    file.write_bytes(damaged)


@pytest.fixture
def run(configured: Configure) -> Path:  # noqa: F811
    config = configured(**{"checkpoint.count": 2})
    train(config)
    return run_dir_of(config)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "progress.json"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_nothing_changes(
    run: Path,
    configured: Configure,  # noqa: F811
    damage: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(**{"checkpoint.count": 2})
    loss = json.loads((run / "result.json").read_text())["loss"]["iid"]
    (run / "result.json").unlink()
    before, newest = checkpoints(run)
    file = newest / name
    if damage == "flip":
        flip(file, random.Random(1))
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"is damaged .* goes on from the checkpoint before"):
        load_model(run)
    assert train(config) == loss
    printed = capsys.readouterr()
    assert f"warning: {newest} is damaged" in printed.err
    assert f"after step {read_progress(before).step}" in printed.out
    assert read_progress(checkpoints(run)[-1]).step == read_progress(newest).step


def test_a_run_without_a_whole_checkpoint_says_so(
    run: Path,
    configured: Configure,  # noqa: F811
) -> None:
    (run / "result.json").unlink()
    for checkpoint in checkpoints(run):
        (checkpoint / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole; delete .*checkpoints"):
        train(configured(**{"checkpoint.count": 2}))


def test_an_absent_checkpoint_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match=r"step-00000099 is no checkpoint"):
        load_model(run / "checkpoints" / "step-00000099")


def test_progress_of_another_version_is_named(run: Path) -> None:
    progress = checkpoints(run)[-1] / "progress.json"
    write_sealed(progress, json.loads(progress.read_text()) | {"moon": "full"})
    with pytest.raises(ValueError, match=r"progress\.json is damaged or of another version.*moon"):
        read_progress(progress.parent)


def test_damaged_optional_files_cost_themselves_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tasks.json", "sets.json"):
        (run / name).write_text("{")
    (run / "metrics.jsonl").write_bytes(b"\xff")
    shutil.rmtree(tmp_path / "report", ignore_errors=True)
    text, _ = write_report(run.parent, tmp_path / "report")
    assert "real" in text
    printed = capsys.readouterr().err
    for name in ("tasks.json", "sets.json", "metrics.jsonl"):
        assert f"{name} is damaged" in printed or f"{name} was changed" in printed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sets": ["nosuch"]}, "nosuch is not a finished stream"),
        ({"validation": "nosuch"}, "nosuch is not a finished stream"),
        ({"tasks": ["nosuch"]}, "nosuch"),
        ({"output": "."}, "is a folder; name a file"),
        ({"export": "out", "sets": ["val"]}, "export=out writes the weights .* leave out sets"),
        ({"output": "/dev/null/x.json"}, "/dev/null is no folder: set output"),
    ],
)
def test_an_evaluation_is_checked_before_it_begins(
    run: Path, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "trainer.evaluation.command.evaluate_ensemble", lambda *_: pytest.fail("evaluated")
    )
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(EvaluateConfig(runs=[str(run)], **asked))
