"""The generations of one document that are still to be made, and the prompt they share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gen.client.answers import PromptTooLong
from gen.client.chat import ChatClient
from gen.client.fitting import SHORTEN, fit, shorten
from gen.corpus.documents import Document
from gen.prompts import MethodConfig

Fields = dict[str, str]  # of a prompt template
COMPARED = 16  # siblings that must be the same text before a server is said not to sample
REMEMBERED = 256  # documents whose first generation others are compared with


@dataclass(frozen=True)
class Work:
    """The missing generations of one document, in the order in which they are asked for."""

    document: Document
    indices: list[int]
    fields: Callable[[int], Fields]  # the template's fields of a generation


@dataclass
class Siblings:
    """An open document: workers take its generations from here, one at a time each.

    Args:
        work: what is missing.
        client: counts tokens.
        method: the prompt.
        context_length: tokens of prompt and answer together.
    """

    work: Work
    client: ChatClient
    method: MethodConfig
    context_length: int
    to_come: deque[int] = field(init=False)  # indices that no worker has taken
    fits: dict[int, tuple[Fields, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.to_come = deque(self.work.indices)

    @property
    def document(self) -> Document:
        return self.work.document

    def next_index(self) -> int:
        """Take the next generation."""
        return self.to_come.popleft()

    async def fitted(self, index: int) -> tuple[Fields, bool]:
        """The fields of a prompt that fits, and whether the document was cut for it.

        Rephrases of a document have the same one, so it is looked for once.

        Raises:
            PromptTooLong: not even the instructions fit.
        """
        key = index if self.method.latent else 0
        if key not in self.fits:
            self.fits[key] = await fit(
                self.client,
                self.method,
                self.context_length,
                self.document.id,
                index,
                self.work.fields(index),
            )
        return self.fits[key]

    def shorter(self, fields: Fields) -> Fields:
        """Fields that the server refused as too long, with less of the document.

        Raises:
            PromptTooLong: nothing is left to be cut.
        """
        cut = shorten(fields, SHORTEN)
        if cut == fields:
            raise PromptTooLong(
                f"the server refuses even the instructions of {self.document.id!r} as too long",
                "prompt too long",
            )
        return cut


class Sameness:
    """Whether all siblings are the same text, because the server does not sample.

    Some servers take a temperature and a seed and decode greedily all the same.
    """

    def __init__(self) -> None:
        self.first: dict[str, str] = {}  # text of each document's first generation
        self.same = 0
        self.over = False  # one was another text, or it was said

    def found(self, document_id: str, text: str) -> bool:
        """Note a generation; true once, where :data:`COMPARED` siblings were all the same."""
        if self.over:
            return False
        if document_id not in self.first:
            if len(self.first) < REMEMBERED:
                self.first[document_id] = text
            return False
        differs = self.first[document_id] != text
        self.same += 1
        self.over = differs or self.same == COMPARED
        return self.over and not differs
