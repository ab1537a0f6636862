"""Write the tables of README.md and docs/, and docs/sizes.png, from their data.

    uv run -m bench.tables                          # after bench.json or results.csv changed
    uv run -m bench.tables --add runs/results.csv   # first add the rows of this machine's runs

A table stands between two comments: `<!-- NAME: source -->` and `<!-- end of NAME -->`. The data
are bench/results.csv (a row for each network of a full-length run, written by train.py),
bench/published.csv (others' figures), bench/bench.json (the last line of bench/speed.py) and the
included weights. tests/test_project.py compares documents and data.
"""

import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

import checkpoint
from bench import ROOT, SHIPPED
from engine.inference import SparseResNet
from runlog import plots

RESULTS, BENCH = ROOT / "bench" / "results.csv", ROOT / "bench" / "bench.json"
PUBLISHED = ROOT / "bench" / "published.csv"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXTS = dict.fromkeys(("name", "command", "device", "commit"), str)  # 12e4567 is no number
RELEASES = {"today": "today's", "claim": "today's", "first": "first"}
STEMS = {4: "torchvision's, stride 4", 2: "3x3, stride 2", 1: "3x3, stride 1"}
# The commands that README.md recommends: goal, command as in results.csv, kind of device.
COMMANDS = (
    ("default", "train.py", "cpu"),
    ("most accurate", "train.py --stem 1 --teacher none", "cpu"),
    (
        "torchvision's stem, taught by the most accurate",
        "train.py --teacher pruned_resnet18-stem1.pth",
        "cpu",
    ),
    ("default", "train.py --length 4.0", "gpu"),
)


def results() -> pd.DataFrame:
    return pd.read_csv(RESULTS, dtype=TEXTS)


def row_of(weights: Path) -> pd.Series:
    """The row of results.csv that a weights file comes from."""
    meta, rows = checkpoint.load(weights)[1], results()
    same = (rows.stem == meta["stem"]) & (rows.seed == meta["seed"])
    same &= (rows.pruned_val == round(meta["val_accuracy"], 4)) & (rows.commit == meta["commit"])
    (row,) = rows[same].iloc
    return row


def unpruned(row: pd.Series, rows: pd.DataFrame) -> float:
    """Test accuracy of the student before its first pruning step, also if `row` started from the
    pruned network of another run."""
    if given := re.search(r"--student runs/([^/]+)/pruned", row.command):
        name = given[1].replace("$seed", str(row.seed))
        return unpruned(rows[rows.name == name].iloc[0], rows)
    return row.student_test


def percent(accuracies: Iterable[float]) -> str:
    """Mean ± standard deviation, the latter if they differ."""
    known = pd.Series(accuracies).dropna() * 100
    if known.empty:
        return "-"
    return f"{known.mean():.2f}{f' ± {known.std():.2f}' if known.nunique() > 1 else ''}%"


def markdown(header: str, rows: list[list[object]]) -> str:
    """A table; `header` has the names of the columns, separated by |. Integers get commas."""
    columns = [name.strip() for name in header.split("|")]
    lines = [columns, ["---"] * len(columns)]
    lines += [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def included_table(networks: dict) -> str:
    """The included networks: accuracy before and after pruning, and cost."""
    rows, lines = results(), []
    for path in SHIPPED:
        row, network = row_of(path), networks.get(path.name)
        same, speed = rows[rows.command == row.command], "not measured yet"
        model, meta = checkpoint.load(path)  # speed may have been measured with an earlier file
        multiply_adds = SparseResNet(model, meta["image_size"]).largest.multiply_adds
        if network is not None:
            rates = network["images/s"]["this project"]
            speed = f"{rates['batch 1']:,} / {rates['batch 256']:,}"
        older = "--recipe" in row.command  # a flag that train.py had once
        lines.append(
            [
                f"`{path.name}`",
                STEMS[row.stem],
                percent(unpruned(each, rows) for _, each in same.iterrows()),
                f"**{percent(same.pruned_test)}**",
                len(same),
                f"{multiply_adds / 1e6:.2f} M",
                speed,
                round(path.stat().st_size / 1000),
                "[older commands](docs/accuracy.md#included-networks)"
                if older
                else f"`{row.command}`",
            ]
        )
    header = "weights | stem | unpruned | pruned | seeds | multiply-adds | images/s, batch 1 / 256"
    return markdown(f"{header} | kB | trained by", lines)


def commands_table() -> str:
    """COMMANDS that have runs in results.csv, with their accuracy and time."""
    rows, lines = results().dropna(subset="pruned_test"), []
    for goal, command, kind in COMMANDS:
        on_cpu = rows.device.str.startswith("cpu")
        same = rows[(rows.command == command) & (on_cpu == (kind == "cpu"))]
        if len(same):
            accuracy = f"{percent(same.pruned_test)} ({len(same)} seed{'s' * (len(same) > 1)})"
            minutes = f"{same.minutes.median():.0f} minutes, {same.device.iloc[0]}"
            lines.append([goal, f"`{command}`", accuracy, minutes])
    return markdown("goal | command, after `uv run` | test accuracy | time", lines)


def runs_table() -> str:
    """All of results.csv: means over the seeds of each command."""
    lines = []
    kinds = results().groupby(["command", "device", "parameters"], sort=False)
    for (command, device, parameters), rows in kinds:
        cells = [
            f"{percent([rows[f'{stage}_val'].mean()])} / {percent(rows[f'{stage}_test'])}"
            for stage in ("teacher", "student", "pruned")
        ]
        cost = [f"{rows.minutes.median():.0f}", device, " ".join(rows.commit.unique())]
        lines.append([f"`{command}`", f"{parameters:,}", *cells, len(rows), *cost])
    header = "command | parameters | teacher | student | pruned | seeds"
    return markdown(f"{header} | minutes | device | commits", lines)


def published_table() -> str:
    """All of published.csv."""
    lines = [
        [row.network, f"{row.parameters:,}", f"{row.accuracy:.2f}%", RELEASES[row.kind], row.source]
        for _, row in pd.read_csv(PUBLISHED).iterrows()
    ]
    return markdown("network | parameters | test accuracy | release | source", lines)


def measured_table(corner: str, rows: dict[str, dict]) -> str:
    """Rows as bench/speed.py writes them: {name: {column: figure}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return markdown(" | ".join([corner, *columns]), lines)


def speed_table(measured: dict) -> str:
    """Images/s of each engine by batch size, for each included network."""
    gflops = measured["inference"]["gflops"]
    parts = [f"{measured['device']}, {measured['threads']} threads, commit {measured['commit']}."]
    parts[0] += f" Product of 2048 x 2048 fp32 matrices: {gflops:,} GFLOP/s." if gflops else ""
    for name, network in measured["inference"]["networks"].items():
        multiply_adds, rows = network["multiply_adds"], dict(network["images/s"])
        if gflops:
            rows["this project, GFLOP/s as a share of the matrix product's"] = {
                batch: f"{2e-9 * multiply_adds * rate / gflops:.0%}"
                for batch, rate in rows["this project"].items()
            }
        parts.append(f"`{name}`, {multiply_adds / 1e6:.2f} M multiply-adds an image:")
        parts.append(measured_table("images/s", rows))
    return "\n\n".join(parts)


def tables() -> dict[str, str]:
    """The generated tables by name."""
    measured = json.loads(BENCH.read_text())
    return {
        "included": included_table(measured["inference"]["networks"]),
        "commands": commands_table(),
        "runs": runs_table(),
        "published": published_table(),
        "speed": speed_table(measured),
        "training": measured_table("distillation step, 256 images", measured["train"]),
        "start": measured_table("process, from start to end", measured["start"]),
        "export": measured_table("images/s in one thread", measured["export"]),
        "bits": measured_table("bits", measured["bits"]),
    }


def fill(text: str, content: dict[str, str]) -> str:
    """A document's `text` with its tables replaced by those of `content`. Raises KeyError."""
    part = r"(<!-- (\w+): [^\n]*-->\n).*?(<!-- end of \2 -->)"
    return re.sub(part, lambda m: f"{m[1]}{content[m[2]]}\n{m[3]}", text, flags=re.S)


def add(path: Path) -> None:
    """Add to results.csv the rows of `path` that it lacks: one of each command, seed, size and
    device, the first. Runs on all images stay out: they have no validation accuracy. Raises
    OSError, ValueError or KeyError."""
    read = functools.partial(pd.read_csv, dtype=str, keep_default_na=False)  # as it is written
    rows, new = read(RESULTS), read(path)
    measured = new["pruned_val"].where(new["pruned_test"] != "", new["student_val"])
    new = new[rows.columns][measured != ""]
    rows = pd.concat([rows, new]).drop_duplicates(["command", "seed", "parameters", "device"])
    checkpoint.write(RESULTS, rows.to_csv(index=False))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the tables and the picture of the documents."
    )
    parser.add_argument("--add", type=Path, metavar="FILE", help="rows to add to results.csv first")
    args = parser.parse_args(argv)
    try:
        if args.add is not None:
            add(args.add)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench/tables.py: {args.add}: cannot be added ({error})", file=sys.stderr)
        return 2
    content = tables()
    for path in DOCUMENTS:
        checkpoint.write(path, fill(path.read_text(), content))
    checkpoint.write(ROOT / "docs" / "sizes.png", plots.sizes(RESULTS, PUBLISHED))
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
