"""A tiny data set in Fashion-MNIST's format, and the real program shrunk to run on it."""

import os

# Sums in another order differ in their last bits, which training amplifies: tests that compare two
# trainings need one thread, whatever the machine has. xdist (-n auto) keeps all cores busy.
os.environ["OMP_NUM_THREADS"] = "1"

import runtime  # isort: skip  # noqa: F401  (before torch, which reads what it sets)

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny as shrunk

import checkpoint
import data
import models
import prune
import train
from runlog import plots, record

META = {"arch": "resnet18", "num_classes": 10, "budget": 100_000, "classes": list(data.CLASSES)}


@pytest.fixture(scope="session")
def tiny_images() -> dict[str, np.ndarray]:
    return shrunk.images()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with the four files, raw."""
    return shrunk.write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def narrow() -> Iterator[None]:
    """Networks of a sixteenth of the weights, where size proves nothing."""
    with shrunk.narrow():
        yield


@pytest.fixture
def tiny(wide, narrow, monkeypatch) -> list[str]:
    """As `wide`, with narrow networks, no pictures, no measured times: for all that does not
    depend on these."""
    shrunk.measure_nothing(monkeypatch)
    shrunk.draw_nothing(monkeypatch)
    monkeypatch.setattr(models, "bf16_is_faster", lambda device: False)  # not now this, now that
    return wide


@pytest.fixture
def drawn(tiny, monkeypatch) -> None:
    """With `tiny`: pictures of the run are drawn."""
    for name, draw in shrunk.DRAWINGS.items():
        monkeypatch.setattr(plots, name, draw)


@pytest.fixture
def wide(monkeypatch, tmp_path, tiny_data) -> list[str]:
    """train.main's flags for a run on the tiny images: every stage, a few steps, tmp_path/runs."""
    monkeypatch.setattr(train, "QUICK", shrunk.CHAIN)
    monkeypatch.setattr(record, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(data, "VALIDATION", shrunk.VALIDATION)
    return ["--quick", "--device", "cpu", "--data", str(tiny_data)]


def _trained_like(model: torch.nn.Module) -> torch.nn.Module:
    """With BatchNorm statistics and weights that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def _resnet18() -> torch.nn.Module:
    torch.manual_seed(0)
    return _trained_like(models.build("resnet18", 10))


@pytest.fixture
def resnet18(_resnet18) -> torch.nn.Module:
    """A ResNet18 with BatchNorm statistics and weights that are not the initial ones."""
    return copy.deepcopy(_resnet18)


@pytest.fixture
def narrow_resnet18(narrow) -> torch.nn.Module:
    """Likewise, a narrow one."""
    torch.manual_seed(0)
    return _trained_like(models.build("resnet18", 10))


@pytest.fixture(scope="session")
def _pruned(_resnet18) -> torch.nn.Module:
    model = copy.deepcopy(_resnet18)
    masks = prune.all_reachable(model, 28, grey=True)
    prune.merge_grey_input_(model)
    prune.apply_(model, prune.choose_masks(model, masks, 100_000, 28, grey=True))
    return model.eval()


@pytest.fixture
def pruned(_pruned) -> torch.nn.Module:
    """Of the same network, what is left of it with 100,000 parameters, in eval mode."""
    return copy.deepcopy(_pruned)


@pytest.fixture(scope="session")
def shipped_like(tmp_path_factory, _pruned):
    """A pruned file as train.py writes it, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "pruned.pth"
    checkpoint.save(path, _pruned, {**META, "image_size": 28, "grey": True})
    return path
