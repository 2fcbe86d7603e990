"""What other programs read from an export, printed as JSON.

    python -m tests.trainer.run.readers transformers EXPORT
    python -m tests.trainer.run.readers lm_eval EXPORT RUN TASKS

A process of its own, because each may be of another version than this environment has
(``tests/conftest.py``).
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TEXTS = ["Hello world", "  two  spaces\n", "", "naïve 😀"]
PAIRS = [("Hello", " world"), ("This is", " a text."), ("Hello world,", " this"), ("", "Hello")]
GENERATED = 5  # tokens


def through_transformers(export: Path) -> dict[str, Any]:
    """Ids of ``TEXTS``, logits of the first and what is written after it, and the settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    prompt = torch.tensor(ids[:1])
    with torch.no_grad():
        logits = model(prompt).logits[0]
    written = model.generate(prompt, do_sample=False, max_new_tokens=GENERATED)[0]
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return {
        "version": version("transformers"),
        "ids": ids,
        "texts": [tokenizer.decode(one) for one in ids],
        "logits": logits.tolist(),
        "written": written[prompt.shape[1] :].tolist(),
        "dtype": str(logits.dtype),
        "tied": head.data_ptr() == embeddings.data_ptr(),
        "inv_freq": model.model.rotary_emb.inv_freq.tolist(),
        "context_length": [model.config.max_position_embeddings, tokenizer.model_max_length],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id],
        "ends": [model.config.eos_token_id, model.generation_config.eos_token_id],
    }


def through_lm_eval(export: Path, run: Path, tasks: Path) -> dict[str, Any]:
    """Log-likelihoods of ``PAIRS``, and what ``evaluate.py`` keeps of a task in a folder."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from trainer.config.evaluate import EvaluateConfig
    from trainer.evaluation.command import evaluate

    model = HFLM(str(export), tokenizer=str(export), device="cpu", dtype="float32")
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
    likelihoods = [likelihood for likelihood, _ in model.loglikelihood(requests)]
    names = sorted(file.stem for file in tasks.glob("*.yaml"))
    evaluate(EvaluateConfig(runs=[str(run)], tasks=names, task_folder=str(tasks)))
    return {
        "version": version("lm_eval"),
        "transformers": version("transformers"),
        "likelihoods": likelihoods,
        "tasks": json.loads((run / "tasks.json").read_text()),
    }


if __name__ == "__main__":
    readers: dict[str, Callable[..., dict[str, Any]]] = {
        "transformers": through_transformers,
        "lm_eval": through_lm_eval,
    }
    read = readers[sys.argv[1]]
    printed = os.dup(1)
    os.dup2(2, 1)  # what the libraries print is no JSON
    found = read(*map(Path, sys.argv[2:]))
    os.write(printed, json.dumps(found).encode())
