"""Held-out documents that training knows nearly word for word, found by MinHash.

Two documents are near-duplicates where their 5-word shingles have a Jaccard similarity of at least
0.8, the threshold of Lee et al. 2107.06499. Signatures of the held-out documents lie in an index
that every training document is looked up in; what the index proposes is compared exactly. A shingle
is its 64-bit hash, 8 bytes of memory for each of a held-out document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.files import read_sealed, write_sealed

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 5  # words
THRESHOLD = 0.8  # Jaccard similarity of the sets of shingles
PERMUTATIONS = 128
LEFT_OUT = "left-out.json"  # in the documents' folder: ids by split that are not used
STANDS_ALONE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # Chinese, Japanese, Korean
NO_WORD = re.compile(r"[^\w\x00-\x7f]+")  # beyond ASCII; within it, ONLY_WORDS
ONLY_WORDS = bytes(
    code if code >= 0x80 or chr(code).isalnum() or chr(code) == "_" else ord(" ")
    for code in range(256)
)
# A word's hash is the sum of those of its bytes, each at its place in the word.
OF_BYTE = np.random.default_rng(0).integers(1 << 64, size=(64, 256), dtype=np.uint64)
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # between the words of a run: their order counts
FILTER_BITS = 16  # at least, for each shingle of the held-out documents


class Text(Protocol):
    """What is compared: a document."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass
class NearDuplicates:
    """Ids of what resembles something in the other split."""

    action: str
    held_out_documents: int
    held_out: set[str] = field(default_factory=set)
    training: set[str] = field(default_factory=set)

    @property
    def share(self) -> float:
        """Of the held-out documents that are left, how many have a near-duplicate in training."""
        if self.action != "report":
            return 0.0
        return len(self.held_out) / self.held_out_documents

    def left_out(self) -> dict[str, list[str]]:
        """Ids that are not used, by split."""
        training = self.training if self.action == "drop" else set()
        held_out = self.held_out if self.action == "keep_in_training" else set()
        return {"train": sorted(training), "val": sorted(held_out)}

    def to_dict(self) -> dict[str, Any]:
        """For the manifest of the documents."""
        return {
            "action": self.action,
            "held_out": len(self.held_out),
            "training": len(self.training),
            "share": self.share,
            "threshold": THRESHOLD,
        }


class Shingles:
    """Hashes of any document's shingles, as a table of bits: says "no" surely, "yes" nearly."""

    def __init__(self, hashes: list[NDArray[np.uint64]]) -> None:
        wanted = FILTER_BITS * max(1, sum(map(len, hashes)))
        self.shift = np.uint64(64 - max(10, wanted.bit_length()))
        self.bits = np.zeros(1 << (61 - int(self.shift)), np.uint8)
        for some in hashes:
            byte, bit = self.places(some)
            np.bitwise_or.at(self.bits, byte, bit)

    def places(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Byte and bit of each hash."""
        place = hashes >> self.shift
        return place >> np.uint64(3), np.left_shift(1, place & np.uint64(7), dtype=np.uint8)

    def count(self, hashes: NDArray[np.uint64]) -> int:
        """How many of the hashes may be in it."""
        byte, bit = self.places(hashes)
        return int(np.count_nonzero(self.bits[byte] & bit))


def find(training: Iterable[Text], held_out: Iterable[Text], action: str) -> NearDuplicates:
    """Compare every training document with the held-out ones.

    Raises:
        ValueError: nothing would be held out any more.
    """
    known = {document.id: shingles(document.text) for document in held_out}
    found = NearDuplicates(action, len(known))
    from datasketch import MinHashLSH  # half a second, for SciPy

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    for name, hashes in tqdm(known.items(), desc="held-out", unit="doc", leave=False):
        index.insert(name, signature(hashes))
    anywhere = Shingles(list(known.values()))
    for document in tqdm(training, desc="near-duplicates", unit="doc", leave=False):
        own = shingles(document.text)
        # A near-duplicate shares this many of its shingles with one of them, so with all of them;
        # hardly any other document does, which saves the signatures of nearly all.
        if anywhere.count(own) < THRESHOLD * len(own):
            continue
        for candidate in index.query(signature(own)):
            other = known[candidate]
            shared = len(np.intersect1d(own, other, assume_unique=True))
            if shared >= THRESHOLD * (len(own) + len(other) - shared):
                found.held_out.add(candidate)
                found.training.add(document.id)
    if action == "keep_in_training" and known and len(found.held_out) == len(known):
        raise ValueError(
            "corpus.near_duplicates=keep_in_training would leave no held-out document: all "
            f"{len(known)} have near-duplicates in training; use drop or report"
        )
    return found


def words(text: str) -> list[bytes]:
    """Runs of letters, digits and ``_`` in lower case, UTF-8; signs of Chinese stand alone."""
    text = text.lower()
    if not text.isascii():
        text = STANDS_ALONE.sub(r" \g<0> ", NO_WORD.sub(" ", text))
    return text.encode().translate(ONLY_WORDS).split()


def shingles(text: str) -> NDArray[np.uint64]:
    """Sorted, distinct hashes of the runs of five words; a shorter text is one run.

    A text of signs alone is one word: others of signs alone are no duplicates of it.
    """
    found = words(text) or [b"".join(text.lower().encode().split())]
    content = np.frombuffer(b" ".join([*found, b""]), np.uint8)
    ends = np.flatnonzero(content == ord(" ")) + 1  # of each word, with the space behind it
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
    place = (np.arange(len(content)) - np.repeat(starts, ends - starts)) % len(OF_BYTE)
    of_word = np.add.reduceat(OF_BYTE[place, content], starts)
    count = max(1, len(found) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    for word in range(min(SHINGLE, len(found))):
        hashes = hashes * FACTOR + of_word[word : word + count]
    return np.unique(mixed(hashes))


def mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hashes with every bit spread over all others (the end of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


def signature(hashes: NDArray[np.uint64]) -> MinHash:
    """MinHash of a set of shingles."""
    from datasketch import MinHash

    made = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # they are hashes already
    made.update_batch((hashes >> np.uint64(32)).tolist())
    return made


def write_left_out(folder: Path, found: NearDuplicates) -> None:
    """Note in the documents' folder which ids are not used."""
    write_sealed(folder / LEFT_OUT, found.left_out())


def left_out(folder: Path, split: str) -> set[str]:
    """Ids of a split that are not used."""
    file = folder / LEFT_OUT
    return set(read_sealed(file)[split]) if file.exists() else set()


def share_in(folder: Path) -> float | None:
    """Share of the held-out documents with a near-duplicate in training; None where not known."""
    file = folder / "manifest.json"
    if not file.exists():
        return None
    share: float | None = read_sealed(file).get("near_duplicates", {}).get("share")
    return share


def describe(found: dict[str, Any], documents: int) -> str:
    """One line about what was found."""
    done = {
        "report": "corpus.near_duplicates=drop or keep_in_training leaves them out of one side",
        "drop": "dropped from training",
        "keep_in_training": "no longer held out",
    }[found["action"]]
    return (
        f"near-duplicates: {found['held_out']} of {documents} held-out documents resemble "
        f"{found['training']} of training; {done}"
    )
