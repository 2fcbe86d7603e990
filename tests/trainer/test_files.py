"""Files that are complete or not there, and blocks that one process enters at a time."""

import threading
import time
from pathlib import Path

from trainer.files import only_one


def test_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        with only_one(tmp_path / "new" / "lock"):  # a flock holds between open files
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
