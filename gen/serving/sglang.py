"""The flags of an SGLang server and the GPUs of its replicas."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from gen.serving import sglang_environment
from trainer.config.fields import check_bounds, setting

CPU_CACHE_TOKENS = 65536  # that the KV cache holds on a CPU: 3 GB for a model of 135M parameters


@dataclass
class SglangConfig:
    """How SGLang is started; defaults are for rewriting with a prompt of about 2,000 tokens.

    Flags are those of releases 0.5.11 to 0.5.23. What is null is left to SGLang. Flags that are not
    here, or whose name your release has changed, go into ``arguments``.
    """

    python: str | None = setting(
        None,
        "Interpreter of another environment than that of `make sglang`, or a command that runs one "
        "in a container, such as 'apptainer exec --nv sglang.sif python3'.",
    )
    device: str | None = setting(
        None, "Null: cuda where there is a GPU, else cpu.", choices=("cuda", "cpu")
    )
    replicas: int = setting(
        1,
        "Servers, each on GPUs of its own. Documents stick to one, so every server keeps the "
        "prefixes of its documents; SGLang's own data parallelism deals requests out in turn and "
        "does not.",
        at_least=1,
    )
    tp_size: int = setting(1, "GPUs a model is split over.", unit="GPUs", at_least=1)
    dp_size: int = setting(1, "Copies inside one server; prefer replicas.", at_least=1)
    schedule_policy: str = setting(
        "fcfs",
        "Order of the queue. The order that shares prefixes is the client's: SGLang's "
        "longest-prefix policy gives up above 128 waiting requests.",
    )
    schedule_conservativeness: float = setting(
        0.5, "Below 1 admits more; raise it if requests are retracted.", above=0
    )
    mem_fraction_static: float | None = setting(
        None,
        "Share of the GPU's memory for weights and KV cache. On a CPU the cache is "
        "max_total_tokens.",
        above=0,
        below=1,
    )
    max_total_tokens: int | None = setting(
        None, "That the KV cache holds; null: what memory allows.", unit="tokens", at_least=1
    )
    max_running_requests: int | None = setting(
        None, "In one batch of the engine.", unit="requests", at_least=1
    )
    chunked_prefill_size: int | None = setting(
        8192, "Tokens of prompts in one prefill step; -1: whole prompts.", unit="tokens"
    )
    hierarchical_cache: bool = setting(
        False, "Evicted prefixes go to host memory: for latent thoughts."
    )
    hicache_ratio: float = setting(2.0, "Host memory over KV cache.", above=0)
    ngram_speculation: bool = setting(
        False,
        "Draft tokens from n-grams of the prompt: rewrites copy. Off until it is measured to help "
        "at temperature 1.",
    )
    speculative_num_draft_tokens: int = setting(
        8, "Of ngram_speculation.", unit="tokens", at_least=1
    )
    kv_cache_dtype: str | None = setting(
        None, "fp8_e5m2 halves the cache and changes the samples; null: the model's."
    )
    deterministic: bool = setting(False, "The same text for the same seed; costs throughput.")
    load_format: str | None = setting(
        None, "dummy: random weights of the true shape, for benchmarks."
    )
    arguments: list[str] = setting([], "More flags, as on the command line.")

    def check(self) -> None:
        """Raise ValueError where options do not fit together."""
        check_bounds(self, "generator.sglang.")
        self.interpreter()

    def interpreter(self) -> list[str]:
        """The command that runs the Python of SGLang's environment.

        Raises:
            ValueError: none is named and none is installed.
        """
        return shlex.split(self.python or sglang_environment.interpreter(self.runs_on))

    @property
    def runs_on(self) -> str:
        """``cuda`` or ``cpu``."""
        return self.device or ("cuda" if sglang_environment.has_gpu() else "cpu")

    @property
    def gpus(self) -> int:
        return self.replicas * self.gpus_a_replica if self.runs_on == "cuda" else 0

    @property
    def gpus_a_replica(self) -> int:
        return self.tp_size * self.dp_size

    def command(self, path: str, name: str, context_length: int, port: int) -> list[str]:
        """The command line of one server.

        Args:
            path: of the model: a folder or a name at the hub.
            name: by which clients ask for it.
            context_length: tokens of prompt and answer together.
            port: at which it listens.
        """
        values = {
            "--model-path": path,
            "--served-model-name": name,
            "--host": "127.0.0.1",
            "--port": port,
            "--context-length": context_length,
            "--schedule-policy": self.schedule_policy,
            "--schedule-conservativeness": self.schedule_conservativeness,
            "--tp-size": self.tp_size if self.tp_size > 1 else None,
            "--dp-size": self.dp_size if self.dp_size > 1 else None,
            "--max-total-tokens": self.max_total_tokens,
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
        if self.runs_on == "cpu":
            values |= {
                "--device": "cpu",
                "--attention-backend": "torch_native",
                "--sampling-backend": "pytorch",
                "--dtype": "float32",
                "--max-total-tokens": self.max_total_tokens or CPU_CACHE_TOKENS,
            }
        else:
            values["--mem-fraction-static"] = self.mem_fraction_static
        switches = {
            "--sleep-on-idle": self.runs_on == "cpu",  # or it spins, on a core the client needs
            "--enable-metrics": True,  # the queue that adaptive concurrency looks at
            "--enable-cache-report": True,  # cached tokens in every answer
            "--enable-hierarchical-cache": self.hierarchical_cache,
            "--enable-deterministic-inference": self.deterministic,
        }
        return [
            *self.interpreter(),
            *("-m", "sglang.launch_server"),
            *(f"{name}={value}" for name, value in values.items() if value is not None),
            *(name for name, on in switches.items() if on),
            *self.arguments,
        ]

    def environment(self, replica: int, threads: int) -> dict[str, str]:
        """The variables that give a replica its GPUs or its threads.

        Args:
            replica: its number.
            threads: for each of the replicas, on a CPU.

        Raises:
            ValueError: this process may see fewer GPUs than are asked for.
        """
        if self.runs_on == "cpu":
            return {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads)}
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
