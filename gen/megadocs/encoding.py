"""What stands around the texts of a megadoc, such that every member decodes to its own text.

Tokenizers of the SentencePiece kind put a space before every text they encode. That is right where
a document begins and wrong inside one: a document that thoughts stretch is encoded whole and its
ids are cut, and a text that goes on after another is encoded without that space.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gen.corpus.tokenizer import encode, plain
from gen.megadocs.assembly import Layout
from trainer.data.format import THOUGHT


class Encoding:
    """How the members of a stream become token ids.

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
        self.beginning = tokenizer
        self.continuing = without_prefix(tokenizer)
        self.one_text = separator is not None
        phrases = without_prefix(tokenizer)
        phrases.encode_special_tokens = False
        between = [eos_id] if separator is None else encode(phrases, [separator])[0]
        # Token ids: after the last member, after the others, before and after a thought.
        self.end = [eos_id]
        self.between = between if members_are_documents else []
        self.opening, self.closing = encode(phrases, [open_thought, close_thought])
        # Of what is no member's text but of a megadoc's.
        self.between_bytes = len((separator or "").encode()) if members_are_documents else 0
        self.thought_bytes = len(open_thought.encode()) + len(close_thought.encode())

    def begins(self, layout: Layout) -> NDArray[np.bool_]:
        """Which members' texts stand where a document begins: a prefix is right there alone.

        Returns:
            bool ``[N]``. Pieces of a document are cut from the ids of the whole.
        """
        inside = layout.kind == THOUGHT
        if self.one_text and layout.cuts is None:
            inside = np.ones(len(layout.kind), dtype=bool)
        begins: NDArray[np.bool_] = ~inside | layout.first_members()
        return begins


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
