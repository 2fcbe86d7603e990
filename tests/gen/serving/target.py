"""A running server that tests are asked of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    url: str
    model: str
    context_length: int
    siblings: int  # generations of one document in flight
