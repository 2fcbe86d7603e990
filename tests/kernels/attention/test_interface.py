"""CPU attention against float64, gradients included; isolation of segments."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import varlen_attention
from kernels.attention import libraries
from kernels.attention.interface import automatic_backend, check_backend
from kernels.attention.libraries import cudnn_fits


def inputs(
    lengths: list[int], extra: int = 0, heads: tuple[int, int] = (4, 2), size: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + extra)
    tokens = sum(lengths) + extra
    q = torch.randn(tokens, heads[0], size, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, tokens, heads[1], size, generator=generator, dtype=torch.float64)
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return q, k, v, borders


def token_by_token(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """The definition, one query at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        for token in range(start, end):
            for head in range(q.shape[1]):
                keys, values = (
                    k[start : token + 1, head // group],
                    v[start : token + 1, head // group],
                )
                weights = (keys @ q[token, head] / math.sqrt(q.shape[2])).softmax(0)
                out[token, head] = weights @ values
    return out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 3))
def test_both_backends_equal_the_definition(lengths: list[int], extra: int) -> None:
    q, k, v, borders = inputs(lengths, extra)
    expected = token_by_token(q, k, v, borders)
    for backend in ("torch", "reference"):
        out = varlen_attention(q, k, v, borders, 9, backend=backend)
        torch.testing.assert_close(out, expected)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 7), max_size=6).map(lambda some: [*some, 0, 3]), st.integers(0, 2))
def test_gradients_agree_and_are_zero_after_the_last_border(lengths: list[int], extra: int) -> None:
    q, k, v, borders = inputs(lengths, extra)
    gradients = []
    for backend in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, borders, 7, backend=backend)  # type: ignore[call-overload]
        out.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours[sum(lengths) :].eq(0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_axis_of_padding_alone_still_reaches_keys_and_values(backend: str) -> None:
    leaves = [x.requires_grad_() for x in inputs([0], extra=3)[:3]]
    empty = torch.zeros(3, dtype=torch.int32)
    out = varlen_attention(*leaves, empty, 0, backend=backend)  # type: ignore[call-overload]
    assert out.eq(0).all()
    out.sum().backward()
    for leaf in leaves:  # a gradient that is missing would let the other ranks wait for ever
        assert leaf.grad is not None
        assert leaf.grad.eq(0).all()


def test_reference_passes_gradcheck() -> None:
    q, k, v, borders = inputs([3, 1, 4], size=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: varlen_attention(
            q, k, v, borders, 4, window=2, softcap=5.0, backend="reference"
        ),
        leaves,
    )


def test_a_segment_does_not_see_its_neighbours_bit_for_bit() -> None:
    q, k, v, borders = inputs([5, 6, 5])
    before = varlen_attention(q, k, v, borders, 6)
    for x in (q, k, v):
        x[5:11] += 1
    after = varlen_attention(q, k, v, borders, 6)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[5:11], after[5:11])


def test_log_sum_exp_joins_two_parts_of_the_keys() -> None:
    """Bottom-right causality and the LSE are what context parallelism needs."""
    q, k, v, borders = inputs([10])
    whole = varlen_attention(q, k, v, borders, 10)
    late = q[6:]
    b_q = torch.tensor([0, 4], dtype=torch.int32)
    near, near_lse = varlen_attention(late, k[6:], v[6:], b_q, 4, cu_seqlens_k=b_q, return_lse=True)
    scores = torch.einsum("qhd,khd->hqk", late, k[:6].repeat_interleave(2, 1)) / math.sqrt(8)
    far_lse = scores.logsumexp(-1)
    far = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[:6].repeat_interleave(2, 1))
    share = torch.sigmoid(near_lse.double() - far_lse).T[..., None]
    torch.testing.assert_close(near * share + far * (1 - share), whole[6:], atol=1e-6, rtol=1e-6)
    b_k = torch.tensor([0, 10], dtype=torch.int32)
    aligned = varlen_attention(late, k, v, b_q, 4, cu_seqlens_k=b_k)
    torch.testing.assert_close(aligned, whole[6:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 3, 8)}, "3 query heads are not a multiple of 2"),
        ({"k": torch.zeros(4, 2, 8)}, "must agree in tokens"),
        ({"q": torch.zeros(5, 8)}, r"must be \[T, H, Dh\]"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, "cu_seqlens must be"),
        ({"backend": "magic"}, "backend='magic'"),
        ({"backend": "torch", "window": 3}, "use backend='reference'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    q, k, v, borders = inputs([5])
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": borders, "max_seqlen": 5} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)  # type: ignore[call-overload]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What is asked of an sm_90 device before anything runs on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda")


def test_auto_is_cudnn_only_where_padding_costs_little(hopper: torch.device) -> None:
    assert automatic_backend(hopper, torch.bfloat16, 64, cudnn_fits(16, 4096, 65_536)) == "cudnn"
    assert automatic_backend(hopper, torch.bfloat16, 64, cudnn_fits(256, 4096, 65_536)) == "flash"
    window = {"cu_seqlens_k": False, "window": True, "softcap": False, "return_lse": False}
    assert automatic_backend(hopper, torch.bfloat16, 64, True, window) == "flash"
    assert automatic_backend(hopper, torch.float32, 64, True) == "torch"


def test_versions_that_are_wrong_are_refused_by_name(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92_200)
    with pytest.raises(ValueError, match="cuDNN 92200 gives NaN for segments of length 0"):
        check_backend("cudnn", hopper, torch.bfloat16, 64)
    assert automatic_backend(hopper, torch.bfloat16, 64, True) == "flash"
    monkeypatch.setattr(libraries, "HAS_CUDNN", False)
    with pytest.raises(ValueError, match=r"has no cuDNN in varlen_attn \(2.15 has\)"):
        check_backend("cudnn", hopper, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("backend", "head_dim", "message"),
    [
        ("gluon", 80, "head dimensions 64, 96 and 128, not 80"),
        ("triton", 100, "head dimension 100 is neither a power of two"),
        ("triton", 256, "no tiles for head dimension 256 on sm_90"),
        ("cudnn", 192, "head dimensions up to 128"),
        ("flash", 100, "in multiples of 8, not 100"),
    ],
)
def test_head_dimensions_are_checked_before_anything_is_built(
    hopper: torch.device, backend: str, head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_backend(backend, hopper, torch.bfloat16, head_dim)
    with pytest.raises(ValueError, match=f"backend='{backend}' needs float16 or bfloat16 on CUDA"):
        check_backend(backend, hopper, torch.float32, 64)


def test_our_package_and_hugging_faces_kernels_do_not_collide() -> None:
    """transformers looks for a package called ``kernels``; ours must not be taken for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    assert LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 7])
def test_flash_equals_the_reference_within_its_rounding(window: int | None) -> None:
    q, k, v, borders = (x.cuda() for x in inputs([70, 0, 1, 129, 40], extra=9, size=64))
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    plain = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    results = []
    for leaves, backend in ((exact, "reference"), (half, "flash"), (plain, "reference")):
        out = varlen_attention(*leaves, borders, 129, window=window, backend=backend)  # type: ignore[call-overload]
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        results.append([x.double() for x in (out, *gradients)])
    for expected, ours, rounded in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= 2 * (rounded - expected).abs().max() + 1e-6
        assert ours[240:].eq(0).all()
