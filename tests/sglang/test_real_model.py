"""SmolLM2-135M on the real SGLang: the converted weights are those that llama.cpp runs."""

import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from gen.serving import servers
from gen.serving.servers import EMBEDDED_MODEL, GeneratorConfig, embedded_weights, serving
from gen.serving.sglang import SglangConfig

NEW_TOKENS = 24
TIE = 1e-3  # nats
QUESTIONS = [
    "Explain what a lighthouse is.",
    "Rewrite: The cat sat on the mat.",
    "List three uses of copper.",
    "What is the capital of France?",
    "Write a short poem about rain.",
    "How does a bicycle stay upright?",
    "Summarize: Python is a language.",
    "Why is the sky blue?",
    "Give advice to a new student.",
    "Describe a kernel in computing.",
]
PROMPTS = [f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n" for one in QUESTIONS]


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(url + path, json=body, timeout=1200).raise_for_status().json()


def test_greedy_tokens_are_those_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same float32 numbers: with the quantized file llama.cpp rounds activations too."""
    sglang = SglangConfig(device="cpu", arguments=["--dtype=float32"])
    plain = tmp_path / "plain.gguf"
    script = Path(__file__).with_name("plain_gguf.py")
    command = [*sglang.interpreter(), str(script), str(embedded_weights()), str(plain)]
    subprocess.run(command, check=True, capture_output=True)

    monkeypatch.setattr(servers, "embedded_weights", lambda: plain)
    config = GeneratorConfig("embedded", model=EMBEDDED_MODEL, context_length=256, threads=1)
    with serving(config, tmp_path / "llama.log") as running:
        url = running.urls[0]
        asked = {"add_special": False, "parse_special": True}
        ids = [post(url, "/tokenize", {"content": one, **asked})["tokens"] for one in PROMPTS]
        greedy = {"n_predict": NEW_TOKENS, "temperature": 0, "top_k": 1, "return_tokens": True}
        wanted = [post(url, "/completion", {"prompt": one, **greedy})["tokens"] for one in ids]

    monkeypatch.undo()
    config = GeneratorConfig(
        "sglang", model=EMBEDDED_MODEL, context_length=256, threads=1, sglang=sglang
    )
    with serving(config, tmp_path / "sglang.log") as running:
        greedy = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        told = {"return_logprob": True, "top_logprobs_num": 2}
        body = {"input_ids": ids, "sampling_params": greedy, **told}
        answers = post(running.urls[0], "/generate", body)
    smallest = float("inf")  # margin of a token over the next
    for answer, theirs in zip(answers, wanted, strict=True):
        ours = answer["output_ids"]
        top = answer["meta_info"]["output_top_logprobs"]
        margins = [first[0] - second[0] for first, second in top]
        smallest = min(smallest, *margins)
        # Another processor adds up in another order, which may break a tie otherwise.
        tie = next((place for place, margin in enumerate(margins) if margin < TIE), len(ours))
        assert ours[:tie] == theirs[:tie]
        assert tie < len(ours) or len(ours) == len(theirs)
    print(f"smallest margin: {smallest:.2e} nats")
