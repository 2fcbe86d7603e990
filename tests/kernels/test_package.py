"""``kernels`` in a clone's script and ``megadocs.kernels`` as a library, in one process."""

import importlib

import torch

import kernels


def test_two_copies_register_operators_of_their_own() -> None:
    library = importlib.import_module("megadocs.kernels")
    assert library is not kernels
    assert library.__file__ == kernels.__file__
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(11, 4)
    targets = torch.randint(11, (6,))
    losses = []
    for copy, name in ((kernels, "megadocs"), (library, "megadocs_kernels")):
        loss = copy.linear_cross_entropy(hidden, weight, targets)
        assert f"_{name}_linear_cross_entropy" in type(loss.grad_fn).__name__
        losses.append(loss)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    for loss in losses:
        torch.testing.assert_close(loss, expected)
