"""The GPU path on a CPU: steps of the real models on fake CUDA tensors, launches without a driver.

A few cases are part of every test run; all of them with ``--rehearsal`` (``make rehearse``).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.cross_entropy.interface import fast_bytes
from tests.conftest import REPOSITORY

HERE = Path(__file__).parent
VOCABULARY = 128_256
# model, tokens, context, attention, activation checkpointing, way
SOME = [
    "300m,65536,4096,flash,none,compile",
    "300m,65536,4096,cudnn,none,compile",
    "300m,65536,4096,gluon,selective,compile",
    "300m,32768,32768,triton,none,cp",
    "300m,65536,4096,flash,none,fsdp",
    "300m,65536,4096,flash,none,eager,4",
]
MORE = [
    *(
        f"{model},{tokens},4096,{attention},{mode},{way}"
        for model, tokens in (("300m", 65_536), ("1_5b", 16_384))
        for attention in ("flash", "cudnn", "flex", "triton", "gluon")
        for mode in ("none", "selective", "full")
        for way in ("compile", "fsdp")
    ),
    *(f"{model},32768,32768,flash,none,cp" for model in ("300m", "1_5b")),
    *(
        f"{model},{tokens},{context},{attention},{mode},eager"
        for model, tokens, context, attention, mode in (
            ("300m", 65_536, 4096, "flash", "none"),
            ("300m", 65_536, 4096, "triton", "selective"),
            ("300m", 65_536, 4096, "triton", "full"),
            ("300m", 32_768, 32_768, "gluon", "none"),
            ("1_5b", 32_768, 32_768, "flash", "selective"),
        )
    ),
]


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which PyTorch believes in CUDA devices."""
    if not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("no C and C++ compiler")
    folder = tmp_path_factory.mktemp("fakes")
    devices = folder / "libdevices.so"
    shared = ("-shared", "-fPIC", "-w")
    name = "-Wl,-soname,libcuda.so.1"
    for command in (
        ["gcc", *shared, name, "-o", str(folder / "libcuda.so.1"), str(HERE / "driver.c")],
        ["g++", *shared, "-o", str(devices), str(HERE / "preload.cpp")],
    ):
        subprocess.run(command, check=True)
    return {
        "FAKE_DEVICES": str(devices),
        "LD_PRELOAD": str(devices),
        "LD_LIBRARY_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def run(module: str, arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """The JSON lines that a module prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.rehearsal.{module}", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found: dict[str, Any]) -> None:
    """No graph break, few graphs over 50 packs, the attention asked for, memory as estimated."""
    _, _, _, attention, mode, way, *_ = found["case"].split(",")
    if way == "eager":
        # The loss's own chunks are inside one operator, which a fake step does not enter.
        assert found["estimate"] >= found["peak"] + fast_bytes(VOCABULARY), found
        return
    assert found["breaks"] == 0, found
    assert 1 <= found["graphs"] <= 4, found
    library = {
        "flash": ["torch_attn._varlen_attn.default"],  # 1, the default: FlashAttention
        "cudnn": ["torch_attn._varlen_attn.default 3"],
        "flex": ["flex_attention"],
    }.get(attention, ["megadocs.varlen_attention.default"])
    assert found["forward"] == library, found
    recomputed = [call for call in found["backward"] if "backward" not in call]
    assert bool(recomputed) == (mode == "full"), found


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_steps_trace_whole_and_fit_their_estimate(fakes: dict[str, str]) -> None:
    for found in run("steps", SOME, fakes):
        check(found)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", MORE)
def test_every_way_to_take_a_step(
    case: str, fakes: dict[str, str], request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--rehearsal"):
        pytest.skip("make rehearse")
    [found] = run("steps", [case], fakes)
    check(found)


@pytest.mark.slow
def test_no_kernel_is_compiled_again_for_another_size() -> None:
    """Three head shapes, five packs, three numbers of rows: a variant a head shape, and another of
    the kernel that also adds to dQ."""
    [variants] = run("launches", [], {})
    for name, count in variants.items():
        shapes = 3 if name.startswith("attention") else 1
        assert count <= shapes * (1 + name.endswith("dkdv_sm90_kernel")), variants
    assert len(variants) == 14
