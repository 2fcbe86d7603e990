"""How the four programs log: plain lines, the level first where it is more than information.

Hydra sets this up in every process that it starts, as its ``job_logging`` and ``hydra_logging``
(``conf/*/config.yaml``), and ``hydra.verbose`` lowers the levels: ``hydra.verbose=true`` all of
them, ``hydra.verbose=gen.serving`` that of one logger. ``hydra/job_logging=default`` gives Hydra's
own format, with times and a file. What a program is asked for (a table, a result) it prints.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from tqdm import tqdm

OURS = {"trainer", "gen", "kernels", "hydra_plugins"}

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"shown": {"()": "trainer.logs.Shown"}},
    "formatters": {"line": {"()": "trainer.logs.Line"}},
    "handlers": {
        "console": {"()": "trainer.logs.Console", "filters": ["shown"], "formatter": "line"}
    },
    "root": {"level": "INFO", "handlers": ["console"]},
}


class Shown(logging.Filter):
    """Warnings of every rank and every library; information of the first rank, and only ours.

    What other libraries tell beside warnings is shown where ``hydra.verbose`` names them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        ours = record.name.partition(".")[0] in OURS
        verbose = logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
        return own_rank() == 0 and (ours or verbose)


class Line(logging.Formatter):
    """``message``, ``warning: message``, of one of several ranks ``rank 3: warning: message``."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)  # with the traceback of logger.exception
        if record.levelno == logging.INFO:
            return message
        return f"{rank_prefix()}{record.levelname.lower()}: {message}"


class Console(logging.Handler):
    """Information to stdout, warnings and errors to stderr; a progress bar stays below them."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except BrokenPipeError:
            return  # who read it (`| head`) has gone; the work goes on
        except Exception:
            self.handleError(record)


def own_rank() -> int:
    """This process's rank, by torchrun or by Slurm's step of several tasks; 0 where it is alone."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    alone = os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    return 0 if alone else int(os.environ["SLURM_PROCID"])


def rank_prefix() -> str:
    """``rank 3: `` where there are several."""
    tasks = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return "" if tasks == "1" else f"rank {own_rank()}: "
