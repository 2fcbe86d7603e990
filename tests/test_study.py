"""A whole study at the smallest size: three sizes of corpus, two recipes, two seeds, one report."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gen.megadocs.config import StreamConfig
from gen.megadocs.streams import build_stream
from gen.pipeline import GenerateConfig, prepare_corpus
from gen.quality.gates import QualityConfig
from tests.conftest import REPOSITORY, run_script, wait_until
from trainer.config.schema import (
    CheckpointConfig,
    DataConfig,
    Mask,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from trainer.loop import train
from trainer.study.comparison.answer import answer_question
from trainer.study.comparison.record import Point, read_record
from trainer.study.report import answer_data_efficiency, write_report
from trainer.study.runs import read_study

BUDGETS = (800, 1600, None)


def smaller_corpus(corpus_root: Path, root: Path, budget: int | None) -> Path:
    """A corpus folder with fewer real tokens and the same held-out documents."""
    config = GenerateConfig(root=str(corpus_root))
    config.corpus.token_budget = budget
    config.corpus.max_documents, config.corpus.max_characters = 40, 900
    config.corpus.held_out, config.tokenizer.vocab_size = 0.25, 512
    corpus = prepare_corpus(config, corpus_root)
    (root / "streams").mkdir(parents=True)
    (root / "generations").symlink_to(corpus_root / "generations")
    # The budget cuts the last document; rewrites of all of it would tell what was cut off.
    uncut = corpus.train[:-1] if budget else corpus.train
    for kind, generations, documents in (
        ("real", 0, corpus.train),
        ("stitched", 2, uncut),
        ("val", 0, corpus.val),
    ):
        build_stream(
            kind,
            "rephrase",
            generations,
            documents,
            str(budget),
            corpus.tokenizer,
            corpus.vocabulary,
            StreamConfig(),
            QualityConfig(),
            root,
        )
    return root


@pytest.mark.slow
def test_a_study_from_three_corpora_to_a_data_efficiency(corpus_root: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    real = RecipeConfig(epochs=4, weight_decay=0.8)
    stitched = RecipeConfig("stitched", "real", "stitched", 2, 0.5, 4, 3e-3, 0.4)
    for budget in BUDGETS:
        root = smaller_corpus(corpus_root, tmp_path / f"corpus-{budget}", budget)
        for recipe in (real, stitched):
            for seed in (0, 1):
                train(
                    TrainConfig(
                        data=DataConfig(
                            str(root),
                            context_length=64,
                            batch_size=2,
                            mask=Mask.megadoc,
                            order_seed=seed,
                        ),
                        recipe=recipe,
                        model=ModelConfig(32, 64, 2, 4, 2),
                        tracking=TrackingConfig(tensorboard=False, num_evaluations=2),
                        checkpoint=CheckpointConfig(count=1),
                        runtime=RuntimeConfig(num_threads=1),
                        seed=seed,
                        output=str(runs),
                    )
                )
    study = read_study(runs)
    assert len(study.runs) == 12
    assert sorted({run.real_tokens for run in study.runs})[:2] == [800, 1600]
    whole = [run for run in study.runs if run.setting == study.main_setting]
    members = [str(run.path) for run in whole if run.kind == "stitched"]
    ensemble = f"output={runs}/ensembles/stitched-g2.json"
    scored = run_script(
        "evaluate.py", f"runs=[{','.join(members)}]", ensemble, "mean=probabilities"
    )
    assert re.search(r"^2 members +\d\.\d{4}$", scored.stdout, re.MULTILINE)

    _, page = write_report(runs, tmp_path / "report")
    drawn = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {
        "loss-by-generations-iid",
        "loss-by-generations-short",
        "loss-by-generations-long",
        "loss-by-position",
        "training",
        "ensembles",
        "data-efficiency",
    }
    content = page.read_text()
    for reason in ("two values of recipe.epochs", "two masks", "two sizes of model"):
        assert reason in content
    answer = answer_data_efficiency(runs)
    assert answer.count("stitched G=2 is worth") == 3
    assert "fitted to 3 sizes from 800 to" in answer


TINY_STUDY = """# @package _global_
defaults:
  - override /hydra/sweeper: study
hydra:
  mode: MULTIRUN
  sweeper:
    question: whole_against_cut
    reference: cut
    common:
      - model=tiny
      - recipe.generations=2
      - recipe.mixing_fraction=0.5
      - evaluation.context_lengths=[16,256]
      - evaluation.masks=[megadoc]
      - tracking.num_evaluations=1
      - tracking.tensorboard=false
      - checkpoint.count=2
      - runtime.num_threads=1
    arms:
      whole:
        overrides: [recipe=stitched, data.context_length=256, data.batch_size=2, data.mask=megadoc]
      cut:
        overrides:
          [recipe=stitched, data.context_length=16, data.batch_size=32, data.packing=stream]
    sizes: [0.5, 1.0]
    seeds: [1, 2]
    tuning:
      sizes: [0.5]
      runs: 2
      grid:
        recipe.epochs: 0.5,1
"""


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_answer(
    corpus_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "conf" / "study").mkdir(parents=True)
    (tmp_path / "conf" / "study" / "tiny_study.yaml").write_text(TINY_STUDY)
    command = [
        *("train.py", f"--config-dir={tmp_path}/conf", "-m", "study=tiny_study"),
        f"data.root={corpus_root}",
    ]
    done = run_script(*command, f"output={tmp_path}/undisturbed")
    assert "if each takes all its runs  12 " in done.stdout
    assert "time: not known before the first run has ended here" in done.stdout
    answer = answer_question(read_record(tmp_path / "undisturbed"), "whole_against_cut")
    assert answer in done.stdout

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *command, f"output={killed}"],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(list(killed.glob("*/result.json"))) >= 7)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*/result.json")}
    assert 7 <= len(finished) < 12  # some of the final runs
    resumed = run_script(*command, f"output={killed}")
    assert "time: measured in" in resumed.stdout
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert len(list(killed.glob("*/result.json"))) == 12
    assert answer in resumed.stdout

    def found(folder: Path) -> list[Point]:
        return [replace(point, seconds=0.0) for point in read_record(folder).points]

    assert found(killed) == found(tmp_path / "undisturbed")
    asked = run_script("report.py", f"runs={killed}", "question=whole_against_cut")
    assert asked.stdout.strip() == answer
