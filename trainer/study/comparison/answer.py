"""The answer to ``question=whole_against_cut``: a sentence with an interval, what it rests on.

Differences are paired by seed (``paired.py``); a seed counts where both arms have ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.study.comparison.design import arms_of, size_text
from trainer.study.comparison.paired import (
    MOST_SEEDS,
    Estimate,
    data_efficiency,
    estimate_mean,
    paired_difference,
)
from trainer.study.comparison.record import Record


def answer_question(record: Record, question: str) -> str:
    """The whole answer, as text.

    Raises:
        ValueError: the question is no ``ARM_against_ARM`` of this study, or no seed has both.
    """
    pair = arms_of(question)
    if pair is None or not set(pair) <= record.arms.keys():
        raise ValueError(
            f"question={question} must be data_efficiency or A_against_B with two arms of the "
            f"study: {', '.join(record.arms)}"
        )
    return "\n".join(lines_of(record, *pair))


def lines_of(record: Record, ours: str, theirs: str) -> Iterator[str]:
    """The answer line by line, the sentence first."""
    shared = {size: common_seeds(record, (ours, theirs), size) for size in record.sizes}
    sizes = [size for size, seeds in shared.items() if seeds]
    if not sizes:
        raise ValueError(
            f"no size has a final run of both {ours} and {theirs} with one seed yet; the same "
            "train.py -m study=... goes on"
        )
    own = record.readings[0]
    found = {size: difference(record, ours, theirs, size, own) for size in sizes}
    largest = sizes[-1]
    headline = found[largest]
    yield sentence(record, ours, theirs, largest, headline)
    yield f"  {ours}: {record.arms[ours]}"
    yield f"  {theirs}: {record.arms[theirs]}"
    yield f"{ours} minus {theirs}, nats per token, held-out documents read as {own}:"
    for size in sizes:
        yield f"  {tokens_text(record, size)}: {estimate_text(found[size])}"
    if len(sizes) > 1 and (over_sizes := mean_over_sizes(record, ours, theirs, sizes)):
        yield f"  mean of these sizes: {estimate_text(over_sizes)}"
    for reading in record.readings[1:]:
        other = difference(record, ours, theirs, largest, reading)
        yield f"  {tokens_text(record, largest)}, read as {reading}: {estimate_text(other)}"
    yield from at_own_contexts(record, ours, theirs, largest)
    yield from by_position(record, ours, theirs, largest)
    yield from efficiencies(record)
    yield from power(record, headline, largest)
    yield from untuned(record, (ours, theirs))


def common_seeds(record: Record, arms: Sequence[str], size: float) -> list[int]:
    """Seeds whose final runs of all these arms have ended at a size."""
    ended = set.intersection(*(record.seeds_of(arm, size) for arm in arms))
    return [seed for seed in record.seeds if seed in ended]


def difference(
    record: Record, ours: str, theirs: str, size: float, reading: str, other: str | None = None
) -> Estimate:
    """Paired by seed, in nats per token; negative where ``ours`` is better.

    Args:
        record: of the study.
        ours, theirs: arms.
        size: of the corpus.
        reading: how held-out documents are read.
        other: how for ``theirs``, where it is not the same.
    """
    seeds = common_seeds(record, (ours, theirs), size)
    return paired_difference(
        record.losses(ours, size, reading, seeds),
        record.losses(theirs, size, other or reading, seeds),
    )


def at_own_contexts(record: Record, ours: str, theirs: str, size: float) -> Iterator[str]:
    """Each arm read in windows as long as it was trained with, where both were.

    One mask for both, so the same tokens are scored; what the longer window adds is then counted.
    """
    for mask in dict.fromkeys(name.partition("-")[2] for name in record.readings):
        own, other = (f"{record.contexts[arm]}-{mask}" for arm in (ours, theirs))
        if own != other and {own, other} <= set(record.readings):
            found = difference(record, ours, theirs, size, own, other)
            yield (
                f"  {tokens_text(record, size)}, each in windows as long as in training ({own}, "
                f"{other}): {estimate_text(found)}"
            )


def mean_over_sizes(
    record: Record, ours: str, theirs: str, sizes: Sequence[float]
) -> Estimate | None:
    """A seed's differences averaged over the sizes, then over seeds that have them all."""
    seeds = set.intersection(*(set(common_seeds(record, (ours, theirs), one)) for one in sizes))
    ordered = [seed for seed in record.seeds if seed in seeds]
    if not ordered:
        return None
    columns = [
        [
            one - other
            for one, other in zip(
                record.losses(ours, size, record.readings[0], ordered),
                record.losses(theirs, size, record.readings[0], ordered),
                strict=True,
            )
        ]
        for size in sizes
    ]
    return estimate_mean([sum(row) / len(row) for row in zip(*columns, strict=True)])


def sentence(record: Record, ours: str, theirs: str, size: float, found: Estimate) -> str:
    """The answer itself."""
    where = f"at {tokens_text(record, size)}"
    if found.seeds == 1:
        return (
            f"Not known yet: with one seed {ours} differs from {theirs} by {found.mean:+.4f} nats "
            f"{where}, and one seed has no interval."
        )
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}, {found.seeds} paired seeds"
    if not found.excludes_zero:
        return (
            f"Undecided: {ours} minus {theirs} is {found.mean:+.4f} nats {where} ({interval}), "
            f"where {found.detectable:.4f} would have been seen with 80 % power."
        )
    better, worse = (ours, theirs) if found.mean < 0 else (theirs, ours)
    return (
        f"{better} is better than {worse} by {abs(found.mean):.4f} nats {where} "
        f"({ours} minus {theirs}: {interval})."
    )


def tokens_text(record: Record, size: float) -> str:
    return f"{record.real_tokens(size):,} real tokens ({size_text(size)})"


def estimate_text(found: Estimate) -> str:
    """A difference with its interval."""
    if found.seeds == 1:
        return f"{found.mean:+.4f} (1 seed)"
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}, {found.seeds} seeds)"


def by_position(record: Record, ours: str, theirs: str, size: float) -> Iterator[str]:
    """Where in a document the arms differ, in the longest reading."""
    reading = max(record.readings, key=lambda name: int(name.partition("-")[0]))
    seeds = common_seeds(record, (ours, theirs), size)
    tables: dict[str, list[dict[str, float]]] = {}
    for arm in (ours, theirs):
        points = {
            point.seed: point for point in record.points if (point.arm, point.size) == (arm, size)
        }
        tables[arm] = [points[seed].by_position[reading] for seed in seeds]
    starts = sorted(
        set.intersection(*(set(one) for own in tables.values() for one in own)), key=int
    )
    parts = []
    for start in starts:
        found = paired_difference(
            [one[start] for one in tables[ours]], [one[start] for one in tables[theirs]]
        )
        if int(start) >= 16:
            parts.append(f"{int(start):,} {found.mean:+.3f}")
    if parts:
        yield f"  by first position in the document, read as {reading}: {', '.join(parts)}"


def efficiencies(record: Record) -> Iterator[str]:
    """How many times more real data the reference needs, where that lies inside its sizes."""
    reference, reading = record.reference, record.readings[0]
    sizes = record.sizes_of(reference)
    if len(sizes) < 2:
        return
    yield (
        f"data efficiency, read off {reference} between its {len(sizes)} sizes, the same seeds, "
        "nothing extrapolated:"
    )
    for arm in record.arms:
        if arm == reference:
            continue
        outside = []
        for size in record.sizes_of(arm):
            seeds = [
                seed
                for seed in common_seeds(record, (arm, reference), size)
                if all(seed in record.seeds_of(reference, other) for other in sizes)
            ]
            if not seeds:
                continue
            found = data_efficiency(
                record.losses(arm, size, reading, seeds),
                record.real_tokens(size),
                [record.real_tokens(other) for other in sizes],
                [record.losses(reference, other, reading, seeds) for other in sizes],
            )
            if found is None:
                outside.append(size_text(size))
                continue
            interval = f" ({found.low:.2f} to {found.high:.2f})" if found.seeds > 1 else ""
            yield f"  {arm} at {tokens_text(record, size)}: {found.mean:.2f} times{interval}"
        if outside:
            yield f"  {arm} at {', '.join(outside)}: outside the sizes of {reference}"


def untuned(record: Record, arms: Sequence[str]) -> Iterator[str]:
    """Arms that another one was tuned for: what they could do is not known."""
    for arm in arms:
        if source := record.optimum_of.get(arm):
            yield f"  a search of its own for {arm}, which takes the optimum of {source}"


def power(record: Record, found: Estimate, size: float) -> Iterator[str]:
    """What could have been seen, and what would make the answer more certain."""
    if found.seeds > 1:
        yield (
            f"power: with {found.seeds} seeds whose differences spread by {found.spread:.4f}, a "
            f"true difference of {found.detectable:.4f} nats is seen with 80 % power"
        )
    yield "more certain would be:"
    if found.seeds == 1:
        yield "  a second seed: without it there is no interval"
    else:
        needed = found.seeds_for(found.half_width / 2)
        wanted = f"{needed} seeds" if needed else f"more than {MOST_SEEDS:,} seeds"
        yield f"  {wanted} instead of {found.seeds} for half the interval"
    if len(record.points) < record.planned:
        left = record.planned - len(record.points)
        yield f"  the {left} of {record.planned} final runs that have not ended"
    for search in record.searches:
        where = f"{search.arm} at {size_text(search.size)}"
        if edges := search.certificate["edges"]:
            ends = ", ".join(f"{one['axis']}={one['value']:g} ({one['end']})" for one in edges)
            yield f"  a wider grid for {where}, whose optimum lies at the end of {ends}"
        if unmeasured := search.certificate["unmeasured"]:
            yield f"  more runs for the search of {where}: {unmeasured} neighbours are unmeasured"
    if len(record.sizes) < 4:
        yield f"  more sizes than {len(record.sizes)}: at least 4"
