"""One clear line instead of a traceback for mistakes a user can mend."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the message names step and documents."""


def user_errors(entry: Callable[..., Result]) -> Callable[..., Result]:
    """Print a user's mistake as one message and exit with status 1.

    The traceback stays available: ``MEGADOCS_TRACEBACK=1`` lets the exception through. In a
    Hydra ``--multirun`` the exception reaches Hydra as ``SystemExit`` and ends the sweep.
    """

    @functools.wraps(entry)
    def wrapped(*args: object, **kwargs: object) -> Result:
        try:
            return entry(*args, **kwargs)
        except (ValueError, OSError, NonFiniteLossError) as error:
            if os.environ.get("MEGADOCS_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    return wrapped
