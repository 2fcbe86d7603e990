"""The generation benchmark against the real embedded server."""

import json
from pathlib import Path

import pytest

from benchmarks.generation import main
from gen.serving.servers import GeneratorConfig, embedded_server


def test_it_measures_a_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--documents=3", "--words=12", "--generations=4", "--max-tokens=4"]
    limits = ["--context-length=256", "--concurrency=2", "--siblings=1", "--fixed"]
    output = tmp_path / "result.json"
    config = GeneratorConfig(context_length=256, concurrency=2, threads=1)
    with embedded_server(config, tmp_path / "server.log") as server:
        arguments = [f"--url={server.url}", f"--model={config.model}", *shape, *limits]
        result = main(
            [*arguments, "--offline-tokens-per-second=1000", f"--output={output}"],
        )
        prompts = tmp_path / "prompts.json"
        assert main([*arguments, f"--prompts={prompts}"]) == {}
    assert json.loads(output.read_text()) == result
    assert result["requests"] == 12
    assert 0 < result["completion_tokens"] <= 48
    assert result["cached_share"] > 0.97 * 3 / 4
    assert result["ratio_to_offline"] == pytest.approx(result["tokens_per_second"] / 1000, abs=1e-4)
    assert result["client_cpu_seconds_per_1000_requests"] > 0
    conversations = json.loads(prompts.read_text())
    assert len(conversations) == 12
    assert conversations[0] == conversations[3] != conversations[4]
    assert "tokens_per_second" in capsys.readouterr().out
