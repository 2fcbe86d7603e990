"""Where latent thoughts are inserted: near-equal cuts of a document."""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer


def split_text(text: str, pieces: int, tokenizer: Tokenizer) -> list[str]:
    """Cut ``text`` into near-equal pieces by tokens; earlier pieces take the remainder.

    Args:
        text: one document.
        pieces: how many; G thoughts need G + 1.
        tokenizer: of the corpus; cuts fall on its token borders and never inside a character.

    Returns:
        Non-empty pieces that concatenate to ``text``; fewer than asked for where the text has
        fewer token borders.
    """
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    count = min(pieces, max(1, len(offsets)))
    size, remainder = divmod(len(offsets), count)
    cuts = [0]
    border = 0
    for piece in range(count - 1):
        border += size + (piece < remainder)
        place = offsets[border][0]
        if cuts[-1] < place < len(text):  # tokens of one character share their offset
            cuts.append(place)
    cuts.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(cuts)]
