"""Distill a ResNet50 into a ResNet18 on Fashion-MNIST, then prune it to exactly 100,000 parameters.

    python train.py            # or: uv run train.py
    python train.py --quick    # the whole chain on a part of the images, 5 minutes on 2 cores

Three stages, one training loop (distill.py): `teacher` (a ResNet50, trained with labels), `student`
(a ResNet18, distilled from it), `pruned` (the student, pruned step by step to the budget while it
is distilled). All that a run writes is in runs/<name>/; the same command resumes a run that was
stopped. Validation images, held out of the training set, select the epoch; test accuracy is
measured once, at the end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import contextlib
import functools
import hashlib
import math
import re
from dataclasses import asdict, dataclass, replace
from pickle import UnpicklingError

import torch
from torch import nn

import checkpoint
import data
import distill
import models
import prune
from distill import Batches, Context, Stage, Stop, Training
from runlog import estimate, record, report
from runlog.record import Run, UsageError

# --- the chain ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """The trainings of a run before `--length` and the flags are applied."""

    teacher: Training
    student: Training
    pruned: Training  # once for each budget
    untaught: Training  # with --teacher none: the student's, ...
    self_taught: Training  # ... and that of the pruned network, whose teacher it is
    batches: Batches
    width: float = 1.0  # of the student, at most


# One learning rate cycle has all pruning steps, each small enough that SGD recovers from it within
# an epoch. Each batch of the pruned network comes three times (twice with --teacher none): its step
# is so cheap that the teacher's forward pass would take half of the time.
CHAIN = Chain(
    teacher=Training(epochs=32, unaugmented=1 / 8),
    student=Training(epochs=12),
    pruned=Training(epochs=60, augment_period=15),
    untaught=Training(epochs=60, unaugmented=1 / 8),  # with 1/4 it overfits
    self_taught=Training(epochs=40, augment_period=15),
    batches=Batches(),
)
# The same stages in five minutes: to see that everything works, not how accurate it gets. Half of
# the channels make a step three times as fast, which buys more steps.
QUICK = Chain(
    teacher=Training(epochs=2),
    student=Training(epochs=5),
    pruned=Training(epochs=16, augment_period=4),
    untaught=Training(epochs=7),
    self_taught=Training(epochs=16, augment_period=4),
    batches=Batches(images=5_000, batch_size=64, min_steps=70),
    width=0.5,
)
PRUNE_FRACTION = 1 / 3  # of the epochs have a pruning step before them, the first ones
LENGTH = {"cuda": 4.0}  # factor of all epochs, by device; others 1 (not measured on a GPU yet)
# Fraction of the student's channels, by the total stride of its stem: at stride 1 a ResNet18 of a
# quarter of the channels is as accurate as a whole one at stride 2, in half of the time.
WIDTH = {4: 1.0, 2: 1.0, 1: 0.25}
# The teacher's stem stride and width for images of up to so many pixels: resolution is worth more
# to its accuracy than channels, at equal time (docs/experiments.md).
TEACHERS = ((32, 1, 0.125), (64, 2, 0.5), (data.SIZES[1], 4, 1.0))
STAGES = ("teacher", "student", "pruned")
TOLERANCE = 0.01  # validation accuracies that differ by less than this are equal: 5,000 images


def stages_of(settings: dict, largest: int) -> list[Stage]:
    """The stages of a run whose student has `largest` reachable parameters, in order."""
    trainings = {name: Training(**settings[name]) for name in STAGES}
    student = "resnet18", settings["stem"], settings["width"]
    stages = []
    if settings["teacher_from"] == "trained":
        stages.append(
            Stage(
                "teacher", "resnet50", *settings["resnet50"], trainings["teacher"], 0, "teacher.pth"
            )
        )
    if settings["student_from"] == "trained":
        stages.append(Stage("student", *student, trainings["student"], 1, "student.pth"))
    training, budgets, start = trainings["pruned"], settings["budgets"], largest
    for n, budget in enumerate(budgets):
        steps = max(1, round(training.epochs * settings["prune_fraction"]))
        steps = 1 if start == budget else steps  # a given network of this size is fine-tuned
        schedule = tuple(prune.geometric_schedule(start, budget, steps))
        file = "pruned_resnet18.pth" if n == len(budgets) - 1 else f"pruned_resnet18-{budget}.pth"
        place = 2 + n, file, schedule, n + 1, len(budgets)
        stages.append(Stage("pruned", *student, training, *place))
        start = budget
    return stages


def prepare(
    source: data.Source,
    loaded: tuple[report.Labelled, report.Labelled | None],
    batches: Batches,
    device: torch.device,
    flip: bool = True,
) -> tuple[distill.TrainingData, Context]:
    """The images that `data.load_train` loaded, or the part that is used, and the run's context."""
    (images_u8, labels), val = loaded
    images_u8, labels = images_u8[: batches.images].to(device), labels[: batches.images].to(device)
    if val is not None:
        # A part of the images has a fifth as many for validation: every n-th, because image
        # folders come class by class.
        most = batches.images // 5 if batches.images else len(val[1])
        every = math.ceil(len(val[1]) / most)
        val = val[0][::every].to(device), val[1][::every].to(device)
    images = distill.TrainingData(images_u8, labels, len(source.classes), batches, val, flip)
    bf16 = models.bf16_is_faster(device)
    return images, Context(device, bf16, source.image_size, source.grey)


def build(stage: Stage, settings: dict) -> nn.Module:
    """A new network for a stage, initialized from the run's seed."""
    torch.manual_seed(settings["seed"] * len(STAGES) + STAGES.index(stage.name))
    imagenet = settings["imagenet"] and stage.name != "teacher"
    model = models.build(stage.arch, len(settings["classes"]), imagenet, stage.stem)
    prune.apply_width_(model, stage.width)
    return model


def teacher_files(run: Run, stage: Stage, stages: list[Stage]) -> list[Path]:
    """The weights files of the networks that `stage` is distilled from; []: labels only.

    Without --teacher the pruned network is distilled from the first network of the run whose
    validation accuracy is within TOLERANCE of the best: on few images a ResNet50 of few steps can
    be near chance, and a pruned network more accurate than the unpruned one.
    """
    if stage.name == "teacher" or run.given["teacher"]:
        return run.given["teacher"]
    before = [("student", file) for file in run.given["student"]]
    before += [(other.name, run.path(other)) for other in stages[: stages.index(stage)]]
    files = [file for _, file in sorted(before, key=lambda pair: STAGES.index(pair[0]))]
    if stage.name == "student":
        return files[:1]
    accuracies = [run.load(file)[1].get("val_accuracy") or 0 for file in files]
    enough = max(accuracies) - TOLERANCE
    return [next(f for f, accuracy in zip(files, accuracies, strict=True) if accuracy >= enough)]


def train(
    run: Run,
    stages: list[Stage],
    images: distill.TrainingData,
    context: Context,
    source: data.Source,
    stop: Stop,
) -> None:
    """All stages that are not finished yet."""
    teachers, loaded = [], []
    before = next(iter(run.given["student"]), None)  # what is pruned next
    for stage in stages:
        runtime.barrier()  # until process 0 has written the stage before
        path = run.path(stage)
        if not path.exists():
            files = teacher_files(run, stage, stages)
            if files != loaded:
                teachers = [context.inference_copy(run.load(file)[0]) for file in files]
                loaded = files
            if stage.name == "pruned":
                model, _ = run.load(before)
            else:
                model = build(stage, run.settings)
            model = distill.fit(
                stage,
                model,
                teachers,
                images,
                context,
                seed=run.settings["seed"],
                saved=run.saved(stage),
                save=functools.partial(run.save, stage),
                stop=stop,
            )
            if runtime.rank() == 0:
                save_weights(run, stage, model, images, context, source)
        if stage.name != "teacher":
            before = path


def save_weights(
    run: Run,
    stage: Stage,
    model: nn.Module,
    images: distill.TrainingData,
    context: Context,
    source: data.Source,
) -> None:
    """Write a finished network and its metadata."""
    meta = {
        "arch": stage.arch,
        "stem": stage.stem,
        "num_classes": len(source.classes),
        "classes": list(source.classes),
        "dataset": source.name,
        "image_size": source.image_size,
        "grey": source.grey,
        "stage": stage.name,
        "command": run.command,
        "seed": run.settings["seed"],
        "commit": run.commit,
        "val_accuracy": distill.validate(model, images.val, replace(context, bf16=False)),
    }
    if stage.budgets:
        meta["budget"] = stage.budgets[-1]
    checkpoint.save(run.path(stage), model, meta)


# --- command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Distill a ResNet50 into a ResNet18 on Fashion-MNIST and prune it to exactly "
        "--budget parameters. The same command resumes a run that was stopped.",
    )
    add = parser.add_argument_group("how long, how small").add_argument
    add("--quick", action="store_true", help="the whole chain on 5,000 images, about 5 minutes")
    add(
        "--length", type=float, metavar="F",
        help="factor of the epochs of all stages, not with --quick (default: 1, with CUDA 4)",
    )  # fmt: skip
    add(
        "--budget", type=int, nargs="+", metavar="N",
        help="parameters that are left (default: 100000); with several, the network of each size "
        "is pruned from the next larger one, kept and measured",
    )  # fmt: skip
    add("--no-prune", action="store_true", help="stop after the unpruned student")
    add = parser.add_argument_group("networks").add_argument
    add(
        "--stem", type=int, choices=models.STEMS,
        help="total stride of the student's stem: 4, torchvision's (default); 2, a 3x3 convolution "
        "and the max-pool, more accurate on small images; 1, without the max-pool, even more so",
    )  # fmt: skip
    add(
        "--width", type=float, metavar="F",
        help="fraction of the student's channels (default: 1; a quarter with --stem 1; at most a "
        "half with --quick; 1 with --imagenet)",
    )  # fmt: skip
    add(
        "--teacher", nargs="+", metavar="FILE",
        help="weights of the teacher instead of training one; the mean of the logits of several is "
        "distilled. With --teacher none the student is trained longer, with labels only, and then "
        "teaches its pruned version",
    )  # fmt: skip
    add(
        "--student", type=Path, metavar="FILE",
        help="weights of a ResNet18 to prune, or to fine-tune if it has exactly --budget "
        "parameters, instead of training one",
    )  # fmt: skip
    add("--imagenet", action="store_true", help="start the student from ImageNet weights")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add = parser.add_argument_group("images").add_argument
    add(
        "--data", type=Path, metavar="DIR",
        help="folder with the data set (default: found or downloaded), or with your own images: "
        "DIR/train/<class>/*.png, optional val/ and test/",
    )  # fmt: skip
    add("--dataset", choices=data.DATASETS, default=data.DATASETS[0], help="default: fashion-mnist")
    add("--image-size", type=int, metavar="N", help="resize to N x N pixels (own images: 28)")
    add(
        "--no-flip", action="store_true",
        help="never mirror images: for letters, digits, arrows, left and right (mnist and kmnist "
        "never are)",
    )  # fmt: skip
    add("--full-train", action="store_true", help="train on all images, without validation")
    add = parser.add_argument_group("run").add_argument
    add("--name", help="of the folder in runs/ (default: from the flags, such as resnet18-seed0)")
    add("--device", choices=models.DEVICES, default="auto", help="default: auto, the best there is")
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> None:
    """Check everything that was asked for, then train."""
    check_combination(args)
    device = models.choose_device(args.device)
    source = data.find(args.data, args.dataset, args.image_size)
    loaded = data.load_train(source, args.full_train)
    settings, given, largest = check(args, source, device, loaded[0][0])
    name = args.name or default_name(args, source)
    if Path(name).name != name or name in (".", ".."):
        raise UsageError(f"--name {name}: a name, not a path")
    notes = [*source.notes, *data.order_note(source.classes)]
    for note in notes if runtime.rank() == 0 else ():
        print(f"train.py: {runtime.printable(note)}", file=sys.stderr)
    if runtime.rank() > 0:
        runtime.barrier()  # until process 0 has the folder
    folder = record.RUNS / name
    with record.lock(folder) if runtime.rank() == 0 else contextlib.nullcontext():
        batches = Batches(**settings["batches"])
        images, context = prepare(source, loaded, batches, device, settings["flip"])
        machine = {
            "kind": device.type,
            "threads": torch.get_num_threads(),
            "processes": runtime.world_size(),
        }
        line = command(args, settings["length"])
        run = Run(folder, settings, given, line, machine, context.bf16)
        if run.record["machine"]["kind"] == device.type:  # as measured when the run was begun
            context = replace(context, bf16=run.record["bf16"])
        if runtime.rank() == 0:
            runtime.barrier()
        if run.finished:
            runtime.print_rank0(f"{folder}: this run is finished; --name or --seed starts another")
        else:
            stages = stages_of(settings, largest)
            estimate.print_plan(run, stages, build, images, context)
            with Stop() as stop:
                train(run, stages, images, context, source, stop)
            if runtime.rank() == 0:
                report.write_report(run, stages, images, context, source)
        if runtime.rank() == 0:
            report.print_summary(run)


def check_combination(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that contradict each other or are out of range."""
    bounds = {"seed": (0, 10**9 - 1), "length": (0.01, 100), "width": (0.05, 1)}
    for flag, (least, most) in bounds.items():
        if (value := getattr(args, flag)) is not None and not least <= value <= most:
            raise UsageError(f"--{flag} {value}: must be from {least} to {most}")
    teachers, budgets = args.teacher or (), args.budget or ()
    for wrong, message in (
        (args.quick and args.length, "--quick and --length: choose one"),
        (args.no_prune and args.budget, "--no-prune and --budget: choose one"),
        (args.no_prune and args.student, "--no-prune and --student: nothing is left to train"),
        (args.student and args.imagenet, "--student and --imagenet: choose one"),
        (args.student and args.width, "--student and --width: choose one"),
        (args.imagenet and args.width not in (None, 1), "--imagenet needs --width 1"),
        (len(teachers) > 1 and "none" in teachers, "--teacher: give none or files, not both"),
        (len(set(budgets)) < len(budgets), "--budget: the same number twice"),
    ):
        if wrong:
            raise UsageError(message)


def check(
    args: argparse.Namespace, source: data.Source, device: torch.device, images: torch.Tensor
) -> tuple[dict, dict[str, list[Path]], int]:
    """The run's settings, the given files, and the number of the student's reachable parameters.

    `images`: those to train on. Raises UsageError, or whatever else is wrong, before hours of work.
    """
    if len(source.classes) > checkpoint.MAX_CLASSES:
        raise UsageError(f"{source.path}: more than {checkpoint.MAX_CLASSES:,} classes")
    if data.has_split(source, "test"):
        data.load(source, "test")
    teachers = [] if args.teacher in (None, ["none"]) else args.teacher
    given = {"teacher": [*map(Path, teachers)], "student": [args.student] * bool(args.student)}
    loaded = {
        path: check_given(stage, path, source, args.stem if stage == "student" else None, images)
        for stage in given
        for path in given[stage]
    }
    stem = args.stem or 4
    if args.student:
        arch, stem = (loaded[args.student][1][key] for key in ("arch", "stem"))
        if arch != "resnet18":
            raise UsageError(f"--student {args.student}: a {arch}, not a resnet18")
    settings = chain_settings(args, source, device, stem)
    for stage, files in given.items():
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        settings[f"{stage}_files"] = digests
    settings["files"] = data.digest(source)
    budgets, batches = settings["budgets"], Batches(**settings["batches"])
    try:
        probe = models.build("resnet18", len(source.classes), args.imagenet, stem)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # or an incomplete file
        raise UsageError(
            "--imagenet: torchvision's weights cannot be downloaded, or their file is damaged "
            f"({error}); try again, or put the file into {torch.hub.get_dir()}/checkpoints"
        ) from None
    with torch.no_grad():
        for weight in prune.weights(probe).values():
            weight.fill_(1)  # a random one can be 0.0, and the schedule would differ next time
    prune.apply_width_(probe, settings["width"])
    kind = source.image_size, source.grey
    smallest, largest = prune.budget_range(probe, *kind)
    for budget in budgets:
        if not smallest <= budget <= largest:
            raise UsageError(
                f"--budget {budget}: must be from {smallest} (BatchNorm, biases and the per-layer "
                f"minimum) to {largest} (all reachable weights)"
            )
    if args.student:
        largest = min(largest, distill.largest_budget(loaded[args.student][0], *kind))
        if largest < max(budgets):
            text = f"{largest:,} parameters can be kept, fewer than --budget {max(budgets)}"
            raise UsageError(f"--student {args.student}: {text}")
    batch_size, _, _ = distill.batch_layout(len(images[: batches.images]), batches)
    if batch_size % runtime.world_size():
        raise UsageError(
            f"{runtime.world_size()} processes cannot share batches of {batch_size} equally; start "
            "a number that divides it"
        )
    return settings, given, largest


def chain_settings(
    args: argparse.Namespace, source: data.Source, device: torch.device, stem: int
) -> dict:
    """All that decides what is trained, but for the given weights files and the images."""
    chain = QUICK if args.quick else CHAIN
    length = 1.0 if args.quick else args.length or LENGTH.get(device.type, 1.0)
    stages = {name: getattr(chain, name) for name in STAGES}
    teacher_from = "given" if args.teacher else "trained"
    if args.teacher == ["none"]:
        teacher_from = "none"
        stages |= {"student": chain.untaught, "pruned": chain.self_taught}
    stages = {n: replace(t, epochs=max(1, round(t.epochs * length))) for n, t in stages.items()}
    whole = args.imagenet or args.student
    return {
        **{name: asdict(training) for name, training in stages.items()},
        "batches": asdict(chain.batches),
        "quick": args.quick,
        "length": length,
        "stem": stem,
        "width": 1.0 if whole else args.width or min(chain.width, WIDTH[stem]),
        "budgets": [] if args.no_prune else sorted(args.budget or [100_000], reverse=True),
        "seed": args.seed,
        "prune_fraction": PRUNE_FRACTION,
        "resnet50": next(row[1:] for row in TEACHERS if source.image_size <= row[0]),
        "teacher_from": teacher_from,
        "student_from": "given" if args.student else "trained",
        "imagenet": args.imagenet,
        "full_train": args.full_train,
        "flip": source.name in data.FLIPPABLE and not args.no_flip,
        "dataset": source.name,
        "image_size": source.image_size,
        "grey": source.grey,
        "classes": list(source.classes),
    }


def check_given(
    stage: str, path: Path, source: data.Source, stem: int | None, images: torch.Tensor
) -> tuple[nn.Module, dict]:
    """The network in a file that was given as `stage`, and its metadata. Raises UsageError if it
    was trained for other classes or images than those of `source`, models.LogitsError if its logits
    for the first of `images` are not finite."""
    network, meta = checkpoint.load(path, stem=stem)
    if note := checkpoint.pop_ignored_(meta, path):
        record.warn(note)
    there = {"classes": list(source.classes), "image_size": source.image_size, "grey": source.grey}
    if meta["num_classes"] != len(source.classes):
        raise UsageError(
            f"--{stage} {path}: has {meta['num_classes']} classes, but {source.path} has "
            f"{len(source.classes)}"
        )
    names = {
        "classes": lambda classes: f"the classes {', '.join(classes)[:200]}",
        "image_size": lambda size: f"images of {size} pixels a side",
        "grey": lambda grey: f"{'grayscale' if grey else 'color'} images",
    }
    for key, shown in names.items():
        if meta.get(key, there[key]) != there[key]:
            raise UsageError(
                f"--{stage} {path}: was trained for {shown(meta[key])}, but {source.path} has "
                f"{shown(there[key])}" + "; --image-size resizes them" * (key == "image_size")
            )
    if "image_size" not in meta and runtime.rank() == 0:
        way = "give" if stage == "student" else "first write it with export.py --bits 16 and"
        hint = f" (if it has a max-pool, {way} --stem 2)" if meta["stem"] == 1 else ""
        print(
            f"train.py: {path} does not say its classes and images: taken to be those of "
            f"{source.path}; stem {meta['stem']}{hint}",
            file=sys.stderr,
        )
    models.check_finite(models.infer(network, images[:1]), f"--{stage} {path}")
    return network, meta


def command(args: argparse.Namespace, length: float) -> str:
    """The command line without seed and place, the same on every device; `length`: of --length."""
    budgets = sorted(args.budget or [], reverse=True) or None
    flags = vars(args) | {"length": None if length == 1 else length, "budget": budgets}
    words = ["train.py"]
    for name, value in flags.items():
        if name in ("seed", "name", "device", "data") or value in (None, False, [100_000]):
            continue
        if (name, value) in (("stem", 4), ("dataset", "fashion-mnist")):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [record.shown_path(v) if Path(str(v)).is_file() else f"{v}" for v in values]
    return " ".join(words)


def default_name(args: argparse.Namespace, source: data.Source) -> str:
    """The folder of a run whose --name is not given: its flags, as `command` has them."""
    own = source.path.resolve().name if source.name == "folder" else ""
    flags = command(args, args.length or 1).removeprefix("train.py").replace(".pth", "")
    words = f"{'' if args.quick else 'resnet18'} {own} {flags}"
    name = re.sub(r"(\.\.+|[^\w.])+", "-", words).strip("-.")
    return f"{name[:100]}-seed{args.seed}"  # file systems allow 255 bytes


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with runtime.process_group(args.device):
            start(args)
    except runtime.UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: {error}; another --seed starts another run", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes this run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
