import csv
import subprocess
import sys

import pytest
import torch
from test_checkpoint import KINDS, damage
from test_project import ROOT

import checkpoint
import data
import models
import predict


@pytest.fixture
def flags(tmp_path, shipped_like, tiny_data):
    """predict.main's flags with good weights, and an output that must not be lost."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(shipped_like.read_bytes())
    (tmp_path / "submission.csv").write_text("precious")
    return ["-w", str(weights), "-o", str(tmp_path / "submission.csv"), "--data", str(tiny_data)]


def fails(flags, capsys, tmp_path):
    """The one line on stderr of a run that fails and leaves everything as it was."""
    before = sorted(tmp_path.iterdir())
    assert predict.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: ") and error.count("\n") == 1
    assert (tmp_path / "submission.csv").read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == before
    return error


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_weights(kind, engine, flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(tmp_path / "weights.pth", kind)
    assert "weights.pth" in fails([*flags, "--engine", engine], capsys, tmp_path)


def test_a_wrong_number_of_classes(flags, capsys, tmp_path):
    model, meta = models.build("resnet18", 7), {"arch": "resnet18", "num_classes": 7}
    checkpoint.save(tmp_path / "weights.pth", model, meta)
    assert "has 7 classes" in fails(flags, capsys, tmp_path)


def test_bad_outputs_are_found_before_the_work(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "infer", None)
    for bad in (tmp_path / "absent" / "out.csv", tmp_path):
        assert "cannot be written" in fails([*flags, "-o", str(bad)], capsys, tmp_path)


def test_missing_images_and_devices(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in fails([*flags, "--device", "cuda"], capsys, tmp_path)
    monkeypatch.setattr(models, "choose_device", lambda wanted: torch.device("meta"))
    only = "--engine sparse: runs on the CPU"
    assert only in fails([*flags, "--engine", "sparse"], capsys, tmp_path)
    monkeypatch.undo()
    assert "absent" in fails([*flags, "--data", str(tmp_path / "absent")], capsys, tmp_path)


@pytest.mark.parametrize("wrong", [[], ["-w", "x", "--batch-size", "0"], ["-w", "x", "--color"]])
def test_wrong_usage_is_argparses(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(wrong)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_mirror_images_and_batch_sizes_reach_the_network(flags, tmp_path, tiny_data, capsys):
    model, _ = checkpoint.load(tmp_path / "weights.pth")
    images, _ = data.load(data.find(tiny_data), "test")
    for more, options in (
        ([], {}),
        (["--batch-size", "7"], {"batch_size": 7}),
        (["--tta"], {"tta": True}),
        (["--engine", "dense"], {}),
        (["--engine", "sparse"], {}),
    ):
        assert predict.main([*flags, *more]) == 0
        expected = models.infer(model, images, **options).argmax(1).tolist()
        with (tmp_path / "submission.csv").open() as file:
            assert [int(row["pred"]) for row in csv.DictReader(file)] == expected
        printed = capsys.readouterr().out
        assert ("with mirror images" in printed) == ("--tta" in more)
        assert ("(dense)" in printed) == ("dense" in more)  # mostly zeros: sparse by itself


def test_a_start_imports_nothing_that_is_not_used():
    heavy = ["pandas", "matplotlib", "llvmlite", "torch._dynamo", "sympy", "torchmetrics"]
    code = f"import sys, predict; print([name for name in {heavy} if name in sys.modules])"
    started = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert started.stdout == "[]\n", started.stderr
