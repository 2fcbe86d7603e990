"""``study.json``: what a study found, all that its answer needs, whole in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.schema import TrainConfig
from trainer.files import SEAL, read_sealed, write_sealed

NAME = "study.json"
FORMAT = "megadocs study 1"  # other study.json are older, of a study by hand


@dataclass(frozen=True)
class Point:
    """A final run: one arm, one size, one seed."""

    arm: str
    size: float
    seed: int
    run: str  # its folder
    real_tokens: int  # unique
    tokens: int  # trained on
    steps: int
    seconds: float
    losses: dict[str, float]  # reading -> nats per token over all held-out documents
    by_position: dict[str, dict[str, float]]  # reading -> first position -> nats per token


@dataclass(frozen=True)
class Search:
    """What the star search of an arm at a size found."""

    arm: str
    size: float
    certificate: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A study as far as it has come."""

    question: str
    reference: str
    arms: dict[str, str]  # name -> how it is trained, in words
    contexts: dict[str, int]  # name -> tokens of the windows it is trained with
    sizes: list[float]
    seeds: list[int]
    planned: int  # final runs when it is done
    readings: list[str]  # how held-out documents are read, the one that was tuned for first
    corpus: dict[str, str]  # stream -> content hash
    searches: list[Search] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    # arm -> the arm whose optimum it takes, instead of a search of its own
    optimum_of: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Put it into the study's folder; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / NAME, {"format": FORMAT, **asdict(self)})
        return folder / NAME

    def losses(self, arm: str, size: float, reading: str, seeds: Sequence[int]) -> list[float]:
        """One loss a seed, in the order of ``seeds``, which all have run."""
        found = {
            point.seed: point.losses[reading]
            for point in self.points
            if (point.arm, point.size) == (arm, size)
        }
        return [found[seed] for seed in seeds]

    def seeds_of(self, arm: str, size: float) -> set[int]:
        """Seeds whose final run of an arm at a size has ended."""
        return {point.seed for point in self.points if (point.arm, point.size) == (arm, size)}

    def sizes_of(self, arm: str) -> list[float]:
        """Sizes an arm has final runs at, ascending."""
        return sorted({point.size for point in self.points if point.arm == arm})

    def real_tokens(self, size: float) -> int:
        """Unique real tokens at a size.

        Raises:
            KeyError: nothing has ended there.
        """
        for point in self.points:
            if point.size == size:
                return point.real_tokens
        raise KeyError(size)


def read_record(folder: Path) -> Record:
    """The study below a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, or it is damaged.
    """
    found = [
        (path, content)
        for path in sorted(folder.rglob(NAME))
        if (content := read_sealed(path)).get("format") == FORMAT
    ]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no study; python train.py -m study=whole_against_cut "
            f"output={folder} runs one"
        )
    if len(found) > 1:
        names = ", ".join(str(path.parent) for path, _ in found)
        raise ValueError(f"{folder} holds several studies: ask for one of runs={names}")
    content = found[0][1]
    searches = [Search(**one) for one in content["searches"]]
    points = [Point(**one) for one in content["points"]]
    parsed = ("searches", "points", "format", SEAL)
    plain = {name: value for name, value in content.items() if name not in parsed}
    return Record(**plain, searches=searches, points=points)


def point_of(arm: str, size: float, config: TrainConfig, folder: Path) -> Point:
    """A final run that has ended, from its result."""
    result = read_sealed(folder / "result.json")
    real = config.recipe.real_stream
    readings = result.get("readings") or {config.readings[0].name: result}
    return Point(
        arm,
        size,
        config.seed,
        folder.name,
        round(result["tokens_seen"][real] / result["epochs_seen"][real]),
        sum(result["tokens_seen"].values()),
        result["steps"],
        round(result["seconds"], 1),
        {name: one["loss"]["iid"] for name, one in readings.items()},
        {name: one["loss_by_position"] for name, one in readings.items()},
    )


def describe_arm(config: TrainConfig) -> str:
    """How an arm is trained, in words."""
    data = config.data
    kind = config.recipe.synthetic or "real documents only"
    return (
        f"{kind}, windows of {data.context_length:,} tokens, mask {data.mask.value}, packing "
        f"{data.packing.value}"
    )
