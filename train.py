"""Train one recipe: ``python train.py recipe=stitched data.root=data/mine model=300m``.

Several at once: ``python train.py --multirun recipe=real,simple,stitched,latent``.
The paper's local search: ``python train.py -m sweep=star recipe=stitched``.
One job a GPU: ``python train.py --multirun hydra/launcher=gpu_pool seed=0,1,2``.
One job on several GPUs: ``torchrun --nproc-per-node 8 train.py recipe=stitched``.
"""

import math
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import trainer
from trainer.config.schema import TrainConfig
from trainer.errors import NonFiniteLossError, user_errors
from trainer.loop import train

ConfigStore.instance().store(name="train_schema", node=TrainConfig)
sys.path.append(str(Path(trainer.__file__).parent / "plugins"))  # gpu_pool launcher, star sweeper


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@user_errors
def main(config: DictConfig) -> float:
    """Return the validation loss, the number a sweep minimises; infinite where it diverged."""
    run = OmegaConf.to_object(config)
    assert isinstance(run, TrainConfig)
    try:
        loss = train(run)
    except NonFiniteLossError as error:
        (run.run_dir() / "diverged.txt").write_text(f"{error}\n")  # a search reads it
        if OmegaConf.is_missing(HydraConfig.get().job, "num"):  # not a job of a sweep
            raise
        print(f"diverged: {error}", file=sys.stderr, flush=True)  # one bad point, not the end
        return math.inf
    if math.isnan(loss):  # stopped by SIGTERM, which ends a whole sweep
        sys.exit(0)
    return loss


if __name__ == "__main__":
    main()
