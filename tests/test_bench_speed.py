"""bench/speed.py with short rounds: that it measures what it says, not how fast it is."""

import json
import sys

import pytest

import export
from bench import speed

SLOW = ("inference", "start", "train", "export")  # a minute together
PARTS = [pytest.param(part, marks=[pytest.mark.slow] * (part in SLOW)) for part in speed.MEASURES]


@pytest.fixture
def short(monkeypatch, shipped_like):
    monkeypatch.setitem(sys.modules, "openvino", None)  # its threads crash training in this process
    for name, value in (("BATCHES", (1, 5)), ("EXPORT_BATCHES", (1, 5)), ("BITS", (32, 16, 4))):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "SHIPPED", [shipped_like])
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "SECONDS", 0)
    monkeypatch.setattr(speed, "STEPS", 1)


def run(part, shipped_like, tiny_data, capsys, *flags):
    flags = ["--only", part, "-w", str(shipped_like), "--data", str(tiny_data), *flags]
    assert speed.main([*flags, "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])[part]


@pytest.mark.parametrize("part", PARTS)
def test_the_last_line_has_a_figure_for_each(part, wide, tiny_data, shipped_like, short, capsys):
    found = run(part, shipped_like, tiny_data, capsys)
    if part == "inference":
        network = found["networks"][shipped_like.name]
        assert found["gflops"] > 0 and 0 < network["multiply_adds"] < 10_000_000
        assert next(iter(network["images/s"])) == speed.OURS
        for rates in network["images/s"].values():
            assert list(rates) == ["batch 1", "batch 5"] and min(rates.values()) > 0
    if part == "train":
        assert len(found) == 2 and min(row["ms"] for row in found.values()) > 0
    if part == "bits":
        assert list(found) == ["32", "16", "4"] and found["32"]["changed predictions"] == 0
        sizes = [row["kB"] for row in found.values()]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == round(shipped_like.stat().st_size / 1000)
    if part == "start":
        first, *more = (row["seconds"] for row in found.values())
        assert 0 < first < min(more)
    if part == "export":
        assert found["`.pth`, 32 bits"]["equal predictions"] == 40
        assert found["`.pth`, 8 bits"]["kB"] < found["`.pth`, 16 bits"]["kB"]
        assert min(row[f"batch {n}"] for row in found.values() for n in (1, 5)) > 0
        assert not export.compiler() or found["`.c`, 32 bits"]["equal predictions"] == 40


def test_runs_take_turns_and_the_peer_once_a_round(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 3)
    turns = []
    runs = {name: lambda name=name: turns.append(name) for name in "ab"}
    times = speed.medians(runs, seconds=0, peer=lambda: turns.append("peer") or {"peer": 7.0})
    assert turns == ["a", "b", *(3 * ["peer", "a", "b"])]
    assert times["peer"] == 7.0 and times.keys() == {"a", "b", "peer"}


def stand_in(path, code):
    """An interpreter that runs `code` instead of the script it is given."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    path.chmod(0o755)
    return path


def test_deepsparse_is_measured_by_the_interpreter_that_is_given(tmp_path, short):
    python = stand_in(
        tmp_path / "python",
        "from pathlib import Path; assert Path(sys.argv[2]).read_bytes() == b'onnx'\n"
        "print('{\"' + '\": 10, \"'.join(sys.argv[4:]) + '\": 20}')",
    )
    assert speed.deepsparse(python, b"onnx")() == {
        ("DeepSparse 1.8", 1): 1 / 10,
        ("DeepSparse 1.8", 5): 5 / 20,
    }


def test_without_deepsparse_there_is_a_reason(tmp_path, short, capsys):
    assert speed.deepsparse(None, b"")() == {}
    assert "--deepsparse" in capsys.readouterr().err
    python = stand_in(tmp_path / "python", "sys.exit('no such module')")
    with pytest.raises(OSError, match="no such module"):
        speed.deepsparse(python, b"")()
    with pytest.raises(SystemExit):  # not after minutes
        speed.main(["--deepsparse", str(tmp_path / "absent")])
    assert "absent: there is no such file" in capsys.readouterr().err
