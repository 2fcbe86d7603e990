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

SWEEP_FOLDER = "MEGADOCS_SWEEP_FOLDER"  # variable of a sweep's jobs: where it was started
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]  # holds the packages trainer, gen and kernels


def discover_plugins() -> None:
    """Let Hydra find the plugins in this process, and what they import."""
    for folder in (str(FOLDER), str(ROOT)):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in ("gpu_pool_launcher", "grid_sweeper", "star_sweeper", "study_sweeper"):
        importlib.import_module(f"hydra_plugins.{name}")  # Hydra may have looked for plugins before


@contextlib.contextmanager
def importable_in_jobs() -> Iterator[None]:
    """What is started in this block can import this project and its plugins, and knows this folder.

    A job of submitit or Ray unpickles Hydra's state, which names both, before any of our code runs.
    """
    inherited = os.environ.get("PYTHONPATH")
    paths = [*job_path(), *([inherited] if inherited else [])]
    added = {"PYTHONPATH": os.pathsep.join(paths), SWEEP_FOLDER: str(Path.cwd())}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def job_path() -> list[str]:
    """Folders a job needs on its path: the plugins, and the packages unless they are installed."""
    installed = {Path(folder).resolve() for folder in site.getsitepackages()}
    return [str(FOLDER), *([] if ROOT.resolve() in installed else [str(ROOT)])]
