"""Pictures of a run and of predictions, each as the bytes of a PNG; matplotlib stays in here."""

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, NullFormatter
from torch import Tensor

plt.rcParams["text.parse_math"] = False  # a class may be called $


def curves(metrics: Path) -> bytes:
    """A PNG of accuracy and parameters over all epochs of `metrics` (metrics.csv)."""
    rows = pd.read_csv(metrics)
    starts = rows.groupby(["stage", "round"], sort=False).head(1).index + 1
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for column, color, label in (
        ("train_accuracy", "tab:gray", "training batches"),
        ("val_accuracy", "tab:blue", "validation"),
        ("val_accuracy_average", "tab:orange", "validation, EMA of the weights"),
    ):
        for _, part in rows.groupby(["stage", "round"], sort=False):  # a line for each network
            top.plot(part.index + 1, 100 * part[column], color=color, label=label)
            label = None
    seen = pd.concat(rows[c] for c in ("train_accuracy", "val_accuracy", "val_accuracy_average"))
    top.set_ylim(100 * max(0, seen.quantile(0.1) - 0.03), 100 * min(1, seen.max() + 0.01))
    top.set_ylabel("accuracy, %")
    figure.legend(loc="outside lower center", ncols=3)
    bottom.plot(rows.index + 1, rows.parameters, color="tab:green", drawstyle="steps-mid")
    _count_logarithmically(bottom.set_yscale, bottom.yaxis)
    bottom.set_ylabel("parameters")
    bottom.set_xlabel("epoch")
    last = rows.parameters.iloc[-1]
    bottom.annotate(f"{last:,}", (len(rows), last), (0, 8), textcoords="offset points", ha="right")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        for start in starts:
            axes.axvline(start - 0.5, color="black", alpha=0.3, linestyle=":")
    for start in starts:
        row = rows.iloc[start - 1]
        rounds = rows[rows.stage == row.stage]["round"].nunique()
        label = row.stage if rounds == 1 else f"{row.stage} {row['round']}"
        top.annotate(label, (start, 1), (0, 3), xycoords=("data", "axes fraction"),
                     textcoords="offset points", fontsize=8, rotation=30)  # fmt: skip
    return _png(figure)


KINDS = {  # of published figures: label and marker
    "today": ("published by others", {"marker": "o", "color": "tab:gray"}),
    "claim": ("claimed: best epoch on test, no weights", {"marker": "x", "color": "tab:gray"}),
    "first": (
        "published on the data set's first release, not comparable",
        {"marker": "o", "color": "tab:gray", "markerfacecolor": "white"},
    ),
}
COLORS = {4: "tab:green", 2: "tab:blue", 1: "tab:purple"}  # of stems


def sizes(results: Path, published: Path) -> bytes:
    """A PNG of test accuracy against parameters, of `results` (results.csv) and of others
    (published.csv).

    A run that kept networks of several sizes is a line. Of the other commands, one is a star (a
    square, if it did not prune) for each stem, image size and number of parameters: that with most
    seeds and, of several, the best validation accuracy. It is drawn at the mean over the seeds; a
    bar goes from the lowest to the highest.
    """
    rows = pd.read_csv(results)
    rows["accuracy"] = 100 * rows.pruned_test.fillna(rows.student_test)
    rows["pixels"] = rows.command.str.extract(r"--image-size (\d+)", expand=False).fillna("")
    of_command = rows.groupby(["command", "stem"])
    rows["line"] = of_command.parameters.transform("nunique") > 1
    # Validation accuracies are at most 1, and seeds whole numbers: one number orders by both.
    rows["order"] = rows.pruned_val.fillna(rows.student_val)
    rows["order"] = of_command.order.transform("mean") + of_command.seed.transform("nunique")
    best = rows[~rows.line].groupby(["stem", "pixels", "parameters"]).order.transform("max")
    rows = rows[rows.line | (rows.order == best.reindex(rows.index))]
    figure, axes = plt.subplots(figsize=(10.5, 6.5), layout="constrained")
    drawn = []
    for (_, stem), part in rows.groupby(["command", "stem"]):
        ours = part.groupby("parameters").accuracy.agg(["mean", "min", "max", "count"])
        line, seeds = len(ours) > 1, int(ours["count"].max())
        pruned = part.pruned_test.notna().any()
        size = part.pixels.iloc[0]
        label = f"ours, {'' if pruned else 'unpruned, '}stem of stride {stem}"
        label += f", images enlarged to {size} pixels" * bool(size) + ": "
        label += f"{ours['mean'].max():.2f}% at "
        label += f"{ours['mean'].idxmax():,}, {seeds} seed{'s' * (seeds > 1)}"
        label += ", each pruned from the larger one" * line
        bars = axes.errorbar(
            ours.index, ours["mean"], (ours["mean"] - ours["min"], ours["max"] - ours["mean"]),
            fmt="o-" if line else "*" if pruned else "s",
            markersize=5 if line else 12 if pruned else 7, color=COLORS[stem],
            capsize=3 * (seeds > 1), label=label,
        )  # fmt: skip
        drawn.append((line, ours["mean"].max(), bars))
    handles = [bars for *_, bars in sorted(drawn, key=lambda entry: entry[:2], reverse=True)]
    others = pd.read_csv(published)
    for kind, (label, style) in KINDS.items():
        for _, other in others[others.kind == kind].iterrows():
            place, x = (other.parameters, other.accuracy), other.label_x
            (point,) = axes.plot(*place, **style, linestyle="", label=label)
            axes.annotate(
                other.network, place, (x, other.label_y), textcoords="offset points", fontsize=8,
                ha="right" if x < 0 else "left" if x else "center", va="center", color="dimgray",
                arrowprops={"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5},
            )  # fmt: skip
        handles.append(point)
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    _count_logarithmically(axes.set_xscale, axes.xaxis)
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    axes.margins(x=0.06, y=0.1)
    axes.grid(alpha=0.3, which="both")
    return _png(figure)


def layers(kept: dict[str, int], live: dict[str, int]) -> bytes:
    """Kept weights of each layer, in front of the reachable ones of the unpruned network."""
    names = [name.removesuffix(".weight") for name in kept]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    rows = range(len(names))
    axes.barh(rows, list(live.values()), color="tab:gray", alpha=0.35, label="reachable")
    axes.barh(rows, list(kept.values()), color="tab:green", label="kept")
    for row, n in zip(rows, kept.values(), strict=True):
        axes.annotate(f"{n:,}", (n, row), (4, 0), textcoords="offset points", va="center",
                      fontsize=8)  # fmt: skip
    _count_logarithmically(axes.set_xscale, axes.xaxis)
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"weights; {sum(kept.values()):,} are kept")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def confusion(labels: Tensor, probs: Tensor, classes: Sequence[str]) -> bytes:
    """How often each class (row) was taken for each other (column), in percent of the class.

    `labels` int64 (N,) and `probs` float (N, classes), on the CPU.
    """
    n = len(classes)
    counts = np.zeros((n, n))
    np.add.at(counts, (labels.numpy(), probs.argmax(1).numpy()), 1)
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    side = 4 + (0.45 if n <= 30 else 0.24) * min(n, 100)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(np.sqrt(percent), cmap="Blues")  # the root shows the few mistakes
    if n <= 100:
        size = 8 if n <= 30 else 5
        for row, column in np.argwhere(counts > 0):
            value = percent[row, column]
            axes.text(column, row, f"{value:.0f}" if value >= 0.95 else f"{value:.1f}",
                      ha="center", va="center", fontsize=size,
                      color="white" if value > 40 else "black")  # fmt: skip
        axes.set_xticks(range(n), classes, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(n), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("is")
    axes.set_title(f"% of each class; {np.trace(counts) / counts.sum():.2%} of all are right")
    return _png(figure)


def mistakes(images_u8: Tensor, labels: Tensor, probs: Tensor, classes: Sequence[str]) -> bytes:
    """The images that the network is most certain and wrong about; arguments as of `confusion`."""
    certainty, predicted = probs.max(1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    worst = wrong[certainty[wrong].argsort(descending=True)][:40]
    titles = [f"{classes[predicted[i]]} {certainty[i]:.0%}\nis {classes[labels[i]]}" for i in worst]
    title = f"{len(wrong):,} of {len(labels):,} are wrong; the most certain ones, as predicted"
    return sheet(images_u8[worst], titles, title)


def sheet(images_u8: Tensor, titles: Sequence[str], title: str = "") -> bytes:
    """A contact sheet of images, uint8 (N, H, W) or (N, 3, H, W), with a title above each."""
    columns = min(8, max(len(titles), 1))
    rows = max(-(-len(titles) // columns), 1)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.45 * columns, 1.7 * rows + 0.4), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, text in zip(grid.flat, images_u8, titles, strict=False):
        grey = image.dim() == 2
        axes.imshow(
            (image if grey else image.permute(1, 2, 0)).numpy(), cmap="gray" if grey else None
        )
        axes.set_title(text, fontsize=7)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _count_logarithmically(set_scale: Callable[[str], None], axis: Axis) -> None:
    """A logarithmic axis whose numbers are words: powers need fonts that are looked for loudly."""
    set_scale("log")
    axis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
    axis.set_minor_formatter(NullFormatter())


def _png(figure: plt.Figure) -> bytes:
    """The picture of `figure`, in more fonts if the default one lacks characters of class names.

    Says on stderr which characters no installed font has.
    """
    content = _draw(figure)  # which also makes the texts at the axes
    texts = figure.findobj(Text)
    characters = {c for text in texts for c in text.get_text() if c.isprintable()}
    families, missing = _fonts_for(characters)
    if families:
        for text in texts:
            text.set_fontfamily([*plt.rcParams["font.family"], *families])
        content = _draw(figure)
    plt.close(figure)
    if unsaid := missing - _said:
        _said.update(unsaid)
        shown = "".join(sorted(unsaid)[:20]) + "..." * (len(unsaid) > 20)
        print(
            f"warning: no installed font has the characters {shown}, they are boxes in pictures; "
            "install one that has them, such as Noto Sans CJK",
            file=sys.stderr,
        )
    return content


_said: set[str] = set()  # characters that were named: a run draws several pictures


def _draw(figure: plt.Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # `_png` says it, once
        figure.savefig(file, dpi=120)
    return file.getvalue()


def _fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """Installed fonts that have what the default font lacks, and characters that none has."""
    default = get_font(findfont(FontProperties()))
    families, left = [], {c for c in characters if not default.get_char_index(ord(c))}
    for entry in fontManager.ttflist if left else ():
        if entry.style != "normal" or entry.name.startswith("Last Resort"):  # which has boxes only
            continue
        try:
            font = get_font(entry.fname)
        except Exception:  # whatever a damaged or removed font file raises
            continue
        if found := {c for c in left if font.get_char_index(ord(c))}:
            families.append(entry.name)
            left -= found
    return families, left
