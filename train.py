"""Distil a ResNet50 into a ResNet18 on Fashion-MNIST, then prune it to exactly 100,000 parameters.

    python train.py            # or: uv run train.py; 90 minutes on 2 cores with bf16 matrix units
    python train.py --quick    # every stage on a part of the images, 5 minutes on 2 cores

Three stages, one loop: `teacher` (ResNet50, labels only; skipped with --teacher FILE), `student`
(ResNet18, distilled), `pruned` (the student, cut to the budget in rounds while distillation goes
on). All that a run leaves is in runs/<name>/; the same command goes on with a run that was stopped.
Validation images, held out of the training set, choose the epoch; test is measured once, at the
end.
"""

import openmp  # isort: skip  # noqa: F401  (before torch, which reads what it sets)

import argparse
import contextlib
import csv
import io
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchinfo
import torchvision
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

import augment
import checkpoint
import data
import models
import parallel
import plots
import prune
import rewrite
import shell

# --- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One training of one network, in which the learning rate rises, then falls to 0."""

    epochs: int
    optimizer: str = "adamw"  # or "sgd", with Nesterov momentum 0.9
    learning_rate: float = 2e-3  # at the peak
    weight_decay: float = 0.05
    kd_weight: float = 0.0  # of the distillation loss; the labels have the rest
    temperature: float = 1.0
    cuts: int = 0  # one before each of the first epochs


@dataclass(frozen=True)
class Recipe:
    teacher: Stage
    student: Stage
    pruned: tuple[Stage, ...]  # rounds of pruning, each from the network before it
    budgets: tuple[int, ...] = ()  # what rounds end with; (): evenly, by their cuts, to --budget
    images: int | None = None  # of the training set; None: all
    batch_size: int = 256
    crop_scale: tuple[float, float] = (0.85, 1.0)  # share of the image's area
    flip: bool = True
    mixup_alpha: float = 0.1


_KD = {"kd_weight": 0.5, "temperature": 4.0}
_SGD = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}
RECIPES = {
    # Long, for accuracy; needs a GPU.
    "full": Recipe(
        teacher=Stage(120),
        student=Stage(200, **_SGD, **_KD),
        pruned=tuple(Stage(epochs, **_SGD, **_KD, cuts=40) for epochs in (60, 60, 240)),
        crop_scale=(0.75, 1.0),
        mixup_alpha=0.2,
    ),
    # About 90 minutes on two cores with bf16 matrix units: too few epochs for strong augmentation.
    "cpu": Recipe(
        teacher=Stage(24),
        student=Stage(12, **_SGD, **_KD),
        pruned=tuple(
            Stage(epochs, **_SGD, **_KD, cuts=cuts)
            for epochs, cuts in ((14, 10), (14, 10), (32, 8))
        ),
    ),
    # For --stem 2, whose larger maps leave more to learn: stronger augmentation, a longer student.
    "standard": Recipe(
        teacher=Stage(20),
        student=Stage(16, **_SGD, **_KD),
        pruned=tuple(
            Stage(epochs, **_SGD, **_KD, cuts=cuts)
            for epochs, cuts in ((14, 10), (14, 10), (32, 8))
        ),
        crop_scale=(0.8, 1.0),
        mixup_alpha=0.2,
    ),
    # Accuracy against size: one ladder whose networks are all kept, one for each budget. After cuts
    # so harsh AdamW recovers faster than SGD, which in longer rounds is as good or better (LOG.md).
    "curve": Recipe(
        teacher=Stage(24),
        student=Stage(12, **_KD),
        pruned=tuple(Stage(epochs, **_KD, cuts=epochs // 2) for epochs in (8, 8, 10, 10, 12, 16)),
        budgets=(1_000_000, 500_000, 200_000, 100_000, 50_000, 20_000),
    ),
    # All stages on a part of the images: a look at the whole chain, not at its accuracy.
    "quick": Recipe(
        teacher=Stage(2),
        student=Stage(3, **_KD),
        pruned=(Stage(4, **_KD, cuts=3), Stage(6, **_KD, cuts=4)),
        images=10_000,
        batch_size=128,
    ),
}
STAGES = ("teacher", "student", "pruned")
WARMUP = 0.1  # share of the steps in which the learning rate rises
PLAIN = 0.25  # share of the epochs, the last: whole images, mirrored at random, but not mixed
CLIP = 1.0  # largest norm of the gradient
AVERAGE_EVERY, AVERAGE_DECAY = 16, 0.9  # steps; the average of weights looks back about 160 steps
REFRESH = 8  # batches from which BatchNorm statistics are taken anew after a cut
STATE, STATE_BEFORE = "state.pt", "state-before.pt"
RUNS = Path(__file__).resolve().parent / "runs"
RESULTS = Path(__file__).resolve().parent / "results.csv"


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is one line."""


# --- one step -----------------------------------------------------------------------------------


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, kd_weight: float, temperature: float
) -> Tensor:
    """kd_weight * T^2 * KL(teacher || student at temperature T) + (1 - kd_weight) * cross-entropy.

    Hinton et al., arXiv 1503.02531; the mean is over the batch. All (N, classes) float; `targets`
    are probabilities.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher_logits / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    labels = F.cross_entropy(logits, targets)
    return kd_weight * temperature**2 * divergence + (1 - kd_weight) * labels


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear rise over the first tenth of the steps, then half a cosine down to 0."""
    rise = min(1.0, (step + 1) / (WARMUP * steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))


class Images:
    """The resident images of a run and the batches that training sees of them."""

    def __init__(self, images_u8: Tensor, labels: Tensor, recipe: Recipe, classes: int):
        self.images_u8, self.labels, self.recipe, self.classes = images_u8, labels, recipe, classes
        self.batch_size = min(recipe.batch_size, len(labels))
        self.steps = len(labels) // self.batch_size

    def batches(self, generator: Generator, plain: bool = False) -> Iterable[tuple[Tensor, Tensor]]:
        """One epoch of (images, targets): cropped and mixed unless `plain`, for the networks."""
        recipe = self.recipe
        scale, alpha = ((1.0, 1.0), 0.0) if plain else (recipe.crop_scale, recipe.mixup_alpha)
        for index in augment.batches(len(self.labels), self.batch_size, generator):
            images = augment.random_resized_crop(
                self.images_u8[index], generator, scale, flip=recipe.flip
            )
            targets = F.one_hot(self.labels[index], self.classes).float()
            images, targets = augment.mixup(images, targets, alpha, generator)
            yield models.normalize(images), targets


class Network:
    """A network in training, with all that a step changes: what a checkpoint must hold."""

    def __init__(
        self, model: nn.Module, stage: Stage, device: torch.device, bf16: bool, image_size: int
    ):
        self.stage, self.device, self.bf16 = stage, device, bf16
        model = rewrite.speed_up_(rewrite.trim_(model, image_size))
        self.model = model.to(device, memory_format=torch.channels_last)
        self.trained = self.model
        if parallel.processes() > 1:
            parallel.synchronize_batchnorm_(self.model)
            self.trained = DistributedDataParallel(self.model)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True
        )
        self.masks: prune.Masks | None = None
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[stage.optimizer]
        extra = {"momentum": 0.9, "nesterov": True} if stage.optimizer == "sgd" else {}
        self.optimizer = kind(
            self.model.parameters(),
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            fused=device.type in ("cpu", "cuda"),
            **extra,
        )

    def set_masks(self, masks: prune.Masks) -> None:
        """From now on, only these weights are not zero, in the average as well."""
        self.masks = masks
        weights = prune.weights(self.model)
        self._masked = [(weights[name], mask.to(weights[name])) for name, mask in masks.items()]
        prune.apply_(self.model, masks)
        prune.apply_(self.average.module, masks)

    def cut(self, budget: int, image_size: int, grey: bool, images: Iterable[Tensor]) -> None:
        """Prune to `budget`, refresh BatchNorm's statistics on `images`, restart the average."""
        masks = self.masks
        if masks is None:
            if grey:
                prune.fold_equal_channels_(self.model)
            masks = prune.all_useful(self.model, image_size, grey)
        self.set_masks(prune.choose(self.model, masks, budget, image_size, grey))
        with self.autocast():
            update_bn(images, self.model)
        self.average.n_averaged.zero_()
        self.average.update_parameters(self.model)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def step(self, images: Tensor, targets: Tensor, teacher: nn.Module | None, rate: float):
        """One update; returns loss and logits, without waiting for the device.

        All processes are given the same batch, and each takes its share.
        """
        stage = self.stage
        images, targets = parallel.share(images), parallel.share(targets)
        with self.autocast():
            logits = self.trained(images)
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = teacher(images.to(teacher.fc.weight.dtype))
        if teacher is None:
            loss = F.cross_entropy(logits.float(), targets)
        else:
            loss = distillation_loss(
                logits.float(), teacher_logits.float(), targets, stage.kd_weight, stage.temperature
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.masks is not None:  # momentum and weight decay must not revive what was pruned
            with torch.no_grad():
                for weight, mask in self._masked:
                    weight.mul_(mask)
        return loss.detach(), logits.detach()

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["masks"] is not None:
            self.set_masks({name: mask.to(self.device) for name, mask in state["masks"].items()})


# --- one stage ----------------------------------------------------------------------------------


class Stop:
    """Within: Ctrl-C and SIGTERM only set `asked`, so that the step can be finished and saved.

    A second one stops at once, as does the first if several processes would have to agree.
    """

    def __init__(self):
        self.asked = False
        self.handlers: dict = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            if parallel.processes() == 1 and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Progress:
    """How far an epoch is: steps done, their losses, and the accuracy, which stay on the device."""

    def __init__(self, steps: int, classes: int, device: torch.device):
        self.step = 0
        self.losses = torch.zeros(steps, device=device)
        self.accuracy = MulticlassAccuracy(
            classes, average="micro", validate_args=False, sync_on_compute=False
        ).to(device)
        self.accuracy.persistent(True)

    def state_dict(self) -> dict:
        accuracy = self.accuracy.state_dict()
        return {"step": self.step, "losses": self.losses, "accuracy": accuracy}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.losses.copy_(state["losses"])
        self.accuracy.load_state_dict(state["accuracy"])

    def result(self) -> tuple[Tensor, float]:
        """Losses of all steps (steps,), on the CPU, and accuracy, over all processes."""
        if parallel.processes() > 1:
            dist.all_reduce(self.losses)
            self.losses /= parallel.processes()
            self.accuracy.sync()
        return self.losses.cpu(), self.accuracy.compute().item()


def train_epoch(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    teacher: nn.Module | None,
    rates: list[float],
    progress: Progress,
    stop: Stop,
    title: str = "",
) -> None:
    """One pass over `batches` of images and targets, with a learning rate for each step.

    Goes on after `progress.step` steps (batches before are drawn again and left out), and returns
    before the end if it is asked to. Under mixup an answer is right if it is the class with the
    larger share. The bar, if there is a terminal, reads loss and accuracy ten times.
    """
    network.model.train()
    hidden = True if parallel.process() else None  # None: unless there is a terminal
    bar = tqdm(batches, title, len(rates), leave=False, disable=hidden)
    for step, (images, targets) in enumerate(bar):
        if step < progress.step:
            continue
        if stop.asked:
            bar.close()
            return
        loss, logits = network.step(images, targets, teacher, rates[step])
        progress.losses[step] = loss
        progress.accuracy.update(logits, parallel.share(targets).argmax(1))
        progress.step = done = step + 1
        if done % AVERAGE_EVERY == 0:
            network.average.update_parameters(network.model)
        if not bar.disable and done % (len(rates) // 10 + 1) == 0 and done < len(rates):
            mean, right = progress.losses[:done].mean().item(), progress.accuracy.compute().item()
            bar.set_postfix_str(f"loss {mean:.3f} accuracy {right:.1%}")
    if network.masks is not None:
        network.set_masks(network.masks)  # a kept weight that just is 0.0 would be miscounted


@dataclass(frozen=True)
class Part:
    """One training of a run: the stage `teacher`, `student`, or a round of `pruned`."""

    name: str
    stage: Stage
    number: int  # in the run, from 0
    file: str
    cuts: tuple[int, ...] = ()  # the budgets that the first epochs begin with
    round: int = 1
    rounds: int = 1

    @property
    def title(self) -> str:
        return self.name if self.rounds == 1 else f"{self.name} {self.round}/{self.rounds}"


def plan(recipe: Recipe, largest: int, budget: int) -> list[Part]:
    """All parts of a run whose dense student has `largest` parameters that can matter."""
    rounds, cuts = len(recipe.pruned), [stage.cuts for stage in recipe.pruned]
    ends = recipe.budgets
    if not ends:
        steps = prune.ladder(largest, budget, sum(cuts))
        ends = tuple(steps[sum(cuts[: n + 1]) - 1] for n in range(rounds))
    parts = [
        Part("teacher", recipe.teacher, 0, "teacher.pth"),
        Part("student", recipe.student, 1, "student.pth"),
    ]
    for n, (stage, start, end) in enumerate(
        zip(recipe.pruned, (largest, *ends[:-1]), ends, strict=True)
    ):
        file = "pruned_resnet18.pth" if n == rounds - 1 else f"pruned_resnet18-{end}.pth"
        ladder = tuple(prune.ladder(start, end, stage.cuts))
        parts.append(Part("pruned", stage, 2 + n, file, ladder, n + 1, rounds))
    return parts


def fit(run: "Run", part: Part, model: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
    """Train `model`; returns a copy with the weights that validation chose.

    Each epoch draws from a generator of its own, seeded by run, part and epoch, so that an epoch
    can be repeated: a run that was stopped goes on at the epoch, or the step, it was at.
    """
    stage, steps = part.stage, run.train.steps
    network = Network(model, stage, run.device, run.bf16, run.source.image_size)
    best: dict = {"score": -1.0}
    first, within = run.done(part)
    if first or within:
        network.load_state_dict(run.state["network"])
        best = run.state["best"]
        parallel.say(
            f"{part.title}: going on after {first} epochs{' and a part' if within else ''}"
        )

    for epoch in range(first, stage.epochs):
        began = time.perf_counter()
        progress = Progress(steps, run.train.classes, run.device)
        if within:
            progress.load_state_dict(within)
            within = None
        elif epoch < len(part.cuts):
            few = zip(range(REFRESH), run.batches(part, epoch), strict=False)
            network.cut(part.cuts[epoch], *run.kind, [images for _, (images, _) in few])
        rates = [
            learning_rate(epoch * steps + step, stage.epochs * steps, stage.learning_rate)
            for step in range(steps)
        ]
        title = f"{part.title}, {epoch + 1}/{stage.epochs}"
        train_epoch(network, run.batches(part, epoch), teacher, rates, progress, run.stop, title)
        if progress.step < steps:
            run.save_state(part, epoch, network, best, progress)
            raise KeyboardInterrupt
        losses, accuracy = progress.result()
        if len(bad := losses.isfinite().logical_not().nonzero()):
            raise ArithmeticError(
                f"stage {part.title}, epoch {epoch + 1}, step {bad[0].item() + 1}: the loss is "
                f"{losses[bad[0]].item()}"
            )

        val, val_average = run.validate(network.model), run.validate(network.average.module)
        # Without validation images the schedule decides: the average after the last epoch.
        averaged = val is None or val_average >= val
        score = float(epoch) if val is None else max(val, val_average)
        if epoch + 1 >= len(part.cuts) and score > best["score"]:
            chosen = network.average.module if averaged else network.model
            weights = {k: v.clone() for k, v in chosen.state_dict().items()}
            best = {"score": score, "epoch": epoch + 1, "averaged": averaged, "model": weights}
        parameters, seconds = prune.count(network.model), time.perf_counter() - began
        run.rows.append(
            {
                "stage": part.name,
                "round": part.round,
                "epoch": epoch + 1,
                "parameters": parameters,
                "loss": round(losses.mean().item(), 5),
                "train_accuracy": round(accuracy, 5),
                "val_accuracy": "" if val is None else round(val, 5),
                "val_accuracy_average": "" if val is None else round(val_average, 5),
                "learning_rate": float(f"{rates[-1]:.3g}"),
                "seconds": round(seconds, 1),
            }
        )
        run.save_state(part, epoch + 1, network, best)
        shown = "" if val is None else f"  val {val:.2%}  averaged {val_average:.2%}"
        parallel.say(
            f"{part.title:11}{epoch + 1:4}/{stage.epochs}  {parameters:>10,} parameters  "
            f"loss {losses.mean().item():.4f}{shown}  {seconds:.0f} s"
        )
        if run.stop.asked:
            raise KeyboardInterrupt
    network.model.load_state_dict(best["model"])
    return rewrite.untrimmed(network.model)


# --- a run and its folder -----------------------------------------------------------------------


class Run:
    """The folder of a run: what was asked for, how far it is, what it leaves."""

    def __init__(self, folder: Path, recipe_name: str, settings: dict):
        self.folder, self.recipe_name = folder, recipe_name
        self.settings = json.loads(json.dumps(settings))  # as they are read back: lists, no tuples
        self.recipe: Recipe = RECIPES[recipe_name]
        self.seed, self.budget = settings["seed"], settings["budget"]
        self.stem = settings.get("stem", 4)
        self.record = self._open()
        self.state = self._read_state()
        self.stop = Stop()
        self.rows: list[dict] = self.state.get("rows", [])
        self.minutes: float = self.state.get("minutes", 0.0)

    def _open(self) -> dict:
        """Create the folder, or go on with what is there if the settings are the same."""
        record = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = json.loads(record.read_text()) if record.exists() else None
            if known is None:
                known = {"name": self.folder.name, "settings": self.settings}
                checkpoint.write(record, json.dumps(known, indent=2))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.folder}: cannot be used for the run ({error})") from None
        wanted = self.settings
        if differing := [key for key in wanted if known["settings"].get(key) != wanted[key]]:
            raise UsageError(
                f"{self.folder} holds a run with other settings ({', '.join(differing)}); "
                "choose another --name, or the settings it was started with"
            )
        return known

    def _read_state(self) -> dict:
        """The newest state that can be read; {} if there is none."""
        for name in (STATE, STATE_BEFORE):
            path = self.folder / name
            try:
                if path.exists():
                    return checkpoint.read(path)
            except checkpoint.CheckpointError as error:
                print(f"train.py: warning: {error}; going on from the one before", file=sys.stderr)
                if parallel.process() == 0:
                    path.unlink()  # it must not become the one before
        return {}

    def done(self, part: Part) -> tuple[int, dict | None]:
        """How many epochs of `part` need not be trained any more, and the state of `Progress` in
        the one after, if it was stopped by hand."""
        if (self.folder / part.file).exists():
            return part.stage.epochs, None
        if self.state.get("part") != part.number:
            return 0, None
        return self.state["epoch"], self.state["progress"]

    def save_state(
        self, part: Part, epoch: int, network: Network, best: dict, within: Progress | None = None
    ) -> None:
        """All that the next epoch needs, or the rest of the one `within`; the state before is kept
        as well. metrics.csv is written from the same rows."""
        if parallel.process() > 0:
            return
        now = time.perf_counter()
        self.minutes += (now - self.clock) / 60
        self.clock = now
        state = {
            "part": part.number,
            "epoch": epoch,
            "network": network.state_dict(),
            "best": best,
            "progress": None if within is None else within.state_dict(),
            "rows": self.rows,
            "minutes": self.minutes,
        }
        if (self.folder / STATE).exists():
            (self.folder / STATE).replace(self.folder / STATE_BEFORE)
        checkpoint.write(self.folder / STATE, state)
        if self.rows:
            checkpoint.write(self.folder / "metrics.csv", _csv(self.rows))

    def batches(self, part: Part, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of an epoch, the same whenever they are asked for."""
        seed = (self.seed * 100 + part.number) * 100_000 + epoch
        plain = epoch >= (1 - PLAIN) * part.stage.epochs
        return self.train.batches(Generator(self.device).manual_seed(seed), plain)

    def prepare(self, device: torch.device, source: data.Source, full_train: bool) -> None:
        """Put the images on the device, split into training and validation, or all for training."""
        self.device, self.bf16 = device, bf16_pays(device)
        self.clock = time.perf_counter()
        self.source, self.kind = source, (source.image_size, source.grey)
        (images_u8, labels), val = data.load_train(source, full_train)
        self.val = None if val is None else (val[0].to(device), val[1].to(device))
        self.available = len(labels)
        images_u8, labels = images_u8[: self.recipe.images], labels[: self.recipe.images]
        classes = len(source.classes)
        self.train = Images(images_u8.to(device), labels.to(device), self.recipe, classes)
        student = models.build("resnet18", classes, stem=self.stem)
        _, largest = prune.budget_range(student, *self.kind)
        parts = plan(self.recipe, largest, self.budget)
        self.parts = parts if self.settings.get("teacher") is None else parts[1:]

    def validate(self, model: nn.Module) -> float | None:
        """Validation accuracy in the precision of training; None without validation images."""
        if self.val is None:
            return None
        images_u8, labels = self.val
        model = rewrite.frozen(model, self.device, self.bf16, self.source.image_size)
        return models.accuracy(models.infer(model, images_u8, 250), labels)

    def build(self, stage: str, imagenet: bool = False) -> nn.Module:
        """A new network, initialised from the run's seed."""
        torch.manual_seed(self.seed * len(STAGES) + STAGES.index(stage))
        arch = "resnet50" if stage == "teacher" else "resnet18"
        return models.build(arch, len(self.source.classes), imagenet, self.stem)

    def keep(self, part: Part, model: nn.Module) -> None:
        """Write a finished network, with what is known of it."""
        if parallel.process() > 0:
            return
        val = None
        if self.val is not None:
            val = models.accuracy(models.infer(model, self.val[0]), self.val[1])
        meta = {
            "arch": "resnet50" if part.name == "teacher" else "resnet18",
            "stem": self.stem,
            "num_classes": len(self.source.classes),
            "classes": list(self.source.classes),
            "dataset": self.source.name,
            "image_size": self.source.image_size,
            "grey": self.source.grey,
            "stage": part.name,
            "recipe": self.recipe_name,
            "seed": self.seed,
            "commit": commit(),
            "val_accuracy": val,
        }
        if part.cuts:
            meta["budget"] = part.cuts[-1]
        checkpoint.save(self.folder / part.file, model, meta)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)  # older rows may have others
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def commit() -> str:
    """The commit of this checkout, "+" behind it if files differ from it; "" outside of git.

    results.csv, to which a run adds its rows, may differ.
    """

    def git(*words: str) -> subprocess.CompletedProcess:
        where = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True)

    try:
        name = git("describe", "--always", "--exclude=*").stdout.strip()
        differs = git("diff", "--quiet", "HEAD", "--", ".", f":!{RESULTS.name}").returncode
    except OSError:
        return ""
    return f"{name}+" if name and differs else name


# --- the machine --------------------------------------------------------------------------------


def bf16_pays(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 clearly faster than in fp32: measured."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(768, 768, dtype=dtype)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32) / 1.5


def measure(run: Run) -> dict[str, float]:
    """Seconds that training takes for one image in each stage, on networks thrown away."""
    seconds = {}
    for part in run.parts:
        if part.round > 1:
            continue
        machine = run.device, run.bf16, run.source.image_size
        network = Network(run.build(part.name), part.stage, *machine)
        teacher = rewrite.frozen(run.build("teacher"), *machine) if part.name != "teacher" else None
        network.model.train()
        times = []
        for _, batch in zip(range(5), run.batches(part, 0), strict=False):
            began = time.perf_counter()
            loss, _ = network.step(*batch, teacher, rate=0.0)
            loss.item()
            times.append(time.perf_counter() - began)
        seconds[part.name] = sorted(times)[len(times) // 2] / run.train.batch_size
    return seconds


# --- the chain ----------------------------------------------------------------------------------


def train(run: Run, teacher_file: Path | None, imagenet: bool) -> None:
    """All parts that are not finished yet."""
    teacher, before = None, None
    for part in run.parts:
        if parallel.processes() > 1:
            dist.barrier()  # until process 0 has written the part before
        path = run.folder / part.file
        if not path.exists():
            if part.name != "teacher" and teacher is None:
                teacher, _ = checkpoint.load(teacher_file or run.folder / "teacher.pth")
                teacher = rewrite.frozen(teacher, run.device, run.bf16, run.source.image_size)
            if part.name == "pruned":
                model, _ = checkpoint.load(before)
            else:
                model = run.build(part.name, imagenet and part.name == "student")
            run.keep(part, fit(run, part, model, teacher))
        before = path


def finish(run: Run, teacher_file: Path | None) -> None:
    """Read the files that the run wrote, measure test, and write summary, pictures and record."""
    test = data.load(run.source, "test") if data.has(run.source, "test") else None
    stages, files = [], [("teacher", 1, "teacher", teacher_file)] if teacher_file else []
    files += [(part.name, part.round, part.title, run.folder / part.file) for part in run.parts]
    for stage, round_, title, path in files:
        model, meta = checkpoint.load(path, run.device)
        seconds = [r["seconds"] for r in run.rows if (r["stage"], r["round"]) == (stage, round_)]
        logits = None if test is None else models.infer(model, test[0])
        stages.append(
            {
                "stage": title,
                "file": path.name,
                "kilobytes": round(path.stat().st_size / 1000),
                "parameters": meta["parameters"],
                "val_accuracy": meta.get("val_accuracy"),
                "test_accuracy": None if test is None else models.accuracy(logits, test[1]),
                "minutes": round(sum(seconds) / 60, 1),
            }
        )
    images = (1, 3, run.source.image_size, run.source.image_size)
    summary = torchinfo.summary(prune.masked(model.cpu()), images, verbose=0)
    checkpoint.write(run.folder / "summary.txt", f"{summary}\n")
    checkpoint.write(run.folder / "curves.png", plots.curves(run.folder / "metrics.csv"))
    live = prune.all_useful(model, *run.kind)
    kept = {name: int(w.count_nonzero()) for name, w in prune.weights(model).items()}
    could = {name: int(mask.sum()) for name, mask in live.items()}
    checkpoint.write(run.folder / "layers.png", plots.layers(kept, could))
    if (shown := test or run.val) is not None:
        if test is None:
            logits = models.infer(model, shown[0])
        images_u8, labels, probs = shown[0].cpu(), shown[1].cpu(), logits.cpu().softmax(1)
        for name, picture in (("confusion", plots.confusion), ("mistakes", plots.mistakes)):
            png = picture(images_u8, labels, probs, run.source.classes)
            checkpoint.write(run.folder / f"{name}.png", png)
    run.record |= {
        "stages": stages,
        "classes": len(run.source.classes),
        "torchinfo_total_params": summary.total_params,
        "minutes": round(run.minutes, 1),
        "commit": commit(),
        "device": device_name(run.device),
        "bf16": run.bf16,
        "processes": parallel.processes(),
        "peak_memory_mb": peak_memory_mb(run.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    checkpoint.write(run.folder / "run.json", json.dumps(run.record, indent=2))
    for name in (STATE, STATE_BEFORE):  # all they held is in the other files now
        (run.folder / name).unlink(missing_ok=True)
    if run.recipe_name != "quick" and run.source.name == "fashion-mnist":
        teacher, student, *pruned = stages
        rows = [
            {
                "name": run.record["name"],
                "recipe": run.recipe_name,
                "stem": run.stem,
                "seed": run.seed,
                "parameters": stage["parameters"],
                **_accuracies("teacher", teacher),
                **_accuracies("student", student),
                **_accuracies("pruned", stage),
                "minutes": run.record["minutes"],
                "device": run.record["device"],
                "commit": run.record["commit"],
            }
            for stage in (pruned if run.recipe.budgets else pruned[-1:])
        ]
        old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
        checkpoint.write(RESULTS, _csv([*old, *rows]))


def _accuracies(name: str, stage: dict) -> dict[str, str]:
    pairs = {split: stage[f"{split}_accuracy"] for split in ("val", "test")}
    return {f"{name}_{k}": "" if v is None else f"{v:.4f}" for k, v in pairs.items()}


def peak_memory_mb(device: torch.device) -> int:
    """Most memory that this process has used: the GPU's, or, without one, the machine's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3))  # bytes there, else kB


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({os.cpu_count()} cores)" if device.type == "cpu" else device.type


def report(run: Run) -> None:
    """The table at the end."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.2%}"

    columns = f"{'parameters':>12}{'val':>9}{'test':>9}{'minutes':>9}{'kB':>9}"
    print(f"\n{'stage':11}{columns}  file")
    for row in run.record["stages"]:
        print(
            f"{row['stage']:11}{row['parameters']:>12,}{percent(row['val_accuracy']):>9}"
            f"{percent(row['test_accuracy']):>9}{row['minutes']:>9.1f}{row['kilobytes']:>9,}"
            f"  {row['file']}"
        )
    print(f"{run.record['minutes']:.0f} minutes; everything is in {run.folder}")
    val, chance = run.record["stages"][-1]["val_accuracy"], 1 / run.record["classes"]
    if val is not None and val < 2 * chance and chance < 0.3:
        print(
            f"train.py: warning: the pruned network has collapsed, its accuracy is near chance "
            f"({chance:.0%}); a larger --budget or a longer recipe may help",
            file=sys.stderr,
        )


# --- command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Distil a ResNet50 into a ResNet18 on Fashion-MNIST and prune it to exactly "
        "--budget parameters. The same command goes on with a run that was stopped.",
    )
    what = parser.add_argument_group("what is trained")
    recipe = what.add_mutually_exclusive_group()
    recipe.add_argument("--recipe", choices=RECIPES, help="default: full with a GPU, else cpu")
    recipe.add_argument(
        "--quick", action="store_true", help="the recipe quick: a part of the images, 5 minutes"
    )
    what.add_argument(
        "--stem",
        type=int,
        choices=models.STEMS,
        default=4,
        help="total stride of the first layers of both networks: 4, torchvision's (default); for "
        "small images 2, 3x3 with stride 1 and the max-pool: 5 times the work; or 1, without the "
        "max-pool: 17 times",
    )
    what.add_argument("--budget", type=int, metavar="N", help="parameters left (default 100000)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    what.add_argument(
        "--teacher", type=Path, metavar="FILE", help="weights of a ResNet50; none is trained then"
    )
    what.add_argument(
        "--imagenet", action="store_true", help="start the student from torchvision's weights"
    )
    what.add_argument(
        "--full-train", action="store_true", help="train on all images, without validation"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--name", help="of the run, a folder in runs/ (default <recipe>-seed<seed>)")
    where.add_argument(
        "--dataset",
        choices=data.DATASETS,
        default="fashion-mnist",
        help="images by name (default: fashion-mnist)",
    )
    where.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the images (default: found or fetched), or with your own: "
        "DIR/train/<class>/*.png, optional val/ and test/",
    )
    where.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side to resize to (own images: 28)"
    )
    where.add_argument("--device", choices=models.DEVICES, default="auto", help="default: auto")
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> None:
    """Check everything that was asked for, then train."""
    device = models.choose_device(args.device)
    recipe_name = args.recipe or (
        "quick" if args.quick else "full" if device.type == "cuda" else "cpu"
    )
    if not 0 <= args.seed < 10**9:
        raise UsageError(f"--seed {args.seed}: a number from 0 to 999,999,999")
    source = data.find(args.data, args.dataset, args.image_size)
    images = "" if source.name == "fashion-mnist" else f"-{source.name}"
    stem = "" if args.stem == 4 else f"-stem{args.stem}"
    name = args.name or f"{recipe_name}{images}{stem}-seed{args.seed}"
    if Path(name).name != name or name in (".", ".."):
        raise UsageError(f"--name {name}: a name, not a path")
    for split in ("train", "val", "test"):  # damage is found now, not after hours
        if data.has(source, split):
            data.load(source, split)
    classes = len(source.classes)
    try:
        probe = models.build("resnet18", classes, args.imagenet, args.stem)
    except OSError as error:
        raise UsageError(f"--imagenet: the weights cannot be downloaded ({error})") from None
    recipe = RECIPES[recipe_name]
    if recipe.budgets and args.budget is not None:
        raise UsageError(f"--budget {args.budget}: the recipe {recipe_name} has its own budgets")
    budget = 100_000 if args.budget is None else args.budget
    budgets = recipe.budgets or (budget,)
    smallest, largest = prune.budget_range(probe, source.image_size, source.grey)
    if not all(smallest <= budget <= largest for budget in budgets):
        raise UsageError(
            f"--budget {budgets[-1]:,}: possible are {smallest:,} (BatchNorm, biases, and "
            f"the floors of all layers) to {largest:,} (all weights that can matter)"
        )
    if args.teacher is not None:
        _, meta = checkpoint.load(args.teacher)
        if meta["arch"] != "resnet50" or meta["num_classes"] != classes:
            raise UsageError(
                f"{args.teacher}: a {meta['arch']} with {meta['num_classes']} classes, the teacher "
                f"must be a resnet50 with {classes}"
            )
    settings = {
        "recipe": asdict(recipe),
        "stem": args.stem,
        "seed": args.seed,
        "budget": budgets[-1],
        "teacher": None if args.teacher is None else str(args.teacher.resolve()),
        "imagenet": args.imagenet,
        "full_train": args.full_train,
        "dataset": source.name if source.name != "folder" else str(source.path.resolve()),
        "image_size": source.image_size,
    }
    if recipe.batch_size % parallel.processes():
        raise UsageError(
            f"{parallel.processes()} processes cannot share batches of {recipe.batch_size} equally"
        )
    if parallel.process() > 0:
        dist.barrier()  # until process 0 has the folder
    with lock(RUNS / name) if parallel.process() == 0 else contextlib.nullcontext():
        run = Run(RUNS / name, recipe_name, settings)
        if parallel.processes() > 1 and parallel.process() == 0:
            dist.barrier()
        if "stages" in run.record:
            parallel.say(f"{run.folder}: this run is finished; --name or --seed starts another")
        else:
            run.prepare(device, source, args.full_train)
            announce(run)
            with run.stop:
                train(run, args.teacher, args.imagenet)
            if parallel.process() == 0:
                finish(run, args.teacher)
        if parallel.process() == 0:
            report(run)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Raises UsageError if another process is training the run in `folder`."""
    held = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{folder}: another process is training this run") from None
    except OSError as error:
        raise UsageError(f"{folder}: cannot be used for the run ({error})") from None
    try:
        yield
    finally:
        held.release()


def announce(run: Run) -> None:
    """Device, recipe, epochs and, from a few measured steps, the expected time."""
    parallel.say(
        f"device {device_name(run.device)}, {'bf16' if run.bf16 else 'fp32'}, run {run.folder}"
    )
    images = run.train.steps * run.train.batch_size
    parallel.say(f"recipe {run.recipe_name}, seed {run.seed}, {images:,} images an epoch")
    seconds = measure(run)

    total = 0.0
    for stage in seconds:
        parts = [part for part in run.parts if part.name == stage]
        done = sum(run.done(part)[0] for part in parts)
        minutes = (sum(p.stage.epochs for p in parts) - done) * images * seconds[stage] / 60
        total += minutes
        epochs = " + ".join(str(part.stage.epochs) for part in parts)
        known = f" ({done} are done)" if done else ""
        parallel.say(f"  {stage:8} {epochs} epochs{known}, about {minutes:.1f} minutes")
    parallel.say(f"  in all about {total:.1f} minutes")
    if run.device.type == "cpu" and run.recipe_name != "full":
        full = [p for p in plan(RECIPES["full"], 10**6, 10**5) if p.name in seconds]
        hours = sum(p.stage.epochs * seconds[p.name] for p in full) * run.available / 3600
        parallel.say(
            f"  (the recipe full, made for a GPU, would take about {hours:.0f} hours here)"
        )


def main(argv: list[str] | None = None) -> int:
    torch.set_flush_denormal(True)  # denormal weights are ten times slower on a CPU
    args = parse(argv)
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if cuda else "gloo")
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        start(args)
    except (
        UsageError,
        models.DeviceError,
        data.DataError,
        checkpoint.CheckpointError,
        prune.BudgetError,
    ) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"train.py: {error}; the epochs before are kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(shell.run(main))
