"""Turn a corpus into megadoc streams: ``python generate.py root=data/mine corpus=jsonl ...``.

A first bare word chooses one task: ``python generate.py status root=data/mine`` tells how far the
generations are, ``python generate.py report root=data/mine`` writes a page to judge them by;
without one the corpus, its generations and its streams are made in order. Several methods at once:
``python generate.py --multirun method=rephrase,latent``.
"""

import re
import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from gen.pipeline import TASKS, GenerateConfig, generate
from trainer.errors import user_errors

ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
@user_errors
def main(config: DictConfig) -> None:
    generate(OmegaConf.to_object(config))  # type: ignore[arg-type]


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in TASKS:
        sys.argv[1] = f"task={sys.argv[1]}"
    # No field of Python can be called import: the keys of that group lie at `imports`.
    for place, argument in enumerate(sys.argv):
        sys.argv[place] = re.sub(r"^([+~]*)import\.", r"\1imports.", argument)
    main()
