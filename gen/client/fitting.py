"""Documents cut as far as a model's context demands, and the fields of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from gen.client.answers import GenerationFailed
from gen.client.chat import ChatClient
from gen.prompts import MethodConfig

TEMPLATE_ROOM = 64  # tokens a chat template may add around the messages
SHORTEN = 0.95  # a prompt that the server still refuses loses 5 % of its document


def counting_tokenizer(name: str) -> Tokenizer:
    """A tokenizer to count prompts with: a JSON file, a folder with one, or a name at the hub.

    Raises:
        ValueError: there is none of that name.
    """
    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        if file.exists():
            return Tokenizer.from_file(str(file))
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # what the library raises has no narrower type
        raise ValueError(f"generator.tokenizer={name} cannot be loaded: {error}") from error


def rephrase_fields(text: str) -> Callable[[int], dict[str, str]]:
    """Every generation of a document has the same document in its prompt."""
    return lambda index: {"text": text}


def latent_fields(pieces: list[str]) -> Callable[[int], dict[str, str]]:
    """Generation ``index`` stands between the pieces before and after its cut."""

    def fields(index: int) -> dict[str, str]:
        return {
            "prefix": "".join(pieces[: index + 1]),
            "suffix": "".join(pieces[index + 1 :]),
        }

    return fields


def shorten(fields: dict[str, str], share: float) -> dict[str, str]:
    """Keep a share of the document: its beginning, or for a cut the text around the cut."""
    shorter = {name: text[: int(len(text) * share)] for name, text in fields.items()}
    if "prefix" in fields:
        prefix = fields["prefix"]
        shorter["prefix"] = prefix[len(prefix) - int(len(prefix) * share) :]
    return shorter


async def fit(
    client: ChatClient,
    method: MethodConfig,
    context_length: int,
    document_id: str,
    index: int,
    fields: dict[str, str],
) -> tuple[dict[str, str], bool]:
    """The fields cut so that prompt and answer fit the context, and whether they were cut.

    Raises:
        GenerationFailed: not even the instructions fit.
    """
    room = context_length - method.max_tokens - (TEMPLATE_ROOM if method.chat else 0)

    async def tokens(candidate: dict[str, str]) -> int:
        text = "".join(part["content"] for part in method.messages(index, **candidate))
        if len(text.encode()) <= room:  # a token holds at least a byte
            return 0
        return await client.count_tokens(document_id, text)

    if await tokens(fields) <= room:
        return fields, False
    if await tokens(dict.fromkeys(fields, "")) > room:
        raise GenerationFailed(
            f"generator.context_length={context_length} leaves {room} tokens for the prompt beside "
            f"method.max_tokens={method.max_tokens}: not even the instructions fit",
            "prompt too long",
        )
    low, high = 0.0, 1.0  # shares of the document that fit and do not fit
    for _ in range(10):
        middle = (low + high) / 2
        if await tokens(shorten(fields, middle)) <= room:
            low = middle
        else:
            high = middle
    return shorten(fields, low), True
