"""Networks for `torch.hub`, from a clone or from GitHub:

    model = torch.hub.load(folder, "pruned_resnet18", source="local")
    logits = model(model.transform(image))  # a PIL image, the path of one, or uint8 pixels
    model.classes[logits.argmax()]

All are in eval mode. `torch.hub.list` names them; the dense ones have random weights. A model
consists of classes of torchvision, so that it can be pickled and saved as a whole; its `transform`
needs this folder where it is unpickled, at the same path.
"""

import functools as _functools
import importlib as _importlib
import sys as _sys
import threading as _threading
from pathlib import Path as _Path

import numpy as _np
import torch as _torch
from PIL import Image as _Image

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]
_FOLDER = _Path(__file__).resolve().parent
# One for all copies of this file, which torch.hub executes anew for each network.
_LOCK = vars(_torch.hub).setdefault("_pruned_resnet18_lock", _threading.Lock())


def _import_project(*names: str) -> list:
    """Import modules of this folder and leave `sys.modules` as it was.

    The caller's program may have modules of the same names (`models`, `data`, ...), imported before
    or after this.
    """
    ours = {path.stem for path in _FOLDER.glob("*.py")}
    ours |= {path.parent.name for path in _FOLDER.glob("*/__init__.py")}

    def take_out() -> dict:
        named = [name for name in list(_sys.modules) if name.partition(".")[0] in ours]
        return {name: _sys.modules.pop(name) for name in named}

    with _LOCK:
        callers = take_out()
        _sys.path.insert(0, str(_FOLDER))
        try:
            return [_importlib.import_module(name) for name in names]
        finally:
            _sys.path.remove(str(_FOLDER))
            take_out()
            _sys.modules.update(callers)


_checkpoint, _data, _models = _import_project("checkpoint", "data", "models")


def _shipped(file: str, description: str):
    """An entry point for a weights file of this folder."""

    def load():
        model, meta = _checkpoint.load(_FOLDER / file)
        model.classes, model.image_size = tuple(meta["classes"]), meta["image_size"]
        model.transform = _transform(meta["image_size"], meta.get("grey", True))
        return model

    load.__doc__ = f"{description}; has `classes`, `image_size` and `transform`."
    return load


pruned_resnet18 = _shipped(
    "pruned_resnet18.pth",
    "ResNet18 of 100,000 parameters for Fashion-MNIST: 28x28, grayscale, 10 classes",
)
pruned_resnet18_stem2 = _shipped(
    "pruned_resnet18-stem2.pth", "The same with a stem of stride 2: more accurate, more computation"
)
pruned_resnet18_stem1 = _shipped(
    "pruned_resnet18-stem1.pth", "The same with a stem of stride 1: the most accurate, the slowest"
)


def resnet18(num_classes: int = 10, stem: int = 4, imagenet: bool = False):
    """A dense ResNet18; `stem` (4, 2 or 1) is the total stride of its first layers."""
    return _models.build("resnet18", num_classes, imagenet, stem).eval()


def resnet50(num_classes: int = 10, stem: int = 4, imagenet: bool = False):
    """A dense ResNet50; see `resnet18`."""
    return _models.build("resnet50", num_classes, imagenet, stem).eval()


def _transform(image_size: int, grey: bool):
    return _Transform(image_size, grey)


class _Transform:
    """Images as the network takes them: float32 (N, 3, H, H) in [-1, 1].

    Takes a PIL image or the path of an image file, which are read as predict.py reads them, or
    pixels of any size, light on dark as those of the training set: a uint8 tensor or array of shape
    (H, W), (N, H, W), (N, 1, H, W), (N, 3, H, W), (H, W, 3) or (N, H, W, 3). Raises TypeError and
    ValueError for others, or what PIL raises.
    """

    def __init__(self, image_size: int, grey: bool):
        self.image_size, self.grey = image_size, grey

    def __call__(self, images) -> _torch.Tensor:
        if isinstance(images, (_Image.Image, str, _Path)):
            images = _data.read_image(images, self.image_size, self.grey)
        else:
            images = _batch(images)
            resized = _data.resize(images.cpu(), self.image_size, self.grey)
            images = resized.to(images.device)
        return _models.normalize(images)

    def __reduce__(self):
        """By this folder: the class belongs to no module that could be imported by name."""
        load = _functools.partial(_torch.hub.load, source="local")
        return load, (str(_FOLDER), "_transform", self.image_size, self.grey)

    def __deepcopy__(self, memo: dict):
        return self  # never changed


def _batch(images) -> _torch.Tensor:
    """Pixels as uint8 (N, H, W) or (N, 3, H, W)."""
    if isinstance(images, _np.ndarray):
        if images.dtype == _np.uint8:
            # A copy, because torch warns of read-only arrays.
            images = _torch.from_numpy(_np.array(images, order="C"))
    elif not isinstance(images, _torch.Tensor):
        kind = type(images).__name__
        raise TypeError(f"a PIL image, a path, a tensor or an array is needed, not a {kind}")
    shape = tuple(images.shape)
    if images.dtype != _torch.uint8:
        raise TypeError(
            f"pixels must be uint8 in 0..255, not {images.dtype}; floats in 0..1: "
            "(images * 255).round().to(torch.uint8)"
        )
    if len(shape) == 3 and shape[0] == 3:
        raise ValueError(
            f"{shape} can be one image in color or three in grayscale: give (1, 3, H, W) or "
            "(3, 1, H, W)"
        )
    if len(shape) in (3, 4) and shape[-1] == 3:  # channels last
        return images.movedim(-1, -3).reshape(-1, 3, *shape[-3:-1])
    if len(shape) == 4 and shape[1] in (1, 3):
        return images[:, 0] if shape[1] == 1 else images
    if len(shape) in (2, 3) and shape[-1] > _data.CHANNELS:
        return images.reshape(-1, *shape[-2:])
    raise ValueError(
        f"{shape}: expected (H, W), (N, H, W) or (N, 1, H, W), in color (H, W, 3), (N, 3, H, W) or "
        "(N, H, W, 3)"
    )
