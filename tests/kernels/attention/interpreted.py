"""Checks of the Triton attention in Triton's interpreter, in fp32 against float64.

``TRITON_INTERPRET=1 python -m tests.kernels.attention.interpreted CHECK``: the interpreter is
chosen when Triton is imported, so these run in processes of their own. Every uninitialised tensor
is NaN.
"""

import functools
import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention_tiles, varlen_attention
from kernels.attention import tile_config
from kernels.attention.op import attention_backward_op, attention_op, most_pairs
from kernels.attention.saved import Saved
from kernels.attention.sm90.dkdv import KEYS
from kernels.attention.tile_scheduler import make_tiles
from tests.kernels.attention.one_pass_twin import twin_backward

Gradients = tuple[Tensor, Tensor, Tensor]


def draw(
    lengths: list[int],
    lengths_k: list[int] | None = None,
    extra: int = 0,
    heads: tuple[int, int] = (2, 1),
    size: int = 16,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v as strided views of one projection where their lengths allow it, and borders."""
    generator = torch.Generator().manual_seed(sum(lengths) + 1)
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    tokens = sum(lengths) + extra
    if lengths_k is None:
        joined = torch.randn(tokens, heads[0] + 2 * heads[1], size, generator=generator)
        q, k, v = joined.split([heads[0], heads[1], heads[1]], 1)
        return q, k, v, borders, None
    q = torch.randn(tokens, heads[0], size, generator=generator)
    k, v = torch.randn(2, sum(lengths_k) + extra, heads[1], size, generator=generator)
    return q, k, v, borders, torch.tensor([0, *lengths_k]).cumsum(0, dtype=torch.int32)


def noise(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Tensor,
    borders_k: Tensor | None,
    backend: str,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Gradients]:
    """Output, log-sum-exp and the gradients for fixed upstream gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = varlen_attention(
        *leaves,
        borders,
        int(borders.diff().max()),
        cu_seqlens_k=borders_k,
        window=window,
        softcap=softcap,
        return_lse=True,
        backend=backend,
    )  # type: ignore[call-overload]
    dout = noise(out.shape) if dout is None else dout
    dlse = noise(lse.shape) if dlse is None else dlse
    seen = torch.isfinite(lse)
    loss = (out * dout).sum() + (torch.where(seen, lse, 0) * dlse).sum()
    dq, dk, dv = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return out.detach(), lse.detach(), (dq, dk, dv)


def compare(
    lengths: list[int],
    lengths_k: list[int] | None = None,
    extra: int = 0,
    heads: tuple[int, int] = (2, 1),
    size: int = 16,
    window: int | None = None,
    softcap: float = 0.0,
    factor: float = 1.0,
) -> None:
    """Everything against the quadratic reference in float64; large ``factor``, large logits."""
    q, k, v, borders, borders_k = draw(lengths, lengths_k, extra, heads, size)
    q = q * factor
    out, lse, gradients = attend(
        q, k, v, borders, borders_k, "triton", window=window, softcap=softcap
    )
    exact = (q.double(), k.double(), v.double())
    # The reference's log-sum-exp has a NaN gradient where a query sees no key; ours has none.
    expected, expected_lse, expected_gradients = attend(
        *exact, borders, borders_k, "reference", window=window, softcap=softcap
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6 * factor)
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        theirs = theirs.nan_to_num()
        error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-3)
        assert error < 1e-5 * factor, (lengths, lengths_k, error)
    assert out[sum(lengths) :].eq(0).all()
    assert gradients[0][sum(lengths) :].eq(0).all()
    for gradient in gradients[1:]:
        assert gradient[sum(lengths_k or lengths) :].eq(0).all()


def gradients() -> None:
    """The list of shapes that have broken other kernels, then drawn ones."""
    compare([0, 0, 40, 0, 1, 3, 0], extra=5, heads=(4, 2))  # empty ones everywhere
    compare([0, 0], extra=3)  # nothing but padding
    compare([1, 1, 1], heads=(3, 3))  # max_seqlen of 1
    compare([31, 32, 33], heads=(1, 1))  # around a tile
    compare([65], heads=(3, 1), size=48)  # 48 = 32 + 16, as 96 = 64 + 32
    compare([40], heads=(1, 1), window=1)
    compare([90], heads=(1, 1), window=40, softcap=3.0, size=48)
    compare([50, 2], heads=(1, 1), factor=300.0)  # one key takes all the weight
    compare([70, 20, 0, 3], [40, 33, 9, 0], extra=2, heads=(1, 1))  # some queries see no key
    compare([33, 1], [95, 64], heads=(1, 1), window=33)  # the last part of a context
    # Where the diagonal and the window's edge meet the ends of a loop's steps.
    compare([10, 10], [24, 25], heads=(1, 1))
    compare([60], [74], heads=(1, 1))
    compare([50], heads=(1, 1), window=33)
    compare([70], heads=(1, 1), window=47)

    @settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 70)), min_size=1, max_size=3),
        st.booleans(),
        st.integers(0, 4),
        st.sampled_from([(1, 1), (4, 2), (3, 1)]),
        st.sampled_from([16, 48]),
        st.one_of(st.none(), st.integers(1, 80)),
        st.sampled_from([0.0, 5.0]),
    )
    def drawn(
        pairs: list[tuple[int, int]],
        separate: bool,
        extra: int,
        heads: tuple[int, int],
        size: int,
        window: int | None,
        softcap: float,
    ) -> None:
        queries, keys = ([pair[i] for pair in pairs] for i in range(2))
        compare(queries, keys if separate else None, extra, heads, size, window, softcap)

    drawn()


def isolation() -> None:
    """What a segment holds, NaN included, changes no bit of another's results."""
    lengths, inside = [20, 40, 9], slice(20, 60)
    q, k, v, borders, _ = draw(lengths, extra=9)
    before = attend(q, k, v, borders, None, "triton")
    again = attend(q, k, v, borders, None, "triton")
    dout = noise(q.shape)
    for value in (torch.nan, 7.0):
        for where in (inside, slice(69, None)):
            q1, k1, v1, dout1 = spoiled = [x.clone() for x in (q, k, v, dout)]
            for x in spoiled:
                x[where] = value
            after = attend(q1, k1, v1, borders, None, "triton", dout=dout1)
            others = torch.ones(len(q), dtype=torch.bool)
            others[where] = False
            assert torch.equal(before[0][others], after[0][others]), (value, where)
            assert torch.equal(before[1][:, others], after[1][:, others])
            for ours, theirs in zip(before[2], after[2], strict=True):
                assert torch.equal(ours[others], theirs[others]), (value, where)
            if where is not inside:
                assert after[0][where].eq(0).all()
                assert all(x[where].eq(0).all() for x in after[2])
    for ours, theirs in zip((*before[:2], *before[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(ours, theirs)
    # Nor does it matter whether there are others at all.
    single = torch.tensor([0, 40], dtype=torch.int32)
    q1, k1, v1 = (x[inside] for x in (q, k, v))
    alone = attend(q1, k1, v1, single, None, "triton", dout=dout[inside], dlse=torch.zeros(2, 40))
    packed = attend(q, k, v, borders, None, "triton", dout=dout, dlse=torch.zeros(2, len(q)))
    assert torch.equal(alone[0], packed[0][inside])
    for ours, theirs in zip(alone[2], packed[2], strict=True):
        assert torch.equal(ours, theirs[inside])


def tiles(architecture: str, size: int, group: int, everything: bool) -> None:
    """The tile sizes that run on a GPU, whose steps may be as large as a tile."""
    entries = tile_config.find_entries(tile_config.read_configs(), architecture, size, group)
    tile_config.entries_of = lambda *_: entries
    heads = (group, 1)
    odd, queries, keys = [0, 1, 63, 64, 65, 0, 127], [64, 1, 0, 130], [200, 63, 17, 131]
    compare(odd, None, 3, heads, size)
    if everything:
        for window, softcap in ((100, 0.0), (64, 5.0), (1, 0.0)):
            compare(odd, None, 3, heads, size, window, softcap)
        compare([128, 129], None, 0, heads, size)
        compare(queries, keys, 2, heads, size)
        compare(queries, keys, 2, heads, size, 100)


def one_pass() -> None:
    """The twin of the sm_90 backward pass in one, at its real tile sizes, against float64."""
    config = tile_config.TileConfig(KEYS, KEYS, *[64, 8, 2] * 3)
    for lengths, lengths_k, extra, heads, size in (
        ([130, 0, 1, 200], None, 20, (4, 2), 64),
        ([127, 128, 129], None, 0, (1, 1), 128),
        ([100, 20, 70], [200, 0, 150], 5, (1, 1), 64),  # some queries see no key
    ):
        q, k, v, borders, borders_k = draw(lengths, lengths_k, extra, heads, size)
        leaves = [x.double() for x in (q, k, v)]
        out, lse, expected = attend(
            leaves[0], leaves[1], leaves[2], borders, borders_k, "reference"
        )
        keys = borders if borders_k is None else borders_k
        tiles = make_tiles(borders, keys, len(q), len(k), config)
        inputs = (q, k, v, out.float(), lse.float(), noise(out.shape), noise(lse.shape))
        saved = Saved(*(x.contiguous() for x in inputs))
        computed = twin_backward(saved, tiles.kv_tiles, size**-0.5)
        for ours, theirs in zip(computed, expected, strict=True):
            theirs = theirs.nan_to_num()
            assert (ours - theirs).norm() < 1e-5 * theirs.norm(), (lengths, size)


def op() -> None:
    """The torch.library op: opcheck, no graph breaks, shared tables, checkpointing, FLOPs."""
    q, k, v, borders, _ = draw([12, 0, 7], extra=3)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    tiles = attention_tiles(borders, 22, 16, 2)
    options = (tiles.q_tiles, tiles.kv_tiles, list(tiles.config), 12, 0.25, 0, 0.0, "triton")
    torch.library.opcheck(attention_op, (q, k, v, *options))
    out, lse = (x.detach() for x in attention_op(q, k, v, *options))
    saved = [x.detach() for x in (q, k, v, out, lse, out.transpose(0, 1).clone().transpose(0, 1))]
    torch.library.opcheck(attention_backward_op, (*saved, torch.zeros_like(lse), *options))

    def attention(q: Tensor, k: Tensor, v: Tensor, tiles: object) -> Tensor:
        out: Tensor = varlen_attention(
            q, k, v, borders, 12, window=7, backend="triton", tiles=tiles
        )  # type: ignore[call-overload]
        return out

    eager = attention(q, k, v, None)
    expected = torch.autograd.grad(eager.sum(), (q, k, v))
    for shared in (None, attention_tiles(borders, 22, 16, 2, window=7)):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, shared)
        assert torch.equal(eager, compiled)
        for ours, theirs in zip(
            torch.autograd.grad(compiled.sum(), (q, k, v)), expected, strict=True
        ):
            assert torch.equal(ours, theirs)
    # Batches differ in their longest segment and may differ in length.
    changing = torch.compile(
        lambda q, borders, longest: varlen_attention(q, q, q, borders, longest, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    for tokens, longest in ((22, 22), (22, 12), (22, 9000), (25, 13)):
        x, ends = torch.randn(tokens, 2, 16), torch.tensor([0, 12, tokens], dtype=torch.int32)
        plain = varlen_attention(x, x, x, ends, longest, backend="triton")
        assert torch.equal(changing(x, ends, longest), plain), (tokens, longest)
    # A checkpointed block that keeps what the op returns does not run its forward pass again.
    kept = [torch.ops.megadocs.varlen_attention.default]
    context = functools.partial(create_selective_checkpoint_contexts, kept)
    with FlopCounterMode(display=False) as counter:
        out = checkpoint(attention, q, k, v, tiles, use_reentrant=False, context_fn=context)
        recomputed = torch.autograd.grad(out.sum(), (q, k, v))
    assert counter.get_total_flops() == 14 * 2 * 16 * most_pairs(22, 12, 7)
    for ours, theirs in zip(recomputed, expected, strict=True):
        assert torch.equal(ours, theirs)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    assert torch.empty(1).isnan()
    if sys.argv[1] == "tiles":
        tiles(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:] == ["everything"])
    else:
        checks = {"gradients": gradients, "isolation": isolation, "one_pass": one_pass, "op": op}
        checks[sys.argv[1]]()
    print("passed")
