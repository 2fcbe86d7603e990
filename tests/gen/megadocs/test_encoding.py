"""Six kinds of tokenizer: every member of every stream decodes to its text, byte for byte."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming import LocalDataset
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from gen.corpus.documents import Document
from gen.corpus.tokenizer import (
    TokenizerConfig,
    build_tokenizer,
    describe_losses,
    encode,
    plain,
    train_bpe,
)
from gen.generations.store import Generation, GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.encoding import Encoding
from gen.megadocs.streams import build_stream
from gen.quality.gates import QualityConfig
from trainer.data.format import REAL, THOUGHT

WORDS = "Considerations regarding internationalization were postponed. "
TEXTS = [
    WORDS.strip(),
    "Leading and  double   spaces,\n\nlines\tand tabs.  ",
    "Zwölf Boxkämpfer 🙂🙂 jagen 数学, naïve e\u0301. " * 3,
    "A literal </s> and <|endoftext|> in a text.",
    "word",
]
DOCUMENTS = [Document(f"d{place}", text) for place, text in enumerate(TEXTS)]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level() -> Tokenizer:
    return train_bpe(TEXTS, TokenizerConfig(vocab_size=400, eos_token="</s>"))


def llama_3() -> Tokenizer:
    """Splits digits and letters by a pattern before the bytes."""
    tokenizer = byte_level()
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def byte_level_with_prefix() -> Tokenizer:
    """Byte-level with a space before every text, as RoBERTa's variants have."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """The vocabulary of the two below: SentencePiece's space, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    spaced = ["▁" + text.replace(" ", "▁") for text in (WORDS, "Leading and double spaces", "word")]
    tokenizer.train_from_iterator(spaced, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def llama_2() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """The newer form of Llama 2's, and Mistral's."""
    tokenizer = byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


def with_holes() -> Tokenizer:
    """End of text far above the other ids, and added tokens, one of them in plain texts."""
    content = json.loads(byte_level().to_str())
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["</s>"] = 1000
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken("internationalization", normalized=False)])
    return tokenizer


TOKENIZERS = [byte_level, llama_3, byte_level_with_prefix, llama_2, metaspace, with_holes]


def generation(document: Document, method: str, index: int) -> Generation:
    text = rewrite(document.text, index)
    return Generation(
        document.id, method, index, text, "m", "v", 1.0, 1.0, 9, 0, "stop", 1, 1, 0, False
    )


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("separator", [None, "\n---\n"])
def test_every_member_decodes_to_its_text(
    make: object, separator: str | None, tmp_path: Path
) -> None:
    make().save(str(tmp_path / "mine.json"))  # type: ignore[operator]
    settings = TokenizerConfig(kind="file", path=str(tmp_path / "mine.json"), eos_token="</s>")
    tokenizer, vocabulary = build_tokenizer(settings, tmp_path, [])
    config = StreamConfig(separator=separator, open_thought="<t>", close_thought="</t>")
    for kind, method in (
        ("real", "rephrase"),
        ("simple", "rephrase"),
        ("stitched", "rephrase"),
        ("latent", "latent"),
    ):
        if kind in ("simple", "latent"):
            store = GenerationStore.of_method(tmp_path, method, 2, method == "latent")
            store.claim({})
            store.append([generation(d, method, i) for d in DOCUMENTS for i in range(2)], 0)
        manifest = build_stream(
            kind,
            method,
            2,
            DOCUMENTS,
            "h",
            tokenizer,
            vocabulary,
            config,
            QualityConfig(),
            tmp_path,
        )
        texts = {document.id: document.text for document in DOCUMENTS}
        dataset = LocalDataset(str(tmp_path / "streams" / manifest["name"]))
        for sample in (dataset[place] for place in range(len(dataset))):
            ids = sample["tokens"].tolist()
            assert ids[-1] == vocabulary.eos_id
            assert max(ids) < manifest["vocab_size"]
            text = texts[sample["provenance"]["document_id"]]
            parts = sample["provenance"]["members"]
            if kind == "latent":
                whole = tokenizer.decode(ids[:-1], skip_special_tokens=False)
                for _, index in (part for part in parts if part[0] == THOUGHT):
                    before, thought, after = whole.partition(f"<t>{rewrite(text, index)}</t>")
                    assert thought
                    whole = before + after
                assert whole == text
                continue
            members = [text if part == REAL else rewrite(text, index) for part, index in parts]
            if separator is not None:
                whole = tokenizer.decode(ids[:-1], skip_special_tokens=False)
                assert whole == separator.join(members)
                continue
            start = 0
            for end, member in zip(sample["member_ends"].tolist(), members, strict=True):
                assert tokenizer.decode(ids[start : end - 1], skip_special_tokens=False) == member
                start = end


@pytest.mark.parametrize("make", TOKENIZERS)
def test_what_a_tokenizer_loses_is_said_of_none_that_loses_nothing(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = plain(make())
    assert describe_losses(tokenizer, TEXTS) is None
    normalizer = tokenizer.normalizer
    lower = [normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([normalizer, *lower] if normalizer else lower)
    said = describe_losses(tokenizer, TEXTS)
    assert said is not None
    assert "not give back 4 of 5 documents ('Considerations regar' becomes 'considerations" in said


def rewrite(text: str, index: int) -> str:
    return f"{index}: {text[::-1]}"


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_separator_that_names_a_special_token_is_that_token(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = plain(make())
    eos = tokenizer.token_to_id("</s>")
    encoding = Encoding(tokenizer, eos, "</s>", "<t>", "</s>", members_are_documents=True)
    assert encoding.between == [eos]
    assert encoding.closing == [eos]
    assert encoding.opening != [eos]
    # In a document the same letters are text, and decode to themselves.
    (ids,) = encode(tokenizer, ["a </s> b"])
    assert eos not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a </s> b"
