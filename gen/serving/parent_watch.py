"""Run a command and end it, with all its children, when whoever started this is gone.

The starter holds the other end of standard input: it closes when the starter ends, however it ends,
so a killed job leaves no server behind that holds a GPU. Run as a file; it needs only the standard
library. It must be started as the leader of its own session.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE = 20.0  # seconds between SIGTERM and SIGKILL


def main() -> None:
    """Run the command of the arguments; exit as it does, or once the starter is gone."""
    # Sent to the whole group, it is for the command. A handler, because an ignored signal would
    # stay ignored in the command.
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    abandoned = threading.Event()

    def end_with_starter() -> None:
        sys.stdin.buffer.read()
        abandoned.set()
        os.killpg(0, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_starter, daemon=True).start()
    status = process.wait()
    if abandoned.is_set():
        os.killpg(0, signal.SIGKILL)  # what the command left running
    os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
