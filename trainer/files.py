"""Files that are either complete or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` if the block succeeds and vanishes if it fails."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder that replaces ``path`` if the block succeeds.

    What an earlier, killed attempt left behind is removed first, so two processes must not be here
    with one ``path`` at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(leftover)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():
            sync(file)
        sync(unfinished)
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def only_one(path: Path, wait: bool = True) -> Iterator[None]:
    """Be the only process in a block with this lock file; a killed one holds it no longer.

    Raises:
        BlockingIOError: another process is in it and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        raise BlockingIOError(f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    with replace_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
