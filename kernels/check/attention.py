"""Attention against float64, on segments of awkward lengths and with poisoned neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.interface import HALF, LACKS, refusal, varlen_attention
from ..attention.libraries import cudnn_fits, has_flash_attn, library_attention
from ..attention.op import OURS, attention_tiles
from ..attention.reference import reference_attention
from ..attention.sdpa import torch_attention
from ..segments import padded_borders
from .verdicts import (
    ROUNDS,
    Choice,
    Verdict,
    cache_file,
    cached,
    choose,
    circumstances,
    distance,
    median_seconds,
    too_far,
)

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 2, 300)  # of the checked segments, then empty ones
TAIL = 37  # tokens behind the last border
CANDIDATES = ("gluon", "gluon_split", "triton", "cudnn", "flash", "flash_attn")
DETERMINISTIC = ("gluon_split", "triton", "torch", "reference")

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class Pack(NamedTuple):
    """Segments on a packed axis; those of the keys where they differ (context parallelism)."""

    cu_seqlens: Tensor
    max_seqlen: int
    tokens: int
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    tokens_k: int | None = None

    def to(self, device: torch.device) -> Pack:
        """The same borders on ``device``."""
        keys = self.cu_seqlens_k
        return self._replace(
            cu_seqlens=self.cu_seqlens.to(device),
            cu_seqlens_k=None if keys is None else keys.to(device),
        )


class Heads(NamedTuple):
    query: int
    key: int
    size: int


class Results(NamedTuple):
    """What a backend makes of one case; ``lse`` None where it has none."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Errors(NamedTuple):
    out: float
    dq: float
    dk: float
    dv: float


class AttentionCase:
    """Inputs on a pack, and what plain PyTorch makes of them in float64 and in their dtype."""

    def __init__(self, pack: Pack, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        self.pack = pack.to(device)
        self.scale = heads.size**-0.5
        generator = torch.Generator(device).manual_seed(0)
        tokens_k = pack.tokens if pack.tokens_k is None else pack.tokens_k

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.inputs = (
            draw(pack.tokens, heads.query, heads.size),
            draw(tokens_k, heads.key, heads.size),
            draw(tokens_k, heads.key, heads.size),
        )
        self.dout = draw(pack.tokens, heads.query, heads.size)
        self.dlse = torch.randn(heads.query, pack.tokens, generator=generator, device=device)

    def run(
        self,
        attend: Attend,
        inputs: tuple[Tensor, Tensor, Tensor] | None = None,
        dout: Tensor | None = None,
        with_lse: bool = True,
    ) -> Results:
        """Forward and backward; the log-sum-exp has a gradient too where the backend gives it."""
        leaves = [x.detach().requires_grad_() for x in inputs or self.inputs]
        out, lse = attend(*leaves)
        upstream = (self.dout if dout is None else dout).to(out.dtype)
        results, gradients = [out], [upstream]
        if lse is not None and with_lse:
            seen = lse.isfinite()
            results.append(torch.where(seen, lse, 0))
            gradients.append(torch.where(seen, self.dlse, 0).to(lse.dtype))
        dq, dk, dv = torch.autograd.grad(results, leaves, gradients)
        kept = None if lse is None else lse.detach()
        return Results(out.detach(), kept, dq, dk, dv)

    def exact(self, with_lse: bool) -> Results:
        """The definition in float64."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            pack = self.pack
            keys = pack.cu_seqlens if pack.cu_seqlens_k is None else pack.cu_seqlens_k
            return reference_attention(q, k, v, pack.cu_seqlens, keys, self.scale)

        q, k, v = (x.double() for x in self.inputs)
        return Results(*(zero_if_nan(x) for x in self.run(attend, (q, k, v), with_lse=with_lse)))

    @functools.cached_property
    def plain_errors(self) -> Errors:
        """How far PyTorch's own operations in the dtype of the inputs are from float64."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            pack = self.pack
            with sdpa_kernel(SDPBackend.MATH):
                if pack.cu_seqlens_k is None:
                    return torch_attention(q, k, v, pack.cu_seqlens, self.scale), None
            borders = (pack.cu_seqlens, pack.cu_seqlens_k)
            return reference_attention(q, k, v, *borders, self.scale)[0], None

        plain, exact = self.run(attend), self.exact(False)
        names = Errors._fields
        return Errors(
            *(distance(getattr(plain, name).nan_to_num(), getattr(exact, name)) for name in names)
        )

    def poisoned(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]:
        """Inputs and upstream gradient with NaN in every other segment and behind the last border;
        which queries and which keys are not in one of those."""
        pack, (q, k, v) = self.pack, self.inputs
        clean = every_other(pack.cu_seqlens, pack.tokens)
        keys = pack.cu_seqlens if pack.cu_seqlens_k is None else pack.cu_seqlens_k
        clean_k = every_other(keys, len(k))
        nan = float("nan")
        spoilt = (
            q.masked_fill(~clean[:, None, None], nan),
            k.masked_fill(~clean_k[:, None, None], nan),
            v.masked_fill(~clean_k[:, None, None], nan),
        )
        return spoilt, self.dout.masked_fill(~clean[:, None, None], nan), clean, clean_k


def zero_if_nan(x: Tensor | None) -> Any:
    """The reference has NaN gradients where a query sees no key."""
    return None if x is None else x.nan_to_num(nan=0.0, neginf=float("-inf"))


def every_other(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """bool ``[tokens]``: the tokens of the segments 0, 2, 4, ..."""
    segment = torch.searchsorted(
        cu_seqlens, torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32), right=True
    )
    return (segment % 2 == 1) & (segment < len(cu_seqlens))


def attention_failure(case: AttentionCase, attend: Attend, deterministic: bool) -> str:
    """What is wrong with a backend, or nothing."""
    try:
        first, second = case.run(attend), case.run(attend)
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error).splitlines()[0][:200] or 'no message'}"
    exact, plain_errors = case.exact(first.lse is not None), case.plain_errors
    for name in ("out", "dq", "dk", "dv"):
        if why := too_far(
            name, getattr(first, name), getattr(exact, name), getattr(plain_errors, name)
        ):
            return why
        if not getattr(second, name).isfinite().all():
            return f"{name} is not finite in the second run"
    if first.lse is not None and exact.lse is not None:
        tolerance = 1e-3 if first.out.dtype in HALF else 1e-5
        close = torch.isclose(first.lse.double(), exact.lse, rtol=tolerance, atol=tolerance)
        if not close.all():
            return f"the log-sum-exp is wrong in {int((~close).sum())} places"
    for name in Results._fields if deterministic else ("out", "lse"):
        if getattr(first, name) is not None and not torch.equal(
            getattr(first, name), getattr(second, name)
        ):
            return f"{name} has other bits in the second run"
    return leak(case, attend, deterministic, first)


def leak(case: AttentionCase, attend: Attend, deterministic: bool, before: Results) -> str:
    """Whether NaN in other segments reaches a segment."""
    inputs, dout, clean, clean_k = case.poisoned()
    after = case.run(attend, inputs, dout, with_lse=before.lse is not None)
    for name, rows in (("out", clean), ("dq", clean), ("dk", clean_k), ("dv", clean_k)):
        old, new = getattr(before, name)[rows], getattr(after, name)[rows]
        same = torch.equal(old, new)
        if not same and not deterministic and name != "out":
            same = torch.allclose(old.float(), new.float(), rtol=2e-2, atol=2e-2)
        if not same:
            return f"{name} changes when other segments hold NaN"
    if after.out[int(case.pack.cu_seqlens[-1]) :].ne(0).any():
        return "the output behind the last border is not 0"
    return ""


def bind(backend: str, heads: Heads, pack: Pack) -> Attend:
    """A backend of :func:`kernels.varlen_attention` on a pack, its tables made beforehand."""
    if backend == "cudnn":  # also where it would not be chosen for the padding

        def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            borders = (pack.cu_seqlens, pack.max_seqlen)
            return library_attention(q, k, v, *borders, heads.size**-0.5, library="cudnn"), None

        return cudnn
    options: dict[str, Any] = {"backend": backend, "cu_seqlens_k": pack.cu_seqlens_k}
    if backend in OURS:
        options["tiles"] = attention_tiles(
            pack.cu_seqlens,
            pack.tokens,
            heads.size,
            heads.query // heads.key,
            max_seqlen=pack.max_seqlen,
            cu_seqlens_k=pack.cu_seqlens_k,
            tokens_k=pack.tokens_k,
            gluon=backend != "triton",
        )
    with_lse = "return_lse" not in LACKS[backend]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        found: Any = varlen_attention(  # type: ignore[call-overload]
            q,
            k,
            v,
            pack.cu_seqlens,
            pack.max_seqlen,
            max_seqlen_k=pack.max_seqlen_k,
            return_lse=with_lse,
            **options,
        )
        return found if with_lse else (found, None)

    return attend


def awkward_pack() -> Pack:
    """What the trainer's ``pack`` makes of ``LENGTHS``: empty segments behind them, and a tail."""
    borders = [0]
    for length in LENGTHS:
        borders.append(borders[-1] + length)
    tokens = borders[-1] + TAIL
    return Pack(*padded_borders(borders, tokens), tokens)


def chunk_of(pack: Pack, start: int, end: int) -> Pack:
    """Queries ``start`` to ``end`` and all keys before their end, as in context parallelism."""
    return Pack(
        pack.cu_seqlens.clamp(start, end) - start,
        min(pack.max_seqlen, end - start),
        end - start,
        pack.cu_seqlens.clamp(max=end),
        pack.max_seqlen,
        pack.tokens,
    )


def attention_verdicts(
    backends: dict[str, Callable[[Pack], Attend]],
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    checked: Pack,
    timed: Pack,
    rounds: int = ROUNDS,
    deterministic: Collection[str] = DETERMINISTIC,
) -> list[Verdict]:
    """A verdict for every backend.

    Args:
        backends: how to put each on a pack.
        heads: of the run.
        dtype: of the run.
        device: where it runs.
        checked: the pack of the check; must have segments of awkward lengths.
        timed: the pack of the timing, of the run's own shape.
        rounds: measurements of each backend.
        deterministic: those whose gradients must have the same bits in every run.
    """
    checked, timed = checked.to(device), timed.to(device)
    case = AttentionCase(checked, heads, dtype, device)
    failed = {}
    for name, on in backends.items():
        try:
            failed[name] = attention_failure(case, on(checked), name in deterministic)
        except Exception as error:
            failed[name] = f"raised {type(error).__name__}: {str(error)[:200]}"
    right = [name for name in backends if not failed[name]]
    seconds: dict[str, float] = {}
    if len(right) > 1:
        large = AttentionCase(timed, heads, dtype, device)
        bound = {name: backends[name](timed) for name in right}
        calls = {name: partial(large.run, attend) for name, attend in bound.items()}
        seconds, broken = median_seconds(calls, device, rounds)
        failed |= broken
    return [Verdict(name, failed[name], seconds.get(name)) for name in backends]


def attention_backends(
    heads: Heads, device: torch.device, dtype: torch.dtype, context_parallel: bool = False
) -> tuple[dict[str, Callable[[Pack], Attend]], list[Verdict]]:
    """What could run here, and verdicts of what cannot."""
    if device.type != "cuda" or dtype not in HALF:
        names = ("reference",) if context_parallel else ("torch", "reference")
        return {name: partial(bind, name, heads) for name in names}, []
    found: dict[str, Callable[[Pack], Attend]] = {}
    refused = []
    for name in CANDIDATES:
        why = refusal(name, device, heads.size)
        if name == "flash_attn" and not has_flash_attn():
            continue
        if context_parallel and "cu_seqlens_k" in LACKS[name]:
            continue
        if why is None:
            found[name] = partial(bind, name, heads)
        else:
            refused.append(Verdict(name, why, None))
    return found, refused


def check_attention(
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    timed: Pack,
    only: str | None = None,
    checked: Pack | None = None,
    file: Path | None = None,
    deterministic: bool = False,
) -> Choice:
    """The attention of a run: the fastest that is right, or ``only`` if that is right.

    Args:
        heads: of the run.
        dtype: of the run.
        device: where it runs.
        timed: a pack of the run.
        only: the one backend to look at.
        checked: the pack of the check; default :func:`awkward_pack`.
        file: where verdicts are kept; default :func:`cache_file`.
        deterministic: leave out those whose gradients have other bits in every run.

    Raises:
        ValueError: no backend is right; names what failed.
    """
    split = timed.cu_seqlens_k is not None
    if checked is None:
        checked = awkward_pack()
        checked = chunk_of(checked, 200, checked.tokens) if split else checked
    backends, refused = attention_backends(heads, device, dtype, split)
    if only is not None:
        backends = {only: partial(bind, only, heads)}
        refused = []
    if deterministic and only is None:
        refused += [
            Verdict(name, "it is not deterministic", None)
            for name in backends
            if name not in DETERMINISTIC
        ]
        backends = {name: backends[name] for name in backends if name in DETERMINISTIC}
    lengths = timed.cu_seqlens.diff().sort().values
    if not fits(timed) and "cudnn" in backends and only is None:
        del backends["cudnn"]
        refused.append(Verdict("cudnn", "segments x longest exceeds twice the tokens", None))
    key = circumstances(device) | {
        "what": "attention",
        "heads": list(heads),
        "dtype": str(dtype),
        "split": split,
        "only": only,
        "backends": list(backends),
        # Packs of one run differ in their borders; what decides the speed is of this order.
        "tokens": timed.tokens,
        "segments": len(lengths),
        "max_seqlen": timed.max_seqlen,
    }
    verdicts = cached(
        key,
        lambda: attention_verdicts(backends, heads, dtype, device, checked, timed),
        file or cache_file(),
    )
    return choose("attention", verdicts + refused)


def fits(pack: Pack) -> bool:
    """Whether cuDNN may be used."""
    return cudnn_fits(len(pack.cu_seqlens) - 1, pack.max_seqlen, pack.tokens)
