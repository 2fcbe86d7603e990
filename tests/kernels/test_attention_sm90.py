"""The Gluon forward kernel: run on a model of the machine, compiled, and, on an sm_90 GPU, run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import varlen_attention
from kernels.attention_config import TileConfig
from kernels.attention_layout import make_tiles
from kernels.attention_reference import reference_attention
from tests.kernels import gluon_model
from tests.kernels.test_attention_triton import random_pack, results, run

SOURCE = Path(__file__).parents[2] / "kernels" / "attention_sm90.py"
CONFIG = TileConfig(128, 128, *[64, 8, 2] * 3)


@pytest.fixture(scope="module")
def modelled() -> ModuleType:
    """``kernels.attention_sm90`` from its own source, with the model in Gluon's place."""
    name = "kernels.gluon_compat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, gluon_model)
        spec = importlib.util.spec_from_file_location("attention_sm90_on_the_model", SOURCE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(
    ("lengths", "lengths_k", "extra", "heads", "size", "programs"),
    [
        ([600], None, 0, (1, 1), 64, 1),  # the rings go round
        ([130, 0, 1, 300], None, 20, (4, 2), 64, 3),
        ([127, 128, 129], None, 0, (2, 1), 128, 2),
        ([100, 20, 200], [300, 0, 150], 5, (1, 1), 128, 2),  # some queries see no key
        ([1] * 5, None, 3, (2, 2), 64, 4),
    ],
)
def test_on_the_model_of_the_machine(
    modelled: ModuleType,
    lengths: list[int],
    lengths_k: list[int] | None,
    extra: int,
    heads: tuple[int, int],
    size: int,
    programs: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = lengths_k or lengths
    q = torch.randn(sum(lengths) + extra, heads[0], size, generator=generator)
    k, v = torch.randn(2, sum(keys) + extra, heads[1], size, generator=generator)
    borders, borders_k = borders_of(lengths), borders_of(keys)
    tiles = make_tiles(borders, borders_k, len(q), len(k), CONFIG)
    for x in (q[sum(lengths) :], k[sum(keys) :], v[sum(keys) :]):
        x.fill_(torch.nan)  # what lies behind the last border
    out, lse = modelled.attention_forward_sm90(q, k, v, tiles.rows, 0.1, programs)
    expected, expected_lse = reference_attention(
        q.double(), k.double(), v.double(), borders, borders_k, 0.1
    )
    expected[sum(lengths) :] = 0
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_segments_do_not_leak_bit_for_bit(modelled: ModuleType) -> None:
    lengths, inside = [100, 150, 90], slice(100, 250)
    q, k, v = torch.randn(3, 340, 2, 64, generator=torch.Generator().manual_seed(0))
    borders = borders_of(lengths)
    tiles = make_tiles(borders, borders, 340, 340, CONFIG)
    before, _ = modelled.attention_forward_sm90(q, k, v, tiles.rows, 0.1, 2)
    for x in (q, k, v):
        x[inside] = torch.nan
    after, _ = modelled.attention_forward_sm90(q, k, v, tiles.rows, 0.1, 2)
    assert torch.equal(before[:100], after[:100])
    assert torch.equal(before[250:], after[250:])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_with_overlapping_products(head_dim: int, tmp_path: Path) -> None:
    printed = run("attention_compiled", "gluon", str(head_dim), TRITON_CACHE_DIR=str(tmp_path))
    need = json.loads(printed)
    assert need["spilled"] <= 8, need  # two registers, outside the loops
    assert need["shared"] <= 232_448, need
    assert {24, 240} <= set(need["setmaxnreg"]), need
    # In each of two consumers' two loops one product is left running while scores are worked on.
    assert need["waits"].count("1") == 4, need


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
        inputs, borders, _ = random_pack(generator, (64, 128)[number % 2])
        ours = results(inputs, borders, None, 0.0, "gluon")
        assert torch.equal(ours[0], results(inputs, borders, None, 0.0, "gluon")[0]), number
        triton = results(inputs, borders, None, 0.0, "triton")
        exact = results([x.float() for x in inputs], borders, None, 0.0, "reference")
        for a, b, c in zip(ours, triton, exact, strict=True):
            rounding = 2 * 2**-8 * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + rounding, number
