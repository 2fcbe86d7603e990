"""What a stream is asked for with."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.fields import check_bounds, setting
from trainer.data.format import SYNTHETIC


@dataclass
class StreamConfig:
    """How megadocs are put together."""

    generations: list[int] = setting(
        [],
        "G of the streams, of each method where there are several; empty: the method's.",
        unit="generations",
        at_least=1,
    )
    methods: list[str] = setting(
        [],
        "simple, stitched: styles whose generations they take, in this order; empty: the method's "
        "alone.",
    )
    shares: list[float] = setting(
        [],
        "Of each of methods, the share of the documents that take its generations, chosen by a "
        "hash of the id; empty: all of them.",
        at_least=0,
        at_most=1,
    )
    member_order: str = setting(
        "methods",
        "Order of a stitched megadoc's rephrases: as methods says, or random.",
        choices=("methods", "random"),
    )
    separator: str | None = setting(
        None,
        "Text between the members of a megadoc; null: the end-of-text token, which the evidence "
        "says the paper used.",
    )
    real_document: str = setting(
        "last",
        "Where the real document stands in a megadoc.",
        choices=("last", "first", "absent"),
    )
    open_thought: str = setting(
        "<think>",
        "Before a latent thought. The paper's delimiters are not known; these are what the public "
        "re-implementation uses.",
    )
    close_thought: str = setting("</think>", "After a latent thought.")
    missing: str = setting(
        "refuse",
        "Generations that are not there: refuse to build, or allow a share of them to be left out.",
        choices=("refuse", "allow"),
    )
    missing_share: float = setting(
        0.01,
        "allow: of all generations of the stream, at most.",
        at_least=0,
        at_most=1,
    )
    shuffle_seed: int = setting(0, "Of the order of the simple stream.", at_least=0)
    shard_bytes: int = setting(1 << 26, "Size of a shard.", unit="bytes", at_least=1)
    processes: int | None = setting(
        None,
        "That tokenize and write; null: all cores, where there is much to do.",
        unit="processes",
        at_least=1,
    )
    writer: int = setting(0, "This job among several that build the streams.", at_least=0)
    writers: int = setting(1, "Jobs that build the streams together.", at_least=1)

    def check(self) -> None:
        """Raise ValueError for an unknown option or an impossible number."""
        check_bounds(self, "streams.")
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"streams.methods={self.methods} names a method twice")
        if self.shares and len(self.shares) != len(self.methods):
            raise ValueError(
                f"streams.shares={self.shares} must hold one share for each of "
                f"streams.methods={self.methods}"
            )
        if self.writer >= self.writers:
            raise ValueError(
                f"streams.writer={self.writer} must be in [0, streams.writers={self.writers})"
            )

    def styles(self, kind: str, method: str) -> list[str]:
        """The methods whose generations a stream of a kind takes."""
        return (self.methods if kind != "latent" and self.methods else [method]) * (
            kind in SYNTHETIC
        )
