"""What arXiv 2603.18534 published, to be drawn beside our own runs.

Losses are nats per token of a 300M Llama on 203,867,748 tokens of DCLM with the Llama 3.1 tokenizer
and attention across documents; another corpus, tokenizer or model gives other numbers, so they
show the shape to expect, not a target. Sources: the authors' published plots and plot scripts.
Values measured from the pixels of a plot are right to about 0.0005 (i.i.d.) or 0.001 (arXiv,
ensembles). What was not published in a readable form is absent here.
"""

from __future__ import annotations

from dataclasses import dataclass

REAL_TOKENS = 203_867_748
PARAMETERS = 299_649_792
REAL_ONLY = 3.5544
REAL_ONLY_ASYMPTOTE = 3.449  # of the fit over parameters, N -> infinity
HEADLINE = {"simple": 1.48, "megadocs": 1.80}  # data efficiency at G = 32 (abstract)


@dataclass(frozen=True)
class Tuned:
    """A tuned recipe of the 300M student."""

    kind: str
    generations: int
    epochs: float
    mixing_fraction: float
    learning_rate: float
    weight_decay: float
    loss: float | None = None  # i.i.d.; None: not published


TUNED = [
    Tuned("real", 0, 16, 0.0, 3e-3, 1.6, REAL_ONLY),
    Tuned("simple", 2, 4, 0.75, 3e-3, 0.8, 3.462),
    Tuned("simple", 4, 8, 0.75, 3e-3, 0.8, 3.446),
    Tuned("simple", 8, 8, 0.75, 3e-3, 0.8, 3.429),
    Tuned("simple", 16, 16, 0.75, 3e-3, 0.4, 3.414),
    Tuned("simple", 32, 16, 0.75, 3e-3, 0.4, 3.410),
    Tuned("stitched", 2, 8, 0.75, 3e-3, 0.8, 3.456),
    Tuned("stitched", 4, 8, 0.75, 3e-3, 0.4, 3.436),
    Tuned("stitched", 8, 16, 0.75, 3e-3, 0.4, 3.417),
    Tuned("stitched", 16, 16, 0.75, 3e-3, 0.4, 3.395),
    # 3.384 was reached at learning rate 3e-3 before this final tuning, so this is at most 3.384.
    Tuned("stitched", 32, 32, 0.90, 1e-3, 0.4),
    Tuned("latent", 2, 4, 0.75, 3e-3, 0.8),
    Tuned("latent", 4, 8, 0.75, 3e-3, 0.8),
    Tuned("latent", 8, 8, 0.75, 3e-3, 0.4),
    Tuned("latent", 16, 16, 0.75, 3e-3, 0.4, 3.381),
    Tuned("latent", 32, 32, 0.90, 1e-3, 0.4, 3.34),  # read by a third party: about 3.34
]

# Loss against G, by evaluation set. Stitched G = 32 is the earlier tuning (learning rate 3e-3).
BY_GENERATIONS: dict[str, dict[str, dict[int, float]]] = {
    "iid": {
        "simple": {2: 3.462, 4: 3.446, 8: 3.429, 16: 3.414, 32: 3.410},
        "stitched": {2: 3.456, 4: 3.436, 8: 3.417, 16: 3.395, 32: 3.384},
        "latent": {16: 3.381, 32: 3.34},
    },
    "arxiv_cs": {
        "simple": {2: 3.769, 4: 3.750, 8: 3.694, 16: 3.680, 32: 3.668},
        "stitched": {2: 3.752, 4: 3.694, 8: 3.653, 16: 3.604, 32: 3.540},
    },
}

# Best loss at each number of epochs.
BY_EPOCHS: dict[tuple[str, int], dict[float, float]] = {
    ("simple", 2): {2: 3.557, 4: 3.462, 8: 3.464, 16: 3.494},
    ("simple", 16): {1: 3.624, 2: 3.496, 4: 3.442, 8: 3.418, 16: 3.415, 32: 3.441},
    ("simple", 32): {8: 3.422, 16: 3.410, 32: 3.423},
    ("stitched", 32): {16: 3.395, 32: 3.384, 64: 3.421},
}

# Where the real document stands; kind -> loss.
ORDER: dict[int, dict[str, float]] = {
    2: {"simple": 3.462, "stitched": 3.456, "stitched-real-first": 3.467},
    8: {
        "simple-no-real": 3.437,
        "stitched-no-real": 3.426,
        "simple": 3.429,
        "stitched-real-first": 3.422,
        "stitched": 3.417,
    },
}

# (kind, G) -> mask -> loss.
MASKS: dict[tuple[str, int], dict[str, float]] = {
    ("real", 0): {"none": 3.554, "document": 3.548},
    ("simple", 16): {"none": 3.414, "document": 3.416},
    ("stitched", 16): {"none": 3.395},
}

NO_SEPARATE_REAL = {"stitched G=2 with the real stream": 3.456, "stitched G=2 alone": 3.521}

# Kind -> loss of K = 1..5 members (mean of logits), and the published asymptote.
ENSEMBLES: dict[str, tuple[list[float], float]] = {
    "real": ([3.692, 3.485, 3.423, 3.389, 3.373], 3.31),
    "self-distillation": ([3.478, 3.400, 3.375, 3.362, 3.355], 3.32),
    "simple G=32": ([3.409, 3.303, 3.269, 3.252, 3.242], 3.21),
    "latent G=16": ([3.383, 3.29, 3.26, 3.245, 3.235], 3.20),
    "stitched G=32": ([3.384, 3.290, 3.257, 3.240, 3.229], 3.18),
}

# G = 16, read off a plot by eye; probably the training context.
BY_CONTEXT: dict[str, dict[int, float]] = {
    "simple": {256: 3.641, 512: 3.543, 1024: 3.474, 2048: 3.434, 4096: 3.415},
    "stitched": {256: 3.638, 512: 3.533, 1024: 3.455, 2048: 3.411, 4096: 3.395},
    "latent": {256: 3.618, 512: 3.513, 1024: 3.441, 2048: 3.399, 4096: 3.382, 8192: 3.379},
}


def published_loss(kind: str, generations: int, mask: str, context_length: int) -> float | None:
    """The paper's i.i.d. loss of the tuned 300M recipe of this shape; None: not published."""
    if mask != "none":
        if context_length != 4096:
            return None
        return MASKS.get((kind, generations), {}).get(mask)
    if context_length != 4096:
        return BY_CONTEXT.get(kind, {}).get(context_length) if generations == 16 else None
    if kind == "real":
        return REAL_ONLY
    found = BY_GENERATIONS["iid"].get(kind, {}).get(generations)
    return found if found is not None else ORDER.get(generations, {}).get(kind)
