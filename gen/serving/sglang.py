"""The flags of an SGLang server and the GPUs of its replicas."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field


@dataclass
class SglangConfig:
    """How SGLang is started; defaults are for rewriting with a prompt of about 2,000 tokens.

    Flags are those of releases 0.5.11 to 0.5.23. What is null is left to SGLang. Flags that are not
    here, or whose name your release has changed, go into ``arguments``.
    """

    # The interpreter of SGLang's own environment, or a command that runs one in a container, such
    # as 'apptainer exec --nv sglang.sif python3'.
    python: str | None = None
    # Servers, each on GPUs of its own. Documents stick to one, so every server keeps the prefixes
    # of its documents; SGLang's own data parallelism deals requests out in turn and does not.
    replicas: int = 1
    tp_size: int = 1  # GPUs a model is split over
    dp_size: int = 1  # copies inside one server; prefer replicas
    # The order that shares prefixes is the client's: SGLang's longest-prefix policy gives up above
    # 128 waiting requests.
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = (
        0.5  # below 1 admits more; raise it if requests are retracted
    )
    mem_fraction_static: float | None = None  # of the GPU's memory for weights and KV cache
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = 8192  # tokens
    hierarchical_cache: bool = False  # evicted prefixes go to host memory: for latent thoughts
    hicache_ratio: float = 2.0  # host memory over KV cache
    # Draft tokens from n-grams of the prompt: rewrites copy. Off until it is measured to help at
    # temperature 1.
    ngram_speculation: bool = False
    speculative_num_draft_tokens: int = 8
    kv_cache_dtype: str | None = None  # fp8_e5m2 halves the cache and changes the samples
    deterministic: bool = False  # the same text for the same seed; costs throughput
    load_format: str | None = None  # dummy: random weights of the true shape, for benchmarks
    arguments: list[str] = field(default_factory=list)  # more flags, as on the command line

    def check(self) -> None:
        """Raise ValueError where options do not fit together."""
        if not self.python:
            raise ValueError(
                "generator=sglang needs generator.sglang.python=/path/to/sglang-venv/bin/python: "
                "SGLang lives in an environment of its own"
            )
        for name in ("replicas", "tp_size", "dp_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"generator.sglang.{name}={getattr(self, name)} must be at least 1"
                )
        if self.mem_fraction_static is not None and not 0.0 < self.mem_fraction_static < 1.0:
            raise ValueError(
                f"generator.sglang.mem_fraction_static={self.mem_fraction_static} must be in (0, 1)"
            )

    @property
    def gpus(self) -> int:
        return self.replicas * self.gpus_a_replica

    @property
    def gpus_a_replica(self) -> int:
        return self.tp_size * self.dp_size

    def command(self, model: str, context_length: int, port: int) -> list[str]:
        """The command line of one server."""
        values = {
            "--model-path": model,
            "--host": "127.0.0.1",
            "--port": port,
            "--context-length": context_length,
            "--schedule-policy": self.schedule_policy,
            "--schedule-conservativeness": self.schedule_conservativeness,
            "--tp-size": self.tp_size if self.tp_size > 1 else None,
            "--dp-size": self.dp_size if self.dp_size > 1 else None,
            "--mem-fraction-static": self.mem_fraction_static,
            "--max-running-requests": self.max_running_requests,
            "--chunked-prefill-size": self.chunked_prefill_size,
            "--kv-cache-dtype": self.kv_cache_dtype,
            "--load-format": self.load_format,
            # Not the model's own defaults, should a request ever leave one out.
            "--sampling-defaults": "openai",
            "--hicache-ratio": self.hicache_ratio if self.hierarchical_cache else None,
            "--speculative-algorithm": "NGRAM" if self.ngram_speculation else None,
            "--speculative-num-draft-tokens": (
                self.speculative_num_draft_tokens if self.ngram_speculation else None
            ),
        }
        switches = {
            "--enable-metrics": True,  # the queue that adaptive concurrency looks at
            "--enable-cache-report": True,  # cached tokens in every answer
            "--enable-hierarchical-cache": self.hierarchical_cache,
            "--enable-deterministic-inference": self.deterministic,
        }
        return [
            *shlex.split(str(self.python)),
            *("-m", "sglang.launch_server"),
            *(f"{name}={value}" for name, value in values.items() if value is not None),
            *(name for name, on in switches.items() if on),
            *self.arguments,
        ]

    def devices(self, replica: int) -> dict[str, str]:
        """The variable that gives a replica its GPUs, out of those this process may see."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(self.gpus)]
        if len(names) < self.gpus:
            raise ValueError(
                f"generator.sglang asks for {self.gpus} GPUs (replicas={self.replicas}, "
                f"tp_size={self.tp_size}, dp_size={self.dp_size}) but "
                f"CUDA_VISIBLE_DEVICES={visible} shows {len(names)}"
            )
        first = replica * self.gpus_a_replica
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + self.gpus_a_replica])}
