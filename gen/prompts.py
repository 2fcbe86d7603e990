"""Prompts: a style is a system message and a template; see ``conf/generate/method/``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from trainer.config.fields import Place, check_bounds, setting
from trainer.data.format import is_variant

FIELD = re.compile(r"\{(text|prefix|suffix|variant)\}")


@dataclass
class MethodConfig:
    """How a model is asked to rewrite a document."""

    name: str = setting("rephrase", "Folder of the generations; latent ones get their G added.")
    latent: bool = setting(False, "A thought for each of G cuts instead of G rewrites.")
    generations: int = setting(8, "G: generations a document.", unit="generations", at_least=1)
    allocation: str = setting(
        "uniform",
        "uniform: G for every document; by_loss: G on the mean, more of them for documents whose "
        "loss (losses) is high.",
        choices=("uniform", "by_loss"),
    )
    losses: str | None = setting(
        None,
        "by_loss: what evaluate.py document_losses= wrote of a model on the real stream.",
        place=Place.here,
    )
    chat: bool = setting(
        True, "false: the prompt as it stands, for base models without a chat template."
    )
    system: str = setting("", "System message.")
    prompt: str = setting("{text}", "Template with {text}; latent: with {prefix} and {suffix}.")
    variants: list[str] = setting(
        [],
        "What {variant} of the prompt stands for: generation i takes variant i mod their number.",
    )
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy.", at_least=0)
    top_p: float = setting(1.0, "Nucleus sampling; 1 is off.", above=0, at_most=1)
    max_tokens: int = setting(1024, "Length of a generation, at most.", unit="tokens", at_least=1)
    source: str = setting("", "Where the prompt comes from.")

    def check(self) -> None:
        """Raise ValueError where the template or a number cannot work."""
        check_bounds(self, "method.")
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
        if is_variant(self.name):
            raise ValueError(
                f"method.name={self.name!r} would be taken for the place of the real document or "
                "the allocation in the name of its streams; choose one that does not end so"
            )
        if self.by_loss and self.latent:
            raise ValueError(
                "method.allocation=by_loss gives documents different numbers of generations, and "
                "the cuts of latent thoughts belong to one: use it with rewrites"
            )
        if self.by_loss != (self.losses is not None):
            raise ValueError(
                f"method.allocation={self.allocation} and method.losses={self.losses or 'null'} do "
                "not fit: by_loss needs the file that evaluate.py document_losses=FILE wrote, "
                "uniform none"
            )

    @property
    def by_loss(self) -> bool:
        return self.allocation == "by_loss"

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
