"""Our Triton attention: interpreted on a CPU, compiled without a GPU, run where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention_tiles, varlen_attention
from kernels.attention.tile_config import (
    TileConfig,
    config_for,
    find_entries,
    read_configs,
    split,
)
from kernels.attention.tile_scheduler import make_tiles
from trainer.data.random_stream import random_windows

REPOSITORY = Path(__file__).parents[3]
# Bytes a program may use. The tiles of sm_80 are those of sm_86 and sm_89 too, which have less.
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}


def run(module: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", *arguments],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": "/tmp", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("check", ["gradients", "isolation", "one_pass", "op"])
def test_interpreted(check: str) -> None:
    assert run("attention.interpreted", check, TRITON_INTERPRET="1") == "passed\n"


@pytest.mark.parametrize(
    ("architecture", "size", "group"), [("sm_80", 128, 1), ("sm_90", 64, 2), ("sm_120", 96, 1)]
)
@pytest.mark.slow
def test_interpreted_at_the_tile_sizes_of_a_gpu(
    architecture: str, size: int, group: int, request: pytest.FixtureRequest
) -> None:
    more = ["everything"] if request.config.getoption("--rehearsal") else []
    arguments = ("tiles", architecture, str(size), str(group), *more)
    assert run("attention.interpreted", *arguments, TRITON_INTERPRET="1") == "passed\n"


OFTEN = [
    ("sm_80", 96, 1),
    ("sm_90", 96, 2),
    ("sm_90", 128, 4),
    ("sm_100", 64, 1),
    ("sm_120", 128, 2),
]
CONFIGS = [
    (architecture, int(head_dim), int(group), int(longest))
    for architecture, dims in read_configs().items()
    if architecture != "interpreter"
    for head_dim, groups in dims.items()
    for group, lengths in groups.items()
    for longest in lengths
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "head_dim", "group"), OFTEN)
def test_kernels_compile_without_spills(
    architecture: str, head_dim: int, group: int, tmp_path: Path
) -> None:
    check_compiled(architecture, head_dim, group, 4096, tmp_path)


@pytest.mark.parametrize(("architecture", "head_dim", "group", "longest"), CONFIGS)
def test_every_config_compiles_without_spills(
    architecture: str,
    head_dim: int,
    group: int,
    longest: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if not request.config.getoption("--rehearsal"):
        pytest.skip("make rehearse")
    check_compiled(architecture, head_dim, group, longest, tmp_path)


def check_compiled(
    architecture: str, head_dim: int, group: int, longest: int, folder: Path
) -> None:
    """The tiles for packs of ``longest`` give kernels that fit the GPU and keep its registers."""
    arguments = (architecture, str(head_dim), str(group), str(longest))
    printed = run("attention.compiled", *arguments, TRITON_CACHE_DIR=str(folder))
    needs = [json.loads(line) for line in printed.splitlines()]
    assert [need["kernel"] for need in needs] == ["forward_kernel", "dq_kernel", "dkdv_kernel"]
    for need in needs:
        assert need["registers"] > 64, need  # fewer: the compiler has given the kernel up
        assert need["spilled"] == 0, need
        assert need["shared"] <= SHARED_MEMORY[architecture], need
        assert (need["wgmma"] > 0) == (architecture == "sm_90"), need


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=6),
    st.integers(0, 40),
    st.sampled_from([16, 32]),
    st.one_of(st.none(), st.integers(1, 50)),
)
def test_tables_hold_every_token_once_and_the_longest_loop_first(
    pairs: list[tuple[int, int]], extra: int, block: int, window: int | None
) -> None:
    queries, keys = (torch.tensor([pair[i] for pair in pairs]) for i in range(2))
    borders_q, borders_k = (
        torch.cat([torch.zeros(1), x.cumsum(0)]).to(torch.int32) for x in (queries, keys)
    )
    config = TileConfig(block, 48 - block, *[16, 4, 2] * 3)
    tokens = [int(queries.sum()) + extra, int(keys.sum()) + extra]
    tiles = make_tiles(borders_q, borders_k, tokens[0], tokens[1], config, window)
    for table, count, size, lengths, side in (
        (tiles.q_tiles, tokens[0], block, queries, 1),
        (tiles.kv_tiles, tokens[1], 48 - block, keys, -1),
    ):
        used = table[table[:, 1] > 0]
        assert table[-1].tolist() == [len(used), 0, 0, 0, 0]
        assert torch.equal(used, table[: len(used)])  # unused ones last
        covered = [token for first, n, *_ in used.tolist() for token in range(first, first + n)]
        assert sorted(covered) == list(range(count))
        assert len(used) == sum(-(-int(n) // size) for n in [*lengths, extra])
        costs = [visits(tile, side, window) for tile in used.tolist()]
        assert costs == sorted(costs, reverse=True)


def test_borders_beyond_the_tokens_are_refused() -> None:
    borders, config = torch.tensor([0, 9], dtype=torch.int32), TileConfig(16, 16, *[16, 4, 2] * 3)
    with pytest.raises(RuntimeError, match="last segment border lies beyond the 8 tokens"):
        make_tiles(borders, borders, 8, 9, config)
    with pytest.raises(RuntimeError, match="beyond the 8 tokens"):
        make_tiles(borders, borders, 9, 8, config)


def visits(tile: list[int], side: int, window: int | None) -> int:
    """Positions of the other axis that somebody in the tile sees, one by one."""
    _, count, _, diagonal, other = tile
    seen = set()
    for row in range(count):
        for position in range(other):
            gap = diagonal + row - position if side > 0 else position - diagonal - row
            if gap >= 0 and (window is None or gap < window):
                seen.add(position)
    return len(seen)


@pytest.mark.parametrize("head_dim", [8, 24, 100])
def test_other_head_dimensions_are_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head dimension {head_dim} is neither"):
        split(head_dim)


def test_configs_are_found_by_nearest_size_and_missing_ones_are_named() -> None:
    entry = dict.fromkeys(TileConfig._fields, 1)
    long = {"1": entry | {"q_tile": 2}, "8192": entry | {"q_tile": 3}}
    configs = {"sm_90": {"64": {"1": {"1": entry}, "4": long}}}
    assert config_for(find_entries(configs, "sm_90", 32, 3), 10**6).q_tile == 1
    assert config_for(find_entries(configs, "sm_90", 64, 8), 8191).q_tile == 2
    assert config_for(find_entries(configs, "sm_90", 64, 8), 8192).q_tile == 3
    assert config_for(find_entries(configs, "sm_90", 64, 8), 0).q_tile == 2
    with pytest.raises(ValueError, match=r"no tiles for sm_80.*tune_attention"):
        find_entries(configs, "sm_80", 64, 1)
    with pytest.raises(ValueError, match="no tiles for head dimension 128"):
        find_entries(configs, "sm_90", 128, 1)
    for architecture in SHARED_MEMORY:
        for head_dim in (64, 96, 128):
            find_entries(read_configs(), architecture, head_dim, 1)


def test_without_a_gpu_or_an_interpreter_the_backend_says_so() -> None:
    q = torch.zeros(4, 1, 16)
    with pytest.raises(ValueError, match="needs float16 or bfloat16 on CUDA"):
        varlen_attention(q, q, q, torch.tensor([0, 4]), 4, backend="triton")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def random_pack(generator: torch.Generator, size: int) -> tuple[list[Tensor], Tensor, int | None]:
    """bf16 q, k, v, the borders of the trainer's ``pack`` and a window; padding behind."""

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    lengths = [1 + number(2 ** (1 + number(11))) for _ in range(1 + number(8))]
    tokens = sum(lengths) + 1 + number(200)
    group, key_heads = 1 + number(4), 1 + number(3)
    joined = torch.randn(tokens, (group + 2) * key_heads, size, generator=generator)
    parts = joined.cuda().bfloat16().split([group * key_heads, key_heads, key_heads], 1)
    borders = random_windows([lengths], tokens).cu_seqlens.cuda()
    return list(parts), borders, 1 + number(600) if number(3) == 0 else None


def results(
    inputs: list[Tensor], borders: Tensor, window: int | None, softcap: float, backend: str
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = varlen_attention(
        *leaves,
        borders,
        int(borders.diff().max()),
        window=window,
        softcap=softcap,
        backend=backend,
    )  # type: ignore[call-overload]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_error_is_at_most_twice_that_of_pytorch_in_bf16(size: int, softcap: float) -> None:
    generator = torch.Generator().manual_seed(size)
    for _ in range(10):
        inputs, borders, window = random_pack(generator, size)
        exact = results([x.double() for x in inputs], borders, window, softcap, "reference")
        plain = results(inputs, borders, window, softcap, "reference")
        ours = results(inputs, borders, window, softcap, "triton")
        for a, b, c in zip(ours, plain, exact, strict=True):
            rounding = 2 * 2**-8 * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + rounding


@pytest.mark.gpu
@gpu
@pytest.mark.timeout(900)
def test_500_packs_against_pytorch_and_bitwise_again() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(500):
        size = (64, 96, 128)[number % 3]
        inputs, borders, window = random_pack(generator, size)
        ours = results(inputs, borders, window, 0.0, "triton")
        again = results(inputs, borders, window, 0.0, "triton")
        plain = results([x.float() for x in inputs], borders, window, 0.0, "reference")
        for a, b, c in zip(ours, again, plain, strict=True):
            assert torch.equal(a, b), number
            assert (a.float() - c).norm() <= 2e-2 * c.norm() + 1e-6, number
            assert a[int(borders[-1]) :].eq(0).all()


@pytest.mark.gpu
@gpu
def test_offsets_beyond_32_bits() -> None:
    """2^31 elements are passed inside the last segment; 5 tensors of 4.3 GB each."""
    tokens, heads, size = 2**31 // (16 * 64) + 300, 16, 64
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    q = torch.zeros(tokens, heads, size, dtype=torch.bfloat16, device="cuda")
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    q[-400:].normal_()
    k[-400:].normal_()
    v[-400:].normal_()
    start = tokens - 400
    step = list(range(0, start, 1000))
    borders = torch.tensor([*step, start, tokens], dtype=torch.int32, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*leaves, borders, 1000, backend="triton")  # type: ignore[call-overload]
    parts = torch.autograd.grad(out[-400:].float().square().sum(), leaves)
    last = [x[-400:].detach().double().requires_grad_() for x in leaves]
    single = torch.tensor([0, 400], dtype=torch.int32, device="cuda")
    expected = varlen_attention(*last, single, 400, backend="reference")  # type: ignore[call-overload]
    torch.testing.assert_close(out[-400:].double(), expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(expected.square().sum(), last)
    for ours, theirs in zip(parts, gradients, strict=True):
        assert (ours[-400:] - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.gpu
@gpu
def test_replays_in_a_cuda_graph_with_new_borders() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1000, 4, 64, generator=generator).cuda().bfloat16()
    borders = torch.tensor([0, 300, 1000], dtype=torch.int32, device="cuda")

    def attention() -> Tensor:
        tiles = attention_tiles(borders, 1000, 64, 1)
        return varlen_attention(q, q, q, borders, 1000, backend="triton", tiles=tiles)

    attention()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention()
    for middle in (300, 500, 1000):
        borders[1] = middle
        graph.replay()
        assert torch.equal(out, attention())
