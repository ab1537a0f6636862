"""The real train.py with a tiny chain on tiny images and narrow networks, in a process of its own.

    python tests/tiny.py FOLDER [flags of train.py]

Images and runs are in FOLDER. With DIE="step 7" in the environment it kills itself (SIGKILL) in its
seventh training step; likewise "write 7", in the middle of writing a file, and "rename 7", just
before a finished file gets its name. With STOP="step 7" it sends itself a SIGTERM instead. The last
words on standard error are how often that moment came, if the run lived to its end.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # isort: skip  (first: it imports less of torchvision)
import data
import distill
import prune
import runtime
import train
from runlog import estimate, plots, record

resnet = models.torchvision.models.resnet
IDX = {
    "train-images-idx3-ubyte": "train_images",
    "train-labels-idx1-ubyte": "train_labels",
    "t10k-images-idx3-ubyte": "test_images",
    "t10k-labels-idx1-ubyte": "test_labels",
}
VALIDATION = 40
CHAIN = train.Chain(
    teacher=distill.Training(1, learning_rate=0.05),
    student=distill.Training(1, learning_rate=0.05, kd_weight=0.9),
    pruned=distill.Training(2, learning_rate=0.05, kd_weight=0.9),
    untaught=distill.Training(2, learning_rate=0.05),
    self_taught=distill.Training(2, learning_rate=0.05, kd_weight=0.9),
    batches=distill.Batches(
        images=64, batch_size=16, min_steps=1, crop_scale=(0.85, 1.0), mixup_alpha=0.1, erasing=0.0
    ),
)
STEP_TIMES = estimate.step_times
DRAWINGS = {name: getattr(plots, name) for name in ("curves", "layers", "confusion", "mistakes")}


class Narrow(resnet.ResNet):
    """A ResNet with a quarter of the channels behind its stem, a sixteenth of the weights, and few
    blocks: time in such networks is Python's, by layer.
    """

    def __init__(self, block: type, layers: list[int], num_classes: int):
        super().__init__(block, layers, num_classes)
        self.fc = torch.nn.Linear(128 * block.expansion, num_classes)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 4, *args, **options)


NARROW = {
    "resnet18": functools.partial(Narrow, resnet.BasicBlock, [1, 1, 1, 2]),
    "resnet50": functools.partial(Narrow, resnet.Bottleneck, [1, 1, 1, 2]),
}


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """Within: the program builds, writes and reads narrow networks."""
    with pytest.MonkeyPatch.context() as patch:
        for arch, build in NARROW.items():
            patch.setattr(models.torchvision.models, arch, build)
        yield


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    """A run announces no times: the steps that it would measure are not part of its training."""
    patch.setattr(
        estimate, "step_times", lambda run, stages, *_: {stage.name: (0, 0) for stage in stages}
    )


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Pictures of a run are empty: to draw them takes longer than to train."""
    for name in DRAWINGS:
        patch.setattr(plots, name, lambda *args: b"")


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def images() -> dict[str, np.ndarray]:
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


# The program takes the tiny images for Fashion-MNIST's.
for _name, _key in IDX.items():
    data.CONTENT_MD5[hashlib.md5(idx_bytes(images()[_key])).hexdigest()] = _name


def write_images(folder: Path) -> Path:
    """The four files, raw, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = images()
    for name, key in IDX.items():
        (folder / name).write_bytes(idx_bytes(arrays[key]))
    return folder


def _signal_at(moment: str, number: int) -> None:
    """Send this process a signal at the n-th "step", "write" or "rename"."""
    kind, n = moment.split()
    owner, name = {
        "step": (distill.TrainState, "step"),
        "write": (os, "fsync"),
        "rename": (Path, "replace"),
    }[kind]
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(n):
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    atexit.register(lambda: print(len(calls), file=sys.stderr))


def _counted(fit):
    """distill.fit that says, in every process, how many parameters it left."""

    def counted(stage, *args, **options):
        model = fit(stage, *args, **options)
        if stage.file == "pruned_resnet18.pth":
            print(f"{prune.count(model)} parameters left", file=sys.stderr)
        return model

    return counted


def _telling(result):
    """distill.Progress.result that says the first losses, in every process."""

    def telling(self):
        losses, accuracy = result(self)
        os.write(2, f"first losses {losses[0].item()} {losses[1].item()}\n".encode())  # at once
        return losses, accuracy

    return telling


def main() -> int:
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    train.QUICK = CHAIN
    record.RUNS, record.RESULTS = folder / "runs", folder / "results.csv"
    data.VALIDATION = VALIDATION
    models.bf16_is_faster = lambda device: False  # a busy machine might measure now this, now that
    measure_nothing(pytest.MonkeyPatch())
    draw_nothing(pytest.MonkeyPatch())
    if "RANK" in os.environ:  # under torchrun
        distill.fit = _counted(distill.fit)
    if "LOSSES" in os.environ:
        distill.Progress.result = _telling(distill.Progress.result)
    for name, number in (("DIE", signal.SIGKILL), ("STOP", signal.SIGTERM)):
        if moment := os.environ.get(name):
            _signal_at(moment, number)
    with narrow():
        return train.main(["--quick", "--device", "cpu", "--data", str(folder / "data"), *flags])


if __name__ == "__main__":
    sys.exit(runtime.run(main))
