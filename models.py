"""torchvision's ResNets with stems for small images, and the one inference path."""

import contextlib
import importlib
import os
import sys
import timeit
import types

import torch
from torch import Tensor, nn

import runtime

try:
    import resource
except ImportError:  # Windows has none
    resource = None


def _import_torchvision() -> types.ModuleType:
    """Import torchvision without torch._dynamo, which takes half of a script's start.

    torchvision's detection operators import it only to call is_compile_supported(); a stub module
    defers that import until the call.
    """

    def is_compile_supported(device_type: str) -> bool:
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type)

    names = ("torch._dynamo", "torch._dynamo.utils")
    if not {"torchvision", *names} & sys.modules.keys():
        package, utils = (types.ModuleType(name) for name in names)
        package.utils, utils.is_compile_supported = utils, is_compile_supported
        sys.modules.update(zip(names, (package, utils), strict=True))
        try:
            with contextlib.suppress(ImportError, AttributeError):  # if it needs more: import all
                return importlib.import_module("torchvision")
        finally:
            for name in names:
                del sys.modules[name]
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()

ARCHITECTURES = ("resnet18", "resnet50")
STEMS = (4, 2, 1)  # total stride of the layers before the first block
DEVICES = ("auto", "cuda", "mps", "cpu")


class DeviceError(runtime.UserError):
    """The device asked for is not there."""


class LogitsError(runtime.UserError):
    """A network whose outputs are no numbers."""


def choose_device(wanted: str) -> torch.device:
    """The device by its name, or for "auto" the best there is. Raises DeviceError if missing."""
    there = {
        "cuda": _cuda_works,  # called only if it matters: it takes memory of the GPU
        "mps": lambda: torch.backends.mps.is_available() and runtime.world_size() == 1,
        "cpu": lambda: True,
    }
    if wanted == "auto":
        wanted = next(name for name in there if there[name]())
    elif not there[wanted]():
        raise DeviceError(
            f"--device {wanted}: PyTorch finds none that works on this machine, or none for "
            "several processes; leave --device out to use the best there is"
        )
    torch.backends.cudnn.benchmark = True  # nearly all batches have one shape
    torch.backends.cudnn.allow_tf32 = False  # what is not in bf16 is to be as on the CPU
    return torch.device(wanted)


def _cuda_works() -> bool:
    """Whether anything can be computed there: PyTorch's packages have no kernels for old GPUs, and
    other processes may have used up the memory."""
    try:
        return torch.cuda.is_available() and bool(torch.ones(1, device="cuda").add(1).item())
    except RuntimeError:
        return False


def memory_format(device: torch.device) -> torch.memory_format:
    """Of feature maps, and of the weights of networks in training.

    With channels_last, gradients of BatchNorm and max-pooling are wrong on MPS (pytorch issues
    175189, 175190).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({os.cpu_count()} cores)" if device.type == "cpu" else device.type


def peak_memory_mb(device: torch.device) -> int | None:
    """Peak memory of this process in MB: on the GPU with CUDA, else in main memory (None if the
    system does not report it)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3))  # bytes there, else kB


def bf16_is_faster(device: torch.device) -> bool:
    """Whether to compute in bf16: on a CPU if its matrix products are clearly faster (measured), on
    a GPU if CUDA supports it."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(side: int, dtype: torch.dtype) -> float:
        matrix = torch.ones(side, side, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=8))

    def faster(side: int) -> float:
        return seconds(side, torch.float32) / seconds(side, torch.bfloat16)

    # Small ones first: without units for it bf16 is many times slower, and large ones take seconds.
    return faster(256) > 1 / 8 and faster(768) > 1.5


def build(arch: str, num_classes: int, imagenet: bool = False, stem: int = 4) -> nn.Module:
    """A newly initialized torchvision ResNet, float32.

    `stem` is the total stride of its stem. 4: torchvision's, a 7x7 convolution of stride 2 and a
    max-pool. For small images, 2: a 3x3 convolution of stride 1 and the max-pool, so that all
    feature maps have twice the side; 1: without the max-pool, four times the side. `imagenet`
    loads torchvision's weights, except for the classifier and a stem that is not torchvision's.
    Raises ValueError for an unknown `arch` or `stem`, OSError if the weights are neither cached
    nor can be downloaded.
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
    return model.float()  # whatever the caller's default dtype is


def normalize(images: Tensor) -> Tensor:
    """The networks' input: in [-1, 1] (mean 0.5, std 0.5), three channels, in `memory_format`.

    `images`: (N, H, W) gray or (N, 3, H, W) color, any dtype, in 0..255.
    Returns float32 (N, 3, H, W); gray images become three equal channels.
    """
    if images.dim() == 3:
        images = images.unsqueeze(1)
    images = (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=memory_format(images.device))


@torch.inference_mode()
def infer(
    model: nn.Module, images_u8: Tensor, batch_size: int | None = None, tta: bool = False
) -> Tensor:
    """Logits, float32 (N, classes), of a model in eval mode; `images_u8` as in `normalize`.

    `batch_size`: by default 250, fewer for images of more than 64 pixels a side, because of the
    memory of the feature maps. `tta` averages the logits of each image and its mirror image. The
    model's dtype decides the precision; reported accuracies are from fp32 weights. Raises
    ValueError for images of another size than those of the weights file that `model` is from.
    """
    model.eval()
    here, needed = images_u8.shape[-1], getattr(model, "image_size", images_u8.shape[-1])
    if here != needed:
        raise ValueError(
            f"images of {here} pixels a side for a network trained on {needed}; see data.resize"
        )
    if batch_size is None:
        batch_size = max(1, min(250, 250 * 64 * 64 // (images_u8.shape[-1] * images_u8.shape[-2])))
    parameter = next(model.parameters())

    def logits(batch: Tensor) -> Tensor:
        images = normalize(batch.to(parameter.device)).to(parameter.dtype)
        out = (model(images) + model(images.flip(-1))) / 2 if tta else model(images)
        return out.float()

    return torch.cat([logits(batch) for batch in images_u8.split(batch_size)])


def check_finite(logits: Tensor, source: object) -> Tensor:
    """`logits`. Raises LogitsError if some are infinite or NaN, which have no prediction."""
    if not logits.isfinite().all():
        raise LogitsError(
            f"{source}: gives logits that are not finite, its weights are too large; train it again"
        )
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of rows of `logits` (N, classes) that are largest at `labels` (N,), in 0..1."""
    return (logits.argmax(1) == labels.to(logits.device)).sum().item() / len(labels)


def accuracy_by_class(logits: Tensor, labels: Tensor) -> Tensor:
    """`accuracy` within each class, (classes,); nan for a class that has no images.

    Its `nanmean()` is balanced accuracy, in which a rare class counts as much as a frequent one.
    """
    labels, classes = labels.to(logits.device), logits.shape[1]
    right = labels[logits.argmax(1) == labels]
    return right.bincount(minlength=classes) / labels.bincount(minlength=classes)
