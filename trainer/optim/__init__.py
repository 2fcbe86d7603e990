"""Optimisers, their schedules, averages of weights, and steps that went wrong.

AdamW and Muon, warm-up and decay, EMA and SWA, skipped steps. It may import ``trainer.model``,
``trainer.data`` and ``trainer.config``, not ``trainer.parallel``.
"""
