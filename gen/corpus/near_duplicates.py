"""Held-out documents that training knows nearly word for word, found by MinHash.

Two documents are near-duplicates where their 5-word shingles have a Jaccard similarity of at least
0.8, the threshold of Lee et al. 2107.06499. Signatures of the held-out documents lie in an index
that every training document is looked up in; what the index proposes is compared exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from trainer.files import read_sealed, write_sealed

SHINGLE = 5  # words
THRESHOLD = 0.8  # Jaccard similarity of the sets of shingles
PERMUTATIONS = 128
LEFT_OUT = "left-out.json"  # in the documents' folder: ids by split that are not used
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # signs of Chinese stand alone


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


def find(training: Iterable[Text], held_out: list[Text], action: str) -> NearDuplicates:
    """Compare every training document with the held-out ones.

    Raises:
        ValueError: nothing would be held out any more.
    """
    found = NearDuplicates(action, len(held_out))
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    known: dict[str, set[str]] = {}
    anywhere: set[str] = set()  # shingles of any held-out document
    for document in held_out:
        known[document.id] = shingles(document.text)
        anywhere |= known[document.id]
        index.insert(document.id, signature(known[document.id]))
    for document in tqdm(training, desc="near-duplicates", unit="doc", leave=False):
        own = shingles(document.text)
        # A near-duplicate shares this many of its shingles with one of them, so with all of them;
        # hardly any other document does, which saves the signatures of nearly all.
        if len(own & anywhere) < THRESHOLD * len(own):
            continue
        for candidate in index.query(signature(own)):
            other = known[candidate]
            if len(own & other) >= THRESHOLD * len(own | other):
                found.held_out.add(candidate)
                found.training.add(document.id)
    if action == "keep_in_training" and len(found.held_out) == len(held_out):
        raise ValueError(
            "corpus.near_duplicates=keep_in_training would leave no held-out document: all "
            f"{len(held_out)} have near-duplicates in training; use drop or report"
        )
    return found


def shingles(text: str) -> set[str]:
    """Runs of five words, lower case; a shorter text is one run."""
    words = WORD.findall(text.lower())
    return {" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}


def signature(of: set[str]) -> MinHash:
    """MinHash of a set of shingles."""
    made = MinHash(num_perm=PERMUTATIONS)
    made.update_batch([shingle.encode() for shingle in of])
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
