"""Properties of the plan: coverage, mixing, resume, ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import Window, minimum_bin_slack, pack_whole
from trainer.data.plan import PART_DOCUMENTS, Plan, Source, balanced_order, rank_windows
from trainer.setup import how_to_fill

lengths_lists = st.lists(st.integers(1, 90), min_size=1, max_size=40)
packings = st.sampled_from(["whole", "stream", "windows"])


# Documents that are packed at once: all, or so few that an epoch has several parts.
parts = st.sampled_from([1 << 15, 7])


def plan_of(
    lengths: list[int], packing: str, batch: int = 2, context: int = 30, part: int = 1 << 15
) -> Plan:
    source = Source("real", np.array(lengths), 1.0)
    return Plan([source], context, batch, packing, 7, part)


def windows_of_epoch(plan: Plan, epoch: int) -> list[Window]:
    of_epoch = range(epoch * plan.parts(0), (epoch + 1) * plan.parts(0))
    packed = [plan.packed(0, part) for part in of_epoch]
    return [one.window(0, index) for one in packed for index in range(len(one.offsets) - 1)]


def tokens_of(windows: list[Window]) -> Counter[tuple[int, int]]:
    return Counter(
        (int(document), place)
        for window in windows
        for document, start, length in zip(
            window.documents, window.starts, window.lengths, strict=True
        )
        for place in range(start, start + length)
    )


@given(lengths_lists, packings, st.integers(0, 3), parts)
def test_an_epoch_holds_every_token_once(
    lengths: list[int], packing: str, epoch: int, part: int
) -> None:
    windows = windows_of_epoch(plan_of(lengths, packing, part=part), epoch)
    everything = Counter((d, p) for d, length in enumerate(lengths) for p in range(length))
    assert tokens_of(windows) == everything
    assert all(0 < window.tokens <= 30 for window in windows)


@given(lengths_lists, parts)
def test_whole_packing_cuts_only_what_is_too_long(lengths: list[int], part: int) -> None:
    windows = windows_of_epoch(plan_of(lengths, "whole", part=part), 0)
    pieces = Counter(document for window in windows for document in window.documents.tolist())
    assert pieces == {d: -(-length // 30) for d, length in enumerate(lengths)}


@settings(deadline=None)
@given(lengths_lists, packings, parts)
def test_no_document_comes_twice_before_all_came_once(
    lengths: list[int], packing: str, part: int
) -> None:
    plan = plan_of(lengths, packing, batch=1, part=part)
    per_epoch = [len(windows_of_epoch(plan, epoch)) for epoch in range(3)]
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(sum(per_epoch)):
        seen += tokens_of(plan.windows(step))
        assert max(seen.values()) - min(seen.get((d, 0), 0) for d in range(len(lengths))) <= 1
    assert set(seen.values()) == {3}
    assert plan.epochs_seen(sum(per_epoch)) == [3.0]


@settings(deadline=None, max_examples=40)
@given(lengths_lists, lengths_lists, st.floats(0.1, 0.9), packings, parts)
def test_the_share_is_exact_within_a_window_at_any_time(
    real: list[int], synthetic: list[int], fraction: float, packing: str, part: int
) -> None:
    sources = [
        Source("real", np.array(real), 1 - fraction),
        Source("synthetic", np.array(synthetic), fraction),
    ]
    plan = Plan(sources, 30, 1, packing, 1, part)
    for steps in range(60):
        seen = plan.tokens_seen(steps)
        assert abs(seen[1] - fraction * sum(seen)) <= 30


def assert_equal_batches(ours: list[Window], theirs: list[Window]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.source == other.source
        assert np.array_equal(one.documents, other.documents)
        assert np.array_equal(one.starts, other.starts)


@settings(deadline=None)
@given(lengths_lists, packings, st.integers(0, 30), parts)
def test_batch_n_is_a_function_of_the_plan_and_n_alone(
    lengths: list[int], packing: str, step: int, part: int
) -> None:
    walked, jumped = (plan_of(lengths, packing, part=part) for _ in range(2))
    for earlier in range(step):
        walked.windows(earlier)
    assert_equal_batches(walked.windows(step), jumped.windows(step))
    assert walked.hash() == jumped.hash()


@settings(deadline=None)
@given(
    st.lists(lengths_lists, min_size=1, max_size=3),
    packings,
    st.integers(0, 30),
    st.integers(0, 5),
    parts,
)
def test_a_position_is_as_good_as_having_walked_there(
    lengths: list[list[int]], packing: str, step: int, further: int, part: int
) -> None:
    sources = [Source(str(n), np.array(one), 1 / len(lengths)) for n, one in enumerate(lengths)]
    walked, resumed = (Plan(sources, 30, 2, packing, 7, part) for _ in range(2))
    resumed.resume(walked.position(step))
    for later in (step + further, step):
        assert resumed.tokens_seen(later) == walked.tokens_seen(later)
        assert_equal_batches(resumed.windows(later), walked.windows(later))
    assert_equal_batches(resumed.windows(0), walked.windows(0))  # before it: from the beginning


def test_a_resumed_order_packs_little_again() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 3000)
    shares = {"real": 0.25, "synthetic": 0.75}
    sources = [Source(name, lengths, share) for name, share in shares.items()]
    walked, resumed = (Plan(sources, 256, 4, "whole", 7, 100) for _ in range(2))
    walked.windows(400)
    resumed.resume(walked.position(400))
    assert_equal_batches(resumed.windows(400), walked.windows(400))
    assert walked.packed.cache_info().misses > 60
    assert resumed.packed.cache_info().misses <= 5


def test_only_the_last_windows_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful, other = (plan_of(list(range(1, 30)), "whole") for _ in range(2))
    expected = [other.windows(step) for step in range(60)]
    monkeypatch.setattr("trainer.data.plan.KEPT_WINDOWS", 20)
    for step, windows in enumerate(expected):
        assert_equal_batches(forgetful.windows(step), windows)
    assert sum(len(block.rows) for block in forgetful.window_order.blocks) < 60
    assert_equal_batches(forgetful.windows(3), expected[3])


def test_the_hash_sees_everything_that_changes_the_order() -> None:
    base = plan_of([5, 6, 7], "whole")
    others = [
        plan_of([5, 6, 8], "whole"),
        plan_of([5, 6, 7], "stream"),
        plan_of([5, 6, 7], "whole", batch=3),
        plan_of([5, 6, 7], "whole", context=31),
        Plan(base.sources, 30, 2, "whole", seed=8),
        plan_of([5, 6, 7], "whole", part=2),
    ]
    assert len({plan.hash() for plan in [base, *others]}) == 7


def test_epochs_are_shuffled_and_packed_differently() -> None:
    plan = plan_of(list(range(3, 29)), "whole")
    first, second = plan.packed(0, 0), plan.packed(0, 1)
    together = [
        {frozenset(packed.window(0, i).documents.tolist()) for i in range(len(packed.offsets) - 1)}
        for packed in (first, second)
    ]
    assert together[0] != together[1]
    cut_once = plan_of(list(range(3, 29)), "windows")
    rows = [
        {tuple(packed.window(0, i).starts.tolist()) for i in range(len(packed.offsets) - 1)}
        for packed in (cut_once.packed(0, 0), cut_once.packed(0, 1))
    ]
    assert rows[0] == rows[1]


@given(st.lists(st.integers(1, 64), max_size=60))
def test_windows_are_never_overfilled(sizes: list[int]) -> None:
    chosen = minimum_bin_slack(np.array(sizes, dtype=np.int64), 64, np.random.default_rng(0))
    filled: Counter[int] = Counter()
    for window, size in zip(chosen.tolist(), sizes, strict=True):
        filled[window] += size
    assert all(load <= 64 for load in filled.values())
    assert sorted(filled) == list(range(len(filled)))
    # Two windows that fit into one do not both stay.
    assert len(filled) <= 1 or sum(sorted(filled.values())[:2]) > 64


@pytest.mark.parametrize(
    ("mean", "deviation"),
    [(750, 1.0), (700, 0.3), (1200, 0.3)],  # a web corpus, and rephrases of much the same length
)
def test_realistic_lengths_pack_to_99_percent(mean: int, deviation: float) -> None:
    """As many as are packed at once; a part of an epoch has at least half of PART_DOCUMENTS."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(mean), deviation, PART_DOCUMENTS // 2), 1, 60_000)
    packed = pack_whole(lengths.astype(np.int64), 4096, generator)
    assert packed.density(4096) >= 0.99


def test_whole_megadocs_fill_long_windows_to_99_percent() -> None:
    """G=32 megadocs of about 22,600 tokens: alone they leave a sixth of 32k, in 128k nothing."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(22_600), 0.3, 5000).astype(np.int64)
    plan = Plan([Source("stitched", lengths, 1.0)], 32_768, 64, "whole", 0)
    assert plan.density()[0] < 0.85
    advice = how_to_fill(lengths, plan)
    assert "data.context_length=65536 data.batch_size=32 fills 9" in advice
    assert pack_whole(lengths, 131_072, generator).density(131_072) >= 0.99


@given(st.lists(st.integers(1, 10_000), min_size=8, max_size=8))
def test_balanced_order_is_a_permutation_and_never_worse_than_halves_in_order(
    costs: list[int],
) -> None:
    order = balanced_order(costs)
    assert sorted(order) == list(range(8))
    for start, stop in itertools.combinations(range(9), 2):
        assert balanced_order(costs, range(start, stop)) == order[start:stop]
    left = sum(costs[i] for i in order[:4])
    assert abs(2 * left - sum(costs)) <= max(costs)


def test_ranks_share_the_global_batch() -> None:
    plan = plan_of([n % 27 + 3 for n in range(100)], "whole", batch=8)
    windows = plan.windows(3)
    for world_size in (1, 2, 4, 8):
        parts = [plan.windows(3, rank, world_size) for rank in range(world_size)]
        assert_equal_batches([w for part in parts for w in part], windows)
    with pytest.raises(ValueError, match="8 windows cannot be divided among 3 ranks"):
        rank_windows(windows, 0, 3)


def test_steps_are_the_papers() -> None:
    def paper(epochs: float, fraction: float) -> int:
        real = Source("real", np.full(4, 203_867_748 // 4), 1 - fraction)
        synthetic = Source("simple", np.array([10**9]), fraction)
        sources = [real, synthetic] if fraction else [real]
        return Plan(sources, 4096, 64, "windows", 0).steps(epochs)

    assert paper(16, 0) == 12_432
    assert paper(8, 0.75) == 24_864
    assert paper(16, 0.75) == 49_728
    with pytest.raises(ValueError, match=r"100 tokens and recipe\.epochs=1 make less"):
        plan_of([100], "whole", context=4096, batch=64).steps(1)


@given(
    st.lists(st.integers(30, 300), min_size=30, max_size=90),
    st.lists(st.integers(30, 900), min_size=30, max_size=90),
    st.sampled_from(["whole", "stream"]),
    st.sampled_from([0.0, 0.5, 0.75]),
    st.floats(1, 6),
)
def test_the_base_stream_is_read_as_often_as_asked(
    real: list[int], synthetic: list[int], packing: str, fraction: float, epochs: float
) -> None:
    """However empty the windows are."""
    sources = [Source("real", np.array(real), 1 - fraction)]
    if fraction:
        sources.append(Source("synthetic", np.array(synthetic), fraction))
    plan = Plan(sources, 128, 4, packing, 0)
    windows = len(plan.packed(0, 0).offsets) - 1
    seen = plan.epochs_seen(plan.steps(epochs))[0]
    # All but the last step, and what the packing may differ by from epoch to epoch.
    assert seen == pytest.approx(epochs, rel=0.1, abs=5 / windows)


@pytest.mark.parametrize(
    ("sources", "packing", "message"),
    [
        ([Source("a", np.array([1]), 0.5)], "whole", "do not sum to 1"),
        ([Source("a", np.array([], dtype=int), 1.0)], "whole", "a is empty"),
        ([Source("a", np.array([1]), 1.0)], "tight", "packing='tight'"),
    ],
)
def test_bad_plans(sources: list[Source], packing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(sources, 8, 1, packing, 0)
