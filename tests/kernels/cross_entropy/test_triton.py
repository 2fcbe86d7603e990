"""The Triton loss: interpreted against float64, compiled for three architectures without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

INTERPRETED = """
import itertools, torch
from kernels.cross_entropy.triton.anchored import anchored_cross_entropy
from tests.kernels.cross_entropy.test_interface import definition

def check(*arguments):
    for fused in (False, True):
        check_route(*arguments, fused)

def check_route(rows, depth, vocabulary, ignored, scale, z_loss, chunk, fused):
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=g) * scale
    w = torch.randn(vocabulary, depth, generator=g)
    targets = torch.randint(vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    row_weight = torch.rand(rows, generator=g) * (targets != -100)
    dx, dw = torch.full_like(x, torch.nan), torch.zeros_like(w)
    spoilt = x.masked_fill((targets < 0)[:, None], torch.nan)  # such rows may hold anything
    losses, _ = anchored_cross_entropy(spoilt, w, targets, row_weight, z_loss, chunk, dx, dw, fused)
    leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
    one = torch.tensor(1.0)
    expected = definition(*leaves, targets, None, row_weight.double(), one, z_loss=z_loss)
    torch.testing.assert_close((losses * row_weight).sum().double(), expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip((dx, dw), torch.autograd.grad(expected, leaves)):
        error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-9)
        assert error < 1e-5, (rows, scale, error)

def outputs(x, w, targets):
    row_weight = torch.full((len(targets),), 1e-6)
    dx, dw = torch.empty_like(x), torch.zeros(w.shape)
    losses, _ = anchored_cross_entropy(x, w, targets, row_weight, 0.0, 3, dx, dw)
    leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
    expected = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    return losses, expected, dx, dw, *torch.autograd.grad((expected * 1e-6).sum(), leaves)

# bf16, the target almost certain: its rounded logit would give losses of -0.07 and gradients of 7 %
x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
w = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.3
w[:4] = x * 0.9
losses, expected, dx, dw, dx_exact, dw_exact = outputs(x, w, torch.arange(4))
assert (losses - expected).abs().max() < 1e-6 and losses.min() >= 0, losses
assert dx.abs().max() < 1e-9 and dw.abs().max() < 1e-9

# hundreds of equal logits that lead the target by less and by more than what is repaired
for lead in (60.0, 79.0, 81.0, 87.0, 110.0, 130.0):
    x = torch.zeros(5, 16)
    x[:, 0] = 1
    w = torch.randn(600, 16, generator=torch.Generator().manual_seed(2)) * 30
    w[:, 0] = lead
    w[:5, 0] = 0
    losses, expected, dx, dw, dx_exact, dw_exact = outputs(x, w, torch.arange(5))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    assert (dx - dx_exact).norm() < 1e-5 * dx_exact.norm(), lead
    assert (dw - dw_exact).norm() < 1e-5 * dw_exact.norm(), lead

# a weight that is not a number must not end as a finite loss
w[300, 0] = torch.nan
assert outputs(x, w, torch.arange(5))[0].isnan().all()

check(5, 16, 5000, 0.3, 1.0, 0.0, 2)       # ragged vocabulary over two tiles, ragged chunks
check(4, 24, 4096, 0.0, 1.0, 0.01, 4)      # z-loss, D that is no power of two
check(6, 16, 300, 1.0, 1.0, 0.0, 6)        # everything ignored
check(1, 8, 7, 0.0, 1.0, 0.0, 1)           # one token
check(8, 16, 500, 0.2, 80.0, 0.0, 3)       # losses of hundreds of nats: rows are repaired
check(8, 16, 5000, 0.0, 40.0, 0.001, 8)    # repaired rows of two tiles, z-loss
print("equal")
"""

SWEPT = """
import itertools, torch
from kernels.cross_entropy.chunked import Gradients, Options, sweep_tokens, sweep_vocabulary
from kernels.cross_entropy.torch_steps import TORCH
from kernels.cross_entropy.triton.forward_only import forward_only
from kernels.cross_entropy.triton.steps import TRITON

def close(ours, theirs):
    assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-9, (ours, theirs)

g = torch.Generator().manual_seed(0)
x = torch.randn(7, 24, generator=g) * 3
w = torch.randn(4500, 24, generator=g)  # two ragged tiles
b = torch.randn(4500, generator=g)
targets = torch.tensor([0, 4095, 4096, 4499, 17, -100, 17])
strided = lambda t: torch.stack((t, t.flip(0)), 1)[:, 0]  # a column of a batch
row_weight = torch.rand(7, generator=g) * (targets >= 0)
double = [t.double() for t in (x, w, b)]
for softcap, smoothing, bias in itertools.product((0.0, 5.0), (0.0, 0.1), (False, True)):
    options = Options(softcap, 0.01, smoothing)
    results = []
    for steps, (h, m, v), weights, lean in (
        (TORCH, double, row_weight.double(), False),
        (TRITON, (x, w, strided(b)), row_weight, False),
        (TRITON, (x, w, strided(b)), row_weight, True),
    ):
        v = v if bias else None
        dx, dw, db = torch.full_like(h, torch.nan), torch.zeros_like(m), torch.zeros(4500).to(m)
        inputs = (steps, h, m, v, strided(targets), weights)
        wanted = Gradients(dx, None, None) if lean else Gradients(dx, dw, db)
        losses, lses = sweep_tokens(*inputs, options, 2 * 4500, wanted)
        if lean:
            sweep_vocabulary(*inputs, lses, options, 4000, Gradients(None, dw, db))
        results.append((losses[targets >= 0], lses, dx, dw, db))
    for right, ours, lean in zip(*results):
        close(ours, right)
        close(lean, right)

for rows, vocabulary, softcap, bias in (
    (7, 1000, 0.0, None), (7, 1000, 5.0, b[:1000]), (130, 129, 0.0, None)
):
    h = torch.randn(rows, 24, generator=g) * 30
    y = torch.randint(vocabulary, (rows,), generator=g)
    m = w[:vocabulary].contiguous()
    shifted = None if bias is None else strided(bias)
    losses, lses = forward_only(h, m, shifted, strided(y), softcap)
    inputs = (h.double(), m.double(), None if bias is None else bias.double(), y)
    right = sweep_tokens(TORCH, *inputs, torch.ones(rows), Options(softcap), 10**6, None)
    close(losses, right[0])
    close(lses, right[1])
print("equal")
"""

COMPILED = """
import itertools, os, re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels.cross_entropy.triton.anchored as anchored
import kernels.cross_entropy.triton.forward_only as forward
import kernels.cross_entropy.triton.fused_exponentials as fused
import kernels.cross_entropy.triton.steps as steps

TILE = {"D": 768, "BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64}
EDGES = {"SHIFT": 30.0, "MAX_EXPONENT": 50.0}
KERNELS = [
    (anchored.anchor_kernel, {"D": 768, "BLOCK_D": 1024}, {}),
    (anchored.exponential_kernel, {**EDGES, "BLOCK_V": 4096}, {}),
    (anchored.repair_kernel,
     {"D": 768, "SHIFT": 30.0, "BLOCK_V": anchored.REPAIR_BLOCK_V, "BLOCK_D": 128}, {}),
    (anchored.finish_kernel, {"D": 768, "SHIFT": 30.0, "BLOCK_T": 32, "BLOCK_D": 1024}, {}),
    (fused.fused_exponential_kernel, {**TILE, **EDGES}, {"num_warps": 8, "num_stages": 3}),
]
for has_bias, capped in itertools.product((False, True), (False, True)):
    flags = {"HAS_BIAS": has_bias, "CAPPED": capped}
    KERNELS += [
        (steps.statistics_kernel, {**flags, "BLOCK_V": 4096}, {}),
        (steps.gradient_kernel, {**flags, "BLOCK_V": 4096}, {}),
        (forward.forward_kernel, {**flags, **TILE}, {"num_warps": 8, "num_stages": 3}),
    ]
TYPES = {"hidden": "*bf16", "weight": "*bf16", "logits": "*bf16", "scaled": "*bf16",
         "bias": "*bf16", "targets": "*i64", "overflow": "*i32", "N": "i32", "V": "i32",
         "row_stride": "i32",
         "TILES": "i32", "z_loss": "fp32", "softcap": "fp32", "smoothing": "fp32", "even": "fp32"}
cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
arch = int(sys.argv[1])
for kernel, constants, options in KERNELS:
    signature = {parameter: "constexpr" if parameter in constants else TYPES.get(parameter, "*fp32")
                 for parameter in kernel.arg_names}
    pointers = {(place,): [["tt.divisibility", 16]]  # as at run time, else no asynchronous copies
                for place, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constants, pointers)
    options = {**options, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True)
    name = kernel.__name__
    stack, local = (int(re.search(key + r":(\\d+)", usage.stdout)[1]) for key in ("STACK", "LOCAL"))
    assert stack == local == 0, (name, constants, usage.stdout)
    if arch == 90 and "BLOCK_N" in constants:
        assert "wgmma" in compiled.asm["ptx"], name
    print(name, *constants.values(), compiled.metadata.shared)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": "/tmp", **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_interpreted_kernels_equal_float64() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "equal\n"


@pytest.mark.slow
def test_interpreted_sweeps_with_every_option_equal_float64() -> None:
    assert run(SWEPT, TRITON_INTERPRET="1") == "equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    printed = run(COMPILED, arch, TRITON_CACHE_DIR=str(tmp_path))
    assert len(printed.splitlines()) == 17
