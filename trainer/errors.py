"""One clear line instead of a traceback for mistakes a user can mend."""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from trainer.logs import rank_prefix
from trainer.plugins import SWEEP_FOLDER

Result = TypeVar("Result")


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the message names step and documents."""


def user_errors(entry: Callable[..., Result]) -> Callable[..., Result]:
    """Print a user's mistake as one message and exit with status 1.

    The traceback stays available: ``MEGADOCS_TRACEBACK=1`` lets the exception through. A job of a
    sweep raises, so that the sweep learns the reason and goes on with the others.
    """

    @functools.wraps(entry)
    def wrapped(*args: object, **kwargs: object) -> Result:
        try:
            enter_job()
            return entry(*args, **kwargs)
        except (ValueError, OSError, NonFiniteLossError) as error:
            if os.environ.get("MEGADOCS_TRACEBACK"):
                raise
            print(f"{rank_prefix()}error: {error}", file=sys.stderr, flush=True)
            if in_sweep():
                raise
            raise SystemExit(1) from None

    return wrapped


def in_sweep() -> bool:
    """Whether this is a job of a Hydra sweep."""
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def enter_job(patience: float = 60.0) -> None:
    """In a job of a sweep: be where the sweep was started, wherever the scheduler started the job.

    Args:
        patience: seconds that a shared folder may take to appear on a node.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    if not in_sweep():
        return
    # submitit's jobs compose their config again, where Slurm started them.
    folder = Path(os.environ.get(SWEEP_FOLDER) or HydraConfig.get().runtime.cwd)
    deadline = time.monotonic() + patience
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{folder}, where the sweep was started, is not there on {socket.gethostname()}: "
                "start it in a folder that all nodes share"
            )
        time.sleep(1.0)
    os.chdir(folder)
