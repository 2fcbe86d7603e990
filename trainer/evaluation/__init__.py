"""Losses of a model or an ensemble on held-out text, and scores on lm-eval's tasks.

The loop and ``evaluate.py`` use the same functions. It may import ``trainer.run`` and what that
imports, neither the loop nor ``trainer.study``.
"""
