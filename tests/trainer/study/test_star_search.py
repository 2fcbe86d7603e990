"""The star search: pure logic on planted valleys, and the Hydra sweeper on real runs."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.conftest import run_script
from tests.trainer.config.test_schema import CONF
from tests.trainer.conftest import StreamMaker
from trainer.config.schema import TrainConfig
from trainer.loop import train
from trainer.study.runs import read_study
from trainer.study.star_search import Grid, Place, StarSearch

AXES: dict[str, list[float]] = {
    "lr": [1e-3, 3e-3, 1e-2],
    "wd": [0.1, 0.4, 0.8, 1.6],
    "epochs": [1, 2, 4, 8, 16, 32],
}


def run_search(search: StarSearch, valley: Place, weights: list[float]) -> int:
    """Answer with a convex bowl around ``valley``; returns the number of rounds."""
    rounds = 0
    while search.wanted:
        rounds += 1
        search.record(
            {
                place: 3 + sum(w * (p - v) ** 2 for w, p, v in zip(weights, place, valley))  # noqa: B905
                for place in search.wanted
            }
        )
    return rounds


@settings(deadline=None)
@given(st.data())
def test_a_bowl_leads_to_its_bottom(data: st.DataObject) -> None:
    grid = Grid(AXES)
    places = st.tuples(*(st.integers(0, len(values) - 1) for values in AXES.values()))
    start, valley = data.draw(places), data.draw(places)
    weights = data.draw(st.lists(st.floats(0.01, 2), min_size=3, max_size=3))
    search = StarSearch(grid, start)
    rounds = run_search(search, valley, weights)
    assert search.centre == valley
    assert rounds == sum(abs(a - b) for a, b in zip(start, valley, strict=True)) + 1
    certificate = search.certificate()
    assert all(neighbour.margin > 0 for neighbour in certificate.neighbours)
    assert len(certificate.neighbours) == len(grid.neighbours(valley))
    ends = {
        name
        for (name, values), index in zip(AXES.items(), valley, strict=True)
        if index in (0, len(values) - 1)
    }
    assert {edge.axis for edge in certificate.edges} == ends
    assert certificate.runs == len(search.losses) <= math.prod(map(len, AXES.values()))


def test_a_full_star_is_nine_runs_and_known_places_are_not_wanted_again() -> None:
    grid = Grid(AXES | {"w": [0.5, 0.75, 0.9]})
    search = StarSearch(grid, (1, 1, 2, 1))
    assert len(search.wanted) == 9  # the paper's count with a mixing fraction
    search.record({place: 3.0 + sum(place) for place in search.wanted})
    assert search.centre == (0, 1, 2, 1)  # the first of the equally best
    assert (1, 1, 2, 1) not in search.wanted


def test_ties_and_diverged_neighbours_do_not_move_the_centre() -> None:
    search = StarSearch(Grid({"lr": [1.0, 2.0, 3.0]}), (1,))
    search.record({(0,): 3.0, (1,): 3.0, (2,): math.inf})
    certificate = search.certificate()
    assert certificate.optimum == {"lr": 2.0}
    assert "lr=3: diverged" in str(certificate)
    assert "lr=1: 3.0000 (worse by 0.0000)" in str(certificate)
    assert json.loads(json.dumps(certificate.to_dict()))["neighbours"][1]["loss"] is None


@settings(deadline=None)
@given(st.data())
def test_a_limit_ends_a_search_at_its_best_place(data: st.DataObject) -> None:
    grid = Grid(AXES)
    places = st.tuples(*(st.integers(0, len(values) - 1) for values in AXES.values()))
    start, valley, limit = data.draw(places), data.draw(places), data.draw(st.integers(1, 40))
    free, limited = StarSearch(grid, start), StarSearch(grid, start, limit)
    for search in (free, limited):
        run_search(search, valley, [1.0, 1.0, 1.0])
    assert len(limited.losses) == min(limit, len(free.losses))
    certificate = limited.certificate()
    assert certificate.loss == min(limited.losses.values())
    assert certificate.runs == len(limited.losses)
    if limit >= len(free.losses):
        assert certificate == free.certificate()
        assert not certificate.unmeasured
    else:
        assert certificate.unmeasured or limited.centre != valley
        assert ("not certified" in str(certificate)) == bool(certificate.unmeasured)


def test_a_start_outside_the_grid_moves_to_its_nearest_place() -> None:
    grid = Grid({"lr": [2.0, 1.0, 4.0], "wd": [0.0, 0.1]})
    assert grid.nearest({"lr": 2.0, "wd": 0.1}) == (1, 1)
    assert grid.nearest({"lr": 99.0, "wd": -1.0}) == (2, 0)


def test_what_proves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one axis"):
        Grid({})
    with pytest.raises(ValueError, match="distinct"):
        Grid({"lr": [1.0, 1.0]})
    search = StarSearch(Grid({"lr": [1.0, 2.0]}), (0,))
    with pytest.raises(ValueError, match="not trained yet"):
        search.certificate()
    with pytest.raises(ValueError, match="the loss nan"):
        search.record({(0,): math.nan})
    search.record({(0,): math.inf, (1,): math.inf})
    with pytest.raises(ValueError, match="diverged"):
        search.certificate()


def sweeper_for(*overrides: str) -> Any:
    """The sweeper as Hydra sets it up, without a launcher."""
    import train  # noqa: F401  (puts trainer/plugins on sys.path, registers the schema)

    plugin = importlib.import_module("hydra_plugins.star_sweeper")
    master = compose("config", list(overrides), return_hydra_config=True)
    sweeper = plugin.StarSweeper(dict(master.hydra.sweeper.params))
    sweeper.master, sweeper.loader = master, GlobalHydra.instance().config_loader()
    return sweeper


def test_what_is_no_axis_makes_searches_of_their_own() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        arguments = ["sweep=star", "recipe=stitched,simple", "recipe.generations=2,8", "seed=1"]
        studies = sweeper_for("sweep=star").studies([*arguments, "recipe.epochs=4,8,16"])
        assert len(studies) == 4
        assert studies[1].overrides == ["recipe=stitched", "recipe.generations=8", "seed=1"]
        centre = studies[1].search.grid.values(studies[1].search.centre)
        assert centre == {
            "recipe.learning_rate": 3e-3,
            "recipe.weight_decay": 0.4,
            "recipe.epochs": 16.0,
            "recipe.mixing_fraction": 0.75,
        }
        assert len(studies[1].search.wanted) == 1 + 2 + 2 + 1 + 2  # 16 epochs end that axis
        down = studies[1].job((1, 1, 1, 1))
        assert down[-2:] == ["recipe.epochs=8.0", "recipe.mixing_fraction=0.75"]
        # A value given for an axis is where the search starts.
        (moved,) = sweeper_for("sweep=star").studies(["recipe=simple", "recipe.epochs=2"])
        assert moved.search.grid.values(moved.search.centre)["recipe.epochs"] == 2.0
        assert moved.overrides == ["recipe=simple"]
        (real,) = sweeper_for("sweep=star_real").studies(["recipe=real"])
        assert len(real.search.wanted) == 7  # the paper's count for real only


def test_a_start_off_the_grid_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with initialize_config_dir(CONF, version_base="1.3"), caplog.at_level("INFO"):
        sweeper = sweeper_for("sweep=star_real")
        sweeper.studies(["recipe=real", "recipe.epochs=0.004", "recipe.learning_rate=1e9"])
    assert "recipe.learning_rate=0.03 (the nearest of its grid to 1e+09)" in caplog.text
    assert "recipe.epochs=1 (the nearest of its grid to 0.004)" in caplog.text


def test_a_search_over_the_share_of_no_stream_names_the_other_search() -> None:
    with (
        initialize_config_dir(CONF, version_base="1.3"),
        pytest.raises(ValueError, match=r"recipe=real mixes no .*: use sweep=star_real"),
    ):
        sweeper_for("sweep=star").studies(["recipe=real"])


def run_of(sweeper: Any, overrides: list[str]) -> TrainConfig:
    config = OmegaConf.to_object(sweeper.compose(overrides))
    assert isinstance(config, TrainConfig)
    return config


def test_a_search_takes_no_loss_of_streams_that_were_built_again(
    make_stream: StreamMaker, tmp_path: Path
) -> None:
    job = [
        *("recipe=real", "recipe.epochs=1.0", f"data.root={tmp_path}", f"output={tmp_path}/runs"),
        *("data.context_length=16", "data.batch_size=2", "model=tiny", "runtime.num_threads=1"),
        *("tracking.tensorboard=false", "checkpoint.count=1", "tracking.num_evaluations=1"),
    ]
    for name in ("real", "val"):
        make_stream(name, [[12]] * 4)
    with initialize_config_dir(CONF, version_base="1.3"):
        sweeper = sweeper_for("sweep=star_real")
        assert sweeper.outcome(job) is None
        loss = train(run_of(sweeper, job))
        assert sweeper.outcome(job) == loss
        make_stream("real", [[12]] * 4, shift=1)
        assert sweeper.outcome(job) is None
        named = [*job, "name=mine"]  # its folder stays the same
        train(run_of(sweeper, named))
        make_stream("real", [[12]] * 4, shift=2)
        with pytest.raises(ValueError, match="other data"):
            sweeper.outcome(named)


@pytest.mark.slow
def test_the_sweeper_trains_stars_resumes_and_certifies(corpus_root: Path, tmp_path: Path) -> None:
    command = [
        *("train.py", "-m", "sweep=star", "experiment=demo", "model=tiny"),
        *(f"data.root={corpus_root}", f"output={tmp_path}", "runtime.num_threads=1"),
        *("data.context_length=64", "data.batch_size=64", "tracking.tensorboard=false"),
        *("tracking.log_every=1", "tracking.num_evaluations=1", "checkpoint.count=1"),
        *("recipe=simple", "recipe.generations=2", "recipe.weight_decay=0.4,0.8"),
        *("recipe.learning_rate=3e-3,1e30", "recipe.mixing_fraction=0.5,0.75"),
        *("recipe.epochs=2,4",),
    ]
    wrong = run_script(*command, "recipe.learning_rate=high,low", check=False)
    assert wrong.returncode == 1
    assert "error: the axis recipe.learning_rate=high,low must be a list of numbers" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    done = run_script(*command)
    assert "starts at recipe.learning_rate=0.003" in done.stdout
    assert "recipe.epochs=4 " in done.stdout  # the recipe's 8 is not on its axis
    assert "star search: 5 runs wanted, 0 of them finished already" in done.stdout
    assert done.stdout.count("recipe.learning_rate=1e+30: diverged") == 1
    (path,) = (tmp_path / "star").iterdir()
    certificate = json.loads(path.read_text())
    assert "recipe=simple" in certificate["study"]
    assert certificate["data"] in {run.training_data for run in read_study(tmp_path).runs}
    losses = [other["loss"] for other in certificate["neighbours"] if other["loss"]]
    assert len(losses) == 3
    assert min(losses) > certificate["loss"]
    again = run_script(*command)
    assert "5 of them finished already" in again.stdout
    assert [line for line in again.stdout.splitlines() if line.startswith("loss ")] == [
        line for line in done.stdout.splitlines() if line.startswith("loss ")
    ]
