"""The generation benchmark against the real embedded server."""

import json
from pathlib import Path

import pytest

from benchmarks.generation import main
from benchmarks.servers import compare
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


@pytest.mark.slow
def test_a_server_is_compared_with_its_engine_alone(tmp_path: Path) -> None:
    """Both write all the tokens of the same documents, or the benchmark ends."""
    shape = ["--documents=2", "--characters=150", "--generations=2", "--tokens=4", "--rounds=1"]
    limits = ["--context-length=512", "--slots=2", "--threads=1"]
    output = tmp_path / "result.json"
    result = compare.main(["--sides", "llama.cpp", *shape, *limits, f"--output={output}"])
    (found,) = result["rounds"]
    assert {name: one["completion_tokens"] for name, one in found.items()} == {
        "llama.cpp client": 16,
        "llama.cpp alone": 16,
    }
    assert all(one["cpu_seconds"] > 0 for one in found.values())
    assert json.loads(output.read_text())["ratios"].keys() == {"llama.cpp client / llama.cpp alone"}
