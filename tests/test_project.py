"""The documents against the code, and the shipped weights against what is said of them.

`uv run tests/test_project.py` writes the README's tables anew, from results.csv, bench.json (the
last line that bench.py prints) and the weights.
"""

import csv
import importlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchinfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import data  # noqa: E402
import export  # noqa: E402
import models  # noqa: E402
import plots  # noqa: E402
import prune  # noqa: E402
import train  # noqa: E402

SHIPPED = ROOT / "pruned_resnet18.pth"


def result_rows() -> list[dict[str, str]]:
    with (ROOT / "results.csv").open() as file:
        return list(csv.DictReader(file))


def shipped_row() -> dict[str, str]:
    """The row of results.csv that the shipped weights come from."""
    meta = checkpoint.load(SHIPPED)[1]
    (row,) = [
        row
        for row in result_rows()
        if (row["recipe"], row["stem"], row["seed"])
        == (meta["recipe"], str(meta["stem"]), str(meta["seed"]))
        and row["pruned_val"] == f"{meta['val_accuracy']:.4f}"
    ]
    return row


def mean_and_spread(percent: list[float]) -> str:
    """Mean ± standard deviation, the latter unless all are the same (seeds can share a teacher)."""
    spread = f" ± {statistics.stdev(percent):.2f}" if len(set(percent)) > 1 else ""
    return f"{statistics.mean(percent):.2f}{spread}%"


def readme_tables() -> dict[str, str]:
    """The README's generated parts, by the name in the comment before them."""
    results = [
        "| run | teacher, val / test | student | **100,000 parameters** | |",
        "|---|---|---|---|---|",
    ]
    same = shipped_row()
    rows = [row for row in result_rows() if all(row[k] == same[k] for k in ("recipe", "stem"))]
    for row in rows:
        figures = [
            " / ".join(f"{float(row[f'{stage}_{part}']):.2%}" for part in ("val", "test"))
            for stage in train.STAGES
        ]
        run = f"`--recipe {row['recipe']} --seed {row['seed']}`"
        where = f"{float(row['minutes']):.0f} min on {row['device']}, commit {row['commit']}"
        results.append(f"| {run} | {' | '.join(figures)} | {where} |")
    if len(rows) > 1:
        figures = [
            " / ".join(
                mean_and_spread([100 * float(row[f"{stage}_{part}"]) for row in rows])
                for part in ("val", "test")
            )
            for stage in train.STAGES
        ]
        results.append(f"| mean ± standard deviation | {' | '.join(figures)} | |")
    model, _ = checkpoint.load(SHIPPED)
    summary = torchinfo.summary(prune.masked(model), (1, 3, 28, 28), verbose=0)
    layers = ["| layer | parameters | of |", "|---|---|---|"]
    for name, weight in prune.weights(model).items():
        layers.append(f"| {name[:-7]} | {int(weight.count_nonzero()):,} | {weight.numel():,} |")
    fixed = prune.count_fixed(model)
    layers.append(f"| BatchNorm, and the bias of fc | {fixed:,} | {fixed:,} |")
    layers.append(f"| **Total params** | **{summary.total_params:,}** | 11,181,642 |")
    layers.append(f"| Total mult-adds (M) | {summary.total_mult_adds / 1e6:.2f} | |")
    return {
        "results": "\n".join(results),
        "layers": "\n".join(layers),
        "sizes": "\n".join(sizes_table()),
        "speed": "\n".join(speed_tables(json.loads((ROOT / "bench.json").read_text()))),
        "ways": "\n".join(ways_table(json.loads((ROOT / "bench.json").read_text())["ways"])),
        "serving": "\n".join(serving_table(json.loads((ROOT / "bench.json").read_text())["ways"])),
    }


WAYS = {  # what bench.py calls it: the file, what it needs
    "sparse": ("`pruned_resnet18.pth`, with `sparse.py`", "PyTorch, torchvision, llvmlite"),
    "16 bits": ("`pruned_resnet18-16bit.pth`, likewise", "PyTorch, torchvision, llvmlite"),
    "8 bits": ("`pruned_resnet18-8bit.pth`, likewise", "PyTorch, torchvision, llvmlite"),
    "c 32 bits": ("`pruned_resnet18.c`, its tables", "a C compiler"),
    "c 8 bits": ("`pruned_resnet18-8bit.c`, its tables", "a C compiler"),
    "onnx": ("`pruned_resnet18.onnx`", "ONNX Runtime"),
    "onnx stock": ("the dense network as ONNX", "ONNX Runtime"),
}


def ways_table(measured: dict) -> list[str]:
    """What leaves the project, as bench.py measured it."""
    lines = [
        "| file | kB | needs | images/s at batch 1 | at batch 256 | predictions equal |",
        "|---|---|---|---|---|---|",
    ]
    for name, (title, needs) in WAYS.items():
        row = measured[name]
        figures = f"{row['bytes'] / 1000:,.0f} | {needs} | {row['1']:,.0f} | {row['256']:,.0f}"
        lines.append(f"| {title} | {figures} | {row['equal']:,.0f} of {row['of']:,.0f} |")
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
    """Accuracies of the networks of the recipe `curve`, means over its seeds, smallest first."""
    sizes: dict[str, list[dict]] = {}
    for row in sorted(result_rows(), key=lambda row: int(row["parameters"])):
        if row["recipe"] == "curve" and row["stem"] == "4":
            sizes.setdefault(f"{int(row['parameters']):,}", []).append(row)
    columns = [(size, "pruned", rows) for size, rows in sizes.items()]
    columns.append(("dense", "student", columns[0][2]))
    lines = [
        "| parameters | " + " | ".join(size for size, _, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for split in ("val", "test"):
        means = [
            statistics.mean(100 * float(row[f"{stage}_{split}"]) for row in rows)
            for _, stage, rows in columns
        ]
        title = {"val": "validation", "test": "test"}[split]
        lines.append(f"| {title} | " + " | ".join(f"{mean:.2f}%" for mean in means) + " |")
    return lines


def speed_tables(measured: dict) -> list[str]:
    """What bench.py measured, as the README shows it."""
    titles = {
        "sparse": "**this project, `sparse.py`**",
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
        f"| its networks alone, on a batch that is there already | {loops['bare']:,.0f} |",
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


def part(readme: str, name: str) -> re.Match:
    return re.search(rf"(<!-- {name}.*?-->\n)(.*?)(\n<!-- end of {name} -->)", readme, re.S)


@pytest.mark.parametrize("name", ["results", "sizes", "layers", "speed", "ways", "serving"])
def test_the_readmes_tables_are_the_programs(name):
    assert part((ROOT / "README.md").read_text(), name)[2] == readme_tables()[name]


def test_the_shipped_weights_are_what_they_say():
    model, meta = checkpoint.load(SHIPPED)
    assert SHIPPED.stat().st_size <= 450_000
    assert meta["arch"] == "resnet18" and meta["budget"] == 100_000
    assert prune.count(model) == 100_000
    masks = {name: weight != 0 for name, weight in prune.weights(model).items()}
    useful = prune.useful(model, masks, meta["image_size"], grey=True)
    assert all(bool((useful[name] == masks[name]).all()) for name in masks)


@pytest.mark.skipif(not data.DEBIAN_DIR.exists(), reason="needs the images, and fetches none")
def test_the_shipped_weights_reach_the_accuracy_in_the_results():
    model, _ = checkpoint.load(SHIPPED)
    images, labels = data.load(data.find(data.DEBIAN_DIR), "test")
    accuracy = models.accuracy(models.infer(model, images), labels)
    assert f"{accuracy:.4f}" == shipped_row()["pruned_test"]


def test_both_environments_list_the_same_dependencies():
    """Read with regular expressions: Python 3.10 has no TOML reader, and YAML is no dependency."""
    project = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)
    pip = set(re.findall(r'"([^"]+)"', block))
    listed = (ROOT / "environment.yml").read_text().split("dependencies:")[1]
    conda = set(re.findall(r"^  - (.+)$", listed, re.M))
    names = {"pytorch": "torch"}  # conda-forge's name: PyPI's
    conda = {re.sub(r"^[a-z]+", lambda m: names.get(m[0], m[0]), entry) for entry in conda}
    python = {entry for entry in conda if re.match("python[^a-z]", entry)}
    tools = {"pytest", "ruff"}
    assert len(python) == 1 and tools <= conda
    assert conda - python - tools == pip
    (pip_python,) = re.findall(r'requires-python = "([^"]+)"', project)
    assert python == {f"python{pip_python}"}


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_the_readme_names_every_flag_and_no_other(script):
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    readme = (ROOT / "README.md").read_text()
    table = re.search(rf"### `{re.escape(script)}`(.*?)(?=\n##)", readme, re.S)[1]
    assert set(re.findall(r"^\| .*?`(?:-\w, )?(--[a-z-]+)", table, re.M)) == known


def test_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in sorted(ROOT.glob("*.py")):
        assert re.search(rf"^\| `{path.name}` \|", readme, re.M), path.name


def readme_commands() -> list[tuple[str, list[str]]]:
    """(script, flags) of every command with a script of ours in the README."""
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"^(?:uv run|python|torchrun)\b.*", readme, re.M)
    lines += re.findall(r"`((?:uv run|python) [^`]+\.py[^`]*)`", readme)
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        (at,) = [i for i, word in enumerate(words) if word.endswith(".py") and words[i - 1] != "-w"]
        commands.append((words[at], words[at + 1 :]))
    return sorted({(script, tuple(flags)) for script, flags in commands})


@pytest.fixture
def newcomers_folder(tmp_path, monkeypatch, tiny, tiny_data, shipped_like):
    """A folder with all that the README's commands speak of, and a tiny recipe behind each name."""
    from PIL import Image

    for recipe in train.RECIPES:
        monkeypatch.setitem(train.RECIPES, recipe, train.RECIPES["quick"])
    monkeypatch.setattr(data, "DEBIAN_DIR", tiny_data)
    for place in ("mine/train/cat", "mine/train/dog", "mine/test/cat", "mine/test/dog", "photos"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(6):
            image = Image.new("RGB", (50, 40), (40 * i, 90, 255 if "cat" in place else 0))
            image.save(tmp_path / place / f"{i}.png")
    shutil.copy(SHIPPED, tmp_path)
    weights = tmp_path / "runs" / "cpu-folder-seed0" / "pruned_resnet18.pth"
    weights.parent.mkdir(parents=True)
    shutil.copy(shipped_like, weights)
    torch.save(models.build("resnet50", 10).state_dict(), tmp_path / "resnet-50.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("script", "flags"), readme_commands())
def test_the_readmes_commands_run(script, flags, newcomers_folder, monkeypatch):
    """train.py up to its first step: tests/test_train.py goes on from there."""
    if script.startswith("tests/"):
        assert (ROOT / script).exists() and not flags
        return
    if script == "export.py" and not {"--c", "--bits"} & {*flags}:
        pytest.importorskip("onnxscript", reason="needs --group export")
    if script == "bench.py":
        monkeypatch.setattr(
            sys.modules.get("bench") or importlib.import_module("bench"), "PARTS", ()
        )
    shutil.rmtree(newcomers_folder / "runs" / "cpu-folder-seed0") if script == "train.py" else None
    monkeypatch.setattr(train, "announce", lambda *args: None)
    monkeypatch.setattr(train, "train", lambda *args: None)
    monkeypatch.setattr(train, "finish", lambda *args: None)
    monkeypatch.setattr(train, "report", lambda *args: None)
    module = importlib.import_module(script.removesuffix(".py"))
    assert module.main(list(flags)) == 0


def test_the_readmes_python_runs(newcomers_folder, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 5
    shutil.copy(ROOT / "hubconf.py", newcomers_folder)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for block in blocks:
        if "onnxruntime" in block:
            pytest.importorskip("onnxscript", reason="needs --group export")
            assert export.main(["-w", "pruned_resnet18.pth"]) == 0
        known = {"images_u8": torch.zeros(3, 28, 28, dtype=torch.uint8)}
        exec(block, known)
        if "logits" in known:
            assert known["logits"].shape[1] == 10


if __name__ == "__main__":
    text = (ROOT / "README.md").read_text()
    for name, table in readme_tables().items():
        text = text.replace(part(text, name)[0], part(text, name)[1] + table + part(text, name)[3])
    checkpoint.write(ROOT / "README.md", text)
    checkpoint.write(ROOT / "sizes.png", plots.sizes(ROOT / "results.csv", "curve"))
