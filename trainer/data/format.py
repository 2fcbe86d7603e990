"""The contract between gen/ and trainer/: what a stream is called, what it holds, its files.

Files are sealed when a stream is written and verified before they are believed.

``manifest.json`` is written last. It carries the size and SHA-256 of every other file, a hash of
itself, and ``content_sha256``, the identity of what the stream says: tokens, members and their
order, wherever the folder lies and however it is cut into shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.files import SEAL, hash_of, only_one, sha256

logger = logging.getLogger(__name__)

# Of members, by the number in a sample's member_kinds.
MEMBER_KINDS = ("real", "rephrase", "thought")
REAL, REPHRASE, THOUGHT = range(3)
SYNTHETIC = ("simple", "stitched", "latent")  # kinds of streams; the others are real and val
# What a stream's name ends with, by where the real document stands in its megadocs.
VARIANTS = {"last": "", "first": "real-first", "absent": "no-real"}
BY_LOSS = "by-loss"  # before that, where documents have generations by a model's loss
# Of the table that evaluate.py document_losses= writes: a document's id, nats per token.
LOSS_COLUMNS = ("document_id", "loss")

MANIFEST = "manifest.json"
SAID = 1 << 32  # bytes above which verifying takes seconds and is announced


class DamagedStreamError(ValueError):
    """A file of a stream is not the one that was written; the message names it and what to do."""


def stream_name(
    kind: str, generations: int, style: str, real_document: str, by_loss: bool = False
) -> str:
    """Folder name: ``real``, ``val``, ``stitched-g8``, ``stitched-g8-faq-real-first``, ...

    Args:
        kind: of the stream.
        generations: all generations of a document, of all styles together; their mean ``by_loss``.
        style: methods of the generations; empty where names leave it out.
        real_document: a key of :data:`VARIANTS`; means nothing for ``latent``.
        by_loss: whether documents have more generations where a model's loss is high.
    """
    if kind not in SYNTHETIC:
        return kind
    variant = "" if kind == "latent" else VARIANTS[real_document]
    allocation = BY_LOSS if by_loss else ""
    return "-".join(part for part in (kind, f"g{generations}", style, allocation, variant) if part)


def is_variant(name: str) -> bool:
    """Whether a method's name would be taken for a variant of a stream of another method."""
    variants = [BY_LOSS, *filter(None, VARIANTS.values())]
    return any(f"-{name}".endswith(f"-{variant}") for variant in variants)


def real_document_of(name: str) -> str:
    """Where the real document stands, from a name: for results that do not say it."""
    return next(
        (place for place, variant in VARIANTS.items() if variant and name.endswith(variant)), "last"
    )


class ContentHash:
    """Identity of a stream's content, fed with its samples in their order.

    Args:
        tokenizer_sha256: of the tokenizer the ids belong to.
        members_are_documents: whether ``data.mask=document`` cuts between members.
    """

    def __init__(self, tokenizer_sha256: str, members_are_documents: bool) -> None:
        self.digest = hashlib.sha256(repr((tokenizer_sha256, members_are_documents)).encode())

    def add(
        self,
        tokens: NDArray[np.integer[Any]],
        member_ends: NDArray[np.integer[Any]],
        member_kinds: NDArray[np.integer[Any]],
    ) -> None:
        """One sample: token ids ``[L]``, cumulative member ends ``[M]``, member kinds ``[M]``."""
        self.add_bytes(
            tokens.astype("<u4").tobytes(),
            member_ends.astype("<u4").tobytes(),
            member_kinds.astype("u1").tobytes(),
        )

    def add_bytes(
        self, tokens: bytes | memoryview, member_ends: bytes | memoryview, kinds: bytes | memoryview
    ) -> None:
        """One sample as its shard holds it: two arrays of uint32, one of uint8, little-endian."""
        self.digest.update(struct.pack("<QQ", len(tokens) // 4, len(member_ends) // 4))
        self.digest.update(tokens)
        self.digest.update(member_ends)
        self.digest.update(kinds)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


def seal(
    folder: Path, manifest: dict[str, Any], known: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Write the manifest of a stream whose other files are complete; returns it with the hashes.

    Args:
        folder: of the stream.
        manifest: without ``files``.
        known: size and SHA-256 of files, where they were hashed as they were written.
    """
    known = known or {}
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    described = known | describe([path for path in files if path.name not in known])
    sealed = {**manifest, "files": dict(sorted(described.items()))}
    sealed[SEAL] = hash_of(sealed)
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=1))
    return sealed


def describe(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, by its name, for :func:`verify`."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stream folder, compared with its own hash.

    Raises:
        FileNotFoundError: the folder holds no finished stream.
        DamagedStreamError: the manifest is damaged, or that of an older version.
    """
    file = folder / MANIFEST
    if not file.exists():
        known = sorted(other.parent.name for other in folder.parent.glob(f"*/{MANIFEST}"))
        raise FileNotFoundError(
            f"{folder} is not a finished stream (no {MANIFEST}). Finished ones beside it: "
            f"{', '.join(known) or 'none'}. Build it with generate.py"
        )
    return parse_manifest(file.read_bytes(), file, folder)


def parse_manifest(written: bytes, file: Path | str, folder: Path | str) -> dict[str, Any]:
    """The bytes of a manifest; ``file`` and ``folder`` are where they come from, for errors.

    Raises:
        DamagedStreamError: they are damaged, or those of an older version.
    """
    try:
        content: dict[str, Any] = json.loads(written)
        told = content.get(SEAL)
    except (ValueError, AttributeError) as error:
        raise DamagedStreamError(f"{file} is damaged ({error}); {build_again(folder)}") from error
    if told is None:
        raise DamagedStreamError(
            f"{file} holds no hashes: it was written by an older version; {build_again(folder)} "
            "(its generations are kept)"
        )
    if hash_of(content) != told:
        raise DamagedStreamError(f"{file} was changed after it was written; {build_again(folder)}")
    return content


def verify(folder: Path, manifest: dict[str, Any], remedy: str | None = None) -> None:
    """Compare every file with the manifest, once on this machine until a file is written again.

    Args:
        folder: that the files lie in.
        manifest: its ``files`` are what :func:`describe` gave.
        remedy: what to do about damage; None to build a stream again.

    Raises:
        DamagedStreamError: a file is missing, longer, shorter or other than it was written.
    """
    remedy = remedy or build_again(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        found = file.stat().st_size if file.exists() else None
        if found != expected["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DamagedStreamError(
                f"{file} {state}, {MANIFEST} says {expected['bytes']}: it was truncated or "
                f"changed; {remedy}"
            )
    hashes = {name: expected["sha256"] for name, expected in manifest["files"].items()}
    for name, found_hash in damaged_files(folder, hashes).items():
        raise DamagedStreamError(
            f"{folder / name} is damaged: its SHA-256 is {found_hash[:12]}, {MANIFEST} says "
            f"{hashes[name][:12]}; {remedy}"
        )


def damaged_files(folder: Path, hashes: dict[str, str]) -> dict[str, str]:
    """Files whose SHA-256 is another than ``hashes`` says, with what it is; both by name.

    Raises:
        FileNotFoundError: one is not there.
    """
    found = remembered_hashes(folder, list(hashes))
    return {name: own for name, own in found.items() if own != hashes[name]}


def remembered_hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files, by name; each is read once on this machine until it is written again.

    What was found is remembered beside the temporary files, by path, size and time of change.

    Raises:
        FileNotFoundError: one is not there.
    """
    memory = Path(tempfile.gettempdir()) / f"megadocs-verified-{os.getuid()}"
    memory.mkdir(mode=0o700, exist_ok=True)
    note = memory / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    with only_one(note.with_suffix(".lock")):  # the ranks of a machine read the files once
        known = known_hashes(note.read_bytes() if note.exists() else b"")
        states = {name: state_of(folder / name) for name in names}
        unknown = [name for name in names if known.get(name, [])[:-1] != states[name]]
        if unknown:
            total = sum(states[name][0] for name in unknown)
            if total > SAID:
                logger.info(f"verifying {total / 1e9:.0f} GB of {folder}, once on this machine")
            with ThreadPoolExecutor() as pool:
                found = pool.map(sha256, [folder / name for name in unknown])
                for name, own in zip(unknown, found, strict=True):
                    known[name] = [*states[name], own]
            kept = {name: state for name, state in known.items() if (folder / name).exists()}
            note.write_text(json.dumps(kept))
        return {name: known[name][-1] for name in names}


def known_hashes(text: bytes) -> dict[str, list[Any]]:
    """What a note of :func:`remembered_hashes` holds; nothing where it is damaged itself."""
    try:
        known = json.loads(text)
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def state_of(file: Path) -> list[int]:
    """Changes when a file is written again."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def build_again(folder: Path | str) -> str:
    """What to do about a stream that cannot be used."""
    return f"build {folder} again with generate.py (of a remote stream: delete that local copy)"
