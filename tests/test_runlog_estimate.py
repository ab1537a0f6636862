from types import SimpleNamespace

import pytest
import torch

import distill
from runlog import estimate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan(capsys, monkeypatch, device=CPU, dataset="fashion-mnist", student=(), budgets=(9,)):
    training = distill.Training(3)
    stage = distill.Stage("pruned", "resnet18", 4, 1.0, training, 2, "a.pth", budgets)
    run = SimpleNamespace(
        settings={"dataset": dataset},
        given={"student": student},
        command="train.py",
        folder="runs/a",
        epochs_done=lambda stage: 1,
    )
    images = SimpleNamespace(val=None, passes=1, steps=30, labels=[0], batch_size=1, flip=True)
    monkeypatch.setattr(estimate, "step_times", lambda *args: {"pruned": (1.0, 0.5)})
    monkeypatch.setattr(estimate.models, "device_name", str)
    estimate.print_plan(run, [stage], None, images, SimpleNamespace(bf16=True, device=device))
    return capsys.readouterr().out


def test_only_the_project_s_own_images_are_promised_its_accuracy(capsys, monkeypatch):
    assert "this command reached 9" in plan(capsys, monkeypatch)
    assert "this command reached" not in plan(capsys, monkeypatch, dataset="folder")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "at most"),  # zeros are skipped later, if that is faster
        ({"device": CUDA}, "about"),
        ({"student": ["a.pth"]}, "about"),  # measured with its zeros
        ({"budgets": ()}, "about"),
    ],
)
def test_the_time_of_a_network_that_is_still_to_be_pruned_is_a_bound(
    known, said, capsys, monkeypatch
):
    out = plan(capsys, monkeypatch, **known)  # two epochs of 30 steps, each of 1.5 seconds
    assert f"3 epochs (1 done), {said} 1.5 minutes" in out and f"in all {said} 1.5 minutes" in out
