"""What the programs of the tests import, imported once: see ``tests/warm.py``."""

import streaming  # noqa: F401

import gen.pipeline  # noqa: F401
import tests.damage.small_study  # noqa: F401
import trainer.estimate
import trainer.evaluation.command
import trainer.loop
import trainer.study.report  # noqa: F401
