"""The Gluon kernels: run on a model of the machine, compiled, and, on an sm_90 GPU, run."""

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import varlen_attention
from kernels.attention.reference import reference_attention
from kernels.attention.saved import Saved
from kernels.attention.sm90 import pipeline
from kernels.attention.tile_config import TileConfig
from kernels.attention.tile_scheduler import Tiles, make_tiles
from kernels.check import Heads, Pack
from kernels.check.attention import Attend, attention_verdicts
from kernels.check.verdicts import choose
from tests.kernels.attention import gluon_model
from tests.kernels.attention.test_triton import random_pack, results, run

SOURCES = Path(__file__).parents[3] / "kernels/attention/sm90"
CONFIG = TileConfig(128, 128, *[64, 8, 2] * 3)
Model = dict[str, ModuleType]  # the kernels' modules on the model of the machine


@pytest.fixture(scope="module")
def modelled() -> Model:
    """The Gluon kernels from their own source, with the model in Gluon's place."""
    modules = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kernels.attention.sm90.gluon_compat", gluon_model)
        for name in ("pipeline", "forward", "dq", "dkdv", "backward"):
            full_name = f"kernels.attention.sm90.{name}"
            spec = importlib.util.spec_from_file_location(full_name, SOURCES / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
            patch.setitem(sys.modules, full_name, modules[name])
    return modules


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(
    ("lengths", "lengths_k", "extra", "heads", "size", "programs"),
    [
        ([600], None, 0, (1, 1), 64, 1),  # the rings go round
        ([130, 0, 1, 300], None, 20, (4, 2), 64, 3),
        ([127, 128, 129], None, 0, (2, 1), 128, 2),
        ([100, 20, 200], [300, 0, 150], 5, (1, 1), 128, 2),  # some queries see no key
        ([10, 10, 80, 80], [136, 137, 142, 143], 0, (1, 1), 64, 1),  # around whole steps
        ([1] * 5, None, 3, (2, 2), 64, 4),
        ([127, 0, 200], None, 3, (2, 1), 96, 2),  # in two parts
        ([100, 20, 200], [300, 0, 150], 5, (1, 1), 96, 1),
    ],
)
def test_on_the_model_of_the_machine(
    modelled: Model,
    lengths: list[int],
    lengths_k: list[int] | None,
    extra: int,
    heads: tuple[int, int],
    size: int,
    programs: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = lengths_k or lengths
    q, dout = torch.randn(2, sum(lengths) + extra, heads[0], size, generator=generator)
    k, v = torch.randn(2, sum(keys) + extra, heads[1], size, generator=generator)
    borders, borders_k = borders_of(lengths), borders_of(keys)
    tiles = make_tiles(borders, borders_k, len(q), len(k), CONFIG)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = reference_attention(
        leaves[0], leaves[1], leaves[2], borders, borders_k, 0.1
    )
    dlse = torch.randn(expected_lse.shape, generator=generator)
    seen = expected_lse.isfinite()
    loss = (expected * dout).sum() + (torch.where(seen, expected_lse, 0) * dlse).sum()
    gradients = torch.autograd.grad(loss, leaves)
    for x in (q[sum(lengths) :], dout[sum(lengths) :], k[sum(keys) :], v[sum(keys) :]):
        x.fill_(torch.nan)  # what lies behind the last border
    forward = modelled["forward"].attention_forward_sm90
    out, lse = forward(q, k, v, tiles.q_tiles, 0.1, programs)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    for pass_over in (split_backward, one_pass_backward):
        saved = Saved(q, k, v, out, lse, dout, dlse)
        computed = pass_over(modelled, saved, tiles, programs)
        for ours, theirs in zip(computed, gradients, strict=True):
            torch.testing.assert_close(ours.double(), theirs.nan_to_num(), rtol=1e-4, atol=1e-4)


def backward(
    one_pass: bool, modelled: Model, saved: Saved, tiles: Tiles, programs: int, scale: float = 0.1
) -> list[Tensor]:
    """Gradients of both passes' own source."""
    run: Any = modelled["backward"].attention_backward_sm90
    return list(run(saved, tiles.q_tiles, tiles.kv_tiles, scale, programs, one_pass))


split_backward = partial(backward, False)
one_pass_backward = partial(backward, True)


def test_segments_do_not_leak_bit_for_bit(modelled: Model) -> None:
    lengths, inside = [100, 150, 90], slice(100, 250)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = torch.randn(4, 340, 2, 64, generator=generator)
    dlse = torch.randn(2, 340, generator=generator)
    borders = borders_of(lengths)
    tiles = make_tiles(borders, borders, 340, 340, CONFIG)

    def everything() -> list[Tensor]:
        out, lse = modelled["forward"].attention_forward_sm90(q, k, v, tiles.q_tiles, 0.1, 2)
        saved = Saved(q, k, v, out, lse, dout, dlse)
        # One program adds to dQ in one order.
        one_pass = one_pass_backward(modelled, saved, tiles, 1)
        return [out, *split_backward(modelled, saved, tiles, 2), *one_pass]

    before = everything()
    for x in (q, k, v, dout, dlse.T):
        x[inside] = torch.nan
    for old, new in zip(before, everything(), strict=True):
        assert torch.equal(old[:100], new[:100])
        assert torch.equal(old[250:], new[250:])


class OnTheModel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        modelled: Model,
        tiles: Tiles,
        pass_over: Callable[..., list[Tensor]],
    ) -> tuple[Tensor, Tensor]:
        out, lse = modelled["forward"].attention_forward_sm90(q, k, v, tiles.q_tiles, 0.125, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (modelled, tiles, pass_over)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        modelled, tiles, pass_over = ctx.rest
        dout, dlse = upstream
        q, k, v, out, lse = ctx.saved_tensors
        saved = Saved(q, k, v, out, lse, dout.contiguous(), dlse)
        gradients = pass_over(modelled, saved, tiles, 2, scale=0.125)
        return (*gradients, None, None, None)


def one_pass_that_loses_a_part(*arguments: Any, **options: Any) -> list[Tensor]:
    dq, dk, dv = one_pass_backward(*arguments, **options)
    dq[70:80] *= 0.9
    return [dq, dk, dv]


@pytest.mark.parametrize("one_pass", [one_pass_backward, one_pass_that_loses_a_part])
@pytest.mark.slow
def test_the_self_check_judges_both_passes_in_bf16(
    modelled: Model, one_pass: Callable[..., list[Tensor]]
) -> None:
    borders = borders_of([1, 65, 130, 0])
    pack = Pack(borders, 130, 201)
    tiles = make_tiles(borders, borders, 201, 201, CONFIG)

    def on(pass_over: Callable[..., list[Tensor]], _pack: Pack) -> Attend:
        return lambda q, k, v: OnTheModel.apply(q, k, v, modelled, tiles, pass_over)

    backends: dict[str, Callable[[Pack], Attend]] = {
        "gluon": partial(on, one_pass),
        "gluon_split": partial(on, split_backward),
    }
    verdicts = attention_verdicts(
        backends, Heads(2, 1, 64), torch.bfloat16, torch.device("cpu"), pack, pack, rounds=1
    )
    assert verdicts[1].failed == ""
    if one_pass is one_pass_backward:
        assert verdicts[0].failed == ""
    else:
        choice = choose("attention", verdicts)
        assert choice.backend == "gluon_split"
        assert "refused: gluon: dq is off by" in choice.line


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_compiles_with_overlapping_products(head_dim: int, tmp_path: Path) -> None:
    printed = run("attention.compiled", "gluon", str(head_dim), TRITON_CACHE_DIR=str(tmp_path))
    needs = [json.loads(line) for line in printed.splitlines()]
    for need in needs:
        assert need["shared"] <= 232_448, need
        for step in need["steps"]:
            # The pass that holds dK, dV and dQ of large heads loads constants of its loops again.
            allowed = 20 if need["kernel"].endswith("with dQ") and head_dim > 64 else 0
            assert step["spill_stores"] == 0, need
            assert step["spill_loads"] <= allowed, need
    # A product of each part of a head stands for itself.
    parts = 2 if head_dim == 96 else 1
    # In each of two consumers' two loops products are left running while scores are worked on: the
    # output's; dQ's and dP's, then dP's, and dP's before the loops. In steps of dK and dV, three
    # times, of two consumers or of one.
    consumers = 2 if head_dim < 128 else 1
    expected = {
        "forward_sm90_kernel": [parts] * 4,
        "dq_sm90_kernel": [parts, 2 * parts, parts, 2 * parts, parts] * 2,
        "dkdv_sm90_kernel": [parts] * 6 * consumers,
        "dkdv_sm90_kernel with dQ": [parts] * 6,
        "delta_kernel": [],
    }
    running = {need["kernel"]: [int(n) for n in need["waits"] if n != "0"] for need in needs}
    assert running == expected
    for need in needs[:-1]:
        assert {24, 240} <= set(need["setmaxnreg"]), need


def test_descriptors_are_accepted_and_other_strides_are_copied() -> None:
    joined = torch.zeros(5, 6, 64, dtype=torch.bfloat16)
    q, k = joined[:, :4], joined.transpose(1, 2).contiguous().transpose(1, 2)[:, :2]
    assert pipeline.with_adjacent_heads(q) is q
    assert pipeline.with_adjacent_heads(k).stride() == (128, 64, 1)
    expanded = joined[:1, :4].expand(5, 4, 64)  # what the gradient of a sum is
    assert pipeline.with_adjacent_heads(expanded).stride() == (256, 64, 1)
    ragged, _ = pipeline.descriptors(q, 128)
    assert sum(ragged.strides[:2]) == 1 << 34  # times 2^30 rows, an address's whole range
    blocks = [part.block_shape for part in pipeline.descriptors(torch.zeros(5, 2, 96), 64)]
    assert blocks == [[1, 1, 64, 64], [1, 1, 64, 32]]


def test_elsewhere_it_is_refused() -> None:
    q = torch.zeros(4, 1, 64)
    with pytest.raises(ValueError, match="needs float16 or bfloat16 on CUDA"):
        varlen_attention(q, q, q, borders_of([4]), 4, backend="gluon")
    with pytest.raises(ValueError, match="backend='gluon' has no window"):
        varlen_attention(q, q, q, borders_of([4]), 4, window=2, backend="gluon")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="no sm_90 CUDA device",
)
@pytest.mark.timeout(900)
def test_500_packs_on_the_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(500):
        inputs, borders, _ = random_pack(generator, (64, 96, 128)[number % 3])
        ours = results(inputs, borders, None, 0.0, "gluon")
        assert torch.equal(ours[0], results(inputs, borders, None, 0.0, "gluon")[0]), number
        triton = results(inputs, borders, None, 0.0, "triton")
        exact = results([x.float() for x in inputs], borders, None, 0.0, "reference")
        for a, b, c in zip(ours, triton, exact, strict=True):
            rounding = 2 * 2**-8 * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + rounding, number
