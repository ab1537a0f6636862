"""Write the README's tables and its picture anew, from results.csv, bench.json and the weights.

    python -m bench.tables                          # after bench.json changed
    python -m bench.tables --add runs/results.csv   # first add a machine's results

What it writes is checked by tests/test_project.py: no figure in a table is typed.
"""

import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path

import torchinfo

import checkpoint
import prune
import train
from runlog import plots, record

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, README = HERE / "results.csv", ROOT / "README.md"
THREE_SEEDS = re.compile(r"(\S+seed)0(\S*) (?:\1)1\2 (?:\1)2\2")
SHIPPED = (ROOT / "pruned_resnet18.pth", ROOT / "pruned_resnet18-stem2.pth")


def result_rows() -> list[dict[str, str]]:
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def row_of(weights: Path) -> dict[str, str]:
    """The row of results.csv that a weights file comes from."""
    meta = checkpoint.load(weights)[1]
    of = {name: str(meta[name]) for name in ("recipe", "stem", "seed")}
    of["pruned_val"] = f"{meta['val_accuracy']:.4f}"
    (row,) = [row for row in result_rows() if of.items() <= row.items()]
    return row


def seeds_of(weights: Path) -> list[dict[str, str]]:
    """The rows of results.csv that differ from a weights file's by their seeds only."""
    flags = flags_of(row_of(weights))
    return [row for row in result_rows() if flags_of(row) == flags]


def flags_of(row: dict[str, str]) -> str:
    """What train.py was given, but for the seed: as in a shell's loop, where that is `$seed`."""
    row = row | {"student": row["student"].replace(f"seed{row['seed']}/", "seed$seed/")}
    defaults = {"recipe": "cpu", "stem": "4", "teacher": "", "student": ""}
    given = [f" --{name} {row[name]}" for name, default in defaults.items() if row[name] != default]
    return THREE_SEEDS.sub(r"\1?\2", "".join(given))  # a shell finds all three


def mean_and_spread(percent: list[float]) -> str:
    """Mean ± standard deviation, the latter if there are several."""
    spread = f" ± {statistics.stdev(percent):.2f}" if len(set(percent)) > 1 else ""
    return f"{statistics.mean(percent):.2f}{spread}%"


def tables() -> dict[str, str]:
    """The README's generated parts, by the name in the comment before them."""
    measured = json.loads((HERE / "bench.json").read_text())
    return {
        "results": "\n".join(results_table(measured["shipped"])),
        "runs": "\n".join(runs_table()),
        "layers": "\n".join(layers_table()),
        "sizes": "\n".join(sizes_table()),
        "speed": "\n".join(speed_tables(measured)),
        "ways": "\n".join(ways_table(measured["ways"])),
        "shared": "\n".join(shared_table(measured["shared"])),
        "bits": "\n".join(bits_table(measured["bits"])),
        "serving": "\n".join(serving_table(measured["ways"])),
        "start": "\n".join(start_table(measured["start"])),
    }


def results_table(measured: dict) -> list[str]:
    """What is shipped: accuracy over the seeds, and what the network costs to run and to train."""
    lines = [
        "| weights | test accuracy | validation | multiply-adds | images/s, one by one | batches "
        "| kB | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in SHIPPED:
        rows, speed = seeds_of(path), measured[path.name]
        test, val = (
            mean_and_spread([100 * float(row[f"pruned_{split}"]) for row in rows])
            for split in ("test", "val")
        )
        seeds = f"{len(rows)} seed{'s' * (len(rows) > 1)}"
        minutes = statistics.median(float(row["minutes"]) for row in rows)
        rates = f"{speed['multiply_adds'] / 1e6:.2f} M | {speed['1']:,.0f} | {speed['256']:,.0f}"
        size, command = path.stat().st_size / 1000, f"`train.py{flags_of(rows[0])}`"
        lines.append(
            f"| `{path.name}` | **{test}** ({seeds}) | {val} | {rates} "
            f"| {size:,.0f} | {command}, {minutes:.0f} minutes on {rows[0]['device']} |"
        )
    return lines


def layers_table() -> list[str]:
    """What is left of the stages of each network that is shipped, as torchinfo counts it."""
    models = [checkpoint.load(path)[0] for path in SHIPPED]
    names = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    rows = {name: [] for name in [*names, "biases"]}
    for model in models:
        for name in names:
            stage = {k: w for k, w in prune.weights(model).items() if k.split(".")[0] == name}
            left = sum(int(weight.count_nonzero()) for weight in stage.values())
            rows[name] += [f"{left:,}", f"{sum(w.numel() for w in stage.values()):,}"]
        rows["biases"] += 2 * [f"{prune.count_fixed(model):,}"]
    rows["BatchNorm, and the bias of fc"] = rows.pop("biases")
    totals, work = [], []
    for model in models:
        summary = torchinfo.summary(prune.with_masks(model), (1, 3, 28, 28), verbose=0)
        totals += [
            f"**{summary.total_params:,}**",
            f"{sum(p.numel() for p in model.parameters()):,}",
        ]
        work += [f"{summary.total_mult_adds / 1e6:.2f}", ""]
    rows |= {"**Total params**": totals, "Total mult-adds (M)": work}
    lines = [
        "| | " + " | ".join(f"`{path.name}` | of" for path in SHIPPED) + " |",
        "|---|" + "---|---|" * len(SHIPPED),
    ]
    return lines + [f"| {name} | {' | '.join(row)} |" for name, row in rows.items()]


def runs_table() -> list[str]:
    """Each run to 100,000 parameters on its own, validation / test."""
    lines = ["| run | teacher | student | **100,000 parameters** | |", "|---|---|---|---|---|"]
    for row in result_rows():
        if row["recipe"] != "curve":
            figures = " | ".join(val_and_test(row, stage) for stage in train.STAGES)
            lines.append(f"| {run_of(row)} | {figures} | {where(row)} |")
    return lines


def val_and_test(row: dict[str, str], stage: str) -> str:
    figures = (row[f"{stage}_{split}"] for split in ("val", "test"))
    return " / ".join(f"{float(figure):.2%}" if figure else "-" for figure in figures)


def run_of(row: dict[str, str]) -> str:
    """The command of one run."""
    return f"`train.py{flags_of(row)} --seed $seed`".replace("$seed", row["seed"])


def where(row: dict[str, str]) -> str:
    return f"{float(row['minutes']):.0f} min on {row['device']}, commit {row['commit']}"


WAYS = {  # what bench/speed.py calls it: the file, what it needs
    "sparse": ("`pruned_resnet18.pth`, with `engine`", "PyTorch, torchvision, llvmlite"),
    "16 bits": ("`pruned_resnet18-16bit.pth`, likewise", "PyTorch, torchvision, llvmlite"),
    "8 bits": ("`pruned_resnet18-8bit.pth`, likewise", "PyTorch, torchvision, llvmlite"),
    "c 32 bits": ("`pruned_resnet18.c`, its tables", "a C compiler"),
    "c 8 bits": ("`pruned_resnet18-8bit.c`, its tables", "a C compiler"),
    "onnx": ("`pruned_resnet18.onnx`", "ONNX Runtime"),
    "onnx stock": ("the dense network as ONNX", "ONNX Runtime"),
}


def ways_table(measured: dict) -> list[str]:
    """What leaves the project, as bench/speed.py measured it."""
    lines = [
        "| file | kB | needs | images/s at batch 1 | at batch 256 | predictions equal |",
        "|---|---|---|---|---|---|",
    ]
    for name, (title, needs) in WAYS.items():
        row = measured[name]
        figures = f"{row['bytes'] / 1000:,.0f} | {needs} | {row['1']:,.0f} | {row['256']:,.0f}"
        lines.append(f"| {title} | {figures} | {row['equal']:,.0f} of {row['of']:,.0f} |")
    return lines


def bits_table(measured: dict) -> list[str]:
    """What weights of fewer bits cost."""
    (of,) = {row["of"] for row in measured.values()}
    lines = [
        f"| bits | kB | predictions that change, of {of:,} | test accuracy |",
        "|---|---|---|---|",
    ]
    for bits, row in measured.items():
        figures = f"{row['bytes'] / 1000:,.0f} | {row['changed']:,} | {row['percent']:.2f}%"
        lines.append(f"| {bits} | {figures} |")
    return lines


def start_table(measured: dict) -> list[str]:
    """What the start of a process costs."""
    titles = {
        "torch": "Python, `import torch`",
        "first answer": "`checkpoint.load`, an engine, its first answer",
        "predict.py": "`predict.py`, 10,000 images",
    }
    lines = ["| a process, from its start to its end | seconds |", "|---|---|"]
    return lines + [f"| {title} | {measured[name]:.1f} |" for name, title in titles.items()]


def shared_table(measured: dict) -> list[str]:
    """What a busy process beside it costs."""
    lines = [
        "| ms | training step | dense, batch 1 | dense, batch 256 |",
        "|---|---|---|---|",
    ]
    for policy, title in (
        ("ours", "as our scripts wait"),
        ("default", "as OpenMP waits by itself"),
    ):
        for state, beside in (("quiet", "alone"), ("busy", "beside one busy process")):
            row = " | ".join(f"{ms:,.0f}" for ms in measured[policy][state].values())
            lines.append(f"| {title}, {beside} | {row} |")
    return lines


def serving_table(measured: dict) -> list[str]:
    lines = [
        "| images/s of one engine | batch 1 | batch 256 |",
        "|---|---|---|",
    ]
    for threads, title in ((1, "1 thread"), (2, "2 threads")):
        row = measured[f"threads {threads}"]
        lines.append(f"| {title} | {row['1']:,.0f} | {row['256']:,.0f} |")
    return lines


def sizes_table() -> list[str]:
    """The networks of each run of the recipe `curve`, smallest first, validation / test."""
    runs: dict[str, list[dict[str, str]]] = {}
    for row in sorted(result_rows(), key=lambda row: int(row["parameters"])):
        if row["recipe"] == "curve":
            runs.setdefault(run_of(row), []).append(row)
    sizes = [f"{budget:,}" for budget in sorted(train.RECIPES["curve"].budgets)]
    lines = [f"| run | {' | '.join(sizes)} | dense | |", "|---|" + "---|" * len(sizes) + "---|---|"]
    for run, rows in runs.items():
        figures = [*(val_and_test(row, "pruned") for row in rows), val_and_test(rows[0], "student")]
        lines.append(f"| {run} | {' | '.join(figures)} | {where(rows[0])} |")
    return lines


def speed_tables(measured: dict) -> list[str]:
    """What bench/speed.py measured, as the README shows it."""
    titles = {
        "sparse": "**this project, `engine`**",
        "dense_fp32": "PyTorch, dense, fp32",
        "dense_bf16": "PyTorch, dense, bf16, BatchNorm folded",
        "onnxruntime": "ONNX Runtime, dense",
        "openvino": "OpenVINO, dense",
    }
    lines = [
        f"On {measured['device']}, {measured['threads']} threads, commit {measured['commit']}:",
        "",
        "| images/s | " + " | ".join(f"batch {n}" for n in measured["predict"]["sparse"]) + " |",
        "|---|" + "---|" * len(measured["predict"]["sparse"]),
    ]
    for name, title in titles.items():
        row = [f"{rate:,.0f}" for rate in measured["predict"][name].values()]
        bold = "**" if name == "sparse" else ""
        lines.append(f"| {title} | " + " | ".join(f"{bold}{r}{bold}" for r in row) + " |")
    loops, files = measured["train"], measured["files"]
    lines += [
        "",
        "| step of distillation while pruning, 256 images | ms |",
        "|---|---|",
        f"| `train.py` | {loops['ours']:,.0f} |",
        "| its networks alone, zeros multiplied, on a batch that is there already "
        f"| {loops['bare']:,.0f} |",
        "| as it is usually written: PIL in DataLoader workers, fp32, metrics at each step "
        f"| {loops['usual']:,.0f} |",
        "",
        "| file | kB | ms to load |",
        "|---|---|---|",
    ]
    for name, title in (
        ("pruned", "`pruned_resnet18.pth`"),
        ("plain", "`torch.save(model.state_dict())`"),
    ):
        row = files[name]
        lines.append(f"| {title} | {row['bytes'] / 1000:,.0f} | {row['load_ms']:,.0f} |")
    return lines


def part(text: str, name: str) -> re.Match:
    """A generated part of the README, `text`: the comment before it, itself, the one behind it."""
    return re.search(rf"(<!-- {name}.*?-->\n)(.*?)(\n<!-- end of {name} -->)", text, re.S)


def add(path: Path) -> None:
    """Add the rows of `path` that results.csv lacks; runs on all images have no validation, and
    stay out."""
    with path.open() as file:
        new = [row for row in csv.DictReader(file) if row["student_val"] or row["pruned_val"]]
    rows = result_rows()
    checkpoint.write(RESULTS, record.to_csv([*rows, *(row for row in new if row not in rows)]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's tables and picture anew.")
    parser.add_argument("--add", type=Path, metavar="FILE", help="rows to add to results.csv first")
    args = parser.parse_args(argv)
    try:
        if args.add is not None:
            add(args.add)
    except (OSError, KeyError) as error:
        print(f"bench/tables.py: {args.add}: cannot be added ({error})", file=sys.stderr)
        return 2
    text = README.read_text()
    for name, table in tables().items():
        found = part(text, name)
        text = text.replace(found[0], found[1] + table + found[3])
    checkpoint.write(README, text)
    checkpoint.write(ROOT / "docs" / "sizes.png", plots.sizes(RESULTS, "curve"))
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
