"""Measures equal their plain definitions, whatever is done to make them fast."""

import itertools
import random
import zlib

from hypothesis import given
from hypothesis import strategies as st

from gen.quality.gates import WORD, measure
from gen.quality.language import dominant_script, language_shares, script_of
from tests.gen.quality.test_gates import ANOTHER, GERMAN, JAPANESE, REWRITE, RUSSIAN, SOURCE

LINES = [SOURCE, REWRITE, ANOTHER, GERMAN, JAPANESE, RUSSIAN, "Kelvin K, long ſ, İstanbul ⅷ ² x_1"]


def runs(words: list[str], size: int) -> list[tuple[str, ...]]:
    """All runs of so many words; the whole text where it is shorter."""
    if len(words) < size:
        return [tuple(words)] if words else []
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


@st.composite
def siblings(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A document and texts that share words with it and with each other, or are arbitrary."""
    chooser = random.Random(draw(st.integers(0, 1 << 32)))
    words = " ".join(draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=3))).split(" ")

    def text() -> str:
        start = chooser.randrange(len(words))
        return " ".join((words * 2)[start : start + chooser.randrange(1, 60)])

    arbitrary = draw(st.lists(st.text(max_size=60), max_size=2))
    texts = [text() for _ in range(draw(st.integers(1, 5)))] + arbitrary
    chooser.shuffle(texts)
    return text(), texts


@given(siblings())
def test_n_grams_shares_and_likeness(drawn: tuple[str, list[str]]) -> None:
    source, texts = drawn
    found = measure(source, [(index, text, "stop") for index, text in enumerate(texts)])
    words = [WORD.findall(text.lower()) for text in texts]
    copied_from = set(runs(WORD.findall(source.lower()), 8))
    for place, one in enumerate(found):
        own = words[place]
        assert one.words == len(own)
        fours, eights = runs(own, 4), runs(own, 8)
        assert one.repeated == (len(fours) - len(set(fours))) / max(1, len(fours))
        assert one.copied == sum(run in copied_from for run in eights) / max(1, len(eights))
        sets = [set(runs(other, 5)) for other in words[: place + 1]]
        indices = [
            len(sets[place] & other) / max(1, len(sets[place] | other)) for other in sets[:place]
        ]
        assert one.similarity == max(indices, default=0.0)
        content = texts[place].encode()
        assert one.compression == len(zlib.compress(content)) / max(1, len(content))


@given(st.one_of(st.text(max_size=80), siblings().map(lambda drawn: drawn[0])))
def test_script_is_that_of_most_letters(text: str) -> None:
    letters = [script_of(character) for character in text if character.isalpha()]
    if len(letters) < 20:
        assert dominant_script(text) is None
    elif text.isascii():
        assert dominant_script(text) == "LATIN"
    else:
        counts = [len(list(group)) for _, group in itertools.groupby(sorted(letters))]
        assert letters.count(str(dominant_script(text))) == max(counts)


def test_function_words_are_counted_alike_in_ascii_and_beyond() -> None:
    text = "The keeper of the lighthouse and the sailors that were not with them " * 3
    ascii_shares, other_shares = language_shares(text), language_shares(text + "é")
    words = len(text.split())
    assert [round(share * words) for share in ascii_shares] == [
        round(share * (words + 1)) for share in other_shares
    ]
