"""``hydra/sweeper=star``: the paper's local search as a Hydra sweeper.

``python train.py -m sweep=star recipe=stitched,simple recipe.generations=2,8`` runs one search for
every combination of what is not an axis, all of them side by side through whatever launcher is
configured. A search starts at the place of its grid nearest to the composed config. Finished runs
are read from their folders, so the same command goes on where it was interrupted.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.grid_sweeper import run_missing
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config.schema import TrainConfig
from trainer.files import write_sealed
from trainer.run.inputs import read_inputs, run_dir_of, training_data
from trainer.run.run_dir import finished_loss
from trainer.run.sweeps import write_results
from trainer.study.star_search import Certificate, Grid, Place, StarSearch

logger = logging.getLogger(__name__)


@dataclass
class StarSweeperConf:
    """``params``: axis -> its grid, as in Hydra's own sweeper (``recipe.epochs: 1,2,4,8``)."""

    _target_: str = "hydra_plugins.star_sweeper.StarSweeper"
    params: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(
    group="hydra/sweeper", name="star", node=StarSweeperConf, provider="megadocs"
)


@dataclass
class Study:
    """One search: the overrides that are the same in all its runs."""

    overrides: list[str]
    search: StarSearch

    def job(self, place: Place) -> list[str]:
        """Overrides of the run at ``place``."""
        values = self.search.grid.values(place)
        return [*self.overrides, *(f"{axis}={value!r}" for axis, value in values.items())]

    def name(self) -> str:
        """File name of the certificate: the same for the same search."""
        content = json.dumps([self.overrides, dict(self.search.grid.axes)])
        return hashlib.sha256(content.encode()).hexdigest()[:8]


class StarSweeper(Sweeper):
    """Centre plus one step each way on every axis; move to the best; stop when none is better."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.jobs = 0  # started so far
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.master = config
        self.context = hydra_context
        self.loader = hydra_context.config_loader
        self.pool = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[dict[str, Any]]:
        """Run all searches to their ends, or estimate their first round; returns certificates."""
        try:
            return self.run(arguments)
        except (ValueError, RuntimeError) as error:  # what a user can mend: no traceback
            logger.error(error)
            raise SystemExit(1) from None

    def run(self, arguments: list[str]) -> list[dict[str, Any]]:
        """One search for every combination of what is no axis."""
        studies = self.studies(arguments)
        if self.compose(studies[0].overrides).estimate.enabled:
            batch = [study.job(place) for study in studies for place in study.search.wanted]
            run_missing(self.context, self.master, self.pool, batch, 0, set())
            logger.info(
                "star search: estimated is the first round; how many follow, the losses decide"
            )
            return []
        return self.search(studies)

    def search(self, studies: list[Study]) -> list[dict[str, Any]]:
        """Round after round of what all searches want next; returns their certificates."""
        while wanted := [(study, place) for study in studies for place in study.search.wanted]:
            missing = [pair for pair in wanted if self.outcome(pair[0].job(pair[1])) is None]
            logger.info(
                f"star search: {len(wanted)} runs wanted, {len(wanted) - len(missing)} of them "
                "finished already"
            )
            self.launch([study.job(place) for study, place in missing])
            for study in studies:
                study.search.record(
                    {place: self.outcome(study.job(place)) for place in study.search.wanted}
                )
        return [self.certify(study) for study in studies]

    def studies(self, arguments: list[str]) -> list[Study]:
        """One search for each combination of the swept values that are not axes."""
        grids, combinations = self.split(arguments, self.params)
        grid = Grid(grids)
        return [self.study(chosen, grid) for chosen in combinations]

    def split(
        self, words: list[str], params: Mapping[str, Any]
    ) -> tuple[dict[str, list[float]], list[list[str]]]:
        """The axes with their values, and every combination of what is no axis.

        Args:
            words: overrides; several values of an axis take the place of its grid.
            params: axis -> its grid, as in Hydra's own sweeper.
        """
        parser = OverridesParser.create(config_loader=self.loader)
        grids = {
            axis: axis_values(parser.parse_override(f"{axis}={values}"))
            for axis, values in params.items()
        }
        combinations: list[list[str]] = [[]]
        for override in parser.parse_overrides(words):
            key = override.get_key_element()
            if override.is_sweep_override():
                if key in grids:
                    grids[key] = axis_values(override)
                    continue
                choices = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                choices = [str(override.input_line)]
            combinations = [[*chosen, choice] for chosen in combinations for choice in choices]
        return grids, combinations

    def study(self, overrides: list[str], grid: Grid, limit: int | None = None) -> Study:
        """A search that starts at the place nearest to the composed config."""
        config = self.compose(overrides)
        centre = {axis: OmegaConf.select(config, axis) for axis in grid.axes}
        for axis, value in centre.items():
            if not isinstance(value, int | float):
                raise ValueError(f"the axis {axis} is {value!r} in the config, not a number")
        if "recipe.mixing_fraction" in centre and config.recipe.stream is None:
            raise ValueError(
                f"recipe={config.recipe.name} mixes no synthetic stream, whose share is an axis of "
                "this search: use sweep=star_real"
            )
        # A run is no search itself, and its axes are set by the search.
        dropped = {"sweep", *grid.axes}
        fixed = [one for one in overrides if one.partition("=")[0] not in dropped]
        start = grid.nearest(centre)
        values = " ".join(
            f"{axis}={value:g}"
            + (f" (the nearest of its grid to {centre[axis]:g})" if value != centre[axis] else "")
            for axis, value in grid.values(start).items()
        )
        logger.info(f"star search: starts at {values}")
        return Study(fixed, StarSearch(grid, start, limit))

    def compose(self, overrides: list[str]) -> DictConfig:
        """The config of one run without Hydra's own part; not to be changed.

        Each is asked for several times, and Hydra takes 0.2 s to compose one.
        """
        key = tuple(overrides)
        if key not in self.composed:
            config = self.loader.load_sweep_config(self.master, overrides)
            with open_dict(config):
                del config["hydra"]
            self.composed[key] = config
        return self.composed[key]

    def launch(self, batch: list[list[str]]) -> None:
        """Run ``batch`` to its end; diverged runs are results, other failures are not.

        Raises:
            RuntimeError: runs ended with neither a result nor a diverged loss; names each.
        """
        common = set.intersection(*map(set, batch)) if batch else set()
        first, self.jobs = self.jobs, self.jobs + len(batch)
        try:
            ends = run_missing(self.context, self.master, self.pool, batch, first, common)
        finally:
            write_results(Path(self.master.hydra.sweep.dir))
        failed = []
        for overrides, end in zip(batch, ends, strict=True):
            if self.outcome(overrides) is None:
                problem = end.problem or "it ended without result.json"
                where = f"; see {end.log}" if end.log else ""
                failed.append(f"  {' '.join(overrides)}: {problem}{where}")
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(batch)} runs failed:\n" + "\n".join(failed) + "\nFinished "
                "runs are kept; mend it and start the same command again"
            )

    def outcome(self, overrides: list[str]) -> float | None:
        """The loss in the run's folder, infinite where it diverged; None where nothing is there."""
        config = OmegaConf.to_object(self.compose(overrides))
        assert isinstance(config, TrainConfig)
        loss = finished_loss(config)
        if loss is not None:
            return loss
        return math.inf if (run_dir_of(config) / "diverged.txt").exists() else None

    def certify(self, study: Study) -> dict[str, Any]:
        """Print the certificate and write it beside the runs."""
        certificate: Certificate = study.search.certificate()
        config = OmegaConf.to_object(self.compose(study.overrides))
        assert isinstance(config, TrainConfig)
        data = training_data(config, read_inputs(config))
        content = {"study": study.overrides, "data": data, **certificate.to_dict()}
        folder = Path(self.master.hydra.sweep.dir) / "star"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{study.name()}.json"
        write_sealed(path, content)
        print(f"\n{' '.join(study.overrides)}\n{certificate}\ncertificate: {path}", flush=True)
        return content


def axis_values(override: Override) -> list[float]:
    """The values of an axis.

    Raises:
        ValueError: it is not a list of numbers.
    """
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(
            f"the axis {override.input_line} must be a list of numbers: 0.5,1 or choice(1)"
        )
    return [float(value) for value in values]  # type: ignore[arg-type]
