"""What makes one model run on many ranks: DDP, FSDP2, context parallelism, recomputation.

All of it is applied to a plain model from outside. It may import ``trainer.model``,
``trainer.data`` and ``trainer.config``, not ``trainer.optim``.
"""
