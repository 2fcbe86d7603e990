"""Train one recipe: ``python train.py recipe=stitched data.root=data/mine model=300m``.

Several at once: ``python train.py --multirun recipe=real,simple,stitched,latent``.
On several GPUs: ``torchrun --nproc-per-node 8 train.py recipe=stitched``.
"""

import math
import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from trainer.config import TrainConfig
from trainer.errors import user_errors
from trainer.loop import train

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@user_errors
def main(config: DictConfig) -> float:
    """Return the validation loss, the number a sweep minimises."""
    loss = train(OmegaConf.to_object(config))  # type: ignore[arg-type]
    if math.isnan(loss):  # stopped by SIGTERM, which ends a whole sweep
        sys.exit(0)
    return loss


if __name__ == "__main__":
    main()
