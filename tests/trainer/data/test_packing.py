"""Packing against the same algorithm in words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import DRAWS, NOISE, minimum_bin_slack


def in_words(sizes: list[int], capacity: int, generator: np.random.Generator) -> list[int]:
    """Window of each piece."""
    free = dict(enumerate(sizes))  # pieces without a window
    queue: list[int] = list(range(len(sizes)))

    def draw() -> int:
        """The next piece of the random order, which begins again at its end."""
        while True:
            if not queue:
                queue.extend(sorted(free))
            if (piece := queue.pop(0)) in free:
                return piece

    def next_piece(room: int) -> int | None:
        """A random piece, if ``room`` can be filled after it, or else the largest that fits."""
        fitting = [size for size in free.values() if size <= room]
        if not fitting:
            return None
        for _ in range(DRAWS):
            piece = draw()
            left = room - free[piece]
            if left == 0 or (left > 0 and (room > 2 * max(fitting) or left in free.values())):
                return piece
        return max(piece for piece, size in free.items() if size == max(fitting))

    chosen = [0] * len(sizes)
    noise = generator.uniform(1 - NOISE, 1 + NOISE, len(sizes))
    window = -1
    for largest in np.argsort(-np.array(sizes) * noise, kind="stable").tolist():
        if largest not in free:
            continue
        window += 1
        room = capacity
        piece: int | None = largest
        while piece is not None:
            chosen[piece] = window
            room -= free.pop(piece)
            piece = next_piece(room)
    return chosen


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(0, 5))
def test_pieces_get_the_windows_that_the_words_say(sizes: list[int], seed: int) -> None:
    found = minimum_bin_slack(np.array(sizes, dtype=np.int64), 64, np.random.default_rng(seed))
    assert found.tolist() == in_words(sizes, 64, np.random.default_rng(seed))
