"""bench/speed.py with short rounds: that it measures what it says, not how fast it is."""

import json
import sys

import pytest

import export
import train
from bench import speed

SLOW = ("predict", "shared", "start", "train", "ways")  # a minute together
MARKED = [pytest.param(part, marks=[pytest.mark.slow] * (part in SLOW)) for part in speed.PARTS]


@pytest.mark.parametrize("part", MARKED)
def test_the_last_line_is_json_with_a_figure_for_each(
    part, wide, tiny_data, shipped_like, monkeypatch, capsys
):
    monkeypatch.setitem(train.RECIPES, "cpu", train.RECIPES["quick"])
    monkeypatch.setitem(sys.modules, "openvino", None)  # tests that train come after this one
    monkeypatch.setattr(speed, "BATCHES", (1, 5))
    monkeypatch.setattr(speed, "WAY_BATCHES", (1, 5))
    monkeypatch.setattr(speed, "SHIPPED", [shipped_like])
    monkeypatch.setattr(speed, "BITS", (32, 16, 4))
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "SECONDS", 0)
    flags = ["--only", part, "-w", str(shipped_like), "--data", str(tiny_data), "--device", "cpu"]
    assert speed.main(flags) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    if part == "predict":
        for engine in ("dense_fp32", "dense_bf16", "sparse"):
            rates, ranges = results["predict"][engine], results["ranges"]["predict"][engine]
            assert list(rates) == ["1", "5"]
            assert all(ranges[n][0] <= rates[n] <= ranges[n][1] for n in rates)
    if part == "files":
        assert results["files"]["pruned"]["bytes"] == shipped_like.stat().st_size
        assert results["files"]["plain"]["bytes"] > 44_000_000
    if part == "train":
        assert min(results["train"][loop] for loop in ("ours", "bare", "usual")) > 0
    if part == "shared":
        busy = {policy: results["shared"][policy]["busy"]["step"] for policy in ("ours", "default")}
        assert 0 < busy["ours"] < busy["default"]
    if part == "bits":
        rows = results["bits"]
        assert list(rows) == ["32", "16", "4"]
        assert rows["32"]["bytes"] == shipped_like.stat().st_size and rows["32"]["changed"] == 0
        sizes = [row["bytes"] for row in rows.values()]
        assert sizes == sorted(sizes, reverse=True)
    if part == "shipped":
        row = results["shipped"][shipped_like.name]
        assert row["1"] > 0 and row["5"] > 0 and row["multiply_adds"] < 10_000_000
    if part == "start":
        assert 0 < results["start"]["torch"] < results["start"]["first answer"]
    if part == "ways":
        found = results["ways"]
        assert found["sparse"]["bytes"] == shipped_like.stat().st_size
        assert found["8 bits"]["bytes"] < found["16 bits"]["bytes"] < found["sparse"]["bytes"]
        assert found["sparse"]["equal"] == found["sparse"]["of"] == 40
        assert all(found[name]["1"] > 0 for name in ("threads 1", "threads 2", "8 bits"))
        assert not export.compiler() or found["c 32 bits"]["equal"] == 40
