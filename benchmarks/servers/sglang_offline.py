"""SGLang's own offline benchmark, run again and again without loading the model anew.

    python sglang_offline.py --model-path FOLDER ...    # in SGLang's environment, a server's flags

Every line of standard input is a task, ``{"chats": [[message, ...], ...], "generations": G,
"tokens": N, "prompts_first": false}``, answered with one line of JSON. The chats go through the
model's template before the clock starts, and the cache is empty then. As SGLang's benchmark does,
all G generations of all chats are handed to the engine at once, which computes a prompt for each
sibling that it takes before the first is computed; ``prompts_first`` lets it compute every prompt
before, with one token, and counts that too.
"""

import json
import os
import sys
import time
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

    def once(requests: list[DatasetRow]) -> dict[str, Any]:
        found: dict[str, Any] = throughput_test_once(
            backend_name="engine",
            backend=engine,
            reqs=requests,
            ignore_eos=True,
            extra_request_body={"temperature": 1.0, "top_p": 1.0},
            profile=False,
        )
        return found

    def run(
        chats: list[Any], generations: int, tokens: int, prompts_first: bool
    ) -> dict[str, float]:
        requests = [row(chat, tokens) for chat in chats for _ in range(generations)]
        prompts = [row(chat, 1) for chat in chats] if prompts_first else []
        while not engine.flush_cache().success:  # not idle yet
            time.sleep(0.01)
        seconds = once(prompts)["total_latency"] if prompts_first else 0.0
        found = once(requests)
        return {
            "seconds": seconds + found["total_latency"],
            "completion_tokens": found["total_output_tokens"],
            "prompt_tokens": found["total_input_tokens"],
        }

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
