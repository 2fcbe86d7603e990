"""Memory that a kernel does not write holds NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """``torch.empty`` and its like return NaN (the highest number for integers) in every test here.

    PyTorch does so in its deterministic mode; without this, a row that a kernel leaves out may hold
    zeros by chance.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
