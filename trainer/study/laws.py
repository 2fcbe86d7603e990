"""The laws of loss over members, parameters, data and repeated data.

Every law is linear in some of its parameters once the others are fixed:
``loss = basis(shape, inputs) @ coefficients`` with coefficients >= 0. U are unique tokens, E epochs
over them, N parameters; losses in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXPONENTS = np.geomspace(0.02, 4.0, 28)


@dataclass(frozen=True)
class Law:
    """A family of curves.

    Attributes:
        name: for tables.
        formula: for tables.
        inputs: meaning of the columns of the inputs ``[n, k]``.
        coefficients: names of the linear parameters, all >= 0.
        shape: names of the other parameters, all > 0.
        grid: values of each shape parameter to start from.
        basis: ``(shape [s], inputs [n, k]) -> [n, c]``.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    coefficients: tuple[str, ...]
    shape: tuple[str, ...]
    grid: tuple[Sequence[float] | NDArray[np.float64], ...]
    basis: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.coefficients + self.shape

    def predict(
        self, parameters: NDArray[np.float64], inputs: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Losses ``[n]`` in nats per token for ``parameters [p]`` and ``inputs [n, k]``."""
        count = len(self.coefficients)
        return self.basis(parameters[count:], inputs) @ parameters[:count]


def power_basis(shape: NDArray[np.float64], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """``x^-B`` and 1."""
    decay = inputs[:, 0] ** -shape[0]
    return np.stack((decay, np.ones_like(decay)), axis=1)


def effective_data_basis(
    shape: NDArray[np.float64], inputs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``D'^-B`` and 1, where a repeated token is worth exponentially less."""
    unique, epochs = inputs[:, 0], inputs[:, 1]
    exponent, half_life = shape
    repeats = np.maximum(epochs - 1, 0)
    worth = unique * np.minimum(epochs, 1)  # less than one epoch: that much fresh data
    effective = worth + unique * half_life * -np.expm1(-repeats / half_life)
    return power_basis(np.array([exponent]), effective[:, None])


def overfitting_basis(
    shape: NDArray[np.float64], inputs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``(U E)^-B``, 1 and ``R^delta (N/U)^kappa``; exponents that are not given are 1."""
    unique, epochs, parameters = inputs.T
    delta, kappa = shape[1:] if len(shape) > 1 else (1.0, 1.0)
    decay = (unique * epochs) ** -shape[0]
    penalty = np.maximum(epochs - 1, 0) ** delta * (parameters / unique) ** kappa
    return np.stack((decay, np.ones_like(decay), penalty), axis=1)


POWER = Law("power law", "A / x^B + C", ("x",), ("A", "C"), ("B",), (EXPONENTS,), power_basis)
TOKENS_SEEN = Law(
    "tokens seen",
    "A / (U E)^B + C",
    ("U", "E", "N"),
    ("A", "C"),
    ("B",),
    (EXPONENTS,),
    lambda shape, inputs: power_basis(shape, inputs[:, :1] * inputs[:, 1:2]),
)
EFFECTIVE_DATA = Law(  # Muennighoff et al. 2305.16264, equation of D', parameters held fixed
    "effective data (Muennighoff)",
    "A / D'^B + C, D' = U + U R* (1 - exp(-(E - 1) / R*))",
    ("U", "E", "N"),
    ("A", "C"),
    ("B", "R*"),
    (EXPONENTS, (0.5, 2.0, 6.0, 15.0, 60.0)),
    effective_data_basis,
)
OVERFITTING = Law(  # Lovelace et al. 2605.01640 with both exponents of the penalty at 1
    "additive overfitting (one coefficient)",
    "A / (U E)^B + C + P (E - 1) (N / U)",
    ("U", "E", "N"),
    ("A", "C", "P"),
    ("B",),
    (EXPONENTS,),
    overfitting_basis,
)
OVERFITTING_FREE = Law(
    "additive overfitting (free exponents)",
    "A / (U E)^B + C + P (E - 1)^delta (N / U)^kappa",
    ("U", "E", "N"),
    ("A", "C", "P"),
    ("B", "delta", "kappa"),
    (EXPONENTS, (0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0)),
    overfitting_basis,
)
REPEATED_DATA = (TOKENS_SEEN, EFFECTIVE_DATA, OVERFITTING, OVERFITTING_FREE)
