"""A Llama on one packed token axis, and how many FLOPs it takes.

There is no batch axis and no mask: segment borders say what attends to what. It may import
``kernels``, ``trainer.data`` and ``trainer.config``.
"""
