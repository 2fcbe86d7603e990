"""What can be wrong with a generation: gates that are counted, and drop only where told to.

Every text is measured once; a gate compares a measure with a threshold, so thresholds and policies
can change without measuring again. A dropped generation stays in its store.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen.quality.language import SourceLanguage
from trainer.config.fields import check_bounds, setting

# Gates in the order in which they are blamed: a generation counts as dropped by its first one.
GATES = (
    "empty",
    "refusal",
    "language",
    "repetition",
    "duplicate",
    "copy",
    "preamble",
    "length",
)
POLICIES = ("keep", "drop")
# A gate that this share of the generations fail tells of the job's settings, not of the texts.
NEARLY_ALL = 0.8
ADVICE = {
    "empty": "the model says nothing: look at them with generate.py report",
    "refusal": "the model refuses: another method, or another model",
    "language": "the model leaves the documents' language: say in method.system which to write in",
    "repetition": "the model loops: raise method.temperature, or generator.extra_body."
    "repetition_penalty where the server has it",
    "duplicate": "siblings are alike: raise method.temperature",
    "copy": "the model copies its document: another method, a higher method.temperature, or a "
    "larger model",
    "preamble": "the model announces its text: quality.preamble=strip cuts that off",
    "length": "method.max_tokens cuts the generations: raise it, or leave long documents out with "
    "corpus.max_characters",
}
HEAD = 300  # characters in which an answer refuses

# One character of a script written without spaces counts as a word.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+"
)
ASCII_WORD = re.compile(r"\w+", re.ASCII)  # the same words of an ASCII text, in half the time
REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)\b|i apologi[sz]e\b"
    r"|i (?:cannot|can't|can not|won't|will not) (?:\w+ ){0,2}"
    r"(?:assist|help|fulfil\w*|comply|provide|generate|create|write|rewrite|rephrase|continue)\b"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:please provide|you (?:haven't|have not|did not|didn't) provided?)"
    r" (?:me )?(?:with )?(?:the|a|any|your) (?:\w+ )?(?:text|document|article|passage)\b)",
    re.IGNORECASE,
)
# A first line that talks about the answer instead of being it, up to its colon or line end.
PREAMBLE = re.compile(
    r"\A[\s*#>_]*"
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great)\b[^\n:]{0,60}[!.,:][ \t]*)?"
    r"(?:"
    r"(?:here(?:'s| is| are)|below (?:is|are)|the following (?:is|are))\b[^\n:]{0,120}"
    r"(?:rephras|rewrit|rewrote|paraphras|version|article|summary|text|document|passage|answer"
    r"|response|thoughts?|table|tutorial|question|faq)[^\n:]{0,80}[*_]*:[*_]*[ \t]*\n*"
    r"|(?:the )?(?:rephrased|rewritten|paraphrased|revised)"
    r" (?:\w+ ){0,2}(?:article|text|document|version|passage)[*_]*(?::[*_]*[ \t]*\n*|\n+)"
    r")",
    re.IGNORECASE,
)
AGREEMENT = re.compile(
    r"\A\s*(?:sure|certainly|of course|absolutely)[!.,][^\n]{0,120}(?::|\n)\s*", re.IGNORECASE
)


@dataclass
class QualityConfig:
    """Policies and thresholds; ``keep`` counts a generation, ``drop`` leaves it out of streams."""

    empty: str = setting("drop", "No letter and no digit.", choices=POLICIES)
    refusal: str = setting(
        "keep", "'I cannot ...', 'As an AI ...', 'Please provide the text'.", choices=POLICIES
    )
    language: str = setting(
        "keep", "Another script or language than its document.", choices=POLICIES
    )
    repetition: str = setting(
        "keep", "Compresses too well, or repeats its own n-grams.", choices=POLICIES
    )
    duplicate: str = setting("keep", "Nearly a sibling of lower index.", choices=POLICIES)
    copy: str = setting("keep", "Nearly its document.", choices=POLICIES)
    preamble: str = setting(
        "keep",
        "'Here is a rephrased version:'; strip: the line is cut off.",
        choices=(*POLICIES, "strip"),
    )
    length: str = setting("keep", "Cut off by max_tokens.", choices=POLICIES)
    compression: float = setting(
        0.2, "repetition: zlib bytes per byte, below.", at_least=0, at_most=1
    )
    repetition_words: int = setting(
        200, "Shorter texts are judged by their n-grams alone.", unit="words", at_least=0
    )
    repeated_ngrams: float = setting(
        0.35, "repetition: share of 4-grams seen before in the text, above.", at_least=0, at_most=1
    )
    copied_ngrams: float = setting(
        0.8, "copy: share of 8-grams that are in the document, above.", at_least=0, at_most=1
    )
    similarity: float = setting(
        0.8, "duplicate: Jaccard index of the 5-grams, above.", at_least=0, at_most=1
    )
    processes: int | None = setting(
        None, "That measure; null: all cores for a large store.", unit="processes", at_least=1
    )

    def check(self) -> None:
        """Raise ValueError for an unknown policy or an impossible threshold."""
        check_bounds(self, "quality.")


@dataclass
class ReportConfig:
    """What the quality report shows."""

    samples: int = setting(
        10, "Documents, drawn at random, beside their generations.", unit="documents", at_least=0
    )
    siblings: int = setting(4, "Generations shown of each.", unit="generations", at_least=0)
    examples: int = setting(3, "Generations shown of each gate.", unit="generations", at_least=0)
    seed: int = setting(0, "Of the draw.", at_least=0)


@dataclass(frozen=True)
class Measures:
    """Measures of one generation, the columns of a quality table."""

    index: int
    words: int
    empty: bool
    refusal: bool
    language: bool
    preamble: bool
    length: bool
    compression: float  # zlib bytes per byte
    repeated: float  # share of 4-grams that occurred before
    copied: float  # share of 8-grams that occur in the document
    similarity: float  # largest Jaccard index of 5-grams with a sibling of lower index


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return (ASCII_WORD if text.isascii() else WORD).findall(text.lower())


def ngrams(words: Sequence[str], size: int) -> list[int]:
    """Hashes of all runs of ``size`` words; of the whole text where it is shorter."""
    if len(words) < size:
        return [hash(tuple(words))] if words else []
    return list(map(hash, zip(*(words[start:] for start in range(size)), strict=False)))


class Siblings:
    """The n-grams of the generations of one document that were measured already."""

    def __init__(self) -> None:
        self.earlier: list[set[int]] = []
        self.seen: set[int] = set()

    def add(self, found: set[int]) -> float:
        """Remember one more; returns its largest Jaccard index with an earlier one, or 0."""
        largest = 0.0
        known = found & self.seen  # what siblings share is little of what they hold
        if known:
            for other in self.earlier:
                shared = len(known & other)
                largest = max(largest, shared / (len(found) + len(other) - shared))
        self.earlier.append(found)
        self.seen |= found
        return largest


def measure(source: str, siblings: Sequence[tuple[int, str, str]]) -> list[Measures]:
    """Measure the generations of one document.

    Args:
        source: the document's text.
        siblings: (index, text, finish reason) of its generations, in ascending order of index.
    """
    language = SourceLanguage(source)
    source_ngrams = set(ngrams(words_of(source), 8))
    measured: list[Measures] = []
    earlier = Siblings()
    for index, text, finish_reason in siblings:
        words = words_of(text)
        content = text.encode()
        quadruples, octuples = ngrams(words, 4), ngrams(words, 8)
        measured.append(
            Measures(
                index=index,
                words=len(words),
                empty=not any(character.isalnum() for character in text),
                refusal=REFUSAL.search(text[:HEAD]) is not None,
                language=language.differs(text),
                preamble=strip_preamble(text) != text,
                length=finish_reason == "length",
                compression=len(zlib.compress(content)) / max(1, len(content)),
                repeated=(len(quadruples) - len(set(quadruples))) / max(1, len(quadruples)),
                copied=sum(map(source_ngrams.__contains__, octuples)) / max(1, len(octuples)),
                similarity=earlier.add(set(ngrams(words, 5))),
            )
        )
    return measured


def strip_preamble(text: str) -> str:
    """The text without a first line that only announces it; the text itself where there is none.

    A text that would be left empty is returned whole.
    """
    for pattern in (PREAMBLE, AGREEMENT):
        found = pattern.match(text)
        if found and text[found.end() :].strip():
            return text[found.end() :].lstrip()
    return text


def gates(columns: dict[str, NDArray[Any]], config: QualityConfig) -> dict[str, NDArray[np.bool_]]:
    """Which generations fail which gate: one bool array [rows] a gate."""
    long_enough = columns["words"] >= config.repetition_words
    return {
        "empty": columns["empty"],
        "refusal": columns["refusal"],
        "language": columns["language"],
        "repetition": (long_enough & (columns["compression"] < config.compression))
        | (columns["repeated"] > config.repeated_ngrams),
        "duplicate": columns["similarity"] > config.similarity,
        "copy": columns["copied"] > config.copied_ngrams,
        "preamble": columns["preamble"],
        "length": columns["length"],
    }


def advice(failed: dict[str, int], generations: int) -> list[str]:
    """What to change where nearly all generations fail a gate.

    Args:
        failed: how many fail each gate.
        generations: how many there are.
    """
    return [
        f"{count:,} of {generations:,} generations fail the gate {gate!r}: {ADVICE[gate]}"
        for gate, count in failed.items()
        if count >= NEARLY_ALL * max(1, generations)
    ]


@dataclass(frozen=True)
class Selection:
    """What the gates did to some generations."""

    kept: NDArray[np.bool_]  # bool [rows]
    failed: dict[str, int]  # by gate; a generation may fail several
    dropped: dict[str, int]  # by the first dropping gate it failed


def select(failed: dict[str, NDArray[np.bool_]], config: QualityConfig) -> Selection:
    """Apply the policies."""
    kept = np.ones(len(failed["empty"]), dtype=bool)
    dropped: dict[str, int] = {}
    for gate in GATES:
        if getattr(config, gate) == "drop":
            dropped[gate] = int((failed[gate] & kept).sum())
            kept &= ~failed[gate]
    return Selection(kept, {gate: int(failed[gate].sum()) for gate in GATES}, dropped)
