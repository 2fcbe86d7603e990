"""SGLang's own environment: which release, where it is, and whether it is the one for this machine.

SGLang's pins (torch, transformers) and this project's cannot share an environment, so it is a
program beside, reached over HTTP. ``make sglang`` (:mod:`gen.serving.sglang_environment.__main__`)
installs the release below once for all checkouts of a user: the GPU build where there is a GPU, and
otherwise its Python part, which falls back to PyTorch for every compiled kernel a Llama needs.

It imports the standard library alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

VERSION = "0.5.23"
CONVERT = Path(__file__).with_name("convert_gguf.py")
STAMP = "installed"  # file of a finished environment


@functools.cache
def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU; told without importing torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    shown = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return shown.returncode == 0 and shown.stdout.startswith("GPU ")


def cache() -> Path:
    """The user's folder for what all checkouts share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megadocs"


def folder(device: str) -> Path:
    """Where the environment for ``device`` (``cuda`` or ``cpu``) is or would be."""
    return cache() / f"sglang-{VERSION}-{device}"


def interpreter(device: str) -> str:
    """The Python of the environment for ``device``.

    Raises:
        ValueError: it is not installed.
    """
    if not (folder(device) / STAMP).exists():
        raise ValueError(
            f"generator=sglang needs SGLang {VERSION} for {device}, which is not installed in "
            f"{folder(device)}: run `make sglang`, or name the interpreter of another environment "
            "with generator.sglang.python=/path/to/bin/python"
        )
    return str(folder(device) / "bin" / "python")
