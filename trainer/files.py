"""Files that are either complete or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

SEAL = "content_seal"  # key of a JSON object's own hash
BLOCK = 1 << 22  # bytes hashed at a time


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
    # The fallback of a file system without flock would outlive a killed process.
    lock = filelock.FileLock(path, fallback_to_soft=False)
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
    """A JSON file.

    Raises:
        DamagedFileError: it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it."""


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its own hash, atomically."""
    write_json(path, content | {SEAL: hash_of(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote, without the hash; of older versions without one.

    Raises:
        DamagedFileError: it is no JSON object, or not the one that was written.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged: it holds {str(content)[:40]}")
    if content.pop(SEAL, None) not in (None, hash_of(content)):
        raise DamagedFileError(f"{path} is damaged: it was changed after it was written")
    return content


def hash_of(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever its spaces."""
    others = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
