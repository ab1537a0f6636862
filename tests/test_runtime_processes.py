"""Several processes (gloo, on the CPU) train as one."""

import csv
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import tiny as shrunk
import torch
import torch.multiprocessing as mp

import checkpoint
import distill
import runtime
import train


def torchrun(folder, n, *flags, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), str(Path(shrunk.__file__)), str(folder), *flags]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def first_losses(text):
    lines = re.findall(r"^first losses (.*)", text, re.M)
    return [[float(loss) for loss in line.split()] for line in lines]


def test_two_processes_follow_one_and_go_on_where_one_was_stopped(tiny, tmp_path, monkeypatch):
    flags = [*tiny[:-1], str(shrunk.write_images(tmp_path / "data"))]
    first, steps = [], []
    result, step = distill.Progress.result, distill.TrainState.step

    def telling(self):
        losses, accuracy = result(self)
        first.append(losses[:2].tolist())
        return losses, accuracy

    def stopped(*args):
        steps.append(args)
        if len(steps) == 7:  # in the second epoch of six
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill.Progress, "result", telling)
        assert train.main([*flags, "--name", "alone"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(distill.TrainState, "step", stopped)
        assert train.main(flags) == 130
    ended = torchrun(tmp_path, 2, LOSSES="1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("pruned        2/2") == 1  # only one of them speaks
    assert ended.stderr.count("100000 parameters left") == 2  # but both have the same count
    one, two = (rows(tmp_path / "runs" / name) for name in ("alone", "quick-seed0"))
    assert [r["parameters"] for r in one] == [r["parameters"] for r in two]
    second = first_losses(ended.stderr)
    # Of the student, which both train from the same weights. Later steps differ more: rounding
    # grows in BatchNorms of channels that hardly vary.
    assert second[0] == second[1] == pytest.approx(first[1], rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=0.1)
    path = tmp_path / "runs" / "quick-seed0" / "pruned_resnet18.pth"
    assert checkpoint.load(path)[1]["parameters"] == 100_000


def test_if_one_process_is_refused_the_others_end_in_one_line(tiny, tmp_path):
    shrunk.write_images(tmp_path / "data")
    folder = tmp_path / "runs" / "quick-seed0"
    folder.mkdir(parents=True)
    (folder / "pruned_resnet18.pth").touch()  # of an unknown run
    ended = torchrun(tmp_path, 2)
    assert ended.returncode != 0 and ended.stderr.count("has weights files, but no run.json") == 1
    assert ended.stderr.count("train.py: cannot reach the other processes") == 1


def test_batches_that_cannot_be_shared_are_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "world_size", lambda: 3)
    assert train.main(tiny) == 2
    assert "3 processes cannot share batches of 16 equally" in capsys.readouterr().err
    # Batches of 256 could be shared, but they shrink for 160 images.
    batches = replace(shrunk.CHAIN.batches, images=None, batch_size=256)
    monkeypatch.setattr(train, "QUICK", replace(shrunk.CHAIN, batches=batches))
    monkeypatch.setattr(runtime, "world_size", lambda: 64)
    assert train.main(tiny) == 2
    assert "64 processes cannot share batches of 32 equally" in capsys.readouterr().err


@pytest.mark.slow  # the run above follows one process for two steps to 1e-5
def test_synchronized_batchnorm_is_batchnorm_of_the_whole_batch():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(ranks.batchnorm, (port, results), nprocs=2)
        first, second = results[0], results[1]
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 5, 5, dtype=torch.double) * 3 + 1).requires_grad_()
    layer = torch.nn.BatchNorm2d(3).double()
    out = layer(x)
    (out**3).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad, **close)
    for part in (first, second):
        torch.testing.assert_close(part[2], layer.running_mean, **close)
        torch.testing.assert_close(part[3], layer.running_var, **close)
