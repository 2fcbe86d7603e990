"""The report: every figure of the paper from a fabricated study, refusals, the one-line answer."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_script
from trainer.config.schema import (
    DataConfig,
    Mask,
    ModelConfig,
    RecipeConfig,
    TrainConfig,
    save_config,
)
from trainer.evaluation.downstream import SETS, TASKS, keep_scores
from trainer.run.inputs import run_dir_of
from trainer.study.figures import recipe_figures
from trainer.study.page import Drawing, Missing
from trainer.study.report import answer_data_efficiency, write_report
from trainer.study.runs import best_by, read_study

# The planted world: a real-only law, and recipes worth a known multiple of the data.
REAL_TOKENS = 2_000_000
WORTH = {"simple": {2: 1.15, 8: 1.3}, "stitched": {2: 1.2, 8: 1.6}, "latent": {2: 1.25, 8: 1.5}}
SMALL = ModelConfig(64, 192, 2, 4, 2, vocab_size=1000)


def planted_loss(real_tokens: float, worth: float = 1.0) -> float:
    loss: float = 40 / (real_tokens * worth) ** 0.25 + 2.0
    return loss


def fabricate(
    folder: Path,
    kind: str,
    generations: int,
    loss: float,
    *,
    seed: int = 0,
    real_tokens: int = REAL_TOKENS,
    epochs: float = 8,
    mixing_fraction: float = 0.75,
    weight_decay: float = 0.4,
    model: ModelConfig = SMALL,
    **data: object,
) -> Path:
    """A run folder as ``train.py`` leaves it, with a loss of our choice (and noise by seed)."""
    real = kind == "real"
    recipe = RecipeConfig(
        name=kind,
        stream=None if real else kind,
        generations=generations,
        mixing_fraction=0.0 if real else mixing_fraction,
        epochs=epochs,
        weight_decay=weight_decay,
    )
    config = TrainConfig(
        data=DataConfig(root=f"d{real_tokens}", order_seed=seed, context_length=1024),
        recipe=recipe,
        model=model,
        seed=seed,
        output=str(folder),
    )
    config = replace(config, data=replace(config.data, **data))  # type: ignore[arg-type]
    inputs = {"real": f"real of {real_tokens}", "val": "val"}
    if recipe.synthetic:
        inputs[recipe.synthetic] = f"{recipe.synthetic} of {real_tokens}"
    run = run_dir_of(config, inputs)
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    loss += np.random.default_rng((seed, int(1e6 * loss))).normal(0, 0.0014)
    seen, passes = {"real": int(real_tokens * epochs)}, {"real": epochs}
    if recipe.synthetic:
        size = real_tokens * (1 + generations // 2)
        seen[recipe.synthetic] = int(seen["real"] * mixing_fraction / (1 - mixing_fraction))
        passes[recipe.synthetic] = seen[recipe.synthetic] / size
    result = {
        "name": run.name,
        "inputs": inputs,
        "steps": 100,
        "parameters": model.parameter_count(),
        "seconds": 7200.0,
        "processes": 1,
        "device": "cuda",
        "tokens_seen": seen,
        "epochs_seen": passes,
        "loss": {"iid": loss, "short": loss + 0.1, "long": loss - 0.1},
        "bits_per_byte": loss / 3,
        "loss_by_position": {str(1 << place): loss + 1 / (place + 1) for place in range(8)},
        "evaluation": {
            "stream": "val",
            "documents": 50,
            "tokens": 9000 if config.data.mask is Mask.none else 8950,
            "short_up_to": 300,
            "tokenizer_sha256": "f" * 64,
        },
    }
    (run / "result.json").write_text(json.dumps(result))
    lines = [{"step": step, "train/loss": 8 - step / 50, "eval/iid": 8.0} for step in (10, 100)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the paper's figures need."""
    folder = tmp_path_factory.mktemp("study")
    for tokens in (500_000, 1_000_000, REAL_TOKENS, 4_000_000):
        for seed in (0, 1, 2):
            loss = planted_loss(tokens)
            fabricate(folder, "real", 0, loss, seed=seed, real_tokens=tokens, epochs=16)
    for epochs in (4, 32):
        fabricate(folder, "real", 0, planted_loss(REAL_TOKENS) + 0.05, epochs=epochs)
    for kind, by_generations in WORTH.items():
        for generations, worth in by_generations.items():
            for seed in (0, 1, 2):
                fabricate(folder, kind, generations, planted_loss(REAL_TOKENS, worth), seed=seed)
    worse = planted_loss(REAL_TOKENS, 1.1)
    for epochs in (4, 16):
        fabricate(folder, "stitched", 8, worse, epochs=epochs)
    fabricate(folder, "stitched", 8, worse, mixing_fraction=0.5)
    for kind in ("simple-no-real", "stitched-no-real", "stitched-real-first"):
        fabricate(folder, kind, 8, worse, weight_decay=0.8)
    for kind, generations in (("real", 0), ("stitched", 8)):
        fabricate(folder, kind, generations, 3.01, mask=Mask.document)
        fabricate(folder, kind, generations, 3.3, context_length=256)
    for layers in (4, 8):
        deeper = replace(SMALL, num_layers=layers)
        fabricate(folder, "real", 0, 3.06 - 0.01 * layers, model=deeper)
    for run in read_study(folder).runs:
        if run.config.data.mask is DataConfig().mask and run.real_tokens == REAL_TOKENS:
            right = 0.5 + run.generations / 100 + run.config.seed / 1000
            keep_scores(
                run.path / TASKS, {"sciq": {"acc": right, "acc_stderr": 0.03, "questions": 1000}}
            )
            keep_scores(
                run.path / TASKS, {"piqa": {"acc": 0.6, "acc_stderr": 0.04, "questions": 1838}}
            )
    read_alone(fabricate(folder, "real", 0, 3.2, weight_decay=0.9))
    (folder / "ensembles").mkdir()
    evaluation = {"stream": "val", "documents": 50, "tokens": 9000, "tokenizer_sha256": "f" * 64}
    for name in ("real", "stitched-g8"):
        losses = [0.4 / count + 3.0 + 0.002 * math.cos(9 * count) for count in range(1, 7)]
        sizes = [{"loss": {"iid": loss}} for loss in losses]
        content = {"members": [f"m{k}" for k in range(6)], "mean": "logits", "sizes": sizes}
        path = folder / "ensembles" / f"{name}.json"
        path.write_text(json.dumps(content | {"evaluation": evaluation}))
    (folder / "star").mkdir()
    certificate = {
        "study": ["recipe=stitched", "recipe.generations=8"],
        "optimum": {"recipe.epochs": 8.0},
        "loss": 3.0,
        "neighbours": [{"axis": "recipe.epochs", "value": 4.0, "loss": 3.1, "margin": 0.1}],
        "edges": [{"axis": "recipe.weight_decay", "value": 0.1, "end": "smallest"}],
        "path": [],
        "runs": 9,
    }
    (folder / "star" / "0.json").write_text(json.dumps(certificate))
    return folder


FIGURES = {
    "loss-by-generations-iid",
    "loss-by-generations-short",
    "loss-by-generations-long",
    "loss-fixed-hyper-parameters",
    "loss-by-epochs",
    "loss-by-mixing-fraction",
    "order",
    "masks",
    "no-separate-real",
    "loss-by-context",
    "loss-by-position",
    "training",
    "benchmark-error",
    "ensembles",
    "loss-by-parameters",
    "repeated-data",
    "data-efficiency",
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_figure_of_the_paper_is_drawn(study: Path, tmp_path: Path) -> None:
    text, page = write_report(study, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES
    assert {path.stem for path in tmp_path.glob("*.csv")} == FIGURES | {"runs", "compute"}
    content = page.read_text()
    assert content.count("data:image/png;base64,") == len(FIGURES)
    assert "Not drawn" not in content
    for outside in ("<script", "<link", "http://", "https://"):
        assert outside not in content
    assert "recipe.weight_decay" in content  # the certificate's edge
    assert len(text.splitlines()) == 1 + len(read_study(study).runs)

    points = rows_of(tmp_path / "loss-by-generations-iid.csv")
    stitched = {row["generations"]: row for row in points if row["kind"] == "stitched"}
    assert float(stitched["8"]["loss"]) == pytest.approx(planted_loss(REAL_TOKENS, 1.6), abs=0.003)
    assert stitched["8"]["seeds"] == "3"
    assert 0 < float(stitched["8"]["standard_deviation"]) < 0.01
    order = {row["kind"] for row in rows_of(tmp_path / "order.csv")}
    assert order == {
        "simple",
        "stitched",
        "simple-no-real",
        "stitched-no-real",
        "stitched-real-first",
    }
    asymptotes = {row["asymptote"] for row in rows_of(tmp_path / "ensembles.csv")}
    assert all(float(value) == pytest.approx(3.0, abs=0.02) for value in asymptotes)
    benchmarks = rows_of(tmp_path / "benchmark-error.csv")
    (row,) = [row for row in benchmarks if (row["kind"], row["generations"]) == ("simple", "2")]
    # right on sciq: 0.52, 0.521, 0.522 by seed; on piqa: 0.6
    assert float(row["error"]) == pytest.approx(1 - (0.521 + 0.6) / 2)
    assert float(row["uncertainty"]) == pytest.approx(0.001 / 2)
    assert float(row["normalised_error"]) == pytest.approx((0.479 / 0.75 + 0.4 / 0.5) / 2)
    laws = rows_of(tmp_path / "repeated-data.csv")
    errors = [float(row["held_out_error"]) for row in laws]
    assert errors == sorted(errors)
    compute = rows_of(tmp_path / "compute.csv")
    (row,) = [
        row for row in compute if (row["recipe"], row["G"], row["seeds"]) == ("stitched", "8", "3")
    ]
    assert row["generated tokens"] == f"{4 * REAL_TOKENS:,}"
    assert row["hours"] == "2 GPU"
    # 8 passes over the real stream; w = 3/4 makes 48M synthetic tokens, 4.8 passes over 10M.
    assert row["synthetic passes"] == "4.80"
    assert row["real tokens seen"] == f"{8 * REAL_TOKENS + 48 * REAL_TOKENS // 10:,}"


@pytest.mark.slow
def test_data_efficiency_in_one_command(study: Path) -> None:
    done = run_script("report.py", "question=data_efficiency", f"runs={study}")
    found = re.findall(
        r"(?m)^(\w+) G=(\d+) is worth ([\d.]+) times the data \(95 % interval ([\d.]+) times to "
        r"([\d.]+) times\), at 2 GPU-hours",
        done.stdout,
    )
    answers = {(kind, int(g)): tuple(map(float, rest)) for kind, g, *rest in found}
    assert len(answers) == 6
    for kind, by_generations in WORTH.items():
        for generations, worth in by_generations.items():
            factor, low, high = answers[kind, generations]
            assert factor == pytest.approx(worth, rel=0.05)
            assert low <= worth <= high
    assert "1.00 times is the real-only law" in done.stdout
    assert "fitted to 4 sizes from 500,000 to 4,000,000" in done.stdout


def test_a_small_study_says_what_it_lacks(tmp_path: Path) -> None:
    fabricate(tmp_path, "real", 0, 3.2)
    _, page = write_report(tmp_path, tmp_path / "report")
    content = page.read_text()
    assert "Not drawn" in content
    assert "needs at least 3 sizes of corpus" in content
    with pytest.raises(ValueError, match=r"found 1 \(2,000,000 tokens\)"):
        answer_data_efficiency(tmp_path)
    done = run_script("report.py", "question=everything", f"runs={tmp_path}", check=False)
    assert done.returncode == 1
    assert "question=everything is not one of" in done.stderr


def test_epochs_that_were_not_read_are_shown(tmp_path: Path) -> None:
    for epochs, read in ((1, 0.77), (16, 15.99)):
        file = fabricate(tmp_path, "real", 0, 3.2, epochs=epochs) / "result.json"
        result = json.loads(file.read_text()) | {"epochs_seen": {"real": read}}
        file.write_text(json.dumps(result))
    text, page = write_report(tmp_path, tmp_path / "report")
    for shown in (text, page.read_text()):
        assert "1 (0.77 read)" in shown
        assert "15.99" not in shown


def test_real_only_sizes_without_a_recipe_ask_for_one(tmp_path: Path) -> None:
    for tokens in (500_000, 1_000_000, 2_000_000):
        fabricate(tmp_path, "real", 0, planted_loss(tokens), real_tokens=tokens)
    with pytest.raises(ValueError, match="no run with a synthetic stream"):
        answer_data_efficiency(tmp_path)


def test_the_best_configuration_is_the_best_mean_not_the_luckiest_seed(tmp_path: Path) -> None:
    for seed, loss in ((0, 3.0), (1, 3.4)):
        fabricate(tmp_path, "simple", 2, loss, seed=seed)
    for seed in (0, 1):
        fabricate(tmp_path, "simple", 2, 3.1, seed=seed, weight_decay=0.8)
    fabricate(tmp_path, "simple", 2, 2.9, weight_decay=1.6)  # one seed of a search
    (best,) = best_by(read_study(tmp_path).main, lambda run: run.kind).values()
    assert best.first.config.recipe.weight_decay == 0.8
    assert best.spread() == pytest.approx(np.std(best.losses(), ddof=1))


def test_benchmarks_of_one_seed_and_of_other_questions(tmp_path: Path) -> None:
    scores = {"sciq": {"acc": 0.7, "acc_stderr": 0.03, "questions": 100}}
    both = scores | {"piqa": {"acc": 0.6, "acc_stderr": 0.04, "questions": 100}}
    runs = [fabricate(tmp_path, kind, 2, 3.0) for kind in ("simple", "stitched")]
    for run in runs:
        keep_scores(run / TASKS, both)
    write_report(tmp_path, tmp_path / "report")
    row = rows_of(tmp_path / "report" / "benchmark-error.csv")[0]
    assert float(row["uncertainty"]) == pytest.approx(0.05 / 2)
    keep_scores(runs[0] / TASKS, {"sciq": scores["sciq"] | {"questions": 50}})
    with pytest.raises(ValueError, match=r"answered (50|100) questions of sciq"):
        write_report(tmp_path, tmp_path / "report")


def test_other_text_sets_are_drawn_and_must_be_the_same(tmp_path: Path) -> None:
    evaluation = {"documents": 7, "tokenizer_sha256": "f" * 64}
    runs = [fabricate(tmp_path, kind, 2, 3.0) for kind in ("simple", "stitched")]
    for place, run in enumerate(runs):
        keep_scores(
            run / SETS, {"x/arxiv": {"loss": {"iid": 3.5 + place}, "evaluation": evaluation}}
        )
    fabricate(tmp_path, "latent", 2, 3.0)  # not scored
    text, _ = write_report(tmp_path, tmp_path / "report")
    assert "x/arxiv" in text
    rows = rows_of(tmp_path / "report" / "loss-by-generations-x-arxiv.csv")
    assert [float(row["loss"]) for row in rows] == [3.5, 4.5]
    other = {"loss": {"iid": 3.0}, "evaluation": evaluation | {"documents": 8}}
    keep_scores(runs[0] / SETS, {"x/arxiv": other})
    with pytest.raises(ValueError, match=r"with documents=(7|8)"):
        read_study(tmp_path)


def test_a_student_of_teachers_is_no_real_only_run(tmp_path: Path) -> None:
    fabricate(tmp_path, "real", 0, 3.2)
    student = fabricate(tmp_path, "real", 0, 2.9, seed=1) / "config.yaml"
    text = student.read_text()
    assert "teachers: []" in text
    student.write_text(unsealed(text).replace("teachers: []", "teachers: [runs/a, runs/b]"))
    best = best_by(read_study(tmp_path).groups, lambda run: run.kind)
    assert sorted(best) == ["real", "real distilled"]
    assert best["real"].mean() == pytest.approx(3.2, abs=0.01)


def unsealed(text: str) -> str:
    """A stored file without the comment that holds its hash, to be changed."""
    return "\n".join(line for line in text.split("\n") if not line.startswith("# sha256"))


def read_alone(run: Path) -> None:
    """Turn a fabricated real-only run into one of the stream stitched-g8 alone."""
    for name in ("config.yaml", "result.json"):
        text = unsealed((run / name).read_text())
        text = text.replace("real_stream: real", "real_stream: stitched-g8")
        text = text.replace("real of", "stitched-g8 of").replace('"real"', '"stitched-g8"')
        (run / name).write_text(text)


def test_a_stream_read_alone_is_compared_with_its_own_setting(tmp_path: Path) -> None:
    for kind, generations in (("real", 0), ("simple", 8), ("stitched", 8)):
        fabricate(tmp_path, kind, generations, 3.2)
    larger = replace(SMALL, num_layers=8)
    read_alone(fabricate(tmp_path, "real", 0, 3.0, model=larger))
    (figure,) = [
        one for one in recipe_figures(read_study(tmp_path)) if "separate real" in one.title
    ]
    assert isinstance(figure, Missing)
    read_alone(fabricate(tmp_path, "real", 0, 3.1, weight_decay=0.9))
    study = read_study(tmp_path)
    (figure,) = [one for one in recipe_figures(study) if "separate real" in one.title]
    assert isinstance(figure, Drawing)
    assert [row["kind"] for row in figure.rows] == ["stitched", "stitched-g8 alone"]
    assert figure.rows[1]["loss"] == pytest.approx(3.1, abs=0.01)
    write_report(tmp_path, tmp_path / "report")
    (row, _) = [
        row for row in rows_of(tmp_path / "report" / "compute.csv") if "alone" in row["recipe"]
    ]
    # How much of the stream is real, and how much was generated, is not in the run.
    assert [row[name] for name in ("real tokens", "real tokens seen", "generated tokens")] == [
        "-"
    ] * 3


def test_recipes_are_compared_with_real_only_runs_of_their_setting(tmp_path: Path) -> None:
    fabricate(tmp_path, "real", 0, 3.0, model=replace(SMALL, num_layers=8))
    fabricate(tmp_path, "real", 0, 3.3)
    fabricate(tmp_path, "stitched", 8, 3.1)
    write_report(tmp_path, tmp_path / "report")
    rows = rows_of(tmp_path / "report" / "runs.csv")
    (stitched,) = [row for row in rows if row["recipe"] == "stitched"]
    assert float(stitched["vs real"]) == pytest.approx(-0.2, abs=0.01)


def test_a_run_that_is_there_twice_is_no_second_seed(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "a", "real", 0, 3.2)
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"copy repeats .*, its seeds included"):
        read_study(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "result.json"])
def test_a_damaged_run_is_named(tmp_path: Path, name: str) -> None:
    damaged = fabricate(tmp_path, "real", 0, 3.2)
    for content in ("unknown: [1", "unknown: 1", ""):
        (damaged / name).write_text(content)
        with pytest.raises(ValueError, match=f"{damaged.name} cannot be read"):
            read_study(tmp_path)


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = fabricate(tmp_path, "real", 0, 3.2)
    name = "<b>$\\frac$ é"
    (tmp_path / "ensembles").mkdir()
    evaluation = json.loads((run / "result.json").read_text())["evaluation"]
    content = {"members": ["a", "b"], "mean": "logits", "evaluation": evaluation}
    sizes = [{"loss": {"iid": loss}} for loss in (3.2, 3.1)]
    path = tmp_path / "ensembles" / f"{name}.json"
    path.write_text(json.dumps(content | {"sizes": sizes}))
    _, page = write_report(tmp_path, tmp_path / "report")
    assert "&lt;b&gt;$\\frac$ é (logits): no asymptote" in page.read_text(encoding="utf-8")
    assert rows_of(tmp_path / "report" / "ensembles.csv")[0]["ensemble"] == name


def test_styles_are_no_orders(tmp_path: Path) -> None:
    for kind in ("simple", "stitched", "stitched-faq"):
        fabricate(tmp_path, kind, 8, 3.2)
    (figure,) = [one for one in recipe_figures(read_study(tmp_path)) if "Order" in one.title]
    assert isinstance(figure, Drawing)
    assert {row["kind"] for row in figure.rows} == {"simple", "stitched"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"iid": 3.0, "short": math.nan}}, "has the loss nan on short"),
        ({"evaluation": {"documents": 3}}, "with documents=(3|50)"),
        ({"evaluation": {"tokenizer_sha256": "x"}}, "with tokenizer_sha256=(x|f+),"),
        ({"evaluation": {"stream": "other"}}, "with stream=(other|val),"),
        ({"evaluation": {"tokens": 5}}, "with tokens=(5|9000),"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, change: dict[str, dict[str, object]], message: str
) -> None:
    fabricate(tmp_path, "real", 0, 3.2)
    other = fabricate(tmp_path, "real", 0, 3.2, seed=1) / "result.json"
    result = json.loads(other.read_text())
    for key, values in change.items():
        result[key] |= values
    other.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path)


def test_ensembles_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    fabricate(tmp_path, "real", 0, 3.2)
    (tmp_path / "ensembles").mkdir()
    path = tmp_path / "ensembles" / "real.json"
    evaluation = {"stream": "val", "documents": 50, "tokenizer_sha256": "other"}
    content = {"members": ["a"], "mean": "logits", "sizes": [{"loss": {"iid": 3.0}}]}
    path.write_text(json.dumps(content | {"evaluation": evaluation}))
    with pytest.raises(ValueError, match="tokenizer_sha256=other"):
        read_study(tmp_path)
    content["sizes"] = [{"loss": {"iid": math.nan}}]
    path.write_text(json.dumps(content | {"evaluation": evaluation}))
    with pytest.raises(ValueError, match="score the ensemble again"):
        read_study(tmp_path)


def test_several_styles_stand_beside_one_style_of_as_many_tokens(tmp_path: Path) -> None:
    fabricate(tmp_path, "real", 0, 3.3)
    for generations in (2, 8, 32):
        fabricate(tmp_path, "stitched-faq", generations, 3.2)
    fabricate(tmp_path, "simple-faq", 8, 3.1)
    fabricate(tmp_path, "stitched-faq+math+table+tutorial", 8, 3.15)
    figures = {one.title: one for one in recipe_figures(read_study(tmp_path))}
    drawing = figures["Several styles in one stream, against generated tokens"]
    assert isinstance(drawing, Drawing)
    (several,) = [row for row in drawing.rows if "+" in row["kind"]]
    assert (several["one_style"], several["its_generations"]) == ("stitched-faq", 8)
    assert several["its_generated_tokens"] == several["generated_tokens"]
    (single,) = [
        row for row in drawing.rows if row["kind"] == "stitched-faq" and row["generations"] == 8
    ]
    assert several["loss_minus_its"] == pytest.approx(several["loss"] - single["loss"])


def test_the_rate_of_near_duplicates_stands_beside_the_loss(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "runs", "real", 0, 4.0)
    result = json.loads((run / "result.json").read_text())
    said = "12.5% of the held-out documents have a near-duplicate in training"
    for share, shown in ((0.125, True), (None, False)):
        result["evaluation"]["near_duplicates"] = share
        (run / "result.json").write_text(json.dumps(result))
        text, page = write_report(tmp_path / "runs", tmp_path / "report")
        assert (said in text) is shown
        assert (said in page.read_text()) is shown
    other = fabricate(tmp_path / "runs", "simple", 2, 4.0)  # of a corpus they were dropped from
    for one, share in ((run, 0.125), (other, 0.0)):
        result = json.loads((one / "result.json").read_text())
        result["evaluation"]["near_duplicates"] = share
        (one / "result.json").write_text(json.dumps(result))
    text, _ = write_report(tmp_path / "runs", tmp_path / "report")
    assert "0.0% to 12.5%, by run, of the held-out documents have" in text


def test_a_search_over_other_data_than_the_runs_is_marked(tmp_path: Path) -> None:
    fabricate(tmp_path, "real", 0, 4.0)
    (tmp_path / "star").mkdir()
    found = {"study": ["recipe=real"], "optimum": {}, "loss": 4.0, "neighbours": [], "edges": []}
    (read,) = read_study(tmp_path).runs
    for data, shown in ((read.training_data, False), ("123456", True)):
        content = found | {"runs": 3, "data": data}
        (tmp_path / "star" / "0.json").write_text(json.dumps(content))
        _, page = write_report(tmp_path, tmp_path / "report")
        assert ("123456 (no run here)" in page.read_text()) is shown


def test_a_report_that_cannot_be_written_says_where_it_may_be(tmp_path: Path) -> None:
    fabricate(tmp_path / "runs", "real", 0, 4.0)
    (tmp_path / "taken").write_text("")
    where = [f"runs={tmp_path / 'runs'}", f"output={tmp_path / 'taken'}"]
    done = run_script("report.py", *where, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path / 'taken'} is no folder: set output=... to a folder for the report\n"
    )
