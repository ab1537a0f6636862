"""The report of a finished run: record, torchinfo summary, a row of results, plots, the table."""

import functools
import math
import platform
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torchinfo
import torchvision
from torch import Tensor, nn

import checkpoint
import data
import distill
import models
import prune
from runlog import record
from runlog.record import Run

WARN_ACCURACY_DROP = 0.02  # pruning that costs more accuracy than this is warned of

Labelled = tuple[Tensor, Tensor]  # images, labels


def write_report(
    run: Run,
    stages: list[distill.Stage],
    images: distill.TrainingData,
    context: distill.Context,
    source: data.Source,
) -> None:
    """Measure the test accuracy of the networks given to the run and of those that it wrote; write
    record, rows and plots."""
    val, test = images.val, data.load(source, "test") if data.has_split(source, "test") else None
    files = [(name, path, 0.0) for name in ("teacher", "student") for path in run.given[name]]
    files += [(stage.title, run.path(stage), run.minutes_of(stage)) for stage in stages]
    sizes = images.labels.bincount(minlength=images.classes)
    uneven = (sizes.max() > 2 * sizes.min()).item()  # then accuracy says little of rare classes
    rows, exact = [], replace(context, bf16=False)
    for title, path, minutes in files:
        model, meta = run.load(path, context.device)
        last = path == files[-1][1]
        val_logits = exact.logits(model, val[0]) if val and (uneven or last) else None
        test_logits = exact.logits(model, test[0]) if test else None
        row = {
            "stage": title,
            "file": path.name,
            "kilobytes": round(path.stat().st_size / 1000),
            "parameters": meta["parameters"],
            "val_accuracy": meta.get("val_accuracy"),
            "test_accuracy": models.accuracy(test_logits, test[1]) if test else None,
            "minutes": minutes,
        }
        if uneven and test:
            row["test_balanced"] = balanced(test_logits, test[1])
        if uneven and val:
            row["val_balanced"] = balanced(val_logits, val[1])
        rows.append(row)
    size = source.image_size
    # Without a device torchinfo moves it to a GPU, whatever --device says.
    masked, shape = prune.with_masks(model.cpu()), (1, 3, size, size)
    summary = torchinfo.summary(masked, shape, device="cpu", verbose=0)
    checkpoint.write(run.folder / "summary.txt", f"{summary}\n")
    run.add(
        {
            "stages": rows,
            "classes": len(source.classes),
            "val_by_class": by_class(val_logits, val[1], source.classes) if val else None,
            "torchinfo_total_params": summary.total_params,
            "device": models.device_name(context.device),
            "peak_memory_mb": models.peak_memory_mb(context.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
        }
    )
    if not run.settings["quick"] and source.name == "fashion-mnist":
        record.add_results(result_rows(run))
    pictures(run.folder, model, source, test or val, test_logits if test else val_logits)
    run.finish()  # last: a run without its record writes all of this again


def balanced(logits: Tensor, labels: Tensor) -> float:
    """The mean over the classes of the share that is right."""
    return models.accuracy_by_class(logits, labels).nanmean().item()


def by_class(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, float | None]:
    """The share that is right of each class; None where there is no image of it."""
    shares = models.accuracy_by_class(logits, labels).cpu().tolist()
    return {n: None if math.isnan(s) else s for n, s in zip(classes, shares, strict=True)}


def result_rows(run: Run) -> list[dict]:
    """A row for results.csv for each pruned network; for the student if none was pruned."""
    stages = run.record["stages"]
    teachers = [stage for stage in stages if stage["stage"] == "teacher"]
    (student,) = (stage for stage in stages if stage["stage"] == "student")
    pruned = [stage for stage in stages if stage["stage"].startswith("pruned")]

    def accuracies(name: str, stages: list[dict]) -> dict[str, str]:
        """The mean over `stages`: of several teachers, the mean of their accuracies."""
        columns = {}
        for split in ("val", "test"):
            known = [share for s in stages if (share := s[f"{split}_accuracy"]) is not None]
            columns[f"{name}_{split}"] = f"{statistics.mean(known):.4f}" if known else ""
        return columns

    return [
        {
            "name": run.record["name"],
            "command": run.command,
            "stem": run.settings["stem"],
            "seed": run.settings["seed"],
            "parameters": stage["parameters"],
            **accuracies("teacher", teachers),
            **accuracies("student", [student]),
            **accuracies("pruned", [stage] if stage in pruned else []),
            "minutes": run.record["minutes"],
            "device": run.record["device"],
            "commit": run.record["commit"],
        }
        for stage in pruned or [student]
    ]


def pictures(
    folder: Path,
    model: nn.Module,
    source: data.Source,
    shown: Labelled | None,
    logits: Tensor | None,
) -> None:
    """Write the plots: curves, layers and, for the images `shown` and their `logits`, confusion and
    mistakes.

    A plot that cannot be drawn is a warning, not an error.
    """
    try:
        from runlog import plots
    except OSError as error:  # matplotlib needs a folder for its cache
        record.warn(f"no pictures are drawn ({error})")
        return
    live = prune.all_reachable(model, source.image_size, source.grey)
    kept = {name: int(w.count_nonzero()) for name, w in prune.weights(model).items()}
    could = {name: int(mask.sum()) for name, mask in live.items()}
    drawings = {
        "curves": functools.partial(plots.curves, folder / "metrics.csv"),
        "layers": functools.partial(plots.layers, kept, could),
    }
    if shown is not None:
        results = shown[1].cpu(), logits.cpu().softmax(1), source.classes
        drawings["confusion"] = functools.partial(plots.confusion, *results)
        drawings["mistakes"] = functools.partial(plots.mistakes, shown[0].cpu(), *results)
    for name, draw in drawings.items():
        try:
            checkpoint.write(folder / f"{name}.png", draw())
        except Exception as error:  # whatever a plot fails on
            reason = str(error).partition(";")[0]
            record.warn(f"no picture {name}.png ({reason})")


def print_summary(run: Run) -> None:
    """Print the table at the end, and a warning if pruning has cost too much accuracy, or if a
    network is near chance.

    The comparison is with the unpruned student on validation, or without validation images on test.
    """

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.2%}"

    stages = run.record["stages"]
    splits = ["val_accuracy", "test_accuracy"]
    splits += [key for key in ("val_balanced", "test_balanced") if key in stages[-1]]
    (student,) = [row for row in stages if row["stage"] == "student"]
    both = stages[-1], student
    split = next((k for k in splits if all(row[k] is not None for row in both)), None)

    titles = [key.replace("_accuracy", "").replace("_balanced", " bal.") for key in splits]
    columns = "".join(f"{title:>10}" for title in [*titles, "-student"])
    print(f"\n{'stage':11}{'parameters':>12}{columns}{'minutes':>9}{'kB':>9}  file")
    for row in stages:
        shares = "".join(f"{percent(row[key]):>10}" for key in splits)
        pruned = split is not None and row["stage"].startswith("pruned")
        points = f"{100 * (row[split] - student[split]):+.2f}" if pruned else ""
        print(
            f"{row['stage']:11}{row['parameters']:>12,}{shares}{points:>10}"
            f"{row['minutes']:>9.1f}{row['kilobytes']:>9,}  {row['file']}"
        )
    print(f"{run.record['minutes']:.0f} minutes; everything is in {run.folder}")
    if split is None:
        return
    left, chance = stages[-1][split], 1 / run.record["classes"]
    whole = student[split]
    quick = run.settings["quick"]
    longer = "the full chain" if quick else "a larger --length"
    helps = f"a larger --budget or {longer}"
    near = chance + min(chance, (1 - chance) / 5)  # twice chance; of two classes 60%
    if whole < near:
        cost, helps = f"the unpruned student's accuracy is near chance ({chance:.0%})", longer
    elif left < near:
        cost = f"the pruned network has collapsed, its accuracy is near chance ({chance:.0%})"
    elif (lost := whole - left) > WARN_ACCURACY_DROP:
        where = "validation" if split == "val_accuracy" else "test"
        cost = (
            f"pruning has cost {100 * lost:.1f} points on {where}: the unpruned student has "
            f"{whole:.1%}, {stages[-1]['parameters']:,} parameters have {left:.1%}"
        )
    else:
        return
    record.warn(f"{cost}; {helps} may help")
