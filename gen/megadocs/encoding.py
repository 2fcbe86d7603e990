"""Megadocs become token ids, such that every member decodes to its own text.

Tokenizers of the SentencePiece kind put a space before every text they encode. That is right where
a document begins and wrong inside one: a document that thoughts stretch is encoded whole and its
ids are cut, and a text that goes on after another is encoded without that space.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from gen.corpus.tokenizer import encode, plain
from gen.megadocs.assembly import Megadoc, Member
from trainer.data.format import REAL, THOUGHT


class Encoder:
    """Token ids of megadocs.

    Args:
        tokenizer: of the corpus.
        eos_id: ends every megadoc, and its members where there is no other separator.
        separator: text between members, which makes a megadoc one text; None is end-of-text.
        open_thought: before every thought.
        close_thought: after it.
        members_are_documents: whether a separator stands between members at all.

    A separator or delimiter that names a special token of the tokenizer becomes that token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_id: int,
        separator: str | None,
        open_thought: str,
        close_thought: str,
        members_are_documents: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.members_are_documents = members_are_documents
        self.continuing = without_prefix(tokenizer)
        self.eos_id = eos_id
        self.one_text = separator is not None
        phrases = without_prefix(tokenizer)
        phrases.encode_special_tokens = False
        self.separator = [eos_id] if separator is None else encode(phrases, [separator])[0]
        self.delimiters = (open_thought, close_thought)
        self.opening, self.closing = encode(phrases, list(self.delimiters))

    def encode(self, megadocs: list[Megadoc]) -> list[tuple[list[int], list[int]]]:
        """Ids ``[L]`` and cumulative member ends ``[M]`` of each megadoc."""
        texts: dict[bool, list[str]] = {True: [], False: []}  # by whether they begin a document
        for megadoc in megadocs:
            for place, member in enumerate(megadoc.members):
                if member.tokens is None:
                    texts[self.begins(place, member)].append(self.inner_text(member))
        encoded = {
            True: iter(encode(self.tokenizer, texts[True])),
            False: iter(encode(self.continuing, texts[False])),
        }
        found = []
        for megadoc in megadocs:
            tokens: list[int] = []
            ends: list[int] = []
            for place, member in enumerate(megadoc.members):
                own = member.tokens
                if own is None:
                    own = next(encoded[self.begins(place, member)])
                if member.kind == THOUGHT:
                    own = [*self.opening, *own, *self.closing]
                tokens.extend(own)
                if place == len(megadoc.members) - 1:
                    tokens.append(self.eos_id)
                elif self.members_are_documents:
                    tokens.extend(self.separator)
                ends.append(len(tokens))
            found.append((tokens, ends))
        return found

    def begins(self, place: int, member: Member) -> bool:
        """Whether a text stands where a document begins: a prefix is right there alone."""
        return place == 0 or not (self.one_text or member.kind == THOUGHT)

    def inner_text(self, member: Member) -> str:
        """A thought without its delimiters; any other text as it is."""
        if member.kind != THOUGHT:
            return member.text
        opening, closing = self.delimiters
        return member.text[len(opening) : len(member.text) - len(closing)]


def real_tokens(megadoc: Megadoc, ends: list[int]) -> int:
    """Tokens of the real members, separators after them included."""
    starts = [0, *ends[:-1]]
    return sum(
        end - start
        for member, start, end in zip(megadoc.members, starts, ends, strict=True)
        if member.kind == REAL
    )


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer for a text that goes on: it puts no space before it."""
    content = json.loads(tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        content[part] = strip_prefix(content.get(part))
    return plain(Tokenizer.from_str(json.dumps(content)))


def strip_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without what it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {key: [kept for one in part[key] if (kept := strip_prefix(one))]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part
