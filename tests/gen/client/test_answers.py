"""Answers of all sorts of servers and models: the text, why it ended, what was thinking."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.client.answers import Completion, GenerationFailed, completion_of, read_answer

USAGE = {"prompt_tokens": 7, "completion_tokens": 20}


def answer(content: Any, reason: Any = "stop", usage: Any = USAGE, **message: Any) -> Any:
    choice = {"message": {"content": content, **message}, "finish_reason": reason}
    return {"choices": [choice], "usage": usage}


def completed(found: Any, prompt: str = "") -> Completion:
    completion = completion_of(found, prompt)
    assert completion is not None
    return completion


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("A text.", "A text."),
        ("<think>\nOkay, the user wants\n</think>\n\nA text.", "A text."),
        ("  <think></think>A text.", "A text."),
        ("Okay, the user wants</think>\nA text.", "A text."),  # opened by the chat template
        ("<thinking>Hm.</thinking>A text.", "A text."),
        ("[THINK]Hm.[/THINK]A text.", "A text."),
        ("◁think▷Hm.◁/think▷A text.", "A text."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
         "<|channel|>final<|message|>A text.", "A text."),
        ("<|begin_of_thought|>Hm.<|end_of_thought|>\n<|begin_of_solution|>A text."
         "<|end_of_solution|>", "A text."),
        ("The mark <think> and its </think> inside.", "The mark <think> and its </think> inside."),
    ],
)  # fmt: skip
def test_thinking_is_cut_off(content: str, text: str) -> None:
    prompt = "Rewrite: The mark <think> and its </think> inside." if "inside" in content else ""
    found = completed(answer(content), prompt)
    assert (found.text, found.finish_reason, found.thinking_ended) == (text, "stop", True)
    assert (found.thinking_tokens > 0) == ("Hm." in content or "Okay" in content)


@pytest.mark.parametrize(
    "found",
    [
        answer("<think>\nOkay, the user wants", "length"),
        answer("<think>\nOkay, the user wants", "stop"),
        answer(None, "length", reasoning_content="Okay, the user wants"),
        answer("", "length", reasoning="Okay, the user wants"),
    ],
)
def test_an_answer_that_ended_while_thinking_has_no_text(found: Any) -> None:
    completion = completed(found)
    assert not completion.thinking_ended
    assert completion.text == ""
    assert completion.thinking_tokens == 20


def test_thinking_that_the_server_puts_apart_is_counted_by_it() -> None:
    usage = {**USAGE, "completion_tokens_details": {"reasoning_tokens": 15}}
    completion = completed(answer("A text.", usage=usage, reasoning_content="Hm."))
    assert (completion.text, completion.thinking_tokens) == ("A text.", 15)


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [("stop", "stop"), ("eos", "stop"), ("end_turn", "stop"), ("length", "length"),
     ("max_tokens", "length"), ("abort", None), ("error", None), (None, None), (3, None)],
)  # fmt: skip
def test_finish_reasons(reason: Any, meaning: str | None) -> None:
    completion = completion_of(answer("A text.", reason), "")
    assert (completion and completion.finish_reason) == meaning


def test_a_filtered_answer_is_failed_at_once() -> None:
    with pytest.raises(GenerationFailed, match="content_filter") as failed:
        completion_of(answer("", "content_filter"), "")
    assert failed.value.reason == "filtered"


@pytest.mark.parametrize(
    "usage",
    [None, [], "many", {}, {"prompt_tokens": 2**40, "completion_tokens": -1},
     {"prompt_tokens_details": ["x"], "completion_tokens": "9"},
     {"prompt_tokens_details": {"cached_tokens": "3"}, "completion_tokens": True}],
)  # fmt: skip
def test_odd_counts_are_no_counts(usage: Any) -> None:
    completion = completed(answer("A text.", usage=usage))
    assert completion.text == "A text."
    assert (completion.prompt_tokens, completion.completion_tokens) == (None, None)
    assert completion.cached_tokens == 0


def test_cached_tokens_of_other_servers() -> None:
    assert completed(answer("A", usage={"prompt_cache_hit_tokens": 5})).cached_tokens == 5
    assert completed({**answer("A"), "timings": {"cache_n": 6}}).cached_tokens == 6


def test_half_a_character_becomes_one_replacement() -> None:
    content = json.loads('"half \\ud83d and \\ud83d\\ude00"')
    assert completed(answer(content)).text == "half \ufffd and \U0001f600"


def test_what_is_deeply_nested_is_no_answer() -> None:
    found, problem = read_answer("u", 200, b"[" * 100_000 + b"]" * 100_000)
    assert found is None
    assert "not JSON" in problem


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "finish_reason", "usage", "text", "timings",
                 "prompt_tokens", "prompt_tokens_details", "cached_tokens", "reasoning_content"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON, JSON, JSON)
def test_no_json_raises_anything_else(whole: Any, message: Any, usage: Any) -> None:
    for found in (
        whole,
        {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage},
        {"choices": [{"text": message, "finish_reason": "length"}], "usage": usage},
        {"choices": whole, "usage": usage},
    ):
        completion = completion_of(found, "")
        assert completion is None or isinstance(completion.text, str)
