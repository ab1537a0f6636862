"""Distil a ResNet50 into a ResNet18 on Fashion-MNIST, then prune it to exactly 100,000 parameters.

    python train.py            # or: uv run train.py; 90 minutes on 2 cores with bf16 matrix units
    python train.py --quick    # every stage on a part of the images, 5 minutes on 2 cores

Three stages, one loop: `teacher` (ResNet50, labels only; skipped with --teacher FILE), `student`
(ResNet18, distilled), `pruned` (the student, cut to the budget in rounds while distillation goes
on, from one of the best networks so far). A recipe can do without a teacher: then the student
learns from labels, and teaches what is left of it; or without rounds: then it ends with a dense
network, which can teach others. All that a run leaves is in runs/<name>/; the same command goes on
with a run that was stopped. Validation images, held out of the training set, choose the epoch; test
is measured once, at the end.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    import os
    import signal
    import sys

    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH left it out
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of imports

import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import contextlib
import functools
import hashlib
import math
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Generator, nn

import checkpoint
import data
import distill
import models
import prune
from distill import Context, Part, Recipe, Stage, Stop
from runlog import record, report
from runlog.record import Run, UsageError

# --- recipes ------------------------------------------------------------------------------------

_KD = {"kd_weight": 0.5, "temperature": 4.0}
_SGD = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}
RECIPES = {
    # About 90 minutes on two cores with bf16 matrix units: too few epochs for strong augmentation.
    "cpu": Recipe(
        teacher=Stage(24),
        student=Stage(12, **_SGD, **_KD),
        pruned=tuple(
            Stage(epochs, **_SGD, **_KD, cuts=cuts)
            for epochs, cuts in ((14, 10), (14, 10), (32, 8))
        ),
    ),
    # Without a ResNet50, which costs two hours more with `--stem 2`: the dense student learns from
    # labels alone, and teaches its pruned self, or all learn from --teacher. The last round is long
    # and gentle, and meets the same batches again so that the teacher need not answer anew.
    "self": Recipe(
        teacher=None,
        student=Stage(18, **_SGD, **_KD),
        pruned=(
            Stage(4, **_KD, cuts=3),
            Stage(6, **_KD, cuts=4),
            Stage(32, **_SGD, **_KD, cuts=12, share=6, views=16),
        ),
        crop_scale=(0.8, 1.0),
        mixup_alpha=0.2,
    ),
    # For a GPU, 1 and 3 minutes: dense networks to teach others, and the long way down from a
    # student of theirs. One training has all cuts, so gentle that SGD recovers from each within its
    # epoch.
    "dense": Recipe(
        teacher=None,
        student=Stage(24, **_SGD, **_KD),
        pruned=(),
        crop_scale=(0.8, 1.0),
        mixup_alpha=0.2,
        erased=0.5,
    ),
    "long": Recipe(
        teacher=Stage(24),
        student=Stage(12, **_SGD, **_KD),
        pruned=(Stage(60, **_SGD, **_KD, cuts=20, views=15),),
        crop_scale=(0.8, 1.0),
        mixup_alpha=0.2,
        erased=0.5,
    ),
    # A network that is given, trained on: as small as it is already, or cut at once. Its zeros cost
    # nothing, so that training can be long, and augmentation strong.
    "finetune": Recipe(
        teacher=None,
        student=None,
        pruned=(Stage(40, **_SGD, **_KD, cuts=1),),
        crop_scale=(0.8, 1.0),
        mixup_alpha=0.2,
        erased=0.5,
    ),
    # Accuracy against size: one ladder whose networks are all kept, one for each budget. After cuts
    # so harsh AdamW recovers faster than SGD, which in longer rounds is as good or better.
    "curve": Recipe(
        teacher=Stage(24),
        student=Stage(12, **_KD),
        pruned=tuple(Stage(epochs, **_KD, cuts=epochs // 2) for epochs in (8, 8, 10, 10, 12, 16)),
        budgets=(1_000_000, 500_000, 200_000, 100_000, 50_000, 20_000),
    ),
    # All stages on a part of the images: a look at the whole chain, not at its accuracy. Steps of
    # networks of half the channels take a third of the time, which buys more of them. The
    # last cuts lose most, and an epoch costs least then, so that the last round is the longest. The
    # last network's answers are cheap: a ResNet50's would take half of a step.
    "quick": Recipe(
        teacher=Stage(2),
        student=Stage(5, **_KD),
        pruned=(Stage(4, **_KD, cuts=3), Stage(12, **_KD, cuts=8, share=4)),
        images=5_000,
        batch_size=64,
        least_steps=70,
        taught_by="last",
        width=0.5,
    ),
}
STAGES = ("teacher", "student", "pruned")
CLEAR = 0.01  # validation accuracy: a difference above the noise of 5,000 images


def plan(recipe: Recipe, largest: int, budget: int) -> list[Part]:
    """All parts of a run whose dense student has `largest` parameters that can matter."""
    rounds, shares = len(recipe.pruned), [stage.share or stage.cuts for stage in recipe.pruned]
    ends = recipe.budgets
    if not ends:
        steps = prune.geometric_schedule(largest, budget, sum(shares))
        ends = tuple(steps[sum(shares[: n + 1]) - 1] for n in range(rounds))
    dense = ("teacher", recipe.teacher), ("student", recipe.student)
    parts = [Part(name, of, n, f"{name}.pth") for n, (name, of) in enumerate(dense) if of]
    for n, (stage, start, end) in enumerate(
        zip(recipe.pruned, (largest, *ends)[:rounds], ends, strict=True)
    ):
        file = "pruned_resnet18.pth" if n == rounds - 1 else f"pruned_resnet18-{end}.pth"
        ladder = tuple(prune.geometric_schedule(start, end, stage.cuts))
        parts.append(Part("pruned", stage, 2 + n, file, ladder, n + 1, rounds))
    return parts


# --- the chain ----------------------------------------------------------------------------------


def prepare(
    source: data.Source,
    recipe: Recipe,
    device: torch.device,
    full_train: bool = False,
    flip: bool = True,
) -> tuple[distill.TrainingData, Context]:
    """The images on the device, split into training and validation, or all for training."""
    (images_u8, labels), val = data.load_train(source, full_train)
    images_u8, labels = images_u8[: recipe.images].to(device), labels[: recipe.images].to(device)
    if val is not None:
        # A part of the images has a fifth as many for validation, from everywhere in these: one's
        # own lie there class by class.
        most = recipe.images // 5 if recipe.images else len(val[1])
        every = math.ceil(len(val[1]) / most)
        val = val[0][::every].to(device), val[1][::every].to(device)
    images = distill.TrainingData(images_u8, labels, len(source.classes), recipe, val, flip)
    return images, Context(device, models.bf16_is_faster(device), source.image_size, source.grey)


def build(stage: str, settings: dict, classes: int) -> nn.Module:
    """A new network for the stage "teacher" or "student", initialised from the run's seed."""
    torch.manual_seed(settings["seed"] * len(STAGES) + STAGES.index(stage))
    arch = "resnet50" if stage == "teacher" else "resnet18"
    imagenet = settings["imagenet"] and stage == "student"
    model = models.build(arch, classes, imagenet, settings["stem"])
    if not imagenet:
        prune.apply_width_(model, settings["recipe"]["width"])
    return model


def teachers_of(run: Run, part: Part, parts: list[Part]) -> list[Path]:
    """The files of the networks that `part` learns from beside the labels; []: from labels only.

    Without --teacher, what is left of the student learns from one of the networks so far that are
    within CLEAR of the best, by the validation accuracy in their files: where images are few, a
    ResNet50 of few steps can be near chance, and a pruned network far ahead of the dense one.
    """
    if part.name == "teacher":
        return []
    before = [(other.name, run.path(other)) for other in parts[: parts.index(part)]]
    if part.name == "student" or run.given("teacher"):
        return run.given("teacher") or [file for _, file in before][:1]
    before += [("student", file) for file in run.given("student")]  # not a part
    files = [file for _, file in sorted(before, key=lambda pair: STAGES.index(pair[0]))]
    accuracies = [checkpoint.load(file)[1].get("val_accuracy") or 0 for file in files]
    enough = max(accuracies) - CLEAR
    good = [file for file, accuracy in zip(files, accuracies, strict=True) if accuracy >= enough]
    return [good[0 if run.settings["recipe"]["taught_by"] == "first" else -1]]


def train(
    run: Run,
    parts: list[Part],
    images: distill.TrainingData,
    setup: Context,
    source: data.Source,
    stop: Stop,
) -> None:
    """All parts that are not finished yet."""
    teachers, taught_by, before = [], [], next(iter(run.given("student")), None)
    for part in parts:
        runtime.barrier()  # until process 0 has written the part before
        path = run.path(part)
        if not path.exists():
            learns_from = teachers_of(run, part, parts)
            if learns_from != taught_by:
                teachers = [setup.frozen(checkpoint.load(file)[0]) for file in learns_from]
                taught_by = learns_from
            if part.name == "pruned":
                model, _ = checkpoint.load(before)
            else:
                model = build(part.name, run.settings, images.classes)
            model = distill.fit(
                part,
                model,
                teachers,
                images,
                setup,
                seed=run.settings["seed"],
                saved=run.saved(part),
                save=functools.partial(run.save, part),
                stop=stop,
            )
            if runtime.rank() == 0:
                keep(run, part, model, images, source)
        before = path


def keep(
    run: Run, part: Part, model: nn.Module, images: distill.TrainingData, source: data.Source
) -> None:
    """Write a finished network, with what is known of it."""
    val = None
    if images.val is not None:
        val = models.accuracy(models.infer(model, images.val[0]), images.val[1])
    meta = {
        "arch": "resnet50" if part.name == "teacher" else "resnet18",
        "stem": run.settings["stem"],
        "num_classes": len(source.classes),
        "classes": list(source.classes),
        "dataset": source.name,
        "image_size": source.image_size,
        "grey": source.grey,
        "stage": part.name,
        "recipe": run.settings["recipe_name"],
        "seed": run.settings["seed"],
        "commit": record.commit(),
        "val_accuracy": val,
    }
    if part.cuts:
        meta["budget"] = part.cuts[-1]
    checkpoint.save(run.path(part), model, meta)


def announce(run: Run, parts: list[Part], images: distill.TrainingData, setup: Context) -> None:
    """Device, recipe, epochs and, from a few measured steps, the expected time."""
    device, precision = models.device_name(setup.device), "bf16" if setup.bf16 else "fp32"
    runtime.print_rank0(f"device {device}, {precision}, run {run.folder}")
    recipe, seed = run.settings["recipe_name"], run.settings["seed"]
    shown = f"{len(images.labels):,} images{'' if images.flip else ', never mirrored'}"
    shown += f", {images.passes} times an epoch" if images.passes > 1 else ""
    shown += f", batches of {images.batch_size}"
    shown += ", none for validation" if images.val is None else ""
    runtime.print_rank0(f"recipe {recipe}, seed {seed}, {shown}")
    seconds = measure(run, parts, images, setup)
    total = 0.0
    for stage in seconds:
        ours = [part for part in parts if part.name == stage]
        done = {part: run.epochs_done(part) for part in ours}
        step, answer = seconds[stage]
        epochs = sum(part.stage.epochs - done[part] for part in ours)
        asked = sum(distill.distinct_epochs(part.stage, done[part]) for part in ours)
        minutes = (epochs * step + asked * answer) * images.passes * images.steps / 60
        total += minutes
        listed = " + ".join(str(part.stage.epochs) for part in ours)
        known = f" ({sum(done.values())} are done)" if any(done.values()) else ""
        runtime.print_rank0(f"  {stage:8} {listed} epochs{known}, about {minutes:.1f} minutes")
    runtime.print_rank0(f"  in all about {total:.1f} minutes")


def measure(
    run: Run, parts: list[Part], images: distill.TrainingData, setup: Context
) -> dict[str, tuple[float, float]]:
    """Seconds that a training step, and the teacher's answer, take in each stage, on networks
    thrown away."""
    seconds = {}
    recipe, classes = run.settings["recipe"], images.classes

    def networks_of(stage: str) -> list[nn.Module]:
        given = [checkpoint.load(path)[0] for path in run.given(stage)]
        return given or [build(stage, run.settings, classes)]

    teaches = "teacher" if run.given("teacher") or recipe["teacher"] else "student"
    teacher = distill.Teacher([setup.frozen(network) for network in networks_of(teaches)])
    for part in parts:
        if part.round > 1:
            continue
        stage = "teacher" if part.name == "teacher" else "student"
        network = distill.TrainState(networks_of(stage)[0], part.stage, setup)
        if run.given(stage):  # what is zero already costs nothing
            network.set_masks({n: w != 0 for n, w in prune.weights(network.model).items()})
        network.model.train()
        taught = part.name == "pruned" or (part.name, teaches) == ("student", "teacher")
        steps, answers = [], []
        batches = images.batches(Generator(setup.device).manual_seed(0))
        enough = 2 * distill.CudaGraphed.FIRST + 3 if setup.device.type == "cuda" else 5
        for _, (batch, targets) in zip(range(enough), batches, strict=False):
            began = time.perf_counter()
            logits = teacher.logits(batch) if taught else None
            answered = time.perf_counter()
            loss, _ = network.step(batch, targets, logits, rate=0.0)
            loss.item()
            steps.append(time.perf_counter() - answered)
            answers.append(answered - began)
        seconds[part.name] = statistics.median(steps), statistics.median(answers)
    return seconds


# --- command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Distil a ResNet50 into a ResNet18 on Fashion-MNIST and prune it to exactly "
        "--budget parameters. The same command goes on with a run that was stopped.",
    )
    what = parser.add_argument_group("what is trained")
    recipe = what.add_mutually_exclusive_group()
    recipe.add_argument("--recipe", choices=RECIPES, default="cpu", help="default: cpu")
    recipe.add_argument(
        "--quick", action="store_const", dest="recipe", const="quick",
        help="the recipe quick: a part of the images, about 5 minutes",
    )  # fmt: skip
    what.add_argument(
        "--stem",
        type=int,
        choices=models.STEMS,
        default=4,
        help="total stride of the first layers of both networks: 4, torchvision's (default); for "
        "images below about 64 pixels 2, 3x3 with stride 1 and the max-pool, is one or two points "
        "better: 5 times the work; or 1, without the max-pool: 17 times",
    )
    what.add_argument("--budget", type=int, metavar="N", help="parameters left (default 100000)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    what.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="weights of a ResNet50 or ResNet18, or of several, whose mean teaches; no teacher is "
        "trained then",
    )
    what.add_argument(
        "--student",
        type=Path,
        nargs=1,
        metavar="FILE",
        help="weights of a ResNet18, dense or pruned, to go on from; no dense one is trained then",
    )
    what.add_argument(
        "--imagenet", action="store_true", help="start the student from torchvision's weights"
    )
    what.add_argument(
        "--full-train", action="store_true", help="train on all images, without validation"
    )
    what.add_argument(
        "--no-flip",
        action="store_true",
        help="never mirror images: for letters, digits, arrows, left and right (default: half of "
        "the time, but mnist and kmnist never)",
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
    source = data.find(args.data, args.dataset, args.image_size)
    name, settings, largest = check(args, source)
    if runtime.rank() > 0:
        runtime.barrier()  # until process 0 has the folder
    with record.lock(record.RUNS / name) if runtime.rank() == 0 else contextlib.nullcontext():
        recipe = RECIPES[args.recipe]
        images, setup = prepare(source, recipe, device, args.full_train, settings["flip"])
        machine = {
            "kind": device.type,
            "threads": torch.get_num_threads(),
            "processes": runtime.world_size(),
        }
        run = Run(record.RUNS / name, settings, machine, setup.bf16)
        if run.record["machine"]["kind"] == device.type:  # as measured when the run was begun
            setup = replace(setup, bf16=run.record["bf16"])
        if runtime.rank() == 0:
            runtime.barrier()
        if run.finished:
            runtime.print_rank0(
                f"{run.folder}: this run is finished; --name or --seed starts another"
            )
        else:
            parts = plan(recipe, largest, settings["budget"])
            parts = [part for part in parts if not settings.get(part.name)]
            announce(run, parts, images, setup)
            with Stop() as stop:
                train(run, parts, images, setup, source, stop)
            if runtime.rank() == 0:
                report.write_report(run, parts, images, setup, source)
        if runtime.rank() == 0:
            report.print_summary(run)


def check(args: argparse.Namespace, source: data.Source) -> tuple[str, dict, int]:
    """The name of the run, its settings, and how many parameters of the dense student can matter.

    Raises UsageError, or whatever else is wrong, now and not after hours.
    """
    if not 0 <= args.seed < 10**9:
        raise UsageError(f"--seed {args.seed}: a number from 0 to 999,999,999")
    images = "" if source.name == "fashion-mnist" else f"-{source.name}"
    stem = "" if args.stem == 4 else f"-stem{args.stem}"
    name = args.name or f"{args.recipe}{images}{stem}-seed{args.seed}"
    if Path(name).name != name or name in (".", ".."):
        raise UsageError(f"--name {name}: a name, not a path")
    (_, labels), _ = data.load_train(source, args.full_train)
    if data.has_split(source, "test"):
        data.load(source, "test")
    classes = len(source.classes)
    try:
        probe = models.build("resnet18", classes, args.imagenet, args.stem)
    except OSError as error:
        raise UsageError(f"--imagenet: the weights cannot be downloaded ({error})") from None
    with torch.no_grad():
        for weight in prune.weights(probe).values():
            weight.fill_(1)  # a random one can be 0.0, and the plan would be another next time
    recipe = RECIPES[args.recipe]
    if not args.imagenet:
        prune.apply_width_(probe, recipe.width)
    if recipe.budgets and args.budget is not None:
        raise UsageError(f"--budget {args.budget}: the recipe {args.recipe} has its own budgets")
    budgets = recipe.budgets or (100_000 if args.budget is None else args.budget,)
    smallest, largest = prune.budget_range(probe, source.image_size, source.grey)
    if not all(smallest <= budget <= largest for budget in budgets):
        raise UsageError(
            f"--budget {budgets[-1]:,}: possible are {smallest:,} (BatchNorm, biases, and "
            f"the floors of all layers) to {largest:,} (all weights that can matter)"
        )
    files = {"teacher": {}, "student": {}}
    for stage, given in files.items():
        for path in getattr(args, stage) or []:
            network, meta = checkpoint.load(path)
            if (note := checkpoint.pop_ignored_(meta, path)) and runtime.rank() == 0:
                print(f"train.py: warning: {note}", file=sys.stderr)
            given[str(path.resolve())] = hashlib.sha256(path.read_bytes()).hexdigest()
            if meta["num_classes"] != classes:
                raise UsageError(
                    f"{path}: has {meta['num_classes']} classes, the images have {classes}"
                )
    if args.student is not None:  # the last that was read
        if (meta["arch"], meta["stem"]) != ("resnet18", args.stem):
            raise UsageError(
                f"--student {path}: a {meta['arch']} of --stem {meta['stem']}, not a "
                f"resnet18 of --stem {args.stem}"
            )
        largest = min(largest, left := prune.count(network))
        if left < max(budgets):
            raise UsageError(
                f"--student {path}: has {left:,} parameters, fewer than the budget {max(budgets):,}"
            )
    elif recipe.student is None:
        raise UsageError(f"--recipe {args.recipe}: needs a network to go on from, --student FILE")
    batch_size, _, _ = distill.batch_layout(len(labels[: recipe.images]), recipe)
    if batch_size % runtime.world_size():
        raise UsageError(
            f"{runtime.world_size()} processes cannot share batches of {batch_size} equally"
        )
    settings = {
        "recipe": asdict(recipe),
        "recipe_name": args.recipe,
        "stem": args.stem,
        "seed": args.seed,
        "budget": budgets[-1],
        **files,
        "imagenet": args.imagenet,
        "full_train": args.full_train,
        "flip": source.name in data.FLIPPABLE and not args.no_flip,
        "dataset": source.name if source.name != "folder" else str(source.path.resolve()),
        "image_size": source.image_size,
        "grey": source.grey,
        "classes": list(source.classes),
        "files": data.digest(source),
    }
    return name, settings, largest


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_flush_denormal(True)  # denormal weights are ten times slower on a CPU
    try:
        with runtime.process_group(args.device):
            start(args)
    except (
        UsageError,
        models.DeviceError,
        data.DataError,
        checkpoint.CheckpointError,
        prune.BudgetError,
        runtime.ParallelError,
    ) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"train.py: {error}; the epochs before are kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
