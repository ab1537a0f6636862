"""The documents against the code, and the shipped weights against what is said of them."""

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import data  # noqa: E402
import export  # noqa: E402
import models  # noqa: E402
import prune  # noqa: E402
import train  # noqa: E402
from bench import tables  # noqa: E402
from engine import inference  # noqa: E402
from runlog import report  # noqa: E402


def test_the_readmes_tables_are_the_programs():
    text, written = (ROOT / "README.md").read_text(), tables.tables()
    assert written.keys() == set(re.findall(r"^<!-- (\w+)(?=: written| -->)", text, re.M))
    for name, table in written.items():
        assert tables.part(text, name)[2] == table, name


@pytest.mark.parametrize("path", tables.SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_weights_are_what_they_say(path):
    model, meta = checkpoint.load(path)
    assert path.stat().st_size <= 460_000
    assert meta["arch"] == "resnet18" and meta["budget"] == 100_000
    assert prune.count(model) == 100_000
    masks = {name: weight != 0 for name, weight in prune.weights(model).items()}
    useful = prune.reachable(model, masks, meta["image_size"], grey=True)
    assert all(bool((useful[name] == masks[name]).all()) for name in masks)


@pytest.mark.skipif(not data.DEBIAN_DIR.exists(), reason="needs the images, and fetches none")
@pytest.mark.parametrize("path", tables.SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_weights_reach_the_accuracy_in_the_results(path):
    model, meta = checkpoint.load(path)
    images, labels = data.load(data.find(data.DEBIAN_DIR), "test")
    engine = inference.SparseResNet(model, meta["image_size"])  # as predict.py has it
    accuracy = models.accuracy(models.infer(engine, images), labels)
    assert f"{accuracy:.4f}" == tables.row_of(path)["pruned_test"]


def test_commands_that_differ_by_their_seed_only_are_one_in_the_tables():
    def flags(seed: str, teachers: str, student: str) -> str:
        row = {"recipe": "finetune", "stem": "4", "teacher": teachers, "student": student}
        return tables.flags_of(row | {"seed": seed})

    three = " ".join(f"runs/long-seed{n}/a.pth" for n in range(3))
    expected = " --recipe finetune --teacher runs/long-seed?/a.pth --student runs/x-seed$seed/a.pth"
    assert {flags(n, three, f"runs/x-seed{n}/a.pth") for n in "012"} == {expected}
    assert "long-seed0/a.pth runs/long-seed1" in flags("0", three.rpartition(" ")[0], "")
    assert "x-seed1/" in flags("0", three, "runs/x-seed1/a.pth")


def test_all_environments_list_the_same_dependencies():
    """Read with regular expressions: Python 3.10 has no TOML reader, and YAML is no dependency."""
    project = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)
    pip = set(re.findall(r'"([^"]+)"', block))
    plain = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(plain[1:]) == pip and plain[0].startswith("#")
    listed = (ROOT / "environment.yml").read_text().split("dependencies:")[1]
    conda = set(re.findall(r"^  - (.+)$", listed, re.M))
    names = {"pytorch": "torch"}  # conda-forge's name: PyPI's
    conda = {re.sub(r"^[a-z]+", lambda m: names.get(m[0], m[0]), entry) for entry in conda}
    python = {entry for entry in conda if re.match("python[^a-z]", entry)}
    tools = {"pytest", "pytest-xdist", "ruff"}
    assert len(python) == 1 and tools <= conda
    assert conda - python - tools == pip
    (pip_python,) = re.findall(r'requires-python = "([^"]+)"', project)
    assert python == {f"python{pip_python}"}


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_the_readme_names_every_flag_and_no_other(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py")).parse(["--help"])
    shown = capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    text = (ROOT / "README.md").read_text()
    table = re.search(rf"### `{re.escape(script)}`(.*?)(?=\n##)", text, re.S)[1]
    assert set(re.findall(r"^\| .*?`(?:-\w, )?(--[a-z-]+)", table, re.M)) == known


MODULES = [
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("", "engine", "runlog", "bench")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
]


def imports(name: str, other: str) -> bool:
    folder, _, module = other.rpartition("/")
    line = (
        rf"from {folder}(\.{module} import | import .*\b{module}\b)"
        if folder
        else (rf"(import|from) {module}\b")
    )
    return bool(re.search(rf"^\s*{line}", (ROOT / f"{name}.py").read_text(), re.M))


def test_imports_run_down_the_readmes_table_of_files():
    """A room imports from those below it only: no circles, and leaves that stand alone."""
    text = (ROOT / "README.md").read_text().split("\n## Changing it\n")[1].split("\n## ")[0]
    order = re.findall(r"^\| `([\w/]+)\.py` \|", text, re.M)
    assert sorted(order) == sorted(MODULES)
    for n, name in enumerate(order):
        imported = {other for other in order if imports(name, other)}
        assert imported <= {*order[n + 1 :]}, name


def test_no_file_needs_what_windows_lacks(monkeypatch):
    for name in ("fcntl", "grp", "pwd", "resource", "termios"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    for path in (ROOT / f"{name}.py" for name in MODULES):
        spec = importlib.util.spec_from_file_location(f"{path.stem}_there", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    assert sys.modules["models_there"].peak_memory_mb(torch.device("cpu")) is None


def readme_commands() -> list[tuple[str, list[str]]]:
    """(script, flags) of every command with a script of ours in the README."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    text = re.sub(r"-m (bench)\.(\w+)", r"\1/\2.py", text)
    loop, command = r"(?:for .*; do )?", r"(?:uv run|python|torchrun)\b.*?"
    lines = re.findall(rf"^ *{loop}({command})(?:; done)?$", text, re.M)
    lines += re.findall(r"`((?:uv run|python) [^`]+\.py[^`]*|train\.py --[^`]+)`", text)
    commands = []
    for line in lines:
        words = shlex.split(line.replace("$seed", "0"), comments=True)
        (at,) = [i for i, word in enumerate(words) if word.endswith(".py") and words[i - 1] != "-w"]
        commands.append((words[at], words[at + 1 :]))
    return sorted({(script, tuple(flags)) for script, flags in commands})


@pytest.fixture
def newcomers_folder(tmp_path, monkeypatch, wide, tiny_data, shipped_like):
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
    for weights in ROOT.glob("pruned_resnet18*.pth"):
        shutil.copy(weights, tmp_path)
    stem2 = [f"long-stem2-seed{seed}/pruned_resnet18" for seed in range(3)]
    for name in ("cpu-folder-seed0/pruned_resnet18", "dense-stem2-seed0/student", *stem2):
        weights = tmp_path / "runs" / f"{name}.pth"
        weights.parent.mkdir(parents=True)
        shutil.copy(ROOT / "pruned_resnet18-stem2.pth" if name in stem2 else shipped_like, weights)
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
    flags = [str(path) for flag in flags for path in sorted(Path().glob(flag)) or [flag]]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if script == "bench/speed.py":
        monkeypatch.setattr(module, "all_parts", lambda flags: 0)
        monkeypatch.setattr(module, "ways", lambda *args: module.Figures())
    if script == "bench/tables.py":
        shutil.copy(module.README, newcomers_folder)
        monkeypatch.setattr(module, "README", newcomers_folder / "README.md")
        monkeypatch.setattr(module, "ROOT", newcomers_folder)
        (newcomers_folder / "docs").mkdir()
        monkeypatch.setattr(module, "tables", dict)
        monkeypatch.setattr(module, "add", lambda path: None)
    if "resnet-50.pth" in flags:
        torch.save(models.build("resnet50", 10).state_dict(), newcomers_folder / "resnet-50.pth")
    shutil.rmtree(newcomers_folder / "runs" / "cpu-folder-seed0") if script == "train.py" else None
    monkeypatch.setattr(prune, "budget_range", lambda *args: (10_970, 4_228_554))  # a second each
    monkeypatch.setattr(train, "announce", lambda *args: None)
    monkeypatch.setattr(train, "train", lambda *args: None)
    monkeypatch.setattr(report, "write_report", lambda *args: None)
    monkeypatch.setattr(report, "print_summary", lambda *args: None)
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
