"""The training loop, from a config to a trained and evaluated model.

Read :func:`train` top to bottom: build or resume the run (``trainer/setup.py``), then step, log,
save and evaluate until the last step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trainer.config.schema import TrainConfig, to_dict
from trainer.data.batches import PackedBatch
from trainer.errors import NonFiniteLossError
from trainer.evaluation.losses import Scores, evaluate_model
from trainer.files import sha256, write_sealed
from trainer.optim.optimizer import set_schedules
from trainer.parallel.context_parallel import split_batch
from trainer.parallel.ranks import Ranks, choose_device, join_ranks, last_backward
from trainer.run.checkpoint import Checkpointer
from trainer.run.distillation import Teachers
from trainer.run.inputs import learnt_hash, read_inputs, run_dir_of
from trainer.run.kernel_choice import check_kernels
from trainer.run.metrics import Meter
from trainer.run.run_dir import finished_loss
from trainer.run.trackers import Tracker, was_evaluated
from trainer.setup import Run, build_run
from trainer.stop import StopSignals, stopped

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> float:
    """Train one recipe to its end; a run that was stopped goes on where its last checkpoint is.

    Returns:
        The i.i.d. validation loss of the final weights in nats per token.

    Raises:
        Stopped: a signal asked for it; the run is saved and goes on from there.
        ValueError: the config, the streams or an earlier attempt in the same folder do not fit.
        NonFiniteLossError: a loss or a gradient became NaN or infinite; names step and documents.
    """
    config.check()
    check_kernels(config, choose_device(config.runtime.device))
    inputs = read_inputs(config)
    folder = run_dir_of(config, inputs)
    if (trained := finished_loss(config, inputs)) is not None:
        logger.info(f"{folder} is already trained: loss {trained:.4f}")
        return trained

    with join_ranks(config.runtime) as ranks, contextlib.ExitStack() as cleanup:
        run = build_run(config, inputs, folder, ranks, cleanup)
        first, steps = run.before.step, run.steps
        cadence = Cadence(run.config, steps)
        saver = run.checkpointer()
        loader = run.loader()
        with (
            StopSignals() as stop,
            Tracker(run.config, folder, steps, first, ranks.is_main) as tracker,
            saver,
        ):
            meter = Meter(run.config, ranks, run.plan, run.streams, first)
            if cadence.evaluates(first) and not any_rank_evaluated(run, first):
                evaluate(run, first, saver, tracker, meter)  # stopped between saving and this
            for step, micro_batches in loader:
                rate = set_schedules(
                    run.optimizers, step, steps, run.config.optimizer, run.config.recipe
                )
                loss, grad_norm, taken = take_step(run, step, micro_batches, meter)
                meter.add(step, loss, grad_norm, micro_batches, loader.waited, taken)

                done = step + 1
                signal, overdue = ranks.max_on_hosts(
                    stop.wanted, saver.is_due(run.config.checkpoint.minutes)
                )
                now = cadence.after(done, signal > 0, overdue > 0)
                if now.log:
                    # Nothing non-finite may reach a checkpoint, no evaluation the speed.
                    metrics = meter.read(done, rate)
                    tracker.log(done, metrics)
                    tracker.show(done, meter.shown(metrics))
                if now.save:  # what is done is safe before time is spent on anything else
                    saver.save(run.progress(done))
                else:
                    saver.publish_if_written()
                if now.stop:
                    saver.finish()
                    logger.info(f"stopped at step {done} of {steps}; start again to go on")
                    raise stopped(signal, f"stopped at step {done} of {steps}")
                if now.evaluate:
                    evaluate(run, done, saver, tracker, meter)

            saver.finish()
            with run.average.in_place() if run.average else contextlib.nullcontext():
                readings = {
                    reading.name: evaluate_model(run.model, run.validation, reading, ranks)
                    for reading in run.config.readings
                }
            scores = next(iter(readings.values()))
            if first < steps or not any_rank_evaluated(run, steps):  # stopped before the result
                tracker.log(steps, scores.metrics())
        if not math.isfinite(scores.loss["iid"]):
            raise NonFiniteLossError(
                f"the validation loss after the last step is {scores.loss['iid']}; "
                "lower recipe.learning_rate"
            )
        if ranks.is_main:
            write_result(run, readings)
            print(f"{folder}: validation loss {scores.loss['iid']:.4f} nats per token", flush=True)
        return scores.loss["iid"]


@dataclass(frozen=True)
class Due:
    """What is done after a step."""

    log: bool
    save: bool
    stop: bool
    evaluate: bool


class Cadence:
    """When a run logs, saves and evaluates: evenly spread over its steps."""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self.steps = steps
        self.log_every = config.tracking.log_every
        self.evaluate_every = math.ceil(steps / config.tracking.num_evaluations)
        self.save_every = math.ceil(steps / config.checkpoint.count)

    def after(self, done: int, stop: bool, overdue: bool) -> Due:
        """What is due after ``done`` steps.

        Args:
            done: steps done.
            stop: whether a signal asked the run to end; after the last step it ends anyway.
            overdue: whether the last checkpoint is too long ago.
        """
        stop = stop and done < self.steps
        save = done % self.save_every == 0 or done == self.steps or overdue or stop
        evaluate = self.evaluates(done)
        log = done % self.log_every == 0 or save or evaluate
        return Due(log, save, stop, evaluate)

    def evaluates(self, done: int) -> bool:
        """Whether an evaluation follows step ``done``; that after the last one is the result's."""
        return 0 < done < self.steps and done % self.evaluate_every == 0


def any_rank_evaluated(run: Run, step: int) -> bool:
    """Whether the metrics hold an attempt's evaluation after ``step`` steps."""
    found = run.ranks.is_main and was_evaluated(run.folder, step)
    return run.ranks.sum_on_hosts(found) > 0


def evaluate(run: Run, done: int, saver: Checkpointer, tracker: Tracker, meter: Meter) -> None:
    """Score the weights after ``done`` steps; what was saved is on the disk before."""
    saver.finish()
    scores = evaluate_model(run.model, run.validation, run.config.readings[0], run.ranks)
    tracker.log(done, scores.metrics())
    meter.start_window()


def take_step(
    run: Run, step: int, micro_batches: list[PackedBatch], meter: Meter
) -> tuple[Tensor, Tensor, bool]:
    """One update of the weights, unless the guard skips it.

    Returns:
        This rank's share of the loss, the norm of the whole gradient before clipping, and whether
        the optimiser took the step.
    """
    seed_step(run.config.seed, step, run.ranks.rank)
    loss = accumulate_gradients(run.wrapped, micro_batches, run.ranks, run.teachers)
    grad_norm = clip_grad_norm_(run.model.parameters(), run.config.optimizer.max_grad_norm)
    taken = run.guard.accepts(grad_norm, partial(meter.blame, step))
    for optimizer in run.optimizers:
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.update(step)
    return loss, grad_norm, taken


def accumulate_gradients(
    model: nn.Module,
    micro_batches: list[PackedBatch],
    ranks: Ranks,
    teachers: Teachers | None = None,
) -> Tensor:
    """Backward through this rank's part of one batch; returns its share of the loss.

    The loss is a sum over tokens divided by the valid targets of the *global* batch, so neither
    the number of ranks nor the micro-batch size changes the gradient.
    """
    micro_batches = [
        split_batch(batch, ranks.context_rank, ranks.context_parallel) for batch in micro_batches
    ]
    counted = sum(batch.valid_targets for batch in micro_batches)
    # torch.tensor(..., device=cuda) would wait for the device, a fill does not.
    valid = torch.full((), counted, device=ranks.device, dtype=torch.int64)
    valid = ranks.all_reduce(valid).clamp(min=1)
    loss = torch.zeros((), device=ranks.device)
    for index, batch in enumerate(micro_batches):
        batch = batch.to(ranks.device)
        with last_backward(model, index == len(micro_batches) - 1):
            part = model(
                batch.input_ids,
                batch.positions,
                batch.cu_seqlens,
                batch.max_seqlen,
                batch.targets,
                denominator=valid,
                soft=teachers.targets(batch) if teachers else None,
            )
            # DDP and FSDP average gradients over the ranks, a sum is wanted.
            (part * ranks.world_size).backward()
        loss += part.detach()
    return loss


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step (dropout) a function of the step, so resume needs none."""
    torch.manual_seed(hash((seed, step, rank)) & 0x7FFF_FFFF)


def write_result(run: Run, readings: dict[str, Scores]) -> None:
    """``result.json``: what was trained, on what, for how long, and its final scores.

    Args:
        run: that has ended.
        readings: scores by the way held-out documents were read, the run's own first.
    """
    scores, *others = [one.to_dict() for one in readings.values()]
    names = [stream.manifest.name for stream in run.streams]
    result: dict[str, Any] = {
        "name": run.folder.name,
        "recipe": to_dict(run.config)["recipe"],
        "seed": run.config.seed,
        "inputs": run.inputs,
        "identity": learnt_hash(run.config, run.inputs),
        "steps": run.steps,
        "parameters": run.config.model.parameter_count(),
        "seconds": run.seconds,
        "processes": run.ranks.world_size,
        "device": run.ranks.device.type,
        "skipped_steps": run.guard.skipped,
        "tokens_seen": dict(zip(names, run.plan.tokens_seen(run.steps), strict=True)),
        "real_document": {
            stream.manifest.name: stream.manifest.real_document for stream in run.streams
        },
        "epochs_seen": dict(zip(names, run.plan.epochs_seen(run.steps), strict=True)),
        **scores,
    }
    if others:
        result["readings"] = dict(zip(readings, (scores, *others), strict=True))
    if (run.folder / "metrics.jsonl").exists():
        result["metrics_sha256"] = sha256(run.folder / "metrics.jsonl")
    write_sealed(run.folder / "result.json", result)
