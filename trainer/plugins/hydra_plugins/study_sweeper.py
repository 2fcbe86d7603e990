"""``hydra/sweeper=study``: a whole study by one command, ``python train.py -m study=NAME``.

It plans every run from the corpus folder and says what they will cost, tunes each arm by the star
search, trains the final runs seed after seed, and ends in the answer. Finished runs are read from
their folders, so the same command goes on wherever it was interrupted.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.star_sweeper import StarSweeper
from omegaconf import OmegaConf

from trainer.config.schema import TrainConfig
from trainer.run.inputs import read_inputs, run_dir_of
from trainer.study.comparison.design import MIXING, StudyDesign, arms_of, size_text
from trainer.study.comparison.record import Point, Record, Search, describe_arm, point_of
from trainer.study.star_search import Grid

logger = logging.getLogger(__name__)


@dataclass
class StudySweeperConf(StudyDesign):
    """A study, as its YAML fills it."""

    _target_: str = "hydra_plugins.study_sweeper.StudySweeper"


ConfigStore.instance().store(
    group="hydra/sweeper", name="study", node=StudySweeperConf, provider="megadocs"
)


class StudySweeper(StarSweeper):  # type: ignore[misc]  # mypy does not see hydra_plugins
    """Tunes every arm, trains it with every seed at every size, and answers."""

    def __init__(self, **design: Any) -> None:
        schema = OmegaConf.structured(StudyDesign)
        found = OmegaConf.to_object(OmegaConf.merge(schema, design))
        assert isinstance(found, StudyDesign)
        super().__init__(found.tuning.grid)
        self.design = found

    def run(self, arguments: list[str]) -> list[dict[str, Any]]:
        """Plan, say the cost, tune, train, answer; returns the certificates."""
        from trainer.study.comparison import cost  # torch, which no other program's start needs
        from trainer.study.report import write_report

        design = self.design
        design.check()
        self.folder = Path(self.master.hydra.sweep.dir)
        self.arms = {arm: self.arm_of(arm, arguments) for arm in design.arms}
        self.check_shared_optima()
        configs = {
            (arm, size): (self.config_of(self.at_size(arm, size)), grid)
            for arm, (_, grid) in self.arms.items()
            for size in design.sizes_of(arm)
        }
        self.plan = cost.plan_of(design, configs)
        speed = cost.measured_speed(self.plan, list(cost.finished_points(self.folder, self.plan)))
        print(cost.describe_cost(design, self.plan, speed), flush=True)
        if self.plan[0].config.estimate.enabled:
            return []
        self.record = self.empty_record()
        self.record.write(self.folder)
        optima = self.tune()
        for seed, pairs in design.finals():
            logger.info(f"study: final runs with seed {seed}")
            self.train(seed, pairs, optima)
        print(f"\n{self.answer()}", flush=True)
        _, page = write_report(self.folder, self.folder / "report")
        print(f"\nreport: {page}", flush=True)
        return [search.certificate for search in self.record.searches]

    def arm_of(self, arm: str, arguments: list[str]) -> tuple[list[str], Grid]:
        """Overrides of an arm, and the grid it is tuned on.

        Raises:
            ValueError: the command line changes what is the arm's own, or sweeps.
        """
        own = self.design.arms[arm].overrides
        parser = OverridesParser.create(config_loader=self.loader)
        given = {one.get_key_element() for one in parser.parse_overrides(arguments)}
        taken = {"data.share", "seed", "data.order_seed", *self.params}
        taken |= {one.get_key_element() for one in parser.parse_overrides(own)}
        if clash := sorted(given & taken):
            raise ValueError(
                f"{', '.join(clash)} is the study's own: change it in its YAML (a copy of "
                "conf/train/study/NAME.yaml in a folder of yours, --config-dir)"
            )
        words = [*self.design.common, *arguments, *own]
        grids, combinations = self.split(words, self.params)
        if len(combinations) > 1:
            raise ValueError(
                f"the arm {arm} sweeps what is no axis of hydra.sweeper.tuning.grid; make an arm "
                "of each"
            )
        (words,) = combinations
        words = [word for word in words if word.partition("=")[0] != "study"]
        if self.config_of(words).recipe.stream is None:
            grids.pop(MIXING, None)
        return words, Grid(grids)

    def check_shared_optima(self) -> None:
        """Raise ValueError where an arm cannot take another's optimum as it is."""
        parser = OverridesParser.create(config_loader=self.loader)
        for name, arm in self.design.arms.items():
            if arm.optimum_of is None:
                continue
            own = {one.get_key_element() for one in parser.parse_overrides(arm.overrides)}
            axes, known = self.arms[name][1].axes, self.arms[arm.optimum_of][1].axes
            if clash := sorted(own & axes.keys()) or sorted(axes.keys() ^ known.keys()):
                raise ValueError(
                    f"the arm {name} takes the optimum of {arm.optimum_of} and cannot differ from "
                    f"it in {', '.join(clash)}: leave optimum_of out, so that it is tuned itself"
                )

    def at_size(self, arm: str, size: float) -> list[str]:
        """Overrides of an arm at a size of corpus."""
        words, _ = self.arms[arm]
        return [*words, f"data.share={size!r}"]

    def config_of(self, overrides: list[str]) -> TrainConfig:
        """The config of one run."""
        config = OmegaConf.to_object(self.compose(overrides))
        assert isinstance(config, TrainConfig)
        return config

    def empty_record(self) -> Record:
        """What is known of the study before its first run."""
        design, readings = self.design, self.plan[0].config.readings
        largest = {planned.arm: planned for planned in self.plan}
        corpus: dict[str, str] = {}
        for planned in self.plan:
            corpus |= read_inputs(planned.config)
        return Record(
            question=design.question,
            reference=design.reference,
            arms={arm: describe_arm(planned.config) for arm, planned in largest.items()},
            contexts={arm: one.config.data.context_length for arm, one in largest.items()},
            sizes=sorted(design.sizes),
            seeds=list(design.seeds),
            planned=sum(len(pairs) for _, pairs in design.finals()),
            readings=[reading.name for reading in readings],
            corpus=dict(sorted(corpus.items())),
            optimum_of={arm: one.optimum_of for arm, one in design.arms.items() if one.optimum_of},
        )

    def tune(self) -> dict[tuple[str, float], list[str]]:
        """Search after search, each from the optimum of the size before; returns the optima."""
        optima: dict[tuple[str, float], list[str]] = {}
        before: dict[str, list[str]] = {}
        for _, pairs in self.design.searches():
            studies = []
            for arm, size in pairs:
                logger.info(f"study: {arm}, size {size_text(size)}")
                seed = self.design.tuning.seed
                words = [*self.at_size(arm, size), *seeded(seed), *before.get(arm, [])]
                studies.append(self.study(words, self.arms[arm][1], self.design.tuning.runs))
            for (arm, size), certificate in zip(pairs, self.search(studies), strict=True):
                optimum = certificate["optimum"]
                before[arm] = [f"{axis}={value!r}" for axis, value in optimum.items()]
                optima[arm, size] = before[arm]
                self.record.searches.append(Search(arm, size, certificate))
            self.record.write(self.folder)
        return optima

    def train(
        self, seed: int, pairs: list[tuple[str, float]], optima: dict[tuple[str, float], list[str]]
    ) -> None:
        """The final runs of one seed; what has ended is in study.json, whatever happens."""
        jobs = []
        for arm, size in pairs:
            optimum = optima[self.design.tuned_for(arm, size)]
            jobs.append([*self.at_size(arm, size), *optimum, *seeded(seed)])
        try:
            self.launch([job for job in jobs if self.outcome(job) is None])
        finally:
            for (arm, size), job in zip(pairs, jobs, strict=True):
                if (point := self.point(arm, size, job)) is not None:
                    self.record.points.append(point)
            self.record.write(self.folder)

    def point(self, arm: str, size: float, job: list[str]) -> Point | None:
        """A final run that has ended with a loss."""
        loss = self.outcome(job)
        if loss is None:
            return None
        config = self.config_of(job)
        folder = run_dir_of(config)
        if math.isinf(loss):
            logger.warning(f"{folder} diverged: its seed is left out of the answer")
            return None
        return point_of(arm, size, config, folder)

    def answer(self) -> str:
        """What the study asks."""
        from trainer.study.comparison.answer import answer_question
        from trainer.study.report import answer_data_efficiency

        if arms_of(self.design.question) is None:
            return answer_data_efficiency(self.folder)
        return answer_question(self.record, self.design.question)


def seeded(seed: int) -> list[str]:
    """Initial weights and order of the documents both follow the seed."""
    return [f"seed={seed}", f"data.order_seed={seed}"]
