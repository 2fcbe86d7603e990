"""llama.cpp's own batched speed: its C API in a loop, without a server.

    python llama_cpp_batched.py \
        '{"weights": FILE, "sequences": 8, "context_length": 1024, "threads": 1}'

Every line of standard input is a task, ``{"prompts": [[id, ...], ...], "generations": G, "tokens":
N}``, answered with one line of JSON. As a server does with as many slots, each sequence holds the
prompt of a document, all write a generation of it side by side, then the next one. Sampled as the
server samples. The structures are those of the release of llama.cpp in ``constraints.txt``.
"""

import ctypes
import json
import sys
import time
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any, ClassVar

import xllamacpp

BATCH = 2048  # tokens, llama.cpp's own default
Fields = list[tuple[str, Any]]


class ModelParams(Structure):
    _fields_: ClassVar[Fields] = [
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode")),
        ("main_gpu", c_int32),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_data")),
        ("kv_overrides", c_void_p),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, c_bool) for name in ("no_host", "no_alloc", "load_mtp")),
    ]


class ContextParams(Structure):
    _fields_: ClassVar[Fields] = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int32) for name in ("ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, c_int32) for name in ("attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("moe_cache_size", c_size_t),
        *((name, c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload")),
        *((name, c_bool) for name in ("swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(Structure):
    _fields_: ClassVar[Fields] = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class ChainParams(Structure):
    _fields_: ClassVar[Fields] = [("no_perf", c_bool)]


def library() -> ctypes.CDLL:
    """llama.cpp as the embedded server has it."""
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for name, kind in {
        "llama_model_default_params": ModelParams,
        "llama_context_default_params": ContextParams,
        "llama_batch_init": Batch,
        **dict.fromkeys(("llama_model_load_from_file", "llama_init_from_model"), c_void_p),
        **dict.fromkeys(("llama_get_memory", "llama_sampler_chain_init"), c_void_p),
        **dict.fromkeys(("llama_sampler_init_top_k", "llama_sampler_init_min_p"), c_void_p),
        **dict.fromkeys(("llama_sampler_init_temp", "llama_sampler_init_dist"), c_void_p),
    }.items():
        getattr(found, name).restype = kind
    return found


class Sequences:
    """So many texts in one context, each with a sampler of its own."""

    def __init__(self, weights: str, sequences: int, context_length: int, threads: int) -> None:
        self.c = library()
        asked = self.c.llama_model_default_params()
        model = self.c.llama_model_load_from_file(weights.encode(), asked)
        options = self.c.llama_context_default_params()
        options.n_ctx = sequences * context_length
        options.n_batch = BATCH
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self.context = c_void_p(self.c.llama_init_from_model(c_void_p(model), options))
        assert self.context.value, "the structures above are not those of this llama.cpp"
        self.memory = c_void_p(self.c.llama_get_memory(self.context))
        self.batch = self.c.llama_batch_init(BATCH, 0, 1)
        self.samplers = [self.sampler(seed) for seed in range(sequences)]

    def sampler(self, seed: int) -> c_void_p:
        """The server's defaults at temperature 1 and top_p 1."""
        c = self.c
        chain = c_void_p(c.llama_sampler_chain_init(ChainParams(True)))
        for one in (
            c.llama_sampler_init_top_k(40),
            c.llama_sampler_init_min_p(c_float(0.05), c_size_t(0)),
            c.llama_sampler_init_temp(c_float(1.0)),
            c.llama_sampler_init_dist(c_uint32(seed)),
        ):
            c.llama_sampler_chain_add(chain, c_void_p(one))
        return chain

    def add(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        """Put a token into the batch."""
        batch, place = self.batch, self.batch.n_tokens
        batch.token[place], batch.pos[place] = token, position
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.logits[place] = wanted
        batch.n_tokens += 1

    def decode(self) -> None:
        status = self.c.llama_decode(self.context, self.batch)
        if status:
            raise ValueError(f"llama_decode: status {status}")

    def prefill(self, prompts: list[list[int]]) -> None:
        """Compute all but the last token of each prompt."""
        self.batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            self.c.llama_memory_seq_rm(self.memory, sequence, -1, -1)
            for position, token in enumerate(prompt[:-1]):
                self.add(token, position, sequence, wanted=False)
                if self.batch.n_tokens == BATCH:
                    self.decode()
                    self.batch.n_tokens = 0
        if self.batch.n_tokens:
            self.decode()

    def write(self, prompts: list[list[int]], tokens: int) -> None:
        """One generation behind each prompt, which is computed already."""
        last = [prompt[-1] for prompt in prompts]
        for step in range(tokens):
            self.batch.n_tokens = 0
            for sequence, prompt in enumerate(prompts):
                self.add(last[sequence], len(prompt) - 1 + step, sequence, wanted=True)
            self.decode()
            for sequence in range(len(prompts)):
                sampler = self.samplers[sequence]
                last[sequence] = self.c.llama_sampler_sample(sampler, self.context, sequence)
        for sequence, prompt in enumerate(prompts):
            self.c.llama_memory_seq_rm(self.memory, sequence, len(prompt) - 1, -1)

    def run(self, prompts: list[list[int]], generations: int, tokens: int) -> dict[str, float]:
        began, cpu = time.monotonic(), time.process_time()
        for start in range(0, len(prompts), len(self.samplers)):
            side_by_side = prompts[start : start + len(self.samplers)]
            self.prefill(side_by_side)
            for _ in range(generations):
                self.write(side_by_side, tokens)
        return {
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - cpu,
            "completion_tokens": len(prompts) * generations * tokens,
        }


def main() -> None:
    sequences = Sequences(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(sequences.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
