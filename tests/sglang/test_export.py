"""The real SGLang serves what was trained: its tokens, its numbers, its end."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from gen.serving.servers import GeneratorConfig, serving
from gen.serving.sglang import SglangConfig
from tests.trainer.conftest import StreamMaker, make_stream  # noqa: F401
from tests.trainer.run.test_export import encoded, logits_of, tokenizer_of_corpus
from trainer.config.schema import (
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from trainer.loop import train
from trainer.run.export import export_run
from trainer.run.inputs import run_dir_of

CONTEXT = 64
NEW_TOKENS = 24
TEXTS = ["Hello world", "a", "This is a text.", "  two  spaces", "0123456789", "naïve", "zyx", "=)"]


@pytest.fixture
def run(make_stream: StreamMaker, tmp_path: Path) -> Path:  # noqa: F811
    """It has learnt to count, so that its likeliest token is no matter of rounding."""
    described = tokenizer_of_corpus(tmp_path)
    for name in ("real", "val"):
        make_stream(name, [[40]] * 24, **described)
    settings = TrainConfig(
        data=DataConfig(root=str(tmp_path), context_length=CONTEXT, batch_size=4),
        recipe=RecipeConfig(epochs=12, learning_rate=1e-2, weight_decay=0.1),
        model=ModelConfig(64, 128, 2, 4, 2, rope_theta=2500.0),
        runtime=RuntimeConfig(num_threads=1),
        tracking=TrackingConfig(tensorboard=False),
        output=str(tmp_path / "runs"),
    )
    assert train(settings) < 2.0
    return run_dir_of(settings)


def test_it_writes_what_the_run_would(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_run(run, folder)
    config = GeneratorConfig(
        "sglang",
        model=str(folder),
        context_length=CONTEXT,
        threads=1,
        sglang=SglangConfig(device="cpu"),
    )
    body = {
        "text": TEXTS,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    with serving(config, tmp_path / "server.log") as servers:
        asked = httpx.post(f"{servers.urls[0]}/generate", json=body, timeout=1200)
        answers: list[dict[str, Any]] = asked.raise_for_status().json()
    ends = 0
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = encoded(text)
        told = answer["meta_info"]
        assert [token for _, token, _ in told["input_token_logprobs"]] == ids
        written = [token for _, token, _ in told["output_token_logprobs"]]
        scores = logits_of(run, ids + written).log_softmax(1)[:-1]
        assert written == scores[len(ids) - 1 :].argmax(1).tolist()
        ends += written[-1] == 0
        assert 0 not in written[:-1]
        assert len(written) == NEW_TOKENS or written[-1] == 0
        theirs = [
            logprob
            for logprob, *_ in told["input_token_logprobs"][1:] + told["output_token_logprobs"]
        ]
        own = scores.gather(1, torch.tensor((ids + written)[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(theirs), own, atol=2e-3, rtol=0)
    assert ends, "no text ended"
