"""Hydra plugins: the GPU pool, sweeps that end well, the star search.

Hydra finds plugins only in a package called ``hydra_plugins``, hence the folder of that name. They
may import ``trainer.study``, ``trainer.run`` and ``trainer.config``; this file, which puts them on
the search path, imports nothing of ``trainer``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import site
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]  # holds the packages trainer, gen and kernels


def discover_plugins() -> None:
    """Let Hydra find the plugins in this process, and what they import."""
    for folder in (str(FOLDER), str(ROOT)):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in ("gpu_pool_launcher", "grid_sweeper", "star_sweeper"):
        importlib.import_module(f"hydra_plugins.{name}")  # Hydra may have looked for plugins before


@contextlib.contextmanager
def importable_in_jobs() -> Iterator[None]:
    """What is started in this block can import this project and its plugins.

    A job of submitit or Ray unpickles Hydra's state, which names both, before any of our code runs.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*job_path(), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


def job_path() -> list[str]:
    """Folders a job needs on its path: the plugins, and the packages unless they are installed."""
    installed = {Path(folder).resolve() for folder in site.getsitepackages()}
    return [str(FOLDER), *([] if ROOT.resolve() in installed else [str(ROOT)])]
