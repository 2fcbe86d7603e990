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


def as_overrides(arguments: list[str]) -> list[str]:
    """What is typed as Hydra wants it: a task for a first bare word, `imports.` for `import.`.

    No field of Python can be called import, and Hydra wants `++` before new keys of a dictionary.
    """
    task = arguments[:1] if arguments[:1] and arguments[0] in TASKS else []
    keys = [re.sub(r"^([+~]*)import\.", r"\1imports.", key) for key in arguments[len(task) :]]
    keys = [re.sub(r"^imports\.(methods|columns)\b", r"++imports.\1", key) for key in keys]
    return [*(f"task={name}" for name in task), *keys]


if __name__ == "__main__":
    sys.argv[1:] = as_overrides(sys.argv[1:])
    main()
