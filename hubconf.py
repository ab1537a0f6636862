"""Networks for `torch.hub`, from a clone or from GitHub:

    model = torch.hub.load(folder, "pruned_resnet18", source="local")
    logits = model(model.transform(image))  # a PIL image, or uint8 (N, 28, 28) or (N, 3, 28, 28)
    model.classes[logits.argmax()]

All are in eval mode. `torch.hub.list` names them; the dense ones have random weights.
"""

from pathlib import Path as _Path

import numpy as _np
import torch as _torch

import checkpoint as _checkpoint
import data as _data
import models as _models

dependencies = ["torch", "torchvision", "numpy", "PIL"]
_FOLDER = _Path(__file__).resolve().parent


def pruned_resnet18():
    """ResNet18 of 100,000 parameters for Fashion-MNIST: 28x28, grey, 10 classes."""
    return _shipped("pruned_resnet18.pth")


def pruned_resnet18_stem2():
    """The same with a stem of stride 2: more accurate, and more work."""
    return _shipped("pruned_resnet18-stem2.pth")


def resnet18(num_classes: int = 10, stem: int = 4, imagenet: bool = False):
    """A dense ResNet18; `stem` (4, 2 or 1) is the stride of its first layers."""
    return _models.build("resnet18", num_classes, imagenet, stem).eval()


def resnet50(num_classes: int = 10, stem: int = 4, imagenet: bool = False):
    """A dense ResNet50; see `resnet18`."""
    return _models.build("resnet50", num_classes, imagenet, stem).eval()


def _shipped(file: str):
    """A weights file of this folder, with `classes`, `image_size` and `transform`."""
    model, meta = _checkpoint.load(_FOLDER / file)
    model.classes, model.image_size = tuple(meta["classes"]), meta["image_size"]
    model.transform = _Transform(meta["image_size"], meta.get("grey", True))
    return model


class _Transform:
    """What the network takes, float32 (N, 3, H, H), of a PIL image or uint8 images (N, H, W) or
    (N, 3, H, W) of any size, light on dark as those it was trained on."""

    def __init__(self, image_size: int, grey: bool):
        self.image_size, self.grey = image_size, grey

    def __call__(self, images) -> _torch.Tensor:
        if not isinstance(images, _torch.Tensor):
            pixels = _torch.from_numpy(_np.array(images.convert("L" if self.grey else "RGB")))
            images = (pixels if self.grey else pixels.permute(2, 0, 1))[None]
        return _models.normalize(_data.fit(images, self.image_size, self.grey))
