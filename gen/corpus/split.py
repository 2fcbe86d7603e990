"""Where latent thoughts are inserted: near-equal cuts of a document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    tokens: list[int]  # ids: those of all pieces in a row are the document's


def split_document(text: str, pieces: int, tokenizer: Tokenizer) -> list[Piece]:
    """Cut ``text`` into near-equal pieces by tokens; earlier pieces take the remainder.

    Args:
        text: one document.
        pieces: how many; G thoughts need G + 1.
        tokenizer: of the corpus; cuts fall on its token borders and never inside a character.

    Returns:
        Non-empty pieces that concatenate to ``text``; fewer than asked for where the text has
        fewer token borders.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    cuts, places = cut_places(starts_in(encoding.offsets), len(text), pieces)
    return [
        Piece(text[place:end], encoding.ids[token:last])
        for (place, end), (token, last) in zip(
            itertools.pairwise(places), itertools.pairwise(cuts), strict=True
        )
    ]


def starts_in(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The character at which each token starts, from where it starts and ends.

    A token may begin with the rest of a character that the one before it began: that one's start
    is then told for both, so that no cut falls between them.
    """
    starts: list[int] = []
    covered = 0
    for start, end in offsets:
        starts.append(starts[-1] if start < covered else start)
        covered = end
    return starts


def cut_places(starts: Sequence[int], characters: int, pieces: int) -> tuple[list[int], list[int]]:
    """Where :func:`split_document` cuts a text.

    Args:
        starts: the character at which each of its tokens starts.
        characters: of the text.
        pieces: how many are asked for.

    Returns:
        The borders of the pieces, the text's own included: in tokens, and in characters.
    """
    count = min(pieces, max(1, len(starts)))
    size, remainder = divmod(len(starts), count)
    cuts, places = [0], [0]
    border = 0
    for piece in range(count - 1):
        border += size + (piece < remainder)
        token = border
        while token > cuts[-1] and starts[token - 1] >= starts[border]:
            token -= 1  # tokens of one character share their offset
        if places[-1] < starts[border] < characters and cuts[-1] < token:
            cuts.append(token)
            places.append(starts[border])
    cuts.append(len(starts))
    places.append(characters)
    return cuts, places


def split_text(text: str, pieces: int, tokenizer: Tokenizer) -> list[str]:
    """The texts of :func:`split_document`."""
    return [piece.text for piece in split_document(text, pieces, tokenizer)]
