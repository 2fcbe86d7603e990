"""Install SGLang into an environment of its own: ``python -m gen.serving.sglang_environment``.

Finished already, it does nothing; interrupted, it is taken up again. ``--device cpu`` installs the
CPU recipe on a machine with a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from gen.serving.sglang_environment import STAMP, VERSION, folder, has_gpu
from trainer.files import only_one

HERE = Path(__file__).parent
# What SGLang requires and imports only with a GPU, or for what no text model needs.
NOT_ON_A_CPU = {
    *("cuda-python", "flash-attn-4", "flashinfer-python", "humming-kernels", "kernels"),
    *("nvidia-cutlass-dsl", "nvidia-mathdx", "nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep"),
    *("sgl-deep-gemm", "sgl-flash-mla", "sglang-kernel", "tilelang", "torch-memory-saver"),
    *("torchaudio", "torchcodec", "timm", "tml-renderers", "smg-grpc-servicer", "modelscope"),
    *("mistral-common", "build", "ninja", "py-spy", "deepseek-recipe"),
}
IMPORTED_BUT_NOT_REQUIRED = ["dill", "accelerate"]  # the second reads GGUF files


def install(device: str) -> Path:
    """Make the environment for ``device`` unless it is finished; returns its folder.

    Raises:
        subprocess.CalledProcessError: the package index does not answer or lacks a package.
    """
    place = folder(device)
    with only_one(place.with_name(f"{place.name}.lock")):  # another checkout may be installing it
        if (place / STAMP).exists():
            return place
        print(f"installing SGLang {VERSION} for {device} into {place} (some minutes, 6 GB)")
        python = place / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        constraints = HERE / f"constraints-{VERSION}-{device}.txt"
        tested = ["-c", str(constraints)] if constraints.exists() else []  # a newer release: none
        if device == "cuda":
            pip(python, *tested, f"sglang=={VERSION}", *IMPORTED_BUT_NOT_REQUIRED)
        else:
            pip(python, *tested, *requirements_on_a_cpu(python))
            pip(python, "--no-deps", f"sglang=={VERSION}")
            add_kernel_stand_in(place)
        (place / STAMP).touch()
    return place


def pip(python: Path, *arguments: str) -> str:
    """Run the environment's own pip; what it prints on standard output."""
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [str(python), "-m", "pip", "install", *quiet, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def requirements_on_a_cpu(python: Path) -> list[str]:
    """What this release of SGLang itself requires, without what needs a GPU."""
    release = f"sglang=={VERSION}"
    report = pip(python, "--dry-run", "--ignore-installed", "--no-deps", "--report=-", release)
    needed = json.loads(report)["install"][0]["metadata"]["requires_dist"]
    kept = [
        entry for entry in needed if "extra ==" not in entry and name_of(entry) not in NOT_ON_A_CPU
    ]
    return kept + IMPORTED_BUT_NOT_REQUIRED


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def add_kernel_stand_in(place: Path) -> None:
    """Put our ``sgl_kernel`` where SGLang's compiled one would be."""
    (site_packages,) = (place / "lib").glob("python*/site-packages")
    shutil.copyfile(HERE / "sgl_kernel.py", site_packages / "sgl_kernel.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu() else "cpu")
    try:
        place = install(parser.parse_args().device)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {shlex.join(error.cmd)} failed; run `make sglang` again to go on")
    print(f"SGLang {VERSION} is in {place}; generator=sglang finds it there")


if __name__ == "__main__":
    main()
