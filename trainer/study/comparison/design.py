"""What a study is: arms, sizes of corpus, seeds, what is tuned; its YAML fills this.

An arm is a list of Hydra overrides, what one would type after ``train.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config.fields import check_bounds, group, setting

MIXING = "recipe.mixing_fraction"  # an axis that only arms with a synthetic stream have
QUESTION = "_against_"  # between the two arms of a question


@dataclass
class Arm:
    """One way of training that is compared with the others."""

    overrides: list[str] = setting(
        [],
        "What makes the arm, as on the command line: [recipe=stitched,data.mask=megadoc]. Several "
        "values of an axis of the grid (recipe.epochs=8,16,32) are the arm's own grid.",
    )
    sizes: list[float] = setting([], "Its sizes, where it has not all of them.")
    optimum_of: str | None = setting(
        None, "Arm whose optimum it takes, instead of a search of its own."
    )


@dataclass
class Tuning:
    """The star search that gives every arm its own optimum."""

    sizes: list[float] = setting(
        [], "Where every arm is tuned, in this order; other sizes take over from the nearest."
    )
    seed: int = setting(
        0, "Seed of the search; none of seeds, whose losses are then not those it chose by."
    )
    runs: int = setting(
        24, "Runs that each search may take, the same for every arm.", unit="runs", at_least=1
    )
    grid: dict[str, Any] = setting({}, "Axis -> its values, as of sweep=star.")


@dataclass
class StudyDesign:
    """A study."""

    question: str = setting(
        "data_efficiency",
        "What the report answers at the end: data_efficiency, or ARM_against_ARM.",
    )
    reference: str = setting("real", "Arm whose losses over the sizes data efficiency is read off.")
    common: list[str] = setting(
        [], "Overrides of all runs, before those of the command line, which win, and of the arms."
    )
    arms: dict[str, Arm] = setting({}, "Name -> arm.")
    sizes: list[float] = setting(
        [1.0], "Sizes of corpus: shares of the training documents (data.share).", above=0, at_most=1
    )
    seeds: list[int] = setting(
        [1, 2, 3, 4], "Of the final runs of every arm at every size: seed and data.order_seed."
    )
    tuning: Tuning = group(Tuning, "The star search that gives every arm its own optimum.")

    def check(self) -> None:
        """Raise ValueError for a study that cannot be run."""
        check_bounds(self, "hydra.sweeper.")
        if not self.arms:
            raise ValueError("hydra.sweeper.arms is empty: name what the study compares")
        known = set(self.sizes)
        for name, sizes in (
            ("tuning.sizes", self.tuning.sizes),
            *((f"arms.{name}.sizes", arm.sizes) for name, arm in self.arms.items()),
        ):
            if others := set(sizes) - known:
                raise ValueError(
                    f"hydra.sweeper.{name} holds {sorted(others)}, which hydra.sweeper.sizes="
                    f"{self.sizes} does not"
                )
        for name, values in (("sizes", self.sizes), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"hydra.sweeper.{name}={values} must be different values")
        if not self.tuning.sizes or not self.tuning.grid:
            raise ValueError(
                "hydra.sweeper.tuning needs sizes and a grid: an arm that is not tuned cannot be "
                "compared"
            )
        if self.tuning.seed in self.seeds:
            raise ValueError(
                f"hydra.sweeper.tuning.seed={self.tuning.seed} is one of seeds={self.seeds}: the "
                "luckiest run of a search would count among the final ones"
            )
        for name, arm in self.arms.items():
            source = self.arms.get(arm.optimum_of or name)
            if source is None or (source is not arm and source.optimum_of is not None):
                raise ValueError(
                    f"hydra.sweeper.arms.{name}.optimum_of={arm.optimum_of} must be an arm with a "
                    f"search of its own: {', '.join(self.searched)}"
                )
        for name in (self.reference, *(arms_of(self.question) or ())):
            if name not in self.arms:
                raise ValueError(
                    f"hydra.sweeper.question={self.question} and reference={self.reference} name "
                    f"arms; {name!r} is none of {', '.join(self.arms)}"
                )

    @property
    def searched(self) -> list[str]:
        """Arms with a search of their own."""
        return [name for name, arm in self.arms.items() if arm.optimum_of is None]

    def sizes_of(self, arm: str) -> list[float]:
        """Sizes an arm is trained at, ascending."""
        return sorted(self.arms[arm].sizes or self.sizes)

    def tuned_sizes(self, arm: str) -> list[float]:
        """Sizes an arm is tuned at, in the order of the searches; none with another's optimum."""
        if self.arms[arm].optimum_of is not None:
            return []
        wanted = [size for size in self.tuning.sizes if size in self.sizes_of(arm)]
        return wanted or self.sizes_of(arm)[-1:]

    def searches(self) -> Iterator[tuple[int, list[tuple[str, float]]]]:
        """Round after round of searches that do not wait for each other: (arm, size) pairs."""
        sizes = {arm: self.tuned_sizes(arm) for arm in self.searched}
        for place in range(max(map(len, sizes.values()))):
            yield place, [(arm, own[place]) for arm, own in sizes.items() if place < len(own)]

    def finals(self) -> Iterator[tuple[int, list[tuple[str, float]]]]:
        """Seed after seed, all arms at all sizes: after each the picture is complete."""
        for seed in self.seeds:
            yield seed, [(arm, size) for arm in self.arms for size in self.sizes_of(arm)]

    def tuned_for(self, arm: str, size: float) -> tuple[str, float]:
        """The search whose optimum an arm takes at ``size``: the nearest, of two the larger."""
        source = self.arms[arm].optimum_of or arm
        distances = {tuned: abs(math.log(tuned / size)) for tuned in self.tuned_sizes(source)}
        return source, min(distances, key=lambda tuned: (distances[tuned], -tuned))


def arms_of(question: str) -> tuple[str, str] | None:
    """The two arms of ``whole_against_cut``; None where the question is another one."""
    ours, found, theirs = question.partition(QUESTION)
    return (ours, theirs) if found and ours and theirs else None


def size_text(size: float) -> str:
    """``1/8`` for 0.125, ``all`` for 1."""
    if size == 1:
        return "all"
    whole = round(1 / size)
    return f"1/{whole}" if math.isclose(whole * size, 1) else f"{size:g}"
