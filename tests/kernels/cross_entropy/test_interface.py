"""The fused LM head and loss against float64 autograd, every option and their combinations."""

import itertools
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import linear_cross_entropy, next_token_targets, token_losses
from kernels.cross_entropy.chunked import (
    Gradients,
    Options,
    rows_of_chunk,
    sweep_tokens,
    sweep_vocabulary,
)
from kernels.cross_entropy.compiled_steps import COMPILED, gradient_of, statistics_of
from kernels.cross_entropy.interface import (
    LEAN_ELEMENTS,
    add_weight_gradient,
    chunk_elements,
    fast_bytes,
    linear_cross_entropy_op,
)
from kernels.cross_entropy.torch_steps import TORCH


def problem(
    rows: int, vocabulary: int, ignored: float, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(rows, 6) * scale, normal(vocabulary, 6), normal(vocabulary)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def definition(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(1).square() * (targets != -100)
    if token_weight is not None:
        losses = losses * token_weight
    count = (targets != -100).sum().clamp(min=1) if denominator is None else denominator
    return losses.sum() / count


def compare(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> None:
    leaves = [x for x in (hidden, weight, options.get("bias")) if x is not None]
    expected = definition(hidden, weight, targets, **options)
    three_rows = 4 * weight.shape[0] * 3  # several ragged chunks
    for memory in (three_rows, "lean"):
        loss = linear_cross_entropy(hidden, weight, targets, **options, memory=memory)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(
            torch.autograd.grad(loss * 3, leaves),
            torch.autograd.grad(expected * 3, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.sampled_from([0.0, 0.3, 1.0]))
def test_loss_and_gradients(rows: int, vocabulary: int, ignored: float) -> None:
    hidden, weight, _, targets = problem(rows, vocabulary, ignored)
    compare(hidden, weight, targets)
    compare(hidden, weight, targets, denominator=torch.tensor(7.0))


@pytest.mark.parametrize(
    ("softcap", "z_loss", "label_smoothing", "with_bias"),
    itertools.product((0.0, 3.0), (0.0, 1e-2), (0.0, 0.1), (False, True)),
)
def test_every_combination_of_options(
    softcap: float, z_loss: float, label_smoothing: float, with_bias: bool
) -> None:
    hidden, weight, bias, targets = problem(23, 31, 0.2)
    options = {"softcap": softcap, "z_loss": z_loss, "label_smoothing": label_smoothing}
    token_weight = torch.rand(23, generator=torch.Generator().manual_seed(0))
    for weights in (None, token_weight):
        compare(
            hidden,
            weight,
            targets,
            bias=bias if with_bias else None,
            token_weight=weights,
            **options,
        )


def test_extreme_logits_stay_finite() -> None:
    for scale in (50.0, 5e3):
        hidden, weight, _, targets = problem(20, 30, 0.0, scale)
        compare(hidden, weight, targets)
        low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(low[0], low[1], targets)
        assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, low)))


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, _, targets = problem(12, 9, 0.0)
    targets[3:6] = -100
    spoiled = hidden.detach().clone()
    spoiled[3:6] = torch.tensor([torch.inf, torch.nan, -torch.inf]).repeat(2)
    expected = definition(hidden, weight, targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    for memory in ("fast", "lean"):
        leaves = (spoiled.detach().requires_grad_(), weight)
        loss = linear_cross_entropy(*leaves, targets, memory=memory)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(torch.autograd.grad(loss, leaves), gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_the_steps_that_a_gpu_compiles_are_the_same_function(
    softcap: float, smoothing: float, biased: bool
) -> None:
    hidden, weight, bias, targets = (x.detach() for x in problem(11, 19, 0.3))
    row_weight = torch.rand(11, dtype=torch.float64) * (targets >= 0)
    own = bias if biased else None
    options = Options(softcap, 0.01, smoothing)
    found = []
    with torch.compiler.set_stance("force_eager"):
        for steps, lean in ((TORCH, False), (COMPILED, False), (COMPILED, True)):
            dx, dw, db = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
            inputs = (steps, hidden, weight, own, targets, row_weight)
            wanted = Gradients(dx, None, None) if lean else Gradients(dx, dw, db)
            losses, lses = sweep_tokens(*inputs, options, 4 * 19, wanted)
            if lean:
                wanted = Gradients(None, dw, db)
                sweep_vocabulary(*inputs, lses, options, 40, wanted)
            found.append((losses[targets >= 0], lses, dx, dw, db))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_chunks_of_all_sizes_take_two_graphs() -> None:
    torch._dynamo.reset()
    counted = CompileCounter()
    for function, arguments in (
        (statistics_of, (0.0, False)),
        (gradient_of, (torch.zeros(1), torch.zeros(1), 0.0, 0.0, 0.0, 0.0)),
    ):
        run = torch.compile(function, backend=counted, fullgraph=True)
        counted.frame_count = 0
        for rows in (128, 128, 77, 128, 30):
            vectors = [x.expand(rows) if isinstance(x, Tensor) else x for x in arguments]
            run(torch.zeros(rows, 96), None, torch.zeros(rows, dtype=torch.long), *vectors)
        assert counted.frame_count <= 2


def test_chunks_on_a_gpu_have_whole_tiles_and_at_least_4096_rows() -> None:
    hidden = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    for backend, vocabulary in itertools.product(("torch", "triton"), (32_000, 50_257, 248_320)):
        elements = chunk_elements("fast", backend, hidden, vocabulary)  # type: ignore[arg-type]
        rows = rows_of_chunk(elements, vocabulary)
        assert rows >= 4096
        assert rows % 128 == 0
        assert 2 * rows * vocabulary <= fast_bytes(vocabulary)
    assert rows_of_chunk(100, 10) == 10


def test_bf16_gradients_are_within_twice_the_rounding_of_plain_bf16() -> None:
    exact = problem(200, 300, 0.1)
    low = [x.detach().bfloat16().requires_grad_() for x in exact[:2]]
    plain = [x.detach().clone().requires_grad_() for x in low]
    reference = [x.detach().double().requires_grad_() for x in low]
    targets = exact[3]
    ours = torch.autograd.grad(linear_cross_entropy(low[0], low[1], targets), low)
    theirs = torch.autograd.grad(F.cross_entropy((plain[0] @ plain[1].T).float(), targets), plain)
    expected = torch.autograd.grad(definition(reference[0], reference[1], targets), reference)
    for mine, rounded, right in zip(ours, theirs, expected, strict=True):
        assert (mine - right).norm() <= 2 * (rounded - right).norm()


def test_the_weight_gradients_error_does_not_grow_with_the_number_of_chunks() -> None:
    hidden, weight, _, targets = problem(512, 64, 0.1)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = definition(low[0].double(), low[1].double(), targets)
    expected = torch.autograd.grad(exact, low[1])[0].double()
    errors = []
    for rows in (512, 4):
        buffer = torch.zeros(64, 6)
        options: dict[str, Any] = {"grad_weight_out": buffer, "memory": 4 * 64 * rows}
        linear_cross_entropy(low[0], low[1], targets, **options)
        errors.append((buffer - expected).norm().item())
    assert errors[1] <= 1.05 * errors[0]


def test_reported_losses_of_bf16_inputs_are_not_rounded() -> None:
    hidden, weight, _, targets = problem(60, 300, 0.1, scale=6.0)
    low = [x.detach().bfloat16() for x in (hidden, weight)]
    expected = F.cross_entropy(low[0].double() @ low[1].double().T, targets, reduction="none")
    assert expected.max() > 50  # logits whose rounding to bf16 would be off by up to 0.2
    assert (token_losses(low[0], low[1], targets)[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_the_weight_gradient_can_be_added_to_a_buffer(memory: Any) -> None:
    hidden, weight, _, targets = (x.detach().float() if x.is_floating_point() else x
                                  for x in problem(30, 20, 0.3))  # fmt: skip
    hidden.requires_grad_()
    weight.requires_grad_()
    buffer = torch.ones_like(weight)
    loss = linear_cross_entropy(
        hidden, weight, targets, grad_weight_out=buffer, z_loss=0.1, memory=memory
    )
    loss.backward()
    assert weight.grad is None
    expected = torch.autograd.grad(definition(hidden, weight, targets, z_loss=0.1), weight)[0]
    torch.testing.assert_close(buffer, 1 + expected)


def test_frozen_inputs_and_token_losses() -> None:
    hidden, weight, bias, targets = problem(25, 40, 0.3)
    loss, per_token = linear_cross_entropy(hidden, weight, targets, return_token_losses=True)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(per_token, expected.detach())
    assert not per_token.requires_grad
    frozen = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets), weight)
    torch.testing.assert_close(frozen[0], torch.autograd.grad(loss, weight)[0])
    losses, lse = token_losses(hidden, weight, targets, bias=bias, softcap=4.0)
    logits = 4 * torch.tanh((hidden @ weight.T + bias) / 4)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(lse, logits.logsumexp(1))


def test_the_op_is_a_good_citizen_of_torch() -> None:
    hidden, weight, bias, targets = problem(9, 11, 0.3)
    counts = (targets != -100).float()
    arguments = (hidden, weight, bias, targets, counts, counts.sum(), 0.0, 0.0, 0.0, 100)
    for lean in (False, True):
        for wanted in ((True, True, True), (True, False, False)):
            call = (*arguments, lean, *wanted, "", "torch")
            torch.library.opcheck(linear_cross_entropy_op, call)
    inputs = [x.detach() for x in (hidden, weight, bias)]
    lses = torch.zeros(9, dtype=torch.float64)
    added = (torch.zeros_like(inputs[1]), *inputs, targets, counts, lses, 0.0, 0.0, 0.0, 100)
    torch.library.opcheck(add_weight_gradient, (*added, "", "torch"))


def test_no_rows_are_a_loss_of_zero() -> None:
    hidden, weight, _, targets = problem(3, 7, 0.0)
    for memory in ("fast", "lean"):
        options: dict[str, Any] = {"memory": memory}
        none = hidden[:0].detach().requires_grad_()
        loss = linear_cross_entropy(none, weight, targets[:0], **options)
        assert loss == 0
        assert not torch.autograd.grad(loss, (none, weight))[1].any()


def test_second_derivatives_are_refused() -> None:
    hidden, weight, _, targets = problem(9, 11, 0.3)
    loss = linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_backward_pass_can_be_repeated_unless_lean() -> None:
    hidden, weight, _, targets = problem(9, 11, 0.3)
    loss = linear_cross_entropy(hidden, weight, targets)
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    loss = linear_cross_entropy(hidden, weight, targets, memory="lean")
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that operations create, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()
        self.now = self.peak = 0

    def forget(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.storages and not any(
                    isinstance(x, Tensor) and x.untyped_storage()._cdata == key
                    for x in tree_leaves((args, kwargs))
                ):
                    self.storages.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key, size)
        return result


@pytest.mark.parametrize("rows", [512, 4096])
def test_lean_needs_128_mib_beside_its_results_at_any_number_of_rows(rows: int) -> None:
    hidden, weight = torch.randn(rows, 64).bfloat16(), torch.randn(20_000, 64).bfloat16()
    targets = torch.randint(20_000, (rows,))
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    inputs = (TORCH, hidden, weight, None, targets, torch.ones(rows))
    with LiveBytes() as live:
        _, lses = sweep_tokens(
            *inputs, Options(), LEAN_ELEMENTS["torch"], Gradients(dx, None, None)
        )
        sweep_vocabulary(
            *inputs, lses, Options(), LEAN_ELEMENTS["torch"], Gradients(None, dw, None)
        )
    assert 24 << 20 < live.peak <= 128 << 20
    assert dx.isfinite().all()
    assert dw.any(1).all()


def test_compiled_without_graph_breaks_and_equal_to_the_bit() -> None:
    hidden, weight, _, targets = problem(33, 21, 0.2)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets) * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


PARALLEL = """
import itertools, torch, torch.distributed as dist
from kernels import linear_cross_entropy
from tests.kernels.cross_entropy.test_interface import definition, problem
dist.init_process_group("gloo")
rank = dist.get_rank()
for memory, options in itertools.product(
    (200, "lean"), ({}, {"softcap": 3.0}, {"z_loss": 0.01, "label_smoothing": 0.1})
):
    hidden, weight, _, targets = problem(17, 24, 0.2)
    part = weight.detach()[rank * 12 : rank * 12 + 12].clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden, part, targets, group=dist.group.WORLD, memory=memory, **options
    )
    expected = definition(hidden, weight, targets, **options)
    dh, dw = torch.autograd.grad(loss, (hidden, part))
    eh, ew = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dh, eh)
    torch.testing.assert_close(dw, ew[rank * 12 : rank * 12 + 12])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_share_the_vocabulary() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PARALLEL],
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
            cwd=Path(__file__).parents[3],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets \[4\] must have one entry a row"),
        ({"weight": torch.zeros(7, 5, dtype=torch.float64)}, r"and weight \[7, 5\] must be"),
        ({"weight": torch.zeros(7, 6)}, "hidden is torch.float64 and weight torch.float32"),
        ({"bias": torch.zeros(3)}, r"bias \[3\]"),
        ({"token_weight": torch.zeros(3)}, r"token_weight \[3\]"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive"),
        ({"backend": "magic"}, "backend='magic'"),
        ({"backend": "triton"}, "needs CUDA tensors of up to 32 bits, hidden is torch.float64 on"),
        ({"memory": "small"}, "memory='small' must be fast, lean or a number of bytes"),
        ({"memory": 0}, "memory=0 must be"),
        ({"grad_weight_out": torch.zeros(2, 2)}, "grad_weight_out must be float32"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    hidden, weight, _, targets = problem(5, 7, 0.0)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets} | change)


@pytest.mark.parametrize("target", [7, -1])
def test_targets_outside_the_vocabulary_are_refused(target: int) -> None:
    hidden, weight, _, targets = problem(5, 7, 0.0)
    targets[2] = target
    for loss in (linear_cross_entropy, token_losses):
        with pytest.raises(RuntimeError, match="indices of the vocabulary, 0 to 6"):
            loss(hidden, weight, targets)
    counts = (torch.arange(5) != 2).float()  # a row that does not count may hold anything
    linear_cross_entropy(hidden, weight, targets, token_weight=counts)


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
