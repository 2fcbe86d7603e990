"""Files in object stores, and wherever else fsspec reaches, by URI.

A server that is away for a while is waited for; what is denied or not there is an error at once.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as arrow_fs
from fsspec.implementations.arrow import ArrowFSWrapper
from tqdm import tqdm

PATIENCE = 600.0  # seconds for which a server may be away
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts
BLOCK = 8 << 20  # bytes copied at a time
FILES_AT_A_TIME = 8  # that are sent
DENIED = (
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "Forbidden"),
    *("Unable to locate credentials", "NoCredentialsError"),
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "NO_SUCH_BUCKET",
    "403",
)

ENDPOINT = "S3_ENDPOINT_URL"  # of another server than Amazon's, as mosaicml-streaming knows it
SAY_EVERY = 30.0  # seconds
said = -SAY_EVERY  # when it was said last that a server is away

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def is_remote(where: str | Path) -> bool:
    """Whether a place is a URI and no path of this machine."""
    return "://" in str(where)


def filesystem(where: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URI, and the path in it.

    pyarrow speaks S3 and Google's storage itself, with the credentials of the environment;
    ``S3_ENDPOINT_URL`` (which mosaicml-streaming knows too) names another server for ``s3://``.

    Raises:
        ValueError: the protocol is unknown, or needs a package that is not installed.
    """
    protocol, separator, rest = where.partition("://")
    if separator and protocol in ("s3", "gs"):
        bucket = rest.split("/", 1)[0]
        try:
            found = arrow_filesystem(protocol, bucket, os.environ.get(ENDPOINT))
        except OSError as error:  # where the bucket lies is asked for
            raise OSError(f"{where} cannot be reached: {first_line(error)}") from error
        return ArrowFSWrapper(found), rest
    try:
        system, path = fsspec.core.url_to_fs(where)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where} cannot be reached: {error}") from error
    return system, path


@functools.lru_cache
def arrow_filesystem(protocol: str, bucket: str, endpoint: str | None) -> arrow_fs.FileSystem:
    """pyarrow's own file system of a bucket; it tries once, :func:`patiently` tries again."""
    if protocol == "gs":  # by itself it would try for 15 minutes
        return arrow_fs.FileSystem.from_uri(f"gs://{bucket}?retry_limit_seconds=10")[0]
    once = arrow_fs.AwsStandardS3RetryStrategy(max_attempts=1)
    if endpoint:
        scheme, _, server = endpoint.rpartition("://")
        return arrow_fs.S3FileSystem(
            endpoint_override=server, scheme=scheme or "https", retry_strategy=once
        )
    # Where buckets lie in regions; another server of the environment has none.
    known = any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    region = None if known else arrow_fs.resolve_s3_region(bucket)
    return arrow_fs.S3FileSystem(region=region, retry_strategy=once)


class RemoteFile:
    """Parts of one file, each by one request; may be read by several threads.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be reached, or not with these credentials.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.system, self.path = filesystem(where)
        self.handle: pa.NativeFile | None = None
        if isinstance(self.system, ArrowFSWrapper):  # its cat_file asks for the size every time
            self.handle = patiently(lambda: self.system.fs.open_input_file(self.path), where)

    def read(self, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``."""

        def once() -> bytes:
            if self.handle is not None:
                return bytes(self.handle.read_at(end - start, start))
            return bytes(self.system.cat_file(self.path, start=start, end=end))

        return patiently(once, self.where)


def read(where: str) -> bytes:
    """All of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be reached, or not with these credentials.
    """
    system, path = filesystem(where)
    content: bytes = patiently(lambda: system.cat_file(path), where)
    return content


def copy(where: str, local: Path) -> None:
    """Bring a file to ``local``, over what is there.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be reached, or not with these credentials; or the disk is full.
    """
    system, path = filesystem(where)
    local.touch()

    def once() -> None:
        with system.open(path, "rb") as source, local.open("r+b") as target:
            while block := source.read(BLOCK):
                target.write(block)
            target.truncate()

    patiently(once, where)


def is_there(where: str) -> bool:
    """Whether there is such a file.

    Raises:
        OSError: it cannot be told, or not with these credentials.
    """
    system, path = filesystem(where)
    return patiently(lambda: bool(system.exists(path)), where)


def send(folder: Path, where: str, last: str) -> int:
    """Send all files of a folder by mosaicml-streaming's uploader; returns their bytes.

    Args:
        folder: on this machine.
        where: URI of the folder elsewhere; files of the same names are replaced.
        last: the file that goes last: what has it is complete.

    Raises:
        OSError: the store cannot be reached for long, or not with these credentials.
    """
    from streaming.base.storage.upload import CloudUploader  # takes seconds to import

    logging.getLogger("streaming").setLevel(logging.ERROR)  # it warns of every folder that is there

    def uploader() -> Any:
        return CloudUploader.get((str(folder), where), keep_local=True, exist_ok=True)

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files if path.name[0] != "."]
    sender = patiently(uploader, where)

    def send_one(name: str) -> None:
        patiently(lambda: sender.upload_file(name), f"{where}/{name}")

    others = [name for name in names if name != last]
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
        done = threads.map(send_one, others)
        for _ in tqdm(done, desc=folder.name, total=len(others), unit="file", leave=False):
            pass
    send_one(last)
    return sum((folder / name).stat().st_size for name in names)


def patiently(action: Callable[[], Result], where: str) -> Result:
    """Do something with a file elsewhere, again while its server is away.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: denied, or away for longer than :data:`PATIENCE`; names the file.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return action()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where} is not there") from error
        except Exception as error:  # every driver has its own
            message = first_line(error)
            if "(404)" in message:
                raise FileNotFoundError(f"{where} is not there: {message}") from error
            if isinstance(error, PermissionError) or any(word in message for word in DENIED):
                raise OSError(f"{where} is denied: {message}; check the credentials") from error
            if is_local_fault(error):
                raise
            if time.monotonic() - began > PATIENCE:
                raise OSError(f"{where} cannot be reached: {message}") from error
            say_away(where, message)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def say_away(where: str, message: str) -> None:
    """Warn that a server is away, not for every request that waits for it."""
    global said
    if time.monotonic() - said > SAY_EVERY:
        said = time.monotonic()
        logger.warning("%s cannot be reached now (%s); trying again", where, message)


def is_local_fault(error: Exception) -> bool:
    """Whether waiting for a server cannot help: the disk here is full, or this process ends."""
    if "subsystem is finalized" in str(error):
        return True
    known: Any = getattr(error, "errno", None)
    return isinstance(error, OSError) and known in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
