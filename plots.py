"""Pictures of a run; matplotlib stays in this file."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd


def curves(metrics: Path) -> bytes:
    """A PNG of accuracy and parameters over all epochs of `metrics` (metrics.csv)."""
    rows = pd.read_csv(metrics)
    starts = rows.groupby(["stage", "round"], sort=False).head(1).index + 1
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for column, color, label in (
        ("train_accuracy", "tab:gray", "train (augmented, mixed)"),
        ("val_accuracy", "tab:blue", "validation"),
        ("val_accuracy_average", "tab:orange", "validation, averaged weights"),
    ):
        for _, part in rows.groupby("stage", sort=False):  # a line for each network
            top.plot(part.index + 1, 100 * part[column], color=color, label=label)
            label = None
    seen = rows[["train_accuracy", "val_accuracy", "val_accuracy_average"]].stack()
    top.set_ylim(100 * max(0, seen.quantile(0.1) - 0.03), 100 * min(1, seen.max() + 0.02))
    top.set_ylabel("accuracy, %")
    top.legend(loc="lower right")
    bottom.semilogy(rows.index + 1, rows.parameters, color="tab:green", drawstyle="steps-mid")
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
        top.annotate(label, (start, 1), (0, -12), xycoords=("data", "axes fraction"),
                     textcoords="offset points", fontsize=9)  # fmt: skip
    return _png(figure)


def _png(figure: plt.Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file.getvalue()
