"""Teacher and student as torchvision defines them, and the one inference path.

`build` gives torchvision's ResNets, or with a stem of smaller stride. `trim_` and `speed_up_`
change how their convolutions are computed, not what they compute: at 28x28 the maps shrink to 1x1,
where most of a kernel only meets padding, and where a convolution is a matrix product, which
oneDNN's convolutions, above all their weight gradients, do much slower.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


def build(
    arch: str, num_classes: int, imagenet: bool = False, stem: int = 4
) -> torchvision.models.ResNet:
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


def live_taps(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """The kernel taps [first, last) along one axis that meet the map and not only its padding."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    taps = [
        tap
        for tap in range(kernel)
        if any(0 <= out * stride - padding + tap < size for out in range(outputs))
    ]
    return taps[0], taps[-1] + 1


def trim_(model: nn.Module, image_size: int) -> nn.Module:
    """Leave out, in place, kernel taps that only ever meet padding; `untrimmed` is the way back.

    For (square) images of `image_size`. A convolution with one output position becomes the smaller
    one without padding: at 28x28, layer4's 3x3 kernels become 2x2 and 1x1, and with them go 62 % of
    ResNet18's weights, which no step has to clip, update or mask any more.
    """
    sizes = {}
    probe = copy.deepcopy(model).to("meta").eval()
    for name, conv in probe.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(
                lambda _, inputs, output, name=name: sizes.update(
                    {name: (inputs[0].shape[-1], output.shape[-1])}
                )
            )
    first = model.conv1.weight
    shape = (1, first.shape[1], image_size, image_size)
    probe(torch.empty(shape, dtype=first.dtype, device="meta"))
    for name, (size, outputs) in sizes.items():
        conv = model.get_submodule(name)
        kernel, padding = conv.kernel_size[0], conv.padding[0]
        low, high = live_taps(size, kernel, conv.stride[0], padding)
        if outputs == 1 and high - low < kernel:
            _set_kernel_(conv, conv.weight.detach()[:, :, low:high, low:high].clone(), 0)
            conv.stock = kernel, padding
    return model


def untrimmed(model: nn.Module) -> nn.Module:
    """A copy with torchvision's shapes; taps that `trim_` left out are zero."""
    model = copy.deepcopy(model)
    for conv in model.modules():
        if hasattr(conv, "stock"):
            kernel, padding = conv.stock
            after = kernel - padding - conv.kernel_size[0]
            _set_kernel_(conv, F.pad(conv.weight.detach(), 2 * (padding, after)), padding)
            del conv.stock
    return model


def _set_kernel_(conv: nn.Conv2d, weight: Tensor, padding: int) -> None:
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.kernel_size, conv.padding = tuple(weight.shape[2:]), (padding, padding)


class MatmulConv2d(nn.Conv2d):
    """nn.Conv2d (square, no groups) whose work is left to matrix products where they win.

    The same function and, but for rounding, the same gradients. A training step of 256 images in
    bf16 on two AVX-512/AMX cores, with `trim_`: ResNet18 333 -> 125 to 157 ms, ResNet50 1,160 ->
    390 ms.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        size, weight, bias = x.shape[-1], self.weight, self.bias
        if x.device.type != "cpu":
            return super().forward(x)
        if kernel == 1 and padding == 0:
            x = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
            # As one 2-D product: on 4-D strided input F.linear is a product per row, with copies.
            rows = F.linear(x.reshape(-1, x.shape[-1]), weight.flatten(1), bias)
            return rows.view(*x.shape[:3], -1).permute(0, 3, 1, 2)
        if kernel == size and padding == 0:
            x = x.permute(0, 2, 3, 1).flatten(1)
            weight = weight.permute(0, 2, 3, 1).flatten(1)
            return F.linear(x, weight, bias)[:, :, None, None]
        if torch.is_grad_enabled() and bias is None:
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
                x, weight = x.to(dtype), weight.to(dtype)
            return _Conv2dMatmulWeightGrad.apply(x, weight, stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)


class _Conv2dMatmulWeightGrad(torch.autograd.Function):
    """conv2d whose weight gradient is one matrix product over the unfolded input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        stride, padding, kernel = ctx.stride, ctx.padding, weight.shape[-1]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        patches = pixels.unfold(1, kernel, stride).unfold(2, kernel, stride)  # n h w c kh kw
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel * kernel * x.shape[1])
        grad_weight = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]).t() @ patches
        grad_weight = grad_weight.view(weight.shape[0], kernel, kernel, -1).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None


def speed_up_(model: nn.Module) -> nn.Module:
    """Make the convolutions of a torchvision ResNet `MatmulConv2d`; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = MatmulConv2d
    return model


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # each process's loss depends on every x
        return _MeanOverProcesses.forward(ctx, grad)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all processes together (nn.SyncBatchNorm needs GPUs).

    Each process must have the same number of images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(self.weight.dtype)
        mean = _MeanOverProcesses.apply(values.mean((0, 2, 3)))
        centered = values - mean[:, None, None]
        variance = _MeanOverProcesses.apply(centered.square().mean((0, 2, 3)))
        with torch.no_grad():
            n = dist.get_world_size() * x.numel() / x.shape[1]
            # update_bn asks for plain averages by setting the momentum to None
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batchnorm_(model: nn.Module) -> nn.Module:
    """Make every BatchNorm a `SyncBatchNorm2d`; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose convolutions do their BatchNorm's work: the same function.

    In a torchvision ResNet each BatchNorm is defined right behind the convolution it follows.
    """
    model = copy.deepcopy(model).eval()
    conv_name = conv = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            conv_name, conv = name, module
        elif isinstance(module, nn.BatchNorm2d):
            model.set_submodule(conv_name, fuse_conv_bn_eval(conv, module))
            model.set_submodule(name, nn.Identity())
    return model
