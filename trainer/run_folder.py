"""The folder of a run: one config, one process at a time, files that are complete or not there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from trainer.config import TrainConfig, load_config, save_config, to_dict


@contextlib.contextmanager
def claimed(run_dir: Path, config: TrainConfig) -> Iterator[None]:
    """Hold the run folder alone, created or left by an earlier attempt with the same config.

    Raises:
        ValueError: another config was trained there, or another process is training there now.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training {run_dir} right now; wait for it, or choose "
                "another name=..."
            ) from None
        record_config(run_dir, config)
        yield


def record_config(run_dir: Path, config: TrainConfig) -> None:
    """Write ``config.yaml``, or compare with the one that is there."""
    path = run_dir / "config.yaml"
    if path.exists():
        earlier = load_config(path)
        if earlier.identity() != config.identity():
            raise ValueError(
                f"{run_dir} holds a run with another config ({differences(earlier, config)}); "
                "choose another name=... or delete that folder"
            )
        return
    unfinished = path.with_suffix(".tmp")
    save_config(config, unfinished)
    os.replace(unfinished, path)


def differences(earlier: TrainConfig, config: TrainConfig) -> str:
    """The keys in which two configs differ, as ``key: old -> new``."""

    def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        items: dict[str, object] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                items |= flat(value, f"{prefix}{key}.")
            else:
                items[prefix + key] = value
        return items

    old, new = flat(to_dict(earlier)), flat(to_dict(config))
    return ", ".join(f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key])


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
