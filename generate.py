"""Turn a corpus into megadoc streams: ``python generate.py root=data/mine corpus=jsonl ...``.

A first bare word chooses one task: ``python generate.py status root=data/mine`` tells how far the
generations are, ``python generate.py report root=data/mine`` writes a page to judge them by;
without one the corpus, its generations and its streams are made in order. Several methods at once:
``python generate.py --multirun method=rephrase,latent``. What the missing generations will cost:
``python generate.py estimate=true estimate.tokens_per_second=2500``.
"""

import re
import sys

from gen.pipeline import TASKS, GenerateConfig, generate
from trainer.entry import program


@program("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Run one task, or all of them in order."""
    generate(config)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in TASKS:
        sys.argv[1] = f"task={sys.argv[1]}"
    # No field of Python can be called import: the keys of that group lie at `imports`.
    for place, argument in enumerate(sys.argv):
        sys.argv[place] = re.sub(r"^([+~]*)import\.", r"\1imports.", argument)
    main()
