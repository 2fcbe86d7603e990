"""Which backends are right on this GPU, and which of those is the fastest.

    python -m kernels.check                                  # the paper's 300M: heads 12/12x64
    python -m kernels.check --heads 16/16x96 --width 1536 --vocabulary 128256

A backend is right if, on segments of awkward lengths, its output, log-sum-exp and gradients are at
most twice as far from float64 as plain PyTorch's in the same dtype; if a second run gives the same
bits (of everything where it is deterministic, else of the output); and if nothing changes when
every other segment and what lies behind the last one holds NaN. Those that are right are timed,
forward and backward together. Verdicts are kept in a file, by everything that could change them.

May import the rest of ``kernels``.
"""

from .attention import DETERMINISTIC, Heads, Pack, check_attention, chunk_of
from .loss import check_loss
from .verdicts import Choice, Verdict

__all__ = [
    "DETERMINISTIC",
    "Choice",
    "Heads",
    "Pack",
    "Verdict",
    "check_attention",
    "check_loss",
    "chunk_of",
]
