"""Servers that are attached or started: what is checked before a job, SGLang's command line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.job import run_job
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving import sglang_environment, supervisor
from gen.serving.servers import (
    EMBEDDED,
    GeneratorConfig,
    Servers,
    embedded_weights,
    serving,
    sglang_server,
)
from gen.serving.sglang import SglangConfig
from gen.serving.supervisor import SupervisedServer, free_port, without_our_tree
from tests.conftest import REPOSITORY, run_script, wait_until
from trainer.plugins import importable_in_jobs


def flags(config: SglangConfig) -> list[str]:
    return config.command("org/model", "org/model", 8192, 30000)


def test_sglangs_flags() -> None:
    command = flags(
        SglangConfig(python="/opt/sglang/bin/python", device="cuda", mem_fraction_static=0.88)
    )
    assert command[:3] == ["/opt/sglang/bin/python", "-m", "sglang.launch_server"]
    for flag in (
        "--model-path=org/model",
        "--context-length=8192",
        "--schedule-policy=fcfs",
        "--mem-fraction-static=0.88",
        "--chunked-prefill-size=8192",
        "--enable-metrics",
        "--enable-cache-report",
    ):
        assert flag in command
    for absent in ("speculative", "hierarchical", "hicache", "dp-size", "tp-size", "auto-truncate"):
        assert not any(absent in flag for flag in command)


def test_options_of_sglang_add_their_flags() -> None:
    config = SglangConfig(
        device="cuda",
        python="apptainer exec --nv 'my image.sif' python3",
        ngram_speculation=True,
        hierarchical_cache=True,
        deterministic=True,
        dp_size=2,
        arguments=["--cuda-graph-max-bs=512"],
    )
    command = flags(config)
    assert command[:5] == ["apptainer", "exec", "--nv", "my image.sif", "python3"]
    for flag in (
        "--speculative-algorithm=NGRAM",
        "--speculative-num-draft-tokens=8",
        "--enable-hierarchical-cache",
        "--hicache-ratio=2.0",
        "--enable-deterministic-inference",
        "--dp-size=2",
    ):
        assert flag in command
    assert command[-1] == "--cuda-graph-max-bs=512"


def test_replicas_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SglangConfig(python="p", device="cuda", replicas=2, tp_size=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [config.environment(replica, 1)["CUDA_VISIBLE_DEVICES"] for replica in range(2)] == [
        "0,1",
        "2,3",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    assert config.environment(1, 1) == {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=r"asks for 4 GPUs .* shows 2"):
        config.environment(0, 1)
    assert GeneratorConfig("sglang", sglang=config).gpus_used == 4
    assert GeneratorConfig("sglang", sglang=config, gpus=8).gpus_used == 8
    assert GeneratorConfig().gpus_used == 0


def test_an_sglang_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = GeneratorConfig("sglang", sglang=SglangConfig(device="cpu"))
    with pytest.raises(ValueError, match=rf"is not installed in {tmp_path}/.*run `make sglang`"):
        config.check()
    environment = sglang_environment.folder("cpu")
    environment.mkdir(parents=True)
    (environment / sglang_environment.STAMP).touch()
    config.check()
    assert config.sglang.command("m", "m", 512, 1)[0] == str(environment / "bin" / "python")
    assert config.gpus_used == 0


def test_a_servers_environment_does_not_see_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers need our tree on PYTHONPATH; SGLang's environment may hold another `kernels`."""
    monkeypatch.setenv("PYTHONPATH", "/mine/plugins")
    with importable_in_jobs():
        assert str(REPOSITORY) in os.environ["PYTHONPATH"].split(os.pathsep)
        kept = without_our_tree(os.environ)
        assert kept == {**os.environ, "PYTHONPATH": "/mine/plugins"}
    assert "PYTHONPATH" not in without_our_tree({"PYTHONPATH": str(REPOSITORY)})


BUSY = """
import http.server, pathlib, sys

looks = pathlib.Path(sys.argv[2])
answered = 0

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global answered
        answered += 1
        self.send_response(200 if answered == 1 else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()
        looks.write_text(str(answered))

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def test_a_busy_server_is_not_taken_for_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Healthy until it has requests, as SGLang on a loaded CPU; killed, it starts again once."""
    monkeypatch.setattr(supervisor, "HEALTH_EVERY", 0.0)
    port, looks = free_port(), tmp_path / "looks"

    def looked(times: int) -> bool:
        return looks.exists() and int(looks.read_text() or 0) >= times

    command = [sys.executable, "-c", BUSY, str(port), str(looks)]
    config = GeneratorConfig("sglang", model="m", sglang=SglangConfig(python="p", device="cpu"))
    assert sglang_server(config, tmp_path / "log", 0).hangs_after > supervisor.HANGS_AFTER
    with SupervisedServer("busy", command, port, tmp_path / "log", 60, 9, {}, 10**9) as running:
        wait_until(lambda: looked(6))
        first = running.process
        assert first is not None
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        looks.unlink()
        wait_until(lambda: looked(6))
        assert running.restarted == 1


def test_an_unknown_model_is_refused_with_those_served(server: str, tmp_path: Path) -> None:
    config = GeneratorConfig("openai", urls=[server], model="Llama-9")
    with (
        pytest.raises(ValueError, match=r"Llama-9 is not served at .* SmolLM2-135M-Instruct"),
        serving(config, tmp_path / "log"),
    ):
        pass


def test_replicas_share_the_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two real servers from one config: `python -m sglang.launch_server` is llama.cpp here."""
    stand_in = tmp_path / "sglang"
    stand_in.mkdir()
    (stand_in / "__init__.py").touch()
    (stand_in / "launch_server.py").write_text(
        "import argparse, json, os, sys\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--port', type=int)\n"
        "parser.add_argument('--model-path')\n"
        "known, _ = parser.parse_known_args()\n"
        "options = json.loads(os.environ['EMBEDDED']) | {'port': known.port}\n"
        "print('GPUs', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "command = [sys.executable, '-P', os.environ['SCRIPT'], json.dumps(options)]\n"
        "os.execv(sys.executable, command)\n"
    )
    options = {
        "weights": str(embedded_weights()),
        "model": "m",
        "slots": 2,
        "context_length": 256,
        "threads": 1,
    }
    environment = {
        "PYTHONPATH": str(tmp_path),
        "EMBEDDED": json.dumps(options),
        "SCRIPT": str(EMBEDDED),
    }
    read: list[float] = []

    @contextlib.contextmanager
    def measured(config: GeneratorConfig, log: Path) -> Iterator[Servers]:
        with serving(config, log) as servers:
            yield servers
            for url in servers.urls:
                page = httpx.get(f"{url}/metrics").text
                found = re.search(r"^llamacpp:prompt_tokens_total (\d+)", page, re.MULTILINE)
                read.append(float(found.group(1)) if found else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        config = GeneratorConfig(
            "sglang",
            model="m",
            context_length=256,
            concurrency=2,
            siblings_in_flight=2,
            sglang=SglangConfig(python=sys.executable, device="cuda", replicas=2),
        )
        method = MethodConfig(prompt="Say it again: {text}", generations=2, max_tokens=4)
        documents = [Document(f"d{i}", f"There are {i} boats.") for i in range(12)]
        session = run_job(method, config, documents, tokenizer, tmp_path, measured)
    assert session.generations == 24
    assert session.gpus == 2
    assert session.requests == 24 + 12  # a warm-up for each document
    logs = sorted((tmp_path / "generations").glob("server-0-replica-*.log"))
    assert [log.read_text().splitlines()[0] for log in logs] == ["GPUs 0", "GPUs 1"]
    assert all(tokens > 0 for tokens in read)  # both had documents to work on
    assert GenerationStore.of_method(tmp_path, "rephrase", 2).read().num_rows == 24


@pytest.mark.slow
def test_the_slurm_script_gives_each_array_task_its_share(tmp_path: Path) -> None:
    """Run as Slurm would, with /bin/false for SGLang: its log has the writer's number."""
    done = subprocess.run(
        [
            *("bash", "conf/generate/launcher/generate.sbatch", "scale=demo"),
            *("generator.sglang.python=/bin/false", f"root={tmp_path}"),
            "generator.sglang.device=cuda",
        ],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_ARRAY_TASK_COUNT": "4",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the SGLang server ended with status 1 before it was healthy" in done.stderr
    store = tmp_path / "generations" / "rephrase"
    assert (store / "writer-1-of-4.lock").exists()
    logs = {path.name for path in (tmp_path / "generations").glob("*.log")}
    assert logs == {f"server-1-replica-{replica}.log" for replica in range(8)}


def test_the_submitit_launcher_composes(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the launcher")
    done = run_script(
        *("generate.py", "launcher=slurm", f"root={tmp_path}"),
        *("--cfg", "hydra", "--package", "hydra.launcher"),
    )
    assert "array_parallelism: 64" in done.stdout
