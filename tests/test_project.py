"""The documents against the code, and the included weights against what the documents say."""

import argparse
import importlib
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
from runlog import plots, report  # noqa: E402

# Each imports only from those below it.
ORDER = [
    "bench/tables",
    "bench/speed",
    "bench/deepsparse_peer",
    "train",
    "predict",
    "export",
    "hubconf",
    "runlog/report",
    "runlog/estimate",
    "runlog/plots",
    "runlog/record",
    "distill",
    "engine/training",
    "engine/llvm_gradients",
    "engine/inference",
    "engine/c_source",
    "engine/threads",
    "engine/llvm_source",
    "engine/plan",
    "checkpoint",
    "engine/rewrite",
    "engine/layers",
    "models",
    "data",
    "prune",
    "augment",
    "runtime",
]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in tables.DOCUMENTS}
LOG = "docs/experiments.md"  # its commands are those of older commits
SCRIPTS = ("train.py", "predict.py", "export.py", "bench/speed.py", "bench/tables.py")
FORMER_FLAGS = {"--recipe"}  # named where the runs of older commits are explained
WRITTEN = {  # by the scripts, where they are run
    *("submission.csv", "metrics.csv", "run.json", "runs/results.csv", "runs/<name>/"),
    *("curves.png", "layers.png", "confusion.png", "mistakes.png", "summary.txt"),
    *("mine/val/", "mine/test/", "train/", "val/", "test/"),
}


def code_of(document: str) -> list[str]:
    """The commands and names in a document: inline code, and lines of code blocks without comments;
    without the table of runs, whose commands are those of their commits."""
    text = re.sub(r"<!-- runs: .*?<!-- end of runs -->", "", DOCUMENTS[document], flags=re.S)
    text = text.replace("\\\n", " ")
    text = re.sub(r"-m (bench)\.(\w+)", r"\1/\2.py", text)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines] + re.findall(r"`([^`\n]+)`", prose)


# --- tables and weights -------------------------------------------------------------------------


def test_the_tables_in_the_documents_are_up_to_date():
    content = tables.tables()
    for name, text in DOCUMENTS.items():
        assert tables.fill(text, content) == text, name
    placed = re.findall(r"^<!-- (\w+): ", "".join(DOCUMENTS.values()), re.M)
    assert sorted(placed) == sorted(content)


def test_rows_that_are_added_are_new_and_have_a_validation_accuracy(tmp_path, monkeypatch):
    results, new = tmp_path / "results.csv", tmp_path / "new.csv"
    before = "".join(tables.RESULTS.read_text().splitlines(keepends=True)[:3])
    results.write_text(before)
    rows = [
        "a-seed7,train.py,4,7,100000,,,0.9320,0.9300,0.9320,0.9300,9.0,cpu (2 cores),12e4567",
        "a2-seed7,train.py,4,7,100000,,,0.9320,0.9300,0.9330,0.9310,9.0,cpu (2 cores),12e4568",
        "b-seed8,train.py --full-train,4,8,100000,,,,0.9300,,0.9300,9.0,cpu (2 cores),12e4567",
        "c-seed9,train.py --full-train --student s.pth,4,9,100000,,,0.9320,0.9300,,0.9300,9.0,cpu "
        "(2 cores),12e4567",
    ]
    new.write_text("\n".join([before.strip(), *rows]))
    monkeypatch.setattr(tables, "RESULTS", results)
    tables.add(new)
    assert results.read_text() == f"{before}{rows[0]}\n"  # digit for digit, each run once
    assert tables.results().commit.iloc[-1] == "12e4567"  # not a number


def test_recommended_commands_are_written_as_runs_record_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    for _, command, _ in tables.COMMANDS:
        flags = command.split()[1:]
        assert train.command(
            train.parse(flags), length=1.0 if "--length" not in flags else 4.0
        ) == (command)


def test_the_unpruned_accuracy_of_a_fine_tuned_network_is_that_of_the_run_before():
    rows = tables.results()
    row = tables.row_of(tables.SHIPPED[1])
    (before,) = rows[rows.name == f"long-stem2-seed{row.seed}"].student_test
    assert "--student runs/long-stem2-seed$seed/" in row.command
    assert tables.unpruned(row, rows) == before != row.student_test


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
    assert round(accuracy, 4) == tables.row_of(path).pruned_test


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


# --- what the documents name --------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in map(slug, headings), link


def flags_of(script: str) -> set[str]:
    """The flags in a script's --help."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    found = {}

    def keep(parser: argparse.ArgumentParser, *args) -> None:
        found.update(parser._option_string_actions)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        module.main([])
    return set(found)


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    return {script: flags_of(script) for script in SCRIPTS}


@pytest.mark.parametrize("document", sorted(DOCUMENTS.keys() - {LOG}))
def test_flags_are_those_of_the_scripts(document, flags):
    for code in code_of(document):
        script = next((name for name in SCRIPTS if name in code.split()), None)
        named = re.findall(r"(?<!\S)--[a-z][a-z-]*", code.partition(script)[2] if script else code)
        if script or code.startswith("--"):
            known = flags[script] if script else set.union(*flags.values())
            assert {*named} <= known | FORMER_FLAGS, code


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_functions_are_there(document):
    places = (ROOT, (ROOT / document).parent, ROOT / "bench")
    for code in code_of(document) if document != LOG else re.findall("`([^`]+)`", DOCUMENTS[LOG]):
        word = code.split()[0] if code else ""
        if re.fullmatch(r"[\w/.<>-]+(\.(py|md|csv|json|yml|toml)|/)", word) and word not in WRITTEN:
            assert any((place / word).exists() for place in places), code
        module, _, name = word.partition(".")
        if document != LOG and name.isidentifier() and module in ORDER and name != "py":
            assert hasattr(importlib.import_module(module), name), code


# --- modules ------------------------------------------------------------------------------------


def modules() -> set[str]:
    return {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for folder in ("", "engine", "runlog", "bench")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "__init__.py"
    }


def imports(name: str, other: str) -> bool:
    folder, _, module = other.rpartition("/")
    line = (
        rf"from {folder}(\.{module} import | import .*\b{module}\b)"
        if folder
        else (rf"(import|from) {module}\b")
    )
    return bool(re.search(rf"^\s*{line}", (ROOT / f"{name}.py").read_text(), re.M))


def test_imports_run_downwards():
    """No circles, and leaves that stand alone. predict.py needs none of train.py."""
    assert modules() <= {*ORDER}
    order = [name for name in ORDER if name in modules()]
    for n, name in enumerate(order):
        imported = {other for other in order if imports(name, other)}
        assert imported <= {*order[n + 1 :]}, name
    assert not imports("predict", "train")


def test_no_file_needs_what_windows_lacks(monkeypatch):
    for name in ("fcntl", "grp", "pwd", "resource", "termios"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    for path in (ROOT / f"{name}.py" for name in modules() - {"bench/deepsparse_peer"}):
        spec = importlib.util.spec_from_file_location(f"{path.stem}_there", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    assert sys.modules["models_there"].peak_memory_mb(torch.device("cpu")) is None


# --- what the documents run ---------------------------------------------------------------------


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """(script, flags) of every command with a script of ours in the documents."""
    found = set()
    for document in DOCUMENTS.keys() - {LOG}:
        for code in code_of(document):
            command = re.sub(r"^for .*; do |; done$", "", code).replace("$seed", "0")
            if re.match(r"(uv run|python|train\.py) .*", command) and ".py" in command:
                words = shlex.split(command)
                at = next(i for i, word in enumerate(words) if word.endswith(".py"))
                if not {"--help", *FORMER_FLAGS} & {*words}:
                    found.add((words[at], tuple(words[at + 1 :])))
    return sorted(found)


@pytest.fixture
def newcomers_folder(tmp_path, monkeypatch, wide, tiny_data, shipped_like):
    """A folder with all files that the commands name."""
    from PIL import Image

    monkeypatch.setattr(data, "DEBIAN_DIR", tiny_data)
    for place in ("mine/train/cat", "mine/train/dog", "mine/test/cat", "mine/test/dog", "photos"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(6):
            image = Image.new("RGB", (50, 40), (40 * i, 90, 255 if "cat" in place else 0))
            image.save(tmp_path / place / f"{i}.png")
    for weights in ROOT.glob("pruned_resnet18*.pth"):
        shutil.copy(weights, tmp_path)
    stem2 = ROOT / "pruned_resnet18-stem2.pth"
    for name, weights in (
        ("mine/pruned_resnet18", shipped_like),
        ("unpruned-seed0/student", stem2),
        ("pruned-seed0/pruned_resnet18", stem2),
    ):
        copy = tmp_path / "runs" / f"{name}.pth"
        copy.parent.mkdir(parents=True)
        shutil.copy(weights, copy)
    shutil.copy(tables.RESULTS, tmp_path / "runs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "deepsparse" / "bin").mkdir(parents=True)
    (tmp_path / "deepsparse" / "bin" / "python").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("script", "flags"), commands())
def test_commands_run(script, flags, newcomers_folder, monkeypatch):
    """train.py up to its first step, benchmarks up to their first measurement."""
    if script.startswith("tests/"):
        assert (ROOT / script).exists() and not flags
        return
    if script == "export.py" and not {"--c", "--bits"} & {*flags}:
        pytest.importorskip("onnxscript", reason="needs --group export")
    flags = [str(path) for flag in flags for path in sorted(Path().glob(flag)) or [flag]]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if script == "bench/speed.py":
        monkeypatch.setattr(module, "all_parts", lambda flags: 0)
        for part in module.MEASURES:
            monkeypatch.setitem(module.MEASURES, part, lambda *args: {})
    if script == "bench/tables.py":
        shutil.copy(ROOT / "README.md", newcomers_folder)
        shutil.copy(tables.RESULTS, newcomers_folder)
        monkeypatch.setattr(module, "DOCUMENTS", (newcomers_folder / "README.md",))
        monkeypatch.setattr(module, "RESULTS", newcomers_folder / "results.csv")
        monkeypatch.setattr(module, "ROOT", newcomers_folder)
        monkeypatch.setattr(plots, "sizes", lambda *paths: b"")
    if script == "train.py":
        if "resnet-50.pth" in flags:
            torch.save(models.build("resnet50", 10).state_dict(), "resnet-50.pth")
        if "--name" in flags:  # what the command itself makes is not there yet
            shutil.rmtree(Path("runs") / flags[flags.index("--name") + 1], ignore_errors=True)
        monkeypatch.setattr(prune, "budget_range", lambda *args: (10_970, 4_228_554))  # a second
        monkeypatch.setattr(train.estimate, "print_plan", lambda *args: None)
        monkeypatch.setattr(train, "train", lambda *args: None)
        monkeypatch.setattr(report, "write_report", lambda *args: None)
        monkeypatch.setattr(report, "print_summary", lambda *args: None)
    assert module.main(list(flags)) == 0


def test_python_in_the_documents_runs(newcomers_folder, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", "".join(DOCUMENTS.values()), re.S)
    assert len(blocks) == 5
    shutil.copy(ROOT / "hubconf.py", newcomers_folder)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for block in blocks:
        if "onnxruntime" in block:
            pytest.importorskip("onnxscript", reason="needs --group export")
            module = export.ExportModel(checkpoint.load(tables.SHIPPED[0])[0], 28, True).eval()
            file = export.to_onnx(module, torch.zeros(2, 28, 28, dtype=torch.uint8))
            Path("pruned_resnet18.onnx").write_bytes(file)
        known = {"images_u8": torch.zeros(3, 28, 28, dtype=torch.uint8)}
        exec(block, known)
        if "logits" in known:
            assert known["logits"].shape[1] == 10
