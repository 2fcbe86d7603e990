"""Write the model of a GGUF file as a folder that SGLang loads: ``convert_gguf.py FILE FOLDER``.

Run as a file in SGLang's environment; quantized weights are written as the numbers they stand for.
"""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(file: Path, folder: Path) -> None:
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(unfinished)
    # Not model.save_pretrained: it refuses what once was quantized.
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(unfinished)
    weights = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
