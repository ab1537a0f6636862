"""Teacher and student as torchvision defines them, and the one inference path."""

import contextlib
import importlib
import sys
import types

import torch
from torch import Tensor, nn


def _import_torchvision() -> types.ModuleType:
    """torchvision, whose operators for detection import all of torch.compile, half of a script's
    start, to ask one question; here they do so when they ask it."""

    def is_compile_supported(device_type: str) -> bool:
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type)

    names = ("torch._dynamo", "torch._dynamo.utils")
    if not {"torchvision", *names} & sys.modules.keys():
        package, utils = (types.ModuleType(name) for name in names)
        package.utils, utils.is_compile_supported = utils, is_compile_supported
        sys.modules.update(zip(names, (package, utils), strict=True))
        try:
            with contextlib.suppress(ImportError, AttributeError):  # it asks for more: so be it
                return importlib.import_module("torchvision")
        finally:
            for name in names:
                del sys.modules[name]
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()

ARCHITECTURES = ("resnet18", "resnet50")
STEMS = (4, 2, 1)  # total stride of the layers before the first block
DEVICES = ("auto", "cuda", "mps", "cpu")


class DeviceError(Exception):
    """The device asked for is not there; the message is one line for the user."""


def choose_device(wanted: str) -> torch.device:
    """The device named, or for "auto" the best there is. Raises DeviceError if it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name in there if there[name])
    if not there[wanted]:
        raise DeviceError(f"--device {wanted}: there is none on this machine")
    return torch.device(wanted)


def build(arch: str, num_classes: int, imagenet: bool = False, stem: int = 4) -> nn.Module:
    """A freshly initialised torchvision ResNet.

    `stem` is the total stride of its first layers. 4: torchvision's, a convolution of 7x7 with
    stride 2 and a max-pool. For small images, 2: a convolution of 3x3 with stride 1 and the
    max-pool, so that all maps have twice the side; 1: without the max-pool, four times the side.
    `imagenet` starts from torchvision's weights, but for the classifier and a stem that is not
    torchvision's. Raises ValueError for an unknown `arch` or `stem`, OSError if the weights are
    neither cached nor can be downloaded.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}, expected one of {ARCHITECTURES}")
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}, expected one of {STEMS}")
    if imagenet:
        model = getattr(torchvision.models, arch)(weights="IMAGENET1K_V1")
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    else:
        model = getattr(torchvision.models, arch)(num_classes=num_classes)
    if stem < 4:
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == 1:
        model.maxpool = nn.Identity()
    return model


def normalize(images: Tensor) -> Tensor:
    """What the networks take: [-1, 1] (mean 0.5, std 0.5), three channels, channels_last.

    `images`: (N, H, W) grey or (N, 3, H, W) colour, any dtype, in 0..255.
    Returns float32 (N, 3, H, W); grey images become three equal channels.
    """
    if images.dim() == 3:
        images = images.unsqueeze(1)
    images = (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def infer(model: nn.Module, images_u8: Tensor, batch_size: int = 250, tta: bool = False) -> Tensor:
    """Logits, float32 (N, classes), of a model in eval mode; `images_u8` as in `normalize`.

    `tta` averages the logits of each image and its mirror image. The model's dtype decides the
    precision; accuracies that are reported come from fp32 weights.
    """
    model.eval()
    parameter = next(model.parameters())

    def logits(batch: Tensor) -> Tensor:
        images = normalize(batch.to(parameter.device)).to(parameter.dtype)
        out = (model(images) + model(images.flip(-1))) / 2 if tta else model(images)
        return out.float()

    return torch.cat([logits(batch) for batch in images_u8.split(batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` (N, classes) whose largest entry is at `labels` (N,), in 0..1."""
    return (logits.argmax(1) == labels.to(logits.device)).sum().item() / len(labels)
