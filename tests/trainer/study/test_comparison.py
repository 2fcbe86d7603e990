"""What a study concludes: planted differences, their intervals, and the sentence made of them."""

import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.stats import ttest_rel

from tests.trainer.config.test_schema import CONF
from tests.trainer.conftest import StreamMaker
from trainer.config.fields import rows
from trainer.study.comparison.answer import answer_question
from trainer.study.comparison.design import Arm, StudyDesign, Tuning, size_text
from trainer.study.comparison.paired import (
    MOST_SEEDS,
    data_efficiency,
    detectable_difference,
    estimate_mean,
    half_width_of,
    paired_difference,
    seeds_for,
    tokens_for,
)
from trainer.study.comparison.record import NAME, Point, Record, Search, read_record

SIZES = [0.125, 0.25, 0.5, 1.0]
TOKENS = {size: round(240_000 * size) for size in SIZES}


def test_a_paired_interval_is_that_of_the_t_test() -> None:
    ours, theirs = [3.1, 3.3, 3.2, 3.6], [3.4, 3.35, 3.5, 3.7]
    found = paired_difference(ours, theirs)
    peer = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean == pytest.approx(-0.1875)
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high))
    assert found.excludes_zero == (peer.high < 0)
    assert math.isnan(estimate_mean([1.0]).low)
    for wrong in ([], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="finite"):
            estimate_mean(wrong)


@pytest.mark.parametrize("seeds", [2, 3, 4, 8])
def test_what_is_said_to_be_seen_is_seen_in_four_of_five_studies(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    true = detectable_difference(0.01, seeds)
    drawn = generator.normal(true, 0.01, (40_000, seeds))
    half = half_width_of(1.0, seeds) * drawn.std(axis=1, ddof=1)
    seen = np.abs(drawn.mean(axis=1)) > half
    assert seen.mean() == pytest.approx(0.8, abs=0.008)  # four standard errors
    covered = np.abs(drawn.mean(axis=1) - true) <= half
    assert covered.mean() == pytest.approx(0.95, abs=0.0044)


@given(st.integers(2, 40), st.floats(1e-4, 1.0))
def test_the_seeds_for_an_interval_are_the_fewest(seeds: int, spread: float) -> None:
    wanted = half_width_of(spread, seeds) * 1.0000001
    assert seeds_for(spread, wanted) == seeds
    assert seeds_for(spread, half_width_of(spread, MOST_SEEDS + 1)) is None


@given(
    st.floats(0.05, 0.5),
    st.floats(1.0, 4.0),
    st.lists(st.floats(0.0, 0.01), min_size=2, max_size=6),
)
def test_a_planted_efficiency_comes_back(slope: float, factor: float, offsets: list[float]) -> None:
    """Losses linear in log tokens: the curve of each seed is its own."""
    tokens = [1e4, 2e4, 4e4, 8e4]
    curves = [[9 - slope * math.log(one) + own for own in offsets] for one in tokens]
    arm = [9 - slope * math.log(2e4 * factor) + own for own in offsets]
    found = data_efficiency(arm, 2e4, tokens, curves)
    if factor > 4 - 1e-9:
        return  # at the very end of the curve rounding decides
    assert found is not None
    assert found.mean == pytest.approx(factor, rel=1e-6)
    assert found.low == pytest.approx(found.high, rel=1e-6)
    beyond = [loss - slope * math.log(4.1) for loss in arm]
    assert data_efficiency(beyond, 2e4, tokens, curves) is None


def test_a_curve_that_rises_foretells_nothing() -> None:
    assert tokens_for(4.0, [1e4, 2e4, 4e4], [5.0, 3.0, 3.5]) is None
    assert tokens_for(4.0, [1e4], [4.0]) is None
    assert tokens_for(5.0, [1e4, 4e4], [6.0, 4.0]) == pytest.approx(2e4)


def test_intervals_of_the_efficiency_cover_the_planted_one() -> None:
    """The noise of every run is its own; 95 % of 2,000 studies must hold the truth."""
    generator = np.random.default_rng(0)
    tokens = np.array([1e4, 2e4, 4e4, 8e4])
    covered = tried = 0
    for _ in range(2000):
        curves = 9 - 0.3 * np.log(tokens)[:, None] + generator.normal(0, 0.01, (4, 4))
        arm = 9 - 0.3 * math.log(2e4 * 1.7) + generator.normal(0, 0.01, 4)
        found = data_efficiency(arm.tolist(), 2e4, tokens.tolist(), curves.tolist())
        assert found is not None
        tried += 1
        covered += found.low <= 1.7 <= found.high
    assert covered / tried == pytest.approx(0.95, abs=0.02)


def planted(difference: float, noise: float, seeds: int = 4, **changes: Any) -> Record:
    """Whole is better than cut by ``difference`` at every size; real follows a line."""
    generator = np.random.default_rng(1)
    points = []
    for place, size in enumerate(SIZES):
        for seed in range(1, seeds + 1):
            own = generator.normal(0, 0.05)  # of the seed: it cancels
            for arm, shift in (("whole", -0.2 - difference), ("cut", -0.2), ("real", 0.0)):
                loss = 6 - 0.4 * place + shift + own + generator.normal(0, noise)
                losses = {"256-megadoc": loss, "4096-megadoc": loss + 0.1 * (arm == "cut")}
                by_position = {name: {"16": one, "64": one} for name, one in losses.items()}
                points.append(
                    Point(arm, size, seed, "run", TOKENS[size], 1, 1, 1.0, losses, by_position)
                )
    record = Record(
        "whole_against_cut",
        "real",
        {arm: f"words about {arm}" for arm in ("whole", "cut", "real")},
        {"whole": 4096, "cut": 256, "real": 256},
        SIZES,
        list(range(1, seeds + 1)),
        len(points),
        ["256-megadoc", "4096-megadoc"],
        {},
        [],
        points,
    )
    return replace(record, **changes)


def test_a_planted_difference_is_the_sentence(tmp_path: Path) -> None:
    record = planted(0.05, 0.004)
    record.write(tmp_path / "study")
    assert read_record(tmp_path) == record
    text = answer_question(record, "whole_against_cut")
    first = text.splitlines()[0]
    assert first.startswith("whole is better than cut by 0.0")
    assert "at 240,000 real tokens (all)" in first
    assert "4 paired seeds" in first
    assert answer_question(record, "cut_against_whole").startswith("whole is better than cut")
    found = paired_difference(
        record.losses("whole", 1.0, "256-megadoc", [1, 2, 3, 4]),
        record.losses("cut", 1.0, "256-megadoc", [1, 2, 3, 4]),
    )
    assert f"by {-found.mean:.4f} nats" in first
    assert f"interval {found.low:+.4f} to {found.high:+.4f}" in first
    assert "each in windows as long as in training (4096-megadoc, 256-megadoc)" in text
    assert "by first position in the document, read as 4096-megadoc: 16 -0.1" in text
    # Half a halving of the data is worth 0.2 nats; where the curve ends it is not said.
    assert "cut at 1/4: " not in text
    assert "cut at 60,000 real tokens (1/4): 1.4" in text
    assert "cut at all: outside the sizes of real" in text
    assert "true difference of" in text
    assert f"{seeds_for(found.spread, found.half_width / 2)} seeds instead of 4" in text


def test_what_is_not_decided_or_not_known_is_said_to_be() -> None:
    undecided = answer_question(planted(0.0, 0.02), "whole_against_cut")
    assert undecided.startswith("Undecided: whole minus cut is ")
    assert "would have been seen with 80 % power" in undecided.splitlines()[0]
    alone = answer_question(planted(0.05, 0.01, seeds=1), "whole_against_cut")
    assert alone.startswith("Not known yet: with one seed")
    assert "a second seed" in alone
    record = planted(0.05, 0.004)
    half = replace(record, points=[one for one in record.points if one.seed < 3])
    assert "the 24 of 48 final runs that have not ended" in answer_question(
        half, "whole_against_cut"
    )
    certificate = {"edges": [{"axis": "recipe.epochs", "value": 16.0, "end": "largest"}]}
    edged = replace(record, searches=[Search("whole", 1.0, certificate | {"unmeasured": 3})])
    text = answer_question(edged, "whole_against_cut")
    assert (
        "a wider grid for whole at all, whose optimum lies at the end of recipe.epochs=16" in text
    )
    assert "3 neighbours are unmeasured" in text


def test_seeds_count_where_both_arms_have_ended() -> None:
    record = planted(0.05, 0.004)
    left = [one for one in record.points if (one.arm, one.size, one.seed) != ("cut", 1.0, 2)]
    assert "3 paired seeds" in answer_question(replace(record, points=left), "whole_against_cut")
    none = [one for one in record.points if one.arm != "cut"]
    with pytest.raises(ValueError, match="no size has a final run of both whole and cut"):
        answer_question(replace(record, points=none), "whole_against_cut")
    with pytest.raises(ValueError, match="two arms of the study: whole, cut, real"):
        answer_question(record, "whole_against_muon")


def test_what_is_no_study_or_several_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / NAME).write_text(json.dumps({"question": "of a study by hand"}))
    with pytest.raises(FileNotFoundError, match="-m study=whole_against_cut"):
        read_record(tmp_path)
    for name in ("a", "b"):
        planted(0.0, 0.01).write(tmp_path / name)
    with pytest.raises(ValueError, match="several studies"):
        read_record(tmp_path)


def design(**changes: Any) -> StudyDesign:
    arms = {"whole": Arm(["recipe=stitched"]), "cut": Arm(["recipe=stitched"]), "real": Arm()}
    tuning = Tuning(sizes=[0.125, 1.0], grid={"recipe.epochs": "1,2"})
    found = StudyDesign("whole_against_cut", "real", [], arms, SIZES, [1, 2], tuning)
    return replace(found, **changes)


def test_tuning_comes_first_and_seeds_last() -> None:
    plan = design(arms=design().arms | {"muon": Arm(["optimizer.kind=muon"], [1.0])})
    plan.check()
    assert list(plan.searches()) == [
        (0, [("whole", 0.125), ("cut", 0.125), ("real", 0.125), ("muon", 1.0)]),
        (1, [("whole", 1.0), ("cut", 1.0), ("real", 1.0)]),
    ]
    finals = list(plan.finals())
    assert [seed for seed, _ in finals] == [1, 2]
    assert len(finals[0][1]) == 3 * 4 + 1
    nearest = [("whole", tuned) for tuned in (0.125, 0.125, 1.0, 1.0)]
    assert [plan.tuned_for("whole", size) for size in SIZES] == nearest
    assert [size_text(size) for size in (*SIZES, 0.3)] == ["1/8", "1/4", "1/2", "all", "0.3"]
    assert {row.key for row in rows(StudyDesign)} >= {"question", "arms", "tuning.grid"}


def test_an_arm_may_take_the_optimum_of_another() -> None:
    plan = design(arms=design().arms | {"ema": Arm(sizes=[0.25, 0.5], optimum_of="whole")})
    plan.check()
    assert all(arm != "ema" for _, pairs in plan.searches() for arm, _ in pairs)
    assert [plan.tuned_for("ema", size) for size in plan.sizes_of("ema")] == [
        ("whole", 0.125),
        ("whole", 1.0),
    ]
    chain = replace(plan, arms=plan.arms | {"more": Arm(optimum_of="ema")})
    with pytest.raises(
        ValueError, match=r"arms\.more\.optimum_of=ema must be an arm with a search"
    ):
        chain.check()
    record = planted(0.05, 0.004, optimum_of={"cut": "whole"})
    text = answer_question(record, "whole_against_cut")
    assert "a search of its own for cut, which takes the optimum of whole" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: replace(d, arms={}), "arms is empty"),
        (lambda d: replace(d, sizes=[0.25, 1.0]), r"tuning.sizes holds \[0.125\]"),
        (lambda d: replace(d, seeds=[1, 1]), "must be different values"),
        (lambda d: replace(d, seeds=[0, 1]), "luckiest run of a search"),
        (lambda d: replace(d, sizes=[0.0, 0.125, 1.0]), "must all be in"),
        (lambda d: replace(d, question="whole_against_muon"), "'muon' is none of whole, cut, real"),
        (lambda d: replace(d, tuning=Tuning()), "needs sizes and a grid"),
        (
            lambda d: replace(d, arms=d.arms | {"ema": Arm(optimum_of="muon")}),
            "optimum_of=muon must be an arm with a search of its own: whole, cut, real",
        ),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(
    change: Callable[[StudyDesign], StudyDesign], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        change(design()).check()


def sweeper_for(root: Path, study: str = "whole_against_cut") -> Any:
    """The sweeper of a study, as Hydra sets it up, without a launcher."""
    import train  # noqa: F401  (puts trainer/plugins on sys.path, registers the schema)

    plugin = importlib.import_module("hydra_plugins.study_sweeper")
    master = compose("config", [f"study={study}", f"output={root}"], return_hydra_config=True)
    arguments = OmegaConf.to_container(master.hydra.sweeper)
    assert isinstance(arguments, dict)
    keywords = {str(key): value for key, value in arguments.items() if key != "_target_"}
    sweeper = plugin.StudySweeper(**keywords)
    sweeper.master, sweeper.loader = master, GlobalHydra.instance().config_loader()
    return sweeper


def test_what_the_study_fixes_is_no_argument_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        sweeper = sweeper_for(tmp_path)
        root = f"data.root={tmp_path}"
        for own in ("data.context_length=64", "seed=3", "data.share=0.5", "recipe.epochs=4"):
            with pytest.raises(ValueError, match=own.partition("=")[0] + " is the study's own"):
                sweeper.run([root, own])
        with pytest.raises(ValueError, match="sweeps what is no axis"):
            sweeper.run([root, "model=tiny,2m"])
        with pytest.raises(FileNotFoundError) as refused:
            sweeper.run(["study=whole_against_cut", root, "model=2m"])
        lines = str(refused.value).splitlines()
        assert len(lines) == 5
        for name in ("real", "val", "stitched-g8", "simple-g8"):
            (line,) = (one for one in lines if f"/streams/{name}: " in one)
            assert f"python generate.py root={tmp_path} " in line
        assert "streams.generations=[8]" in lines[2]
        # The command line changes what all arms share, and an arm what is its own.
        words, grid = sweeper.arms["real"]
        config = sweeper.config_of(words)
        assert config.model.hidden_size == 128
        assert (config.data.context_length, config.recipe.stream) == (512, None)
        assert "recipe.mixing_fraction" not in grid.axes
        assert "recipe.mixing_fraction" in sweeper.arms["whole"][1].axes
        assert sweeper.arms["real"][1].axes != sweeper.arms["whole"][1].axes


def test_arms_beyond_the_paper_join_those_of_the_study(tmp_path: Path) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        sweeper = sweeper_for(tmp_path, "beyond_whole")
        with pytest.raises(FileNotFoundError) as refused:
            sweeper.run([f"data.root={tmp_path}"])
        beyond = {name for name in sweeper.arms if sweeper.design.sizes_of(name) == [0.25]}
        assert beyond == {"muon", "dropout", "ema", "real_first", "styles", "by_loss"}
        assert set(sweeper.arms) - beyond == {"whole", "cut", "simple", "real"}
        assert sweeper.design.searched == ["whole", "cut", "simple", "real", "muon"]
        for name in beyond:  # but for what each is named after they are trained as whole is
            ours, whole = (sweeper.config_of(sweeper.at_size(arm, 0.25)) for arm in (name, "whole"))
            assert ours.data == whole.data
            assert ours != whole
        made = {
            line.partition(":")[0].rpartition("/")[2] for line in str(refused.value).split("\n")
        }
        assert made >= {
            "stitched-g8-by-loss",
            "stitched-g8-real-first",
            "stitched-g8-rephrase+faq+table+tutorial",
        }
        sweeper = sweeper_for(tmp_path, "beyond_whole")
        sweeper.design.arms["ema"].overrides.append("recipe.epochs=4")
        with pytest.raises(
            ValueError, match=r"ema takes the optimum of whole and .*recipe\.epochs"
        ):
            sweeper.run([f"data.root={tmp_path}"])


@pytest.mark.slow
def test_arms_of_unequal_batches_are_not_compared(make_stream: StreamMaker, tmp_path: Path) -> None:
    for name in ("real", "val", "stitched-g8", "simple-g8"):
        make_stream(name, [[40, 30]] * 60)
    with initialize_config_dir(CONF, version_base="1.3"):
        sweeper = sweeper_for(tmp_path / "runs")
        sweeper.design.arms["whole"].overrides.append("data.batch_size=2")
        with pytest.raises(ValueError, match=r"cut reads 8,192 tokens a step, whole 16,384"):
            sweeper.run([f"data.root={tmp_path}"])
        sweeper = sweeper_for(tmp_path / "runs")
        sweeper.design.arms["cut"].overrides.append("evaluation.masks=[none]")
        with pytest.raises(ValueError, match="whole and cut read the held-out documents diff"):
            sweeper.run([f"data.root={tmp_path}"])


def test_the_cost_is_said_before_anything_is_trained(
    make_stream: StreamMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("real", "val", "stitched-g8", "simple-g8"):
        make_stream(name, [[40, 30]] * 800)
    with initialize_config_dir(CONF, version_base="1.3"):
        sweeper = sweeper_for(tmp_path / "runs")
        assert sweeper.run([f"data.root={tmp_path}", "estimate.enabled=true"]) == []
    said = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert re.search(r"all = 56,000 tokens of 800 documents", said)
    finals = len(sweeper.design.arms) * len(sweeper.design.sizes) * len(sweeper.design.seeds)
    searches = len(sweeper.design.arms) * len(sweeper.design.tuning.sizes)
    most = finals + searches * sweeper.design.tuning.runs
    assert re.search(rf"if each takes all its runs +{most} ", said)
    # An arm's final runs: tokens are E R / (1 - w) at every size, for every seed, whole steps.
    planned = [one for one in sweeper.plan if one.arm == "cut"]
    rates = {"recipe.learning_rate": 3e-3, "recipe.weight_decay": 0.4}
    recipe = planned[0].config.recipe
    for one in planned:
        real = one.work.streams[0].manifest.tokens
        expected = recipe.epochs * real / (1 - recipe.mixing_fraction)
        assert one.work.tokens == pytest.approx(expected, rel=0.02)
    # Of a search's places: twice the epochs are twice the work, w = 0.5 instead of 0.75 is half.
    grid = planned[0].grid
    assert grid is not None
    values = grid.values(
        grid.nearest({"recipe.epochs": 4.0, "recipe.mixing_fraction": 0.5} | rates)
    )
    assert (values["recipe.epochs"], values["recipe.mixing_fraction"]) == (4.0, 0.5)
    assert planned[0].factor(grid.nearest(values)) == pytest.approx(4 / recipe.epochs * 0.5)
