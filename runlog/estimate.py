"""Printed before the first step: what a run is going to do, and how long it will take."""

import statistics
import time
from collections.abc import Callable

from torch import Generator, nn

import distill
import models
import prune
import runtime
from distill import Context, Stage, TrainingData
from runlog import record
from runlog.record import Run


def print_plan(
    run: Run, stages: list[Stage], build: Callable, images: TrainingData, context: Context
) -> None:
    """Print device, images, stages and, from a few measured steps, the expected time.

    `build(stage, settings)` makes a new network.
    """
    say = runtime.print_rank0
    precision = "bf16" if context.bf16 else "fp32"
    say(f"{run.command}: {models.device_name(context.device)}, {precision}, {run.folder}")
    held = "none" if images.val is None else f"{len(images.val[1]):,}"
    passes = f", {images.passes} passes an epoch" if images.passes > 1 else ""
    flips = "" if images.flip else ", never flipped"
    say(
        f"  {len(images.labels):,} images in batches of {images.batch_size}{passes}{flips}; "
        f"{held} held out for validation"
    )
    seconds, total = step_times(run, stages, build, images, context), 0.0
    # Steps are measured before pruning, and a CPU skips zeros as soon as that is faster.
    bound = context.device.type == "cpu" and not run.given["student"]
    most = "at most" if bound and stages[-1].budgets else "about"
    for stage in stages:
        training, done = stage.training, run.epochs_done(stage)
        step, teacher = seconds[stage.name]
        steps = (training.epochs - done) * step
        steps += distill.distinct_epochs(training, done) * teacher
        minutes = steps * images.passes * images.steps / 60
        total += minutes
        if stage.budgets:
            network = f"to {stage.budgets[-1]:,} parameters"
        else:
            network = f"{stage.arch}, stem {stage.stem}, width {stage.width:g}"
        resumed = f" ({done} done)" if done else ""
        say(
            f"  {stage.title:11} {network:26} {training.epochs:4} epochs{resumed}, "
            f"{most if stage.budgets else 'about'} {minutes:.1f} minutes"
        )
    known = run.settings["dataset"] == "fashion-mnist"  # not of own images with the same flags
    reached = record.recorded_accuracy(run.command) if known else ""
    say(f"  in all {most} {total:.1f} minutes{reached}")


def step_times(
    run: Run, stages: list[Stage], build: Callable, images: TrainingData, context: Context
) -> dict[str, tuple[float, float]]:
    """Seconds of a training step and of the teacher's forward pass by stage name, on networks that
    are thrown away."""
    first = {stage.name: stage for stage in reversed(stages)}

    def networks_of(name: str) -> list[nn.Module]:
        files = run.given["student" if name == "pruned" else name]
        return [run.load(f)[0] for f in files] or [build(first[name], run.settings)]

    has_teacher = run.settings["teacher_from"] != "none"
    teachers = networks_of("teacher" if has_teacher else next(reversed(first)))
    teacher = distill.Teacher([context.inference_copy(network) for network in teachers])
    seconds = {}
    for name, stage in first.items():
        state = distill.TrainState(networks_of(name)[0], stage.training, context)
        if name == "pruned" and run.given["student"]:  # its zeros are skipped from the start
            state.set_masks({n: w != 0 for n, w in prune.weights(state.model).items()})
        state.model.train()
        distilled = name == "pruned" or (name == "student" and has_teacher)
        steps, forwards = [], []
        batches = images.batches(Generator(context.device).manual_seed(0))
        cuda = context.device.type == "cuda"
        enough = 2 * distill.CudaGraphed.WARMUP_CALLS + 3 if cuda else 5
        for _, (batch, targets) in zip(range(enough), batches, strict=False):
            batch, targets = runtime.local_shard(batch), runtime.local_shard(targets)
            began = time.perf_counter()
            logits = teacher.logits(batch) if distilled else None
            if logits is not None:
                logits.sum().item()  # until it is computed
            forwarded = time.perf_counter()
            loss, _ = state.step(batch, targets, logits, rate=0.0)
            loss.item()
            steps.append(time.perf_counter() - forwarded)
            forwards.append(forwarded - began)
        seconds[name] = statistics.median(steps), statistics.median(forwards)
    return seconds
