"""SGLang's own offline benchmark, run again and again without loading the model anew.

    python sglang_offline.py --model-path FOLDER ...    # in SGLang's environment, a server's flags

Every line of standard input is a task, ``{"chats": [[message, ...], ...], "tokens": N}``, answered
with one line of JSON. The chats go through the model's template before the clock starts.
"""

import json
import os
import sys
from typing import Any

from sglang.benchmark.datasets.common import DatasetRow
from sglang.benchmark.offline_throughput import throughput_test_once
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import prepare_server_args
from transformers import AutoTokenizer


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    flags = prepare_server_args(sys.argv[1:])
    engine = Engine(server_args=flags)
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)

    def row(chat: list[dict[str, str]], tokens: int) -> DatasetRow:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return DatasetRow(prompt, len(tokenizer(prompt).input_ids), tokens)

    def run(chats: list[Any], tokens: int) -> dict[str, float]:
        found = throughput_test_once(
            backend_name="engine",
            backend=engine,
            reqs=[row(chat, tokens) for chat in chats],
            ignore_eos=True,
            extra_request_body={"temperature": 1.0, "top_p": 1.0},
            profile=False,
        )
        return {
            "seconds": found["total_latency"],
            "completion_tokens": found["total_output_tokens"],
            "prompt_tokens": found["total_input_tokens"],
        }

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
