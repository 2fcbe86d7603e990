"""A running server that tests are asked of."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    url: str
    model: str
    context_length: int
    siblings: int  # generations of one document in flight
    sample: dict[str, Any] = field(default_factory=dict)  # asks for sampling, where it must be
    # asks for an answer of full length: a model may end its own at any token
    full_length: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
