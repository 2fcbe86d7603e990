"""Files that are either complete or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock

Content = TypeVar("Content")
logger = logging.getLogger(__name__)

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


def check_writable(path: Path, wanted: str) -> None:
    """Raise ValueError where nothing can be made at ``path``; ``wanted`` says what to set."""
    there = path
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        state = "is no folder" if not there.is_dir() else "cannot be written to"
        raise ValueError(f"{there} {state}: set {wanted}")


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    with replace_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path, remedy: str = "") -> Any:
    """A JSON file.

    Args:
        remedy: what to do where it is damaged, for the message.

    Raises:
        DamagedFileError: it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFileError(damaged(path, str(error), remedy)) from error


def read_object(path: Path, *keys: str, remedy: str = "") -> dict[str, Any]:
    """A JSON object that has ``keys``, written by others or without a seal.

    Args:
        remedy: what to do where it is damaged, for the message.

    Raises:
        DamagedFileError: it is no JSON object, or lacks a key.
    """
    content = read_json(path, remedy)
    if not isinstance(content, dict):
        raise DamagedFileError(damaged(path, f"it holds {str(content)[:40]}", remedy))
    if missing := [key for key in keys if key not in content]:
        raise DamagedFileError(damaged(path, f"it lacks {', '.join(missing)}", remedy))
    return content


def damaged(path: Path, problem: str, remedy: str) -> str:
    return f"{path} is damaged: {problem}" + (f"; {remedy}" if remedy else "")


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it."""


def optional(path: Path, read: Callable[[Path], Content | None]) -> Content | None:
    """What a file holds that others can do without; damage is said and costs nothing else."""
    if not path.exists():
        return None
    try:
        return read(path)
    except DamagedFileError as error:
        logger.warning(f"{error}; it is left out")
        return None


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its own hash, atomically."""
    write_json(path, content | {SEAL: hash_of(content)})


def read_sealed(path: Path, remedy: str = "") -> dict[str, Any]:
    """What :func:`write_sealed` wrote, without the hash; of older versions without one.

    Args:
        remedy: what to do where it is damaged, for the message.

    Raises:
        DamagedFileError: it is no JSON object, or not the one that was written.
    """
    content = read_object(path, remedy=remedy)
    told = content.pop(SEAL, None)
    # Without a seal an older version wrote it, unless what is damaged is the name of the seal.
    misnamed = told is None and any(
        content[key] == hash_of({name: content[name] for name in content if name != key})
        for key in content
        if len(key) == len(SEAL)
    )
    if misnamed or told not in (None, hash_of(content)):
        raise DamagedFileError(damaged(path, "it was changed after it was written", remedy))
    return content


def hash_file(path: Path) -> Path:
    """Beside a file: its SHA-256, as ``sha256sum -c`` reads it."""
    return path.with_name(f"{path.name}.sha256")


def write_hash(path: Path, content: Path) -> None:
    """Write the hash of ``content``, which ``path`` will hold: before ``path`` is there."""
    with replace_file(hash_file(path)) as unfinished:
        unfinished.write_text(f"{sha256(content)}  {path.name}\n")


def read_hash(path: Path) -> str | None:
    """What :func:`write_hash` wrote about a file; None where older versions wrote the file."""
    try:
        return hash_file(path).read_bytes()[:64].decode("ascii", "replace")
    except FileNotFoundError:
        return None


def is_whole(path: Path) -> bool:
    """Whether a file is what the hash beside it says; one without a hash is of an older version."""
    told = read_hash(path)
    return told is None or sha256(path) == told


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
