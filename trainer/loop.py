"""The training loop, from a config to a trained and evaluated model.

Read :func:`train` top to bottom: open the streams, plan the order of the data, build model and
optimiser, resume, then step, log, evaluate and save until the last step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trainer.config.schema import (
    ActivationCheckpointing,
    Averaging,
    Parallel,
    TrainConfig,
    to_dict,
)
from trainer.data.batches import BatchLoader, PackedBatch
from trainer.data.mds import MegadocStream, check_same_tokenizer
from trainer.data.packing import pack_whole
from trainer.data.plan import Plan, Source
from trainer.errors import NonFiniteLossError
from trainer.evaluation.losses import evaluate_model
from trainer.files import sha256, write_sealed
from trainer.model.llama import Llama
from trainer.optim.averaging import WeightAverage
from trainer.optim.bad_steps import StepGuard
from trainer.optim.optimizer import build_optimizers, set_schedules
from trainer.parallel.activation_checkpointing import choose_recompute, recompute_blocks
from trainer.parallel.context_parallel import split_batch
from trainer.parallel.ranks import Ranks, choose_device, join_ranks, last_backward, parallelize
from trainer.run.checkpoint import Checkpointer, load_checkpoint, newest_whole
from trainer.run.distillation import Teachers
from trainer.run.early import check_early, describe_overlap, describe_reading
from trainer.run.export import load_hugging_face
from trainer.run.inputs import changed_inputs, read_inputs, run_dir_of, stream_path
from trainer.run.kernel_choice import check_kernels, choose_kernels, compute_dtype
from trainer.run.metrics import Meter
from trainer.run.progress import Progress, checkpoints, read_progress
from trainer.run.run_dir import check_progress, claimed, finished_loss
from trainer.run.trackers import Tracker, was_evaluated
from trainer.stop import StopSignals, stopped

FULL = 0.97  # density of the windows below which we say how to raise it


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
    run_dir = run_dir_of(config, inputs)
    if (trained := finished_loss(config, inputs)) is not None:
        print(f"{run_dir} is already trained: loss {trained:.4f}", flush=True)
        return trained

    with join_ranks(config.runtime) as ranks, contextlib.ExitStack() as cleanup:
        # The data: streams, and a plan that says which document is read when.
        streams = open_streams(config)
        validation = open_stream(config, config.data.validation)
        check_same_tokenizer([*streams, validation])
        for stream in (*streams, validation):
            check_unchanged(stream, inputs)
        vocabulary = model_vocabulary(config, streams[0])
        config = replace(config, model=replace(config.model, vocab_size=vocabulary))
        plan = plan_data(config, streams)
        steps = plan.steps(config.recipe.epochs)
        check_early(config, streams[0], run_dir, ranks)
        if ranks.is_main:
            cleanup.enter_context(claimed(run_dir, config))
            print(describe_data(streams, plan), flush=True)
            for remark in (
                describe_reading(plan, config.recipe.epochs, steps),
                describe_overlap(streams, validation),
            ):
                if remark:
                    print(remark, flush=True)

        # The model.
        a_batch = partial(first_batch, config, plan, streams, ranks)
        kernels = choose_kernels(config, a_batch, ranks)
        dtype = compute_dtype(config.runtime, ranks.device)
        model = Llama(config.model, config.seed, dtype, kernels)
        if config.initial_weights is not None and not checkpoints(run_dir):
            tokenizer = Path(config.data.root) / "tokenizer" / "tokenizer.json"
            load_hugging_face(model, Path(config.initial_weights), tokenizer)
        model.to(ranks.device)
        prepare_blocks(model, config, ranks)
        wrapped = parallelize(model, ranks, config.runtime)
        optimizers = build_optimizers(model, config.optimizer, config.recipe)
        average = None
        if config.optimizer.averaging is not Averaging.none:
            average = WeightAverage(wrapped, config.optimizer, steps)

        teachers = None
        if config.distillation.teachers:
            teachers = Teachers(config.distillation, ranks)

        # Where an earlier attempt stopped.
        before = resume(run_dir, wrapped, optimizers, average, plan, streams[0], inputs, ranks)
        if ranks.is_main:
            check_progress(run_dir, before.step)
        guard = StepGuard(
            config.optimizer,
            before.usual_grad_norm,
            before.accepted_steps,
            before.skipped_steps,
            before.skipped_in_a_row,
        )
        keep = config.checkpoint.keep
        saver = Checkpointer(run_dir, wrapped, optimizers, average, ranks, keep)
        loader = BatchLoader(
            plan,
            streams,
            config.data.mask,
            rank=ranks.data_rank,
            world_size=ranks.data_size,
            micro_batch_size=config.data.micro_batch_size,
            start_step=before.step,
            stop_step=steps,
        )
        began = time.monotonic()
        evaluate_every = math.ceil(steps / config.tracking.num_evaluations)
        save_every = math.ceil(steps / config.checkpoint.count)

        with (
            StopSignals() as stop,
            Tracker(config, run_dir, steps, before.step, ranks.is_main) as tracker,
            saver,
        ):
            meter = Meter(config, ranks, plan, streams, before.step)

            def evaluate_at(done: int) -> None:
                saver.finish()
                scores = evaluate_model(model, validation, config.data, ranks)
                tracker.log(done, scores.metrics())
                meter.start_window()

            due = 0 < before.step < steps and before.step % evaluate_every == 0
            if (
                due
                and ranks.sum_on_hosts(ranks.is_main and was_evaluated(run_dir, before.step)) == 0
            ):
                evaluate_at(before.step)  # the attempt before was stopped between the two
            for step, micro_batches in loader:
                rate = set_schedules(optimizers, step, steps, config.optimizer, config.recipe)
                seed_step(config.seed, step, ranks.rank)
                loss = accumulate_gradients(wrapped, micro_batches, ranks, teachers)
                grad_norm = clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
                taken = guard.accepts(grad_norm, partial(meter.blame, step))
                for optimizer in optimizers:
                    if taken:
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if average is not None:
                    average.update(step)
                meter.add(step, loss, grad_norm, micro_batches, loader.waited, taken)

                done = step + 1
                stop_wanted, save_due = ranks.max_on_hosts(
                    stop.wanted, saver.is_due(config.checkpoint.minutes)
                )
                save_now = done % save_every == 0 or done == steps or save_due
                evaluate_now = done % evaluate_every == 0 and done < steps
                stop_now = done < steps and stop_wanted > 0
                log_now = done % config.tracking.log_every == 0
                if log_now or save_now or evaluate_now or stop_now:
                    # Nothing non-finite may reach a checkpoint, no evaluation the speed.
                    metrics = meter.read(done, rate)
                    tracker.log(done, metrics)
                    tracker.show(done, meter.shown(metrics))
                # What is done is safe before time is spent on anything else.
                if save_now or stop_now:
                    progress = Progress(
                        done,
                        plan.hash(),
                        streams[0].manifest.tokenizer_sha256,
                        before.seconds + time.monotonic() - began,
                        guard.usual,
                        guard.accepted,
                        guard.skipped,
                        guard.in_a_row,
                        inputs,
                    )
                    saver.save(progress)
                else:
                    saver.publish_if_written()
                if stop_now:
                    saver.finish()
                    if ranks.is_main:
                        print(f"stopped at step {done} of {steps}; start again to go on")
                    raise stopped(stop_wanted, f"stopped at step {done} of {steps}")
                if evaluate_now:
                    evaluate_at(done)

            saver.finish()
            with average.in_place() if average else contextlib.nullcontext():
                scores = evaluate_model(model, validation, config.data, ranks)
            tracker.log(steps, scores.metrics())
        if not math.isfinite(scores.loss["iid"]):
            raise NonFiniteLossError(
                f"the validation loss after the last step is {scores.loss['iid']}; "
                "lower recipe.learning_rate"
            )
        if ranks.is_main:
            result = {
                "name": run_dir.name,
                "recipe": to_dict(config)["recipe"],
                "seed": config.seed,
                "inputs": inputs,
                "steps": steps,
                "parameters": config.model.parameter_count(),
                "seconds": before.seconds + time.monotonic() - began,
                "processes": ranks.world_size,
                "device": ranks.device.type,
                "skipped_steps": guard.skipped,
                "tokens_seen": dict(zip(meter.names, plan.tokens_seen(steps), strict=True)),
                "epochs_seen": dict(zip(meter.names, plan.epochs_seen(steps), strict=True)),
                **scores.to_dict(),
            }
            if (run_dir / "metrics.jsonl").exists():
                result["metrics_sha256"] = sha256(run_dir / "metrics.jsonl")
            write_sealed(run_dir / "result.json", result)
            print(f"{run_dir}: validation loss {scores.loss['iid']:.4f} nats per token", flush=True)
        return scores.loss["iid"]


def open_streams(config: TrainConfig) -> list[MegadocStream]:
    """The base stream and, when the recipe mixes one in, the synthetic stream."""
    names = [config.recipe.real_stream]
    if config.recipe.synthetic:
        names.append(config.recipe.synthetic)
    return [open_stream(config, name) for name in names]


def open_stream(config: TrainConfig, name: str) -> MegadocStream:
    """A stream of the corpus folder by its name."""
    return MegadocStream(stream_path(config, name), cache=config.data.cache)


def check_unchanged(stream: MegadocStream, inputs: Mapping[str, str]) -> None:
    """Raise ValueError where a stream was built again between naming the run and opening it."""
    if stream.manifest.content_sha256 not in inputs.values():
        raise ValueError(f"{stream.path} was built again just now; start the same command again")


def plan_data(config: TrainConfig, streams: list[MegadocStream]) -> Plan:
    """The order of the whole run as a pure function of the config and the lengths."""
    fraction = config.recipe.mixing_fraction
    shares = [1 - fraction, fraction][: len(streams)]
    return Plan(
        [
            Source(stream.manifest.name, stream.lengths, share)
            for stream, share in zip(streams, shares, strict=True)
        ],
        context_length=config.data.context_length,
        batch_size=config.data.batch_size,
        packing=config.data.packing.value,
        seed=config.data.order_seed,
    )


def describe_data(streams: list[MegadocStream], plan: Plan) -> str:
    """One line a stream: how much there is and how densely its windows are filled."""
    lines = []
    for stream, density in zip(streams, plan.density(), strict=True):
        lines.append(
            f"{stream.manifest.name}: {len(stream):,} samples, {stream.manifest.tokens:,} tokens, "
            f"windows {density:.1%} full"
        )
        if plan.packing == "whole" and density < FULL:
            lines.append(how_to_fill(stream.lengths, plan))
    return "\n".join(lines)


def how_to_fill(lengths: np.ndarray, plan: Plan) -> str:
    """What makes the windows of these documents fuller."""
    for factor in (2, 4, 8):
        longer = factor * plan.context_length
        density = pack_whole(lengths, longer, np.random.default_rng(0)).density(longer)
        if density >= FULL and plan.batch_size % factor == 0:
            return (
                f"  Few documents fit together: data.context_length={longer} "
                f"data.batch_size={plan.batch_size // factor} fills {density:.1%} and,\n  unless "
                "data.mask=none, costs no attention beyond a document; data.packing=stream cuts "
                "documents instead."
            )
    return "  Few documents fit together; data.packing=stream cuts them to fill the windows."


def first_batch(
    config: TrainConfig, plan: Plan, streams: list[MegadocStream], ranks: Ranks
) -> PackedBatch:
    """A micro-batch of the first step."""
    loader = BatchLoader(
        plan,
        streams,
        config.data.mask,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
        micro_batch_size=config.data.micro_batch_size,
        start_step=0,
        stop_step=1,
    )
    return loader.read(0)[0]


def model_vocabulary(config: TrainConfig, stream: MegadocStream) -> int:
    """The model's vocabulary: the tokenizer's unless the config asks for a larger one."""
    wanted, needed = config.model.vocab_size, stream.manifest.vocab_size
    if wanted and wanted < needed:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the {needed} tokens of the tokenizer that "
            f"{stream.path} was written with; leave it at 0 to take the tokenizer's"
        )
    return wanted or needed


def prepare_blocks(model: Llama, config: TrainConfig, ranks: Ranks) -> None:
    """ActivationCheckpointing and compile block by block, so one compilation serves every layer."""
    windows = config.data.micro_batch_size or config.data.batch_size // ranks.data_size
    tokens = windows * config.data.context_length // ranks.context_parallel
    sharded = config.runtime.parallel is Parallel.fsdp
    shards = (config.runtime.shard_size or ranks.world_size) if sharded else 1
    mode = choose_recompute(config, tokens, shards, ranks.device)
    recompute_blocks(model, mode)
    if ranks.is_main and mode is not ActivationCheckpointing.none:
        print(f"recomputing blocks in the backward pass: {mode.value}", flush=True)
    if config.runtime.compile or (config.runtime.compile is None and ranks.device.type == "cuda"):
        for layer in model.model.layers:
            layer.compile()


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


def resume(
    run_dir: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage | None,
    plan: Plan,
    stream: MegadocStream,
    inputs: Mapping[str, str],
    ranks: Ranks,
) -> Progress:
    """Load the newest checkpoint, if there is one, and say what was done."""
    newest = newest_whole(run_dir, ranks)
    if newest is None:
        return Progress(0, plan.hash(), stream.manifest.tokenizer_sha256, 0.0, inputs=dict(inputs))
    progress = read_progress(newest)
    if progress.tokenizer_sha256 != stream.manifest.tokenizer_sha256:
        raise ValueError(
            f"{newest} was trained with another tokenizer than {stream.path} was written with; "
            "use another name=... for the new corpus"
        )
    if changed := changed_inputs(progress.inputs, inputs):
        raise ValueError(
            f"{newest} was trained on other data than is there now ({changed}): streams under "
            f"{stream.path.parent} have changed since; use another name=... or rebuild the old ones"
        )
    if progress.plan_hash != plan.hash():
        raise ValueError(
            f"{newest} was trained in another order of the same data: another version wrote it; "
            "use another name=..."
        )
    load_checkpoint(newest, model, optimizers, average, ranks)
    if ranks.is_main:
        print(f"resuming {run_dir} after step {progress.step}", flush=True)
    return progress
