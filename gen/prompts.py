"""Prompts: a style is a system message and a template; see ``conf/generate/method/``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

FIELD = re.compile(r"\{(text|prefix|suffix|variant)\}")


@dataclass
class MethodConfig:
    """How a model is asked to rewrite a document."""

    name: str = "rephrase"  # folder of the generations; latent ones get their G added
    latent: bool = False  # a thought for each of G cuts instead of G rewrites
    generations: int = 8  # G: generations per document
    chat: bool = True  # False: the prompt as it stands, for base models without a chat template
    system: str = ""
    prompt: str = "{text}"  # with {text}; latent: with {prefix} and {suffix}
    # What {variant} of the prompt stands for: generation i takes variant i modulo their number.
    variants: list[str] = field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024  # of a generation
    source: str = ""  # where the prompt comes from

    def check(self) -> None:
        """Raise ValueError where the template or a number cannot work."""
        wanted = {"prefix", "suffix"} if self.latent else {"text"}
        wanted |= {"variant"} if self.variants else set()
        found = set(FIELD.findall(self.prompt))
        if not self.chat and (self.system or self.latent):
            raise ValueError(
                f"method.chat=false of {self.name} takes neither method.system nor method.latent: "
                "put everything into method.prompt"
            )
        if found != wanted and (self.chat or found - wanted):  # a base model may get no document
            raise ValueError(
                f"method.prompt of {self.name} has the fields {sorted(found)}, it must have "
                f"{sorted(wanted)}"
            )
        if not re.fullmatch(r"[\w.-]*\w", self.name):
            raise ValueError(
                f"method.name={self.name!r} names a folder: use letters, digits, '_', '-' and '.'"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"method.temperature={self.temperature} must not be negative and "
                f"method.top_p={self.top_p} must be in (0, 1]"
            )
        for name in ("generations", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name}={getattr(self, name)} must be at least 1")

    @property
    def version(self) -> str:
        """Hash of the wording."""
        wording = "\0".join((self.system, self.prompt, *self.variants))
        if not self.chat:
            wording += "\0without chat template"
        return hashlib.sha256(wording.encode()).hexdigest()[:12]

    def messages(self, index: int, **fields: str) -> list[dict[str, str]]:
        """The chat that asks for one generation; braces in a document mean nothing."""
        if self.variants:
            fields["variant"] = self.variants[index % len(self.variants)]
        user = FIELD.sub(lambda match: fields[match.group(1)], self.prompt)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]


def sibling_seed(base: int, document_id: str, method: str, index: int) -> int:
    """A seed of 31 bits for one generation: siblings differ, the same job repeats itself."""
    key = f"{base}/{document_id}/{method}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1
