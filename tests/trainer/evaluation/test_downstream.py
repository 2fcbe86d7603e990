"""Text sets by name and folder, losses by kind of member; lm-eval: ``../run/test_export.py``."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_script
from tests.trainer.test_loop import config
from trainer.evaluation.downstream import evaluate_tasks
from trainer.evaluation.ensemble import evaluate_ensemble
from trainer.loop import train
from trainer.run.inputs import run_dir_of


@pytest.fixture
def run(corpus_root: Path, tmp_path: Path) -> Path:
    settings = config(corpus_root, tmp_path / "runs")
    train(settings)
    return run_dir_of(settings)


def test_sets_and_members(corpus_root: Path, run: Path, tmp_path: Path) -> None:
    other = corpus_root / "streams" / "simple-g2"
    output = tmp_path / "scores.json"
    arguments = [f"runs=[{run}]", f"sets=[stitched-g2,{other}]", f"output={output}"]
    printed = run_script("evaluate.py", *arguments).stdout
    scores = json.loads(output.read_text())
    assert f"{other}: {scores['sets'][str(other)]['loss']['iid']:.4f}" in printed
    stitched = evaluate_ensemble([run], "stitched-g2")[-1]
    assert scores["sets"]["stitched-g2"] == stitched.to_dict()
    assert set(stitched.loss_by_kind) == {"real", "rephrase"}
    assert stitched.kind_loss.sum() == pytest.approx(stitched.document_loss.sum())
    real = evaluate_ensemble([run], "real")[-1]
    assert not real.has_members
    # a real member's tokens are those of the document, bar the first, which may not be a target
    assert abs(stitched.kind_tokens[0] - real.stream.manifest.tokens) <= len(real.stream)
    assert np.isfinite(stitched.kind_loss).all()

    refused = run_script("evaluate.py", f"runs=[{run}]", "sets=[long]", check=False)
    assert "sets=['long'] are the report's names for parts" in refused.stderr


def test_lm_eval_that_is_not_installed_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match="need the lm-eval package: pip install"):
        evaluate_tasks(run, ["arc_easy"])
