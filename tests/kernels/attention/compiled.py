"""Compile every attention kernel for an architecture, without a GPU, and print what it needs.

``python -m tests.kernels.attention.compiled sm_90 128 GROUP MAX_SEQLEN [options]`` prints one JSON
line a kernel; ``python -m tests.kernels.attention.compiled gluon 128`` those of the Gluon kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.attention.sm90 import dkdv, dq, pipeline
from kernels.attention.sm90 import forward as sm90
from kernels.attention.tile_config import (
    TileConfig,
    config_for,
    find_entries,
    read_configs,
    split,
)
from kernels.attention.tile_scheduler import FIELDS
from kernels.attention.triton.dkdv import dkdv_kernel
from kernels.attention.triton.dq import dq_kernel
from kernels.attention.triton.forward import forward_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"lse": "*fp32", "dlse": "*fp32", "delta": "*fp32", "tiles": "*i32"}
TYPES |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), "*bf16")
TYPES |= {"scale": "fp32", "softcap": "fp32"}


def kernels_of(config: TileConfig) -> list[tuple[Any, int, int, int, int]]:
    """Kernel, BLOCK_M, BLOCK_N, warps, stages."""
    c = config
    return [
        (forward_kernel, c.q_tile, c.forward_step, c.forward_warps, c.forward_stages),
        (dq_kernel, c.q_tile, c.dq_step, c.dq_warps, c.dq_stages),
        (dkdv_kernel, c.dkdv_step, c.kv_tile, c.dkdv_warps, c.dkdv_stages),
    ]


def compile_kernel(
    kernel: Any, arch: int, head_dim: int, group: int, options: bool, sizes: tuple[int, ...]
) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the PTX's wgmma count of one kernel."""
    block_m, block_n, warps, stages = sizes
    constants = {
        "HEADS": 16,
        "KEY_HEADS": 16 // group,
        "GROUP": group,
        **split(head_dim),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HAS_WINDOW": options,
        "HAS_SOFTCAP": options,
        "PRECISION": "tf32",
        "FIELDS": FIELDS,
    }
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = [
        i
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith(("_row", "_head"))
    ]
    source = ASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(
        source, target, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    )
    return describe(kernel, compiled)


def descriptor(*block: int, kind: Any = gl.bfloat16) -> str:
    """The type of a host descriptor of tiles."""
    layout = gl.NVMMASharedLayout.get_default_for([*block], kind)
    return f"tensordesc<{kind.name}{[*block]},{layout!r}>"


def parts(name: str, head_dim: int, rows: int, kind: Any = gl.bfloat16) -> dict[str, str]:
    """The types of the two descriptors of one tensor."""
    first, rest = split(head_dim).values()
    block = partial(descriptor, 1, 1, rows, kind=kind)
    return {f"{name}_desc": block(first), f"{name}_rest": block(rest or first)}


def gluon_kernels(head_dim: int) -> list[tuple[Any, dict[str, Any], dict[str, str]]]:
    """The kernels for sm_90: their constants and the types of their descriptors."""
    step = sm90.BLOCK_N, dq.BLOCK_N[head_dim]
    queries = parts("q", head_dim, 64) | parts("dout", head_dim, 64)
    found: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
        (
            sm90.forward_sm90_kernel,
            {"BLOCK_N": step[0], "STAGES": sm90.STAGES[head_dim]},
            queries | parts("k", head_dim, step[0]) | parts("v", head_dim, step[0]),
        ),
        (
            dq.dq_sm90_kernel,
            {"BLOCK_N": step[1], "STAGES": dq.STAGES},
            queries | parts("k", head_dim, step[1]) | parts("v", head_dim, step[1]),
        ),
    ]
    for with_dq in (False, True):
        consumers = 1 if with_dq else dkdv.CONSUMERS[head_dim]
        keys = dkdv.KEYS // consumers
        constants = {
            "CONSUMERS": consumers,
            "BLOCK_M": dkdv.BLOCK_M,
            "KEYS": keys,
            "STAGES": dkdv.STAGES,
            "WITH_DQ": with_dq,
        }
        target = parts("dq", head_dim, dkdv.BLOCK_M, gl.float32 if with_dq else gl.bfloat16)
        types = queries | parts("k", head_dim, keys) | parts("v", head_dim, keys) | target
        found.append((dkdv.dkdv_sm90_kernel, constants, types))
    found.append((dq.delta_kernel, {"ROWS": dq.DELTA_ROWS}, {}))
    return found


def compile_gluon(
    kernel: Any, head_dim: int, constants: dict[str, Any], types: dict[str, str]
) -> dict[str, Any]:
    """As :func:`compile_kernel`, with the registers that warps ask for and the waits."""
    constants = constants | {
        "GROUP": 2,
        "CONSUMER_REGISTERS": pipeline.CONSUMER_REGISTERS,
        **pipeline.sizes(head_dim),
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = TYPES | types | {"scale_log2": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = GluonASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    warps = 8 // constants.get("CONSUMERS", 2)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    ptx = compiled.asm["ptx"]
    with_dq = {"kernel": f"{kernel.__name__} with dQ"} if constants.get("WITH_DQ") else {}
    return (
        describe(kernel, compiled)
        | with_dq
        | {
            "waits": re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx),
            "steps": step_loops(compiled.asm["cubin"]),
            "setmaxnreg": sorted({int(n) for n in re.findall(r"setmaxnreg\.\S+\s+(\d+)", ptx)}),
        }
    )


def dump(cubin: bytes, what: str) -> str:
    """What ``cuobjdump`` says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def step_loops(cubin: bytes) -> list[dict[str, int]]:
    """The innermost loops with matrix products: how many, and the accesses to spilled registers."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", dump(cubin, "-sass"))
    code = [(int(address, 16), instruction) for address, instruction in found]
    loops = []
    for end, instruction in code:
        # A jump back without a condition ends a wait for a barrier, not a loop.
        jump = re.match(r"@!?U?P\d\s+U?BRA.*0x([0-9a-f]+)", instruction.strip())
        if jump and int(jump[1], 16) < end:
            loops.append((int(jump[1], 16), end))
    counts = []
    for start, end in loops:
        if any(start <= other[0] and other[1] <= end for other in loops if other != (start, end)):
            continue
        names = [line.split() for address, line in code if start <= address <= end]
        names_of = [re.split(r"[. ]", " ".join(x for x in n if x[0] != "@"))[0] for n in names]
        if products := names_of.count("HGMMA"):
            stores, loads = names_of.count("STL"), names_of.count("LDL")
            counts.append({"products": products, "spill_stores": stores, "spill_loads": loads})
    return counts


def describe(kernel: Any, compiled: Any) -> dict[str, Any]:
    """What ``cuobjdump`` and the PTX say of a compiled kernel."""
    usage = dump(compiled.asm["cubin"], "-res-usage")
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.__name__,
        "registers": number["REG"],
        "spilled": number["STACK"] + number["LOCAL"],
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


def main(architecture: str, head_dim: int, group: int, longest: int, options: bool) -> None:
    config = config_for(find_entries(read_configs(), architecture, head_dim, group), longest)
    for kernel, *sizes in kernels_of(config):
        arch = int(architecture.removeprefix("sm_"))
        print(json.dumps(compile_kernel(kernel, arch, head_dim, group, options, tuple(sizes))))


if __name__ == "__main__":
    if sys.argv[1] == "gluon":
        for kernel, constants, types in gluon_kernels(int(sys.argv[2])):
            print(json.dumps(compile_gluon(kernel, int(sys.argv[2]), constants, types)))
        sys.exit()
    head_dim, group, longest = (int(argument) for argument in sys.argv[2:5])
    main(sys.argv[1], head_dim, group, longest, sys.argv[5:] == ["options"])
