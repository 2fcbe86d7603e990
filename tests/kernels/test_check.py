"""The self-check refuses what is wrong, leaks or raises, and takes the fastest of the rest."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.check import Heads, Pack, Verdict, check_attention, chunk_of
from kernels.check.__main__ import main
from kernels.check.attention import (
    LENGTHS,
    TAIL,
    Attend,
    attention_verdicts,
    awkward_pack,
    bind,
)
from kernels.check.loss import Loss, gradients, loss_verdicts, plain_loss
from kernels.check.verdicts import choose
from trainer.data.random_stream import random_windows

HEADS = Heads(2, 1, 16)
CPU = torch.device("cpu")
CALLS: list[int] = []
OnPack = Callable[[Pack, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
SMALL = Pack(torch.tensor([0, 40, 64], dtype=torch.int32), 64, 64)


def verdicts(
    *attends: OnPack, checked: Pack | None = None, dtype: torch.dtype = torch.float32
) -> list[Verdict]:
    """Of backends that are called 0, 1, ..., each of which says that it is deterministic."""
    backends: dict[str, Callable[[Pack], Attend]] = {
        str(index): partial(partial, own) for index, own in enumerate(attends)
    }
    pack = checked or awkward_pack()
    return attention_verdicts(backends, HEADS, dtype, CPU, pack, SMALL, 1, deterministic=backends)


def right(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    return bind("reference", HEADS, pack)(q, k, v)


class SlightlyWrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None  # type: ignore[attr-defined]


def wrong_gradient(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    return right(pack, q, SlightlyWrong.apply(k, 1.001), v)


def wrong_lse(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    out, lse = right(pack, q, k, v)
    assert lse is not None
    return out, lse + 1e-3


def leaky(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Multiplies what other segments hold by 0 instead of leaving it out."""
    out, lse = right(pack, q, k, v)
    return out + 0 * v.sum(), lse


def dense(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Does not see the borders."""
    keys = None if pack.cu_seqlens_k is None else pack.cu_seqlens_k[[0, -1]]
    return right(pack._replace(cu_seqlens=pack.cu_seqlens[[0, -1]], cu_seqlens_k=keys), q, k, v)


def raising(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError("no kernel image is available")


def unsteady(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    out, lse = right(pack, q, k, v)
    CALLS.append(0)
    return out * (1 + 2**-22 * (len(CALLS) % 2)), lse


def test_the_checked_pack_is_that_of_pack() -> None:
    tokens = sum(LENGTHS) + TAIL
    batch = random_windows([LENGTHS], tokens)
    pack = awkward_pack()
    assert torch.equal(pack.cu_seqlens, batch.cu_seqlens)
    assert (pack.max_seqlen, pack.tokens) == (batch.max_seqlen, len(batch.input_ids))
    lengths = batch.cu_seqlens.diff()
    assert {0, 1, 63, 64, 65, 127, 128, 129} <= set(lengths.tolist())


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (wrong_gradient, "dk is off by"),
        (wrong_lse, "the log-sum-exp is wrong in"),
        (leaky, "out changes when other segments hold NaN"),
        (dense, "out is off by"),
        (raising, "raised RuntimeError: no kernel image is available"),
        (unsteady, "out has other bits in the second run"),
    ],
)
def test_a_wrong_backend_is_refused_by_name_and_never_chosen(attend: OnPack, why: str) -> None:
    found = verdicts(attend)
    assert found[0].failed.startswith(why)
    found.append(Verdict("1", "", None))
    choice = choose("attention", found)
    assert choice.backend == "1"
    assert f"0: {why}" in choice.line
    with pytest.raises(ValueError, match="no attention passes the self-check"):
        choose("attention", found[:1])


def test_the_fastest_that_is_right_is_chosen() -> None:
    timed = verdicts(right, right)
    assert all(not verdict.failed and verdict.seconds for verdict in timed)
    found = [Verdict("a", "", 3e-3), Verdict("b", "raised", 1e-3), Verdict("c", "", 2e-3)]
    choice = choose("attention", found)
    assert choice.backend == "c"
    assert choice.line == "attention: c, 2.00 ms; a takes 1.50 x as long (refused: b: raised)"


def test_what_is_not_deterministic_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.check.attention.DETERMINISTIC", ("reference",))
    choice = check_attention(
        HEADS, torch.float32, CPU, SMALL, checked=SMALL, file=tmp_path / "f", deterministic=True
    )
    assert choice.backend == "reference"
    assert "refused: torch: it is not deterministic" in choice.line


def test_chunks_of_context_parallelism_are_checked_too() -> None:
    pack = awkward_pack()
    checked = chunk_of(pack, 200, pack.tokens)
    [own, other] = verdicts(right, dense, checked=checked)
    assert not own.failed
    assert other.failed.startswith("out is off by")


def test_bf16_is_held_to_twice_pytorchs_error() -> None:
    def plain(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return bind("torch", HEADS, pack)(q, k, v)

    def off(pack: Pack, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return plain(pack, q, SlightlyWrong.apply(k, 1.05), v)

    [own, other] = verdicts(plain, off, dtype=torch.bfloat16)
    assert not own.failed
    assert other.failed.startswith("dk is off by")


def test_a_loss_that_is_wrong_is_refused() -> None:
    def off(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return plain_loss(hidden, SlightlyWrong.apply(weight, 1.001), targets)

    def careful(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        counted = (targets != -100)[:, None]
        return plain_loss(torch.where(counted, hidden, 0), weight, targets)

    def raising(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("out of resource")

    losses: dict[str, Loss] = {
        "right": careful,
        "off": off,
        "poisoned": plain_loss,
        "raising": raising,
    }
    found = loss_verdicts(losses, 16, 50, torch.float32, CPU, 32, rounds=1)
    assert [verdict.failed.partition(" is ")[0] for verdict in found] == [
        "",
        "the gradient of the hidden states",  # of the ignored rows
        "the gradient of the hidden states",
        "raised RuntimeError: out of resource",
    ]
    assert choose("loss", found).backend == "right"


def test_gradients_of_the_loss_are_those_of_pytorch() -> None:
    x, w = torch.randn(5, 4), torch.randn(7, 4)
    loss, dx, dw = gradients(plain_loss, x, w, torch.tensor([0, 6, -100, 2, 2]))
    assert loss.ndim == 0
    assert dx.shape == x.shape
    assert dw.shape == w.shape


def test_verdicts_are_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "verdicts.json"
    made = []

    def count(*arguments: object) -> list[Verdict]:
        made.append(arguments)
        return [Verdict("torch", "", 1.0), Verdict("reference", "too slow to be true", None)]

    monkeypatch.setattr("kernels.check.attention.attention_verdicts", count)
    check = partial(check_attention, HEADS, torch.float32, CPU, file=file)
    first, second = check(SMALL), check(SMALL)
    assert first == second
    assert "torch, the only one that is right here (refused: reference: too slow" in first.line
    assert len(made) == 1
    check(SMALL._replace(max_seqlen=128))
    monkeypatch.setattr("kernels.check.verdicts.source_hash", lambda: "changed")
    check(SMALL)
    assert len(made) == 3
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("heads", ["12/12x64", "16/16x96", "16/8x128"])
def test_what_runs_on_this_gpu_is_right_log_sum_exp_included(heads: str) -> None:
    assert main(["--heads", heads, "--tokens", "8192"]) == 0


def test_the_program_checks_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--heads 2/1x16 --tokens 64 --width 32 --vocabulary 100"
    assert main(sizes.split()) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^attention: (torch|reference), .* x as long$", printed, re.MULTILINE)
    assert "loss: torch" in printed
