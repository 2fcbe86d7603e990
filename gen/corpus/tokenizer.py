"""The tokenizer of a corpus folder: trained on it, a file, or one from the hub."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.config.fields import Place, setting
from trainer.files import DamagedFileError, read_sealed, replace_file, sha256, write_sealed

# Bytes that tokens are learnt from in one piece: so many characters of two, three or four bytes.
LONGEST_WORD = 4092
# What is looked at for what a tokenizer loses: so many documents, of each so many characters.
FIRST_DOCUMENTS, FIRST_CHARACTERS = 100, 1000


@dataclass
class TokenizerConfig:
    """Which tokenizer the streams are written with."""

    kind: str = setting(
        "bpe",
        "bpe (byte-level, trained on the training documents), a file, or one from the hub.",
        choices=("bpe", "file", "hub"),
    )
    path: str | None = setting(
        None, "file: a tokenizers JSON file; hub: a model name.", place=Place.here
    )
    vocab_size: int = setting(4096, "bpe: tokens of the vocabulary.", unit="tokens", at_least=1)
    eos_token: str = setting("<|endoftext|>", "Ends every document; must be in the vocabulary.")


@dataclass(frozen=True)
class TokenizerManifest:
    """What the streams record of the tokenizer."""

    sha256: str
    vocab_size: int
    eos_token: str
    eos_id: int


def build_tokenizer(
    config: TokenizerConfig, root: Path, texts: Iterable[str]
) -> tuple[Tokenizer, TokenizerManifest]:
    """Write ``root/tokenizer/`` unless the same one is there, and load it.

    A tokenizer that exists is never replaced by another, because streams and checkpoints depend on
    it.

    Raises:
        ValueError: another tokenizer is there, or the end-of-text token is unknown.
        FileNotFoundError: ``tokenizer.path`` is not there.
    """
    folder = root / "tokenizer"
    if (folder / "manifest.json").exists():
        found = read_sealed(folder / "manifest.json", start_over(root))["config"]
        if found != asdict(config):
            raise ValueError(
                f"{folder} holds another tokenizer ({found}) than asked for ({asdict(config)}); "
                "use another root=..., or delete that folder and root/streams to start over"
            )
        return load_tokenizer(root)
    if config.kind == "bpe":
        tokenizer = train_bpe(texts, config)
    elif config.kind == "file":
        if config.path is None or not Path(config.path).is_file():
            raise FileNotFoundError(f"tokenizer.path={config.path} is not a tokenizer JSON file")
        try:
            tokenizer = Tokenizer.from_file(config.path)
        except Exception as error:  # the library has no class of its own
            raise ValueError(
                f"tokenizer.path={config.path} is damaged, or no JSON file of the tokenizers "
                f"library ({error}); copy it again"
            ) from error
    elif config.kind == "hub":
        try:
            tokenizer = Tokenizer.from_pretrained(str(config.path))
        except Exception as error:
            raise ValueError(
                f"tokenizer.path={config.path} could not be had from the hub ({error}); on a "
                "machine without network use tokenizer=file"
            ) from error
    else:
        raise ValueError(f"tokenizer.kind={config.kind} is not one of bpe, file, hub")
    eos_id = tokenizer.token_to_id(config.eos_token)
    if eos_id is None:
        raise ValueError(
            f"the tokenizer has no token {config.eos_token!r}; set tokenizer.eos_token to the one "
            "that ends a document"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / "tokenizer.json") as file:
        tokenizer.save(str(file))
    manifest = TokenizerManifest(
        hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        vocabulary_size(tokenizer),
        config.eos_token,
        eos_id,
    )
    write_sealed(folder / "manifest.json", {**asdict(manifest), "config": asdict(config)})
    return load_tokenizer(root)


def load_tokenizer(root: Path) -> tuple[Tokenizer, TokenizerManifest]:
    """The tokenizer of a corpus folder.

    Text that looks like a special token is encoded as ordinary text.
    """
    content = read_sealed(root / "tokenizer" / "manifest.json", start_over(root))
    content.pop("config")
    file = root / "tokenizer" / "tokenizer.json"
    if not file.exists() or sha256(file) != content["sha256"]:
        raise DamagedFileError(
            f"{file} is missing or not the one that was written; {start_over(root)}"
        )
    tokenizer = plain(Tokenizer.from_file(str(file)))
    content["vocab_size"] = vocabulary_size(tokenizer)
    return tokenizer, TokenizerManifest(**content)


def start_over(root: Path) -> str:
    """What to do about a damaged tokenizer."""
    return (
        f"put the old one back, or delete {root / 'tokenizer'} and {root / 'streams'} to start "
        "over with a new one"
    )


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation, padding, and special tokens found in texts."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the highest id and one, as there may be holes below it."""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return max(ids.values()) + 1


def train_bpe(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Byte-level byte-pair encoding with GPT-2's word borders; loses nothing of any text."""
    if config.vocab_size < 257:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} must be at least 257: 256 bytes and the "
            "end-of-text token"
        )
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # A run of 200,000 equal letters, learnt from whole, takes minutes.
    pieces = pre_tokenizers.FixedLength(LONGEST_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


def describe_losses(tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """A warning where some of the first texts do not come back from their tokens; else None."""
    first = [text[:FIRST_CHARACTERS] for text in itertools.islice(texts, FIRST_DOCUMENTS)]
    back = tokenizer.decode_batch(encode(tokenizer, first), skip_special_tokens=False)
    changed = [pair for pair in zip(first, back, strict=True) if pair[0] != pair[1]]
    if not changed:
        return None
    before, after = changed[0]
    pairs = zip(before, after, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    then, now = (repr(text[max(0, same - 10) : same + 20]) for text in (before, after))
    return (
        f"the tokenizer does not give back {len(changed)} of {len(first)} documents ({then} "
        f"becomes {now}): what it drops is never learnt, and bits per byte still count it"
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def cut_to_tokens(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The longest prefix of ``text`` that encodes to exactly ``tokens`` tokens, or fewer.

    A prefix may merge differently than the whole text did, so the exact count is searched for
    around the token's border.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= tokens:
        return text
    if tokens <= 0:
        return ""
    border = encoding.offsets[tokens][0]
    for end in (*range(border, min(border + 32, len(text))), *range(border - 1, 0, -1)):
        prefix = text[:end]
        if len(tokenizer.encode(prefix, add_special_tokens=False).ids) == tokens:
            return prefix
    return text[:border]
