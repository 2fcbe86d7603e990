"""What a study will cost, before it starts: runs, steps, tokens, FLOPs, time where it is known."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from trainer.config.estimate import DEVICES
from trainer.config.schema import TrainConfig, load_config
from trainer.data.format import BY_LOSS
from trainer.estimate import Work, chosen_mfu, work_of
from trainer.files import optional, read_sealed
from trainer.run.inputs import stream_path
from trainer.study.comparison.design import StudyDesign, size_text
from trainer.study.star_search import Grid, Place

UNEQUAL = 0.01  # of the tokens a step: what arms may differ by and still be compared


@dataclass(frozen=True)
class Planned:
    """An arm at a size: the config it starts from, what that computes, the grid of its search."""

    arm: str
    size: float
    config: TrainConfig
    work: Work
    grid: Grid | None  # None: it is not tuned here

    def factor(self, place: Place) -> float:
        """Work at a place of the grid over the work at the config: tokens are E R / (1 - w)."""
        assert self.grid is not None
        values, recipe = self.grid.values(place), self.config.recipe
        epochs = values.get("recipe.epochs", recipe.epochs)
        fraction = values.get("recipe.mixing_fraction", recipe.mixing_fraction)
        return epochs / recipe.epochs * (1 - recipe.mixing_fraction) / (1 - fraction)

    def first_star(self) -> list[float]:
        """Factors of the runs of a search that never moves; none where nothing is tuned."""
        if self.grid is None:
            return []
        axes = self.grid.axes
        centre = self.grid.nearest({axis: value_of(self.config, axis) for axis in axes})
        return [self.factor(place) for place in (centre, *self.grid.neighbours(centre))]

    @property
    def uncut(self) -> float:
        """Share of the megadocs (of the documents, where there are none) that fit the context."""
        lengths = self.work.streams[-1].lengths
        return float((lengths <= self.config.data.context_length).mean())


def value_of(config: Any, key: str) -> float:
    """The number at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return float(config)


def missing_streams(configs: Sequence[TrainConfig]) -> list[str]:
    """Streams that runs need and that are not there, each once."""
    missing = {}
    for config in configs:
        for name in (
            config.recipe.real_stream,
            config.recipe.synthetic,
            config.data.validation,
        ):
            if name is not None and "://" not in config.data.root:
                folder = Path(stream_path(config, name))
                if not (folder / "manifest.json").exists():
                    missing[str(folder)] = generate_line(config, name)
    return [f"  {folder}: {line}" for folder, line in missing.items()]


def generate_line(config: TrainConfig, name: str) -> str:
    """The command that makes a stream."""
    recipe, root = config.recipe, config.data.root
    if name != recipe.synthetic:
        return f"python generate.py root={root} corpus=... task=corpus"
    kind, _, style = str(recipe.stream).partition("-")
    if style == BY_LOSS:
        return (
            f"python generate.py root={root} corpus=... generator=... method=rephrase "
            f"method.generations={recipe.used_generations} method.allocation=by_loss "
            "method.losses=... (docs/generate.md)"
        )
    known = f"python generate.py root={root} corpus=... generator=..."
    if kind == "latent":
        return f"{known} method=latent method.generations={recipe.used_generations}"
    line = (
        f"{known} method=rephrase method.generations={recipe.used_generations} "
        f"streams.generations=[{recipe.used_generations}]"
    )
    return f"{line} (of the styles {style})" if style else line


def plan_of(
    design: StudyDesign, configs: Mapping[tuple[str, float], tuple[TrainConfig, Grid]]
) -> list[Planned]:
    """Every arm at every size, opened and planned.

    Raises:
        FileNotFoundError: streams are missing; names the commands that make them.
        ValueError: arms whose batches differ in size cannot be compared.
    """
    if missing := missing_streams([config for config, _ in configs.values()]):
        raise FileNotFoundError(
            "the study needs streams that are not there:\n" + "\n".join(missing)
        )
    found = [
        Planned(arm, size, config, work_of(config), grid if tuned(design, arm, size) else None)
        for (arm, size), (config, grid) in configs.items()
    ]
    first = found[0]
    for other in found:
        ours, theirs = first.work.step_tokens, other.work.step_tokens
        if abs(theirs - ours) > UNEQUAL * ours:
            raise ValueError(
                f"the arm {other.arm} reads {theirs:,} tokens a step, {first.arm} {ours:,}: arms "
                "are compared at the same number; set data.batch_size times data.context_length so"
            )
        if other.config.readings != first.config.readings:
            raise ValueError(
                f"the arms {first.arm} and {other.arm} read the held-out documents differently: "
                "set evaluation.context_lengths and evaluation.masks, the same for both"
            )
    return found


def tuned(design: StudyDesign, arm: str, size: float) -> bool:
    return size in design.tuned_sizes(arm)


@dataclass(frozen=True)
class Amount:
    """Runs and what they compute together."""

    runs: float = 0
    steps: float = 0
    tokens: float = 0
    flops: float = 0
    seconds: float | None = 0.0  # of one process; None: not known

    def __add__(self, other: Amount) -> Amount:
        known = self.seconds is not None and other.seconds is not None
        return Amount(
            self.runs + other.runs,
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.flops + other.flops,
            (self.seconds or 0) + (other.seconds or 0) if known else None,
        )

    def cells(self) -> list[str]:
        hours = "-" if self.seconds is None else f"{self.seconds / 3600:,.2f}"
        counts = [f"{count:,.0f}" for count in (self.runs, self.steps, self.tokens)]
        return [*counts, f"{self.flops:.2e}", hours]


def amount(planned: Planned, factors: Sequence[float], speed: Speed) -> Amount:
    """Runs at places whose work is these multiples of the config's."""
    work, total = planned.work, sum(factors)
    flops = work.flops * total
    return Amount(
        len(factors),
        work.steps * total,
        work.tokens * total,
        flops,
        speed.seconds(planned.arm, flops),
    )


@dataclass(frozen=True)
class Speed:
    """FLOP/s of a process, by arm where runs of it have ended, and where that is from."""

    by_arm: Mapping[str, float]
    otherwise: float | None
    source: str

    def seconds(self, arm: str, flops: float) -> float | None:
        """Of work of an arm; None where nothing is known."""
        rate = self.by_arm.get(arm, self.otherwise)
        return None if rate is None else flops / rate


def measured_speed(plan: Sequence[Planned], points: Sequence[tuple[str, float, float]]) -> Speed:
    """From runs that have ended, else from the GPU's estimate.

    Args:
        plan: of the study.
        points: arm, tokens trained and seconds of runs that have ended.
    """
    intensity = {one.arm: one.work.flops / one.work.tokens for one in plan}
    rates: dict[str, list[float]] = {}
    for arm, tokens, seconds in points:
        if arm in intensity and seconds > 0:
            rates.setdefault(arm, []).append(intensity[arm] * tokens / seconds)
    if rates:
        by_arm = {arm: statistics.median(found) for arm, found in rates.items()}
        rest = statistics.median(by_arm.values())
        return Speed(by_arm, rest, f"measured in {len(points)} runs that have ended")
    config = plan[0].config
    import torch  # half a second that a study with finished runs need not wait for

    if config.runtime.device == "cpu" or not torch.cuda.is_available():
        return Speed({}, None, "not known before the first run has ended here")
    mfu, source = chosen_mfu(config)
    device = config.estimate.device
    return Speed({}, DEVICES[device][1] * mfu, f"{device} at {mfu:.0%} MFU ({source})")


def finished_points(output: Path, plan: Sequence[Planned]) -> Iterator[tuple[str, float, float]]:
    """Arm, tokens and seconds of the runs that have ended below a folder."""
    arms = {reading_of(planned.config): planned.arm for planned in plan}
    for path in sorted(output.glob("*/result.json")):
        if (result := optional(path, read_sealed)) is None:
            continue
        arm = arms.get(reading_of(load_config(path.parent / "config.yaml")))
        if arm is not None:
            yield arm, sum(result["tokens_seen"].values()), result["seconds"]


def reading_of(config: TrainConfig) -> tuple[object, ...]:
    """What tells the speed of an arm from another's: stream, context, mask, packing."""
    data = config.data
    return (config.recipe.synthetic, data.context_length, data.mask, data.packing)


def describe_cost(design: StudyDesign, plan: Sequence[Planned], speed: Speed) -> str:
    """The table that is printed before anything is trained."""
    rows = []
    least, most = Amount(), Amount()
    for arm in design.arms:
        own = [planned for planned in plan if planned.arm == arm]
        search = finals = limit = Amount()
        for planned in own:
            star = planned.first_star()[: design.tuning.runs]
            search += amount(planned, star, speed)
            if star:
                mean = sum(star) / len(star)
                limit += amount(planned, [mean] * design.tuning.runs, speed)
            finals += amount(planned, [1.0] * len(design.seeds), speed)
        rows += [[arm, "search, first star", *search.cells()], ["", "final", *finals.cells()]]
        least += search + finals
        most += limit + finals
    rows += [["all", "if no search moves", *least.cells()]]
    rows += [["", "if each takes all its runs", *most.cells()]]
    head = ["arm", "", "runs", "steps", "tokens", "FLOPs", "process-hours"]
    table = tabulate(rows, head, "plain", disable_numparse=True, colalign=["left", "left"])
    lines = [describe_corpus(design, plan), table, f"time: {speed.source}"]
    lines.append(
        f"{design.tuning.runs} runs at most for each search, and finals as long as the configs the "
        "searches start from; what the searches find changes both"
    )
    return "\n".join(lines)


def describe_corpus(design: StudyDesign, plan: Sequence[Planned]) -> str:
    """Real tokens of every size, and how much of each arm's megadocs its context holds whole."""
    real = {planned.size: planned.work.streams[0].manifest for planned in plan}
    sizes = ", ".join(
        f"{size_text(size)} = {real[size].tokens:,} tokens of {real[size].samples:,} documents"
        for size in sorted(real)
    )
    lines = [f"sizes: {sizes}"]
    for arm in design.arms:
        planned = next(one for one in reversed(plan) if one.arm == arm)
        config, stream = planned.config, planned.work.streams[-1].manifest
        lines.append(
            f"{arm}: {stream.name} ({stream.tokens:,} tokens), mask {config.data.mask.value}, "
            f"{config.data.batch_size} windows of {config.data.context_length:,} tokens a step; "
            f"{planned.uncut:.1%} of its documents fit into a window, windows "
            f"{min(planned.work.plan.density()):.1%} full"
        )
    return "\n".join(lines)
