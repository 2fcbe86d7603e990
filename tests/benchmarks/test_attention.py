"""The attention benchmark's packs and counts, and that both programs run where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.attention import gpu_packs, pairs, parse_heads, tile_efficiency
from kernels.attention.tile_config import TileConfig

REPOSITORY = Path(__file__).parents[2]


def test_packs_hold_the_tokens_their_names_say() -> None:
    packs = gpu_packs()
    for name, lengths in packs.items():
        expected = {"131k in 262k": 262_144, "small 2k": 2_048, "small 16k": 16_384}
        if name in expected or not name.startswith("small"):
            assert sum(lengths) == expected.get(name, 65_536), name
        assert min(lengths) > 0
    assert packs["30k last"][-1] == packs["30k first"][0] == 30_000
    assert packs["30k middle"][18] == 30_000


def test_tile_efficiency_counts_what_the_tiles_cover() -> None:
    config = TileConfig(4, 4, *[2, 4, 2] * 3)
    # rows 0-3 visit 4 keys, rows 4-7 visit 5 rounded up to 6
    assert tile_efficiency([5], config)["forward"] == pairs([5]) / (4 * 4 + 4 * 6)
    # keys 0-3 are visited by 5 rounded up to 6 queries, keys 4-7 by 1 rounded up to 2
    assert tile_efficiency([5], config)["dkdv"] == pairs([5]) / (4 * 6 + 4 * 2)
    assert parse_heads("16/8x128") == (16, 8, 128)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU: the programs run in earnest there")
def test_both_programs_say_that_there_is_no_gpu(tmp_path: Path) -> None:
    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    output = tmp_path / "attention.json"
    options = ("--rounds", "1", "--packs", "8 equal", "--output", str(output))
    done = run("attention", *options)
    assert done.returncode == 0, done.stderr
    assert "No CUDA device" in done.stdout
    rows = json.loads(output.read_text())["results"]["rows"]
    assert {(row["pass"], row["provider"]) for row in rows} == {
        (which, name)
        for which in ("forward", "backward", "both")
        for name in ("torch", "reference")
    }
    assert output.with_suffix(".png").exists()
    done = run("tune_attention")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
