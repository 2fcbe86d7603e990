"""Tokenizer and cuts: nothing is lost, special strings stay text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gen.corpus.split import split_document, split_text
from gen.corpus.tokenizer import TokenizerConfig, build_tokenizer, encode, train_bpe

CONFIG = TokenizerConfig(vocab_size=300)
TEXTS = ["The cat sat on the mat. " * 20, "Zwölf Boxkämpfer jagen Viktor. 数学 🙂 " * 20]
BPE = train_bpe(TEXTS, CONFIG)
BPE.encode_special_tokens = True
# Characters that end with the same byte: the likeliest pair is the end of one and the next's head.
ALIKE = [chr(0x4E00 + 64 * place) for place in range(48)]
STRADDLING = train_bpe(
    ["".join(ALIKE[i * i % 47] for i in range(start, 2000)) for start in range(9)], CONFIG
)


@given(st.text())
def test_round_trip(text: str) -> None:
    ids = encode(BPE, [text])[0]
    assert BPE.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200)
@given(st.text(min_size=1, max_size=200), st.integers(1, 12))
def test_pieces_make_the_text_and_are_near_equal(text: str, pieces: int) -> None:
    cut = split_text(text, pieces, BPE)
    assert "".join(cut) == text
    assert 1 <= len(cut) <= pieces
    assert all(cut)
    if text.isascii():  # a token border may lie inside a wider character
        sizes = [0] * len(cut)
        ends = [len("".join(cut[: i + 1])) for i in range(len(cut))]
        for start, _ in BPE.encode(text, add_special_tokens=False).offsets:
            sizes[sum(end <= start for end in ends)] += 1
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=200)
@given(st.text([*ALIKE, "a"], min_size=1, max_size=60), st.integers(2, 9))
def test_no_cut_falls_inside_a_character(text: str, pieces: int) -> None:
    """This tokenizer's tokens hold the end of one character and the beginning of the next."""
    cut = split_document(text, pieces, STRADDLING)
    assert "".join(piece.text for piece in cut) == text
    assert all(STRADDLING.decode(piece.tokens) == piece.text for piece in cut)


def test_training_twice_gives_the_same_file() -> None:
    assert train_bpe(TEXTS, CONFIG).to_str() == train_bpe(TEXTS, CONFIG).to_str()


def test_end_of_text_in_a_document_stays_text(tmp_path: Path) -> None:
    tokenizer, manifest = build_tokenizer(CONFIG, tmp_path, TEXTS)
    ids = encode(tokenizer, ["a <|endoftext|> b"])[0]
    assert manifest.eos_id not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"


def test_a_tokenizer_file_and_its_mistakes(tmp_path: Path) -> None:
    BPE.save(str(tmp_path / "mine.json"))
    config = TokenizerConfig(kind="file", path=str(tmp_path / "mine.json"))
    tokenizer, manifest = build_tokenizer(config, tmp_path / "root", [])
    assert isinstance(tokenizer, Tokenizer)
    assert manifest.vocab_size == BPE.get_vocab_size()
    with pytest.raises(ValueError, match="holds another tokenizer"):
        build_tokenizer(CONFIG, tmp_path / "root", TEXTS)
    with pytest.raises(ValueError, match="no token '</s>'"):
        build_tokenizer(
            TokenizerConfig(kind="file", path=config.path, eos_token="</s>"), tmp_path / "b", []
        )
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        build_tokenizer(TokenizerConfig(kind="file", path="none.json"), tmp_path / "c", [])
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json is damaged, or no JSON file"):
        build_tokenizer(config, tmp_path / "e", [])
    with pytest.raises(ValueError, match="at least 257"):
        build_tokenizer(TokenizerConfig(vocab_size=100), tmp_path / "d", TEXTS)
