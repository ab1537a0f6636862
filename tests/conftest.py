"""A tiny data set in Fashion-MNIST's format, and the real program shrunk to run on it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import data
import models
import train

IDX = {
    "train-images-idx3-ubyte": "train_images",
    "train-labels-idx1-ubyte": "train_labels",
    "t10k-images-idx3-ubyte": "test_images",
    "t10k-labels-idx1-ubyte": "test_labels",
}


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture(scope="session")
def tiny_images() -> dict[str, np.ndarray]:
    """28x28 images of ten classes: a bright square in a place of its own, and noise."""
    rng = np.random.default_rng(0)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(n) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[8 * row + 2 : 8 * row + 10, 6 * column + 2 : 6 * column + 10] += 150
        return images, labels

    return dict(zip(IDX.values(), (*split(200), *split(40)), strict=True))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, tiny_images) -> Path:
    """A folder with the four files, raw."""
    folder = tmp_path_factory.mktemp("data")
    for name, key in IDX.items():
        (folder / name).write_bytes(idx_bytes(tiny_images[key]))
    return folder


@pytest.fixture
def tiny(monkeypatch, tmp_path, tiny_data) -> list[str]:
    """train.main's flags for a run on the tiny images: every stage, a few steps, tmp_path/runs."""
    stages = {"learning_rate": 0.05, "weight_decay": 5e-4}
    kd = {"kd_weight": 0.9, "temperature": 4}
    recipe = train.Recipe(
        teacher=train.Stage((1,), "adamw", 1e-3, 0.05),
        student=train.Stage((1,), "sgd", **stages, **kd),
        pruned=train.Stage((2, 2), "sgd", **stages, **kd, cuts=(1, 1)),
        images=64,
        batch_size=16,
    )
    monkeypatch.setitem(train.RECIPES, "quick", recipe)
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(data, "VALIDATION", 40)
    return ["--quick", "--device", "cpu", "--data", str(tiny_data)]


@pytest.fixture
def resnet18() -> torch.nn.Module:
    """A ResNet18 with BatchNorm statistics and weights that are not the initial ones."""
    torch.manual_seed(0)
    model = models.build("resnet18", 10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model
