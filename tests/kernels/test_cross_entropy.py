"""Chunked cross-entropy and targets against float64 and naive loops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import linear_cross_entropy, next_token_targets, token_losses
from kernels.cross_entropy import CHUNK_ELEMENTS


def problem(
    rows: int, vocabulary: int, ignored: float, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.sampled_from([0.0, 0.3, 1.0]))
def test_loss_and_gradients(rows: int, vocabulary: int, ignored: float) -> None:
    hidden, weight, targets = problem(rows, vocabulary, ignored)
    denominator = torch.tensor(7.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_ELEMENTS, "cpu", 64)  # several ragged chunks
        loss = linear_cross_entropy(hidden, weight, targets, denominator=denominator)
    ours = torch.autograd.grad(loss * 3, (hidden, weight))
    summed = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    theirs = torch.autograd.grad(summed / 7 * 3, (hidden, weight))
    torch.testing.assert_close(loss.double(), summed / 7, atol=1e-5, rtol=1e-5)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_the_default_denominator_counts_what_is_not_ignored() -> None:
    hidden, weight, targets = problem(30, 20, 0.4)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets).double(), expected)
    everything_ignored = torch.full_like(targets, -100)
    assert linear_cross_entropy(hidden, weight, everything_ignored) == 0


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = problem(20, 30, 0.0, scale=200.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(loss.double(), expected, atol=1e-3, rtol=1e-5)
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.isfinite().all()


def test_token_losses_and_frozen_inputs() -> None:
    hidden, weight, targets = problem(25, 40, 0.3)
    losses, lse = token_losses(hidden, weight, targets)
    logits = (hidden @ weight.T).detach()
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    frozen = linear_cross_entropy(hidden.detach(), weight, targets)
    reference = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen, weight)[0], reference)


def test_wrong_shapes_are_named() -> None:
    hidden, weight, targets = problem(5, 7, 0.0)
    with pytest.raises(ValueError, match=r"targets \[4\] must have one entry a row"):
        linear_cross_entropy(hidden, weight, targets[:4])
    with pytest.raises(ValueError, match=r"hidden \[5, 6\] and weight \[7, 5\]"):
        linear_cross_entropy(hidden, weight[:, :5], targets)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(0, 4))
def test_targets_are_the_next_token_of_the_segment(lengths: list[int], extra: int) -> None:
    ids = torch.arange(100, 100 + sum(lengths) + extra)
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    expected = []
    for length, start in zip(lengths, borders.tolist(), strict=False):
        segment = ids[start : start + length].tolist()
        expected += [*segment[1:], -100][:length]
    expected += [-100] * extra
    assert next_token_targets(ids, borders).tolist() == expected
