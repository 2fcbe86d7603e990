"""What a server's answer says: the text without the model's thinking, why it ended, its counts.

Servers differ in everything beside the text, so all of that may be missing or odd; an answer whose
text cannot be trusted is no answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

FINISHED = {"stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP"}
CUT_OFF = {"length", "max_tokens", "model_length", "MAX_TOKENS"}
FILTERED = {"content_filter", "safety", "SAFETY", "RECITATION"}
LARGEST_COUNT = 2**31 - 1
# Marks around what a model thinks before it answers, by family: Qwen and DeepSeek, others like
# them, Magistral, Kimi, Seed-OSS, Sky-T1, and gpt-oss where the server does not parse its channels.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")  # Sky-T1, after its thought


RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 504}
TOO_LONG_STATUS = {400, 413, 422}
TOO_LONG = (b"context", b"too long", b"too many tokens", b"maximum input length")


class GenerationFailed(ConnectionError):
    """A request that stayed without a usable answer.

    Args:
        message: for the user.
        reason: the kind of failure in a word or two, by which failures are counted.
    """

    def __init__(self, message: str, reason: str = "unusable answer") -> None:
        super().__init__(message)
        self.reason = reason


class ConnectionsLost(GenerationFailed):
    """A request during which the server went away again and again: it may be what kills it."""


class PromptTooLong(GenerationFailed):
    """The server says that prompt and answer do not fit its context."""


class StillThinking(GenerationFailed):
    """The model used up its tokens before it began to answer."""

    def __init__(self, answer: Completion) -> None:
        super().__init__(
            f"the answer ended after {answer.completion_tokens} tokens while the model was still "
            "thinking; give it room (generator.thinking_tokens=4096) or turn thinking off, for "
            "Qwen 3 by generator.extra_body.chat_template_kwargs.enable_thinking=false",
            "still thinking",
        )
        self.answer = answer


@dataclass(frozen=True)
class Completion:
    """A server's answer; counts that it does not tell are None."""

    text: str
    finish_reason: str  # stop or length
    prompt_tokens: int | None
    completion_tokens: int | None  # those of the thinking included
    cached_tokens: int  # 0 also where the server does not tell
    thinking_tokens: int = 0  # by the server's count, else by the share of the characters
    thinking_ended: bool = True


def read_answer(url: str, status: int, content: bytes) -> tuple[Any, str]:
    """The JSON of an answer, or None and what to say if trying again does not help.

    Raises:
        PromptTooLong: the server says so.
        GenerationFailed: a status that will not change.
    """
    if status == 200:
        try:
            return json.loads(content), f"an unusable answer: {start_of(content)}"
        except (ValueError, RecursionError) as error:
            return None, f"an answer that is not JSON ({error}): {start_of(content)!r}"
    if status in TOO_LONG_STATUS and any(words in content.lower() for words in TOO_LONG):
        raise PromptTooLong(start_of(content), "prompt too long")
    if status in RETRIED_STATUS:
        return None, f"HTTP {status}: {start_of(content)}"
    raise GenerationFailed(f"{url}: HTTP {status}: {start_of(content)}", f"HTTP {status}")


def start_of(content: bytes) -> str:
    """The beginning of an answer, for messages."""
    return content[:300].decode(errors="replace")


def completion_of(answer: Any, prompt: str) -> Completion | None:
    """The parts of an answer that are kept, or None where it holds no finished text.

    Args:
        answer: any JSON value.
        prompt: what was asked; a mark that stands in it is no sign of thinking.

    Raises:
        GenerationFailed: the answer was filtered, which will not change.
    """
    try:
        choice = answer["choices"][0]
        reason = choice["finish_reason"]
        message = choice.get("message") or {"content": choice.get("text")}
        content, apart = message.get("content"), reasoning_of(message)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(reason, str):
        return None
    if reason in FILTERED:
        raise GenerationFailed(f"the server ended the answer with {reason!r}", "filtered")
    finish_reason = "length" if reason in CUT_OFF else "stop" if reason in FINISHED else None
    if finish_reason is None or not (isinstance(content, str) or (content is None and apart)):
        return None
    thought, text = split_thought(content or "", prompt)
    thought = thought if apart is None else apart + (thought or "")
    ended = text is not None and not (apart and not content)
    usage = answer["usage"] if isinstance(answer.get("usage"), dict) else {}
    generated = count_in(usage, "completion_tokens")
    return Completion(
        storable(text or "").strip(),
        finish_reason,
        count_in(usage, "prompt_tokens"),
        generated,
        cached_tokens_of(answer, usage),
        thinking_tokens_of(usage, generated, thought, text),
        ended,
    )


def reasoning_of(message: dict[str, Any]) -> str | None:
    """The thinking that the server's parser has put apart; None where there is none."""
    for name in ("reasoning_content", "reasoning"):
        thinking = message.get(name)
        if isinstance(thinking, str) and thinking:
            return thinking
    return None


def split_thought(content: str, prompt: str) -> tuple[str | None, str | None]:
    """Thinking and text of an answer.

    Thinking stands at the beginning. Chat templates that open it themselves leave only the closing
    mark in the answer.

    Returns:
        The thinking, None where there is none; the text, None where the thinking did not end.
    """
    start = content.lstrip()
    for opening, closing in THOUGHTS:
        if start.startswith(opening):
            thought, found, text = start[len(opening) :].partition(closing)
            return thought, text_after(text) if found else None
    for _, closing in THOUGHTS:
        if closing in content and closing not in prompt:
            thought, _, text = content.partition(closing)
            return thought, text_after(text)
    return None, content


def text_after(text: str) -> str:
    """The text that follows the thinking, without marks of its own."""
    text = text.strip()
    return text.removeprefix(SOLUTION[0]).removesuffix(SOLUTION[1])


def thinking_tokens_of(
    usage: dict[str, Any], generated: int | None, thought: str | None, text: str | None
) -> int:
    """Tokens of the thinking: as the server counts them, else by its share of the characters."""
    details = usage.get("completion_tokens_details")
    told = count_in(details if isinstance(details, dict) else {}, "reasoning_tokens")
    told = told or count_in(usage, "reasoning_tokens")
    if told or not thought or generated is None:
        return told or 0
    return round(generated * len(thought) / (len(thought) + len(text or "")))


def cached_tokens_of(answer: dict[str, Any], usage: dict[str, Any]) -> int:
    """Prompt tokens from the cache, as SGLang and vLLM, DeepSeek and llama.cpp tell of them."""
    details, timings = usage.get("prompt_tokens_details"), answer.get("timings")
    found = (
        count_in(details if isinstance(details, dict) else {}, "cached_tokens"),
        count_in(usage, "prompt_cache_hit_tokens"),
        count_in(timings if isinstance(timings, dict) else {}, "cache_n"),
    )
    return max(count or 0 for count in found)


def count_in(counts: dict[str, Any], name: str) -> int | None:
    """A number of tokens, or None where it is missing or cannot be one."""
    value = counts.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT:
        return value
    return None


def storable(text: str) -> str:
    """The text with halves of characters replaced: JSON can hold them and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
