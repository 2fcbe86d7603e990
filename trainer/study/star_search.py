"""The paper's local search: a centre, one step each way on every axis, move to the best.

Kim et al. 2509.14786 call a point certified when all its neighbours were measured and none is
lower. Pure logic: what to train next, where to move, what the end proves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Place = tuple[int, ...]  # index on every axis


@dataclass(frozen=True)
class Grid:
    """The values each axis may take, ascending.

    Raises:
        ValueError: no axis, or an axis with repeated values.
    """

    axes: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        if not self.axes:
            raise ValueError("a star search needs at least one axis in hydra.sweeper.params")
        for name, values in self.axes.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"the axis {name}={list(values)} needs distinct values")
        ordered = {name: sorted(values) for name, values in self.axes.items()}
        object.__setattr__(self, "axes", ordered)

    def nearest(self, values: Mapping[str, float]) -> Place:
        """Index on every axis of what lies nearest to ``values``."""
        return tuple(
            min(range(len(grid)), key=lambda index: abs(grid[index] - values[name]))
            for name, grid in self.axes.items()
        )

    def values(self, place: Place) -> dict[str, float]:
        return {
            name: grid[index] for (name, grid), index in zip(self.axes.items(), place, strict=True)
        }

    def neighbours(self, place: Place) -> list[Place]:
        """One step down and up on each axis, as far as the grid goes."""
        found = []
        for axis, grid in enumerate(self.axes.values()):
            for step in (-1, 1):
                index = place[axis] + step
                if 0 <= index < len(grid):
                    found.append((*place[:axis], index, *place[axis + 1 :]))
        return found


class StarSearch:
    """One search from one centre; ask :attr:`wanted`, train, :meth:`record`, until it is empty.

    Args:
        grid: of the axes.
        centre: where it starts.
        limit: runs it may take; None: as many as it needs. Searches that are compared have one.
    """

    def __init__(self, grid: Grid, centre: Place, limit: int | None = None) -> None:
        self.grid = grid
        self.centre = centre
        self.limit = limit
        self.losses: dict[Place, float] = {}
        self.path = [centre]

    @property
    def wanted(self) -> list[Place]:
        """Places to train next; empty when the search is over."""
        left = None if self.limit is None else max(0, self.limit - len(self.losses))
        return self.missing[:left]

    @property
    def missing(self) -> list[Place]:
        """Places of the current star that were not trained yet."""
        star = [self.centre, *self.grid.neighbours(self.centre)]
        return [place for place in star if place not in self.losses]

    def record(self, losses: Mapping[Place, float | None]) -> None:
        """Add results (infinite: diverged) and move while the centre of a full star is beaten.

        Raises:
            ValueError: a loss is missing or NaN: such a run was stopped or is broken.
        """
        for place, loss in losses.items():
            if loss is None or math.isnan(loss):
                raise ValueError(f"the run at {self.grid.values(place)} has the loss {loss}")
            self.losses[place] = loss
        while not self.missing:
            best = min(self.grid.neighbours(self.centre), key=self.losses.__getitem__, default=None)
            if best is None or self.losses[best] >= self.losses[self.centre]:
                return
            self.centre = best
            self.path.append(best)

    def certificate(self) -> Certificate:
        """What the finished search proves; less where its limit ended it.

        Raises:
            ValueError: the search is not over, or nothing but diverged runs was found.
        """
        if self.wanted:
            raise ValueError(f"{len(self.wanted)} places of the star are not trained yet")
        if self.missing:  # the limit came first: the best so far
            best = min(self.losses, key=self.losses.__getitem__)
            self.path += [best] if best != self.centre else []
            self.centre = best
        loss = self.losses[self.centre]
        if math.isinf(loss):
            raise ValueError(
                f"every run around {self.grid.values(self.centre)} diverged; start elsewhere, "
                "with a lower learning rate"
            )
        centre = self.grid.values(self.centre)
        neighbours, edges = [], []
        for place in self.grid.neighbours(self.centre):
            if place not in self.losses:
                continue
            axis = next(
                name for name, value in self.grid.values(place).items() if value != centre[name]
            )
            value = self.grid.values(place)[axis]
            neighbours.append(Neighbour(axis, value, self.losses[place], self.losses[place] - loss))
        for name, index in zip(self.grid.axes, self.centre, strict=True):
            if index == 0:
                edges.append(Edge(name, centre[name], "smallest"))
            if index == len(self.grid.axes[name]) - 1:
                edges.append(Edge(name, centre[name], "largest"))
        path = [self.grid.values(place) for place in self.path]
        return Certificate(
            centre, loss, neighbours, edges, path, len(self.losses), len(self.missing)
        )


@dataclass(frozen=True)
class Neighbour:
    """A run one step away on one axis; ``margin`` is how much worse it is, nats per token."""

    axis: str
    value: float
    loss: float
    margin: float


@dataclass(frozen=True)
class Edge:
    """An axis whose optimum is the end of its grid, so a better value may lie outside."""

    axis: str
    value: float
    end: str  # smallest or largest


@dataclass(frozen=True)
class Certificate:
    """The optimum, the neighbours it beats and by how much, the axes that end there."""

    optimum: dict[str, float]
    loss: float
    neighbours: list[Neighbour]
    edges: list[Edge]
    path: list[dict[str, float]]
    runs: int
    unmeasured: int = 0  # neighbours that the limit left out: with any it proves nothing

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a diverged neighbour has the loss null."""
        content = asdict(self)
        for neighbour in content["neighbours"]:
            if math.isinf(neighbour["loss"]):
                neighbour["loss"] = neighbour["margin"] = None
        return content

    def __str__(self) -> str:
        where = ", ".join(f"{name}={value:g}" for name, value in self.optimum.items())
        lines = [
            f"optimum after {self.runs} runs and {len(self.path) - 1} moves: {where}",
            f"loss {self.loss:.4f}; it beats",
        ]
        for other in self.neighbours:
            result = (
                "diverged"
                if math.isinf(other.loss)
                else f"{other.loss:.4f} (worse by {other.margin:.4f})"
            )
            lines.append(f"  {other.axis}={other.value:g}: {result}")
        if self.unmeasured:
            lines.append(
                f"  not certified: its limit of runs left {self.unmeasured} neighbours unmeasured"
            )
        for edge in self.edges:
            lines.append(
                f"  {edge.axis}={edge.value:g} is the {edge.end} of its grid: a better value may "
                "lie beyond"
            )
        return "\n".join(lines)
