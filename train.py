"""Train one recipe: ``python train.py recipe=stitched data.root=data/mine model=300m``.

Several at once: ``python train.py --multirun recipe=real,simple,stitched,latent``.
The paper's local search: ``python train.py -m sweep=star recipe=stitched``.
One job a GPU: ``python train.py --multirun hydra/launcher=gpu_pool seed=0,1,2``.
What it will cost: ``python train.py estimate=true estimate.device=h100-80gb``.
One job on several GPUs: ``torchrun --nproc-per-node 8 train.py recipe=stitched``.
"""

import math
import sys

from trainer.config.schema import TrainConfig
from trainer.entry import program
from trainer.errors import NonFiniteLossError, in_sweep
from trainer.run.inputs import run_dir_of


@program("train", TrainConfig)
def main(run: TrainConfig) -> float:
    """Return the validation loss, the number a sweep minimises; infinite where it diverged."""
    from trainer.loop import train  # imports torch, which --help and a sweep's master need not

    if run.estimate.enabled:
        from trainer.estimate import report

        print(report(run), flush=True)
        return math.nan
    try:
        return train(run)
    except NonFiniteLossError as error:
        (run_dir_of(run) / "diverged.txt").write_text(f"{error}\n")  # a search reads it
        if not in_sweep():
            raise
        print(f"diverged: {error}", file=sys.stderr, flush=True)  # one bad point, not the end
        return math.inf


if __name__ == "__main__":
    main()
