"""Train one recipe: ``python train.py recipe=stitched data.root=data/mine model=300m``.

Several at once: ``python train.py --multirun recipe=real,simple,stitched,latent``.
One job a GPU: ``python train.py --multirun hydra/launcher=gpu_pool seed=0,1,2``.
One job on several GPUs: ``torchrun --nproc-per-node 8 train.py recipe=stitched``.
"""

import math
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import trainer
from trainer.config import TrainConfig
from trainer.errors import user_errors
from trainer.loop import train

ConfigStore.instance().store(name="train_schema", node=TrainConfig)
sys.path.append(str(Path(trainer.__file__).parent / "plugins"))  # hydra/launcher=gpu_pool


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
