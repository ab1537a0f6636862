"""The same function with less work: every rewrite is exact, but for rounding.

Of a torchvision ResNet: `trim_` leaves out kernel taps that only ever meet padding,
`trim_channels_` channels without weights, both until `untrimmed`; `speed_up_` makes convolutions
matrix products where these win, `fold_batchnorm` folds BatchNorm into the convolution before it,
`remove_channels_` removes channels that nobody reads or that are always zero. At 28x28 the maps of
the stock network shrink to 1x1, where most of a kernel only meets padding, and where a convolution
is a matrix product, which oneDNN's convolutions, above all their weight gradients, do much slower.
"""

import copy
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

UNFOLDED = 2**24  # bytes of unfolded input at a time: what a cache holds
BLOCK = 16  # channels that onnxruntime computes together; it is slow with other numbers of them


# --- taps and channels that cannot matter ---------------------------------------------------------


def output_size(layer: nn.Module, size: int) -> int:
    """Side of the (square) map that a convolution or max-pool makes of one of `size`."""
    if isinstance(layer, nn.Identity):
        return size
    kernel, stride, padding = (
        value[0] if isinstance(value, tuple) else value
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    return (size + 2 * padding - kernel) // stride + 1


def input_sizes(model: nn.Module, image_size: int) -> dict[str, int]:
    """Side of the map that each convolution of a torchvision ResNet reads, by its name."""
    found = {"conv1": image_size}
    size = output_size(model.maxpool, output_size(model.conv1, image_size))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(model.get_submodule(stage)):
            if block.downsample is not None:
                found[f"{stage}.{index}.downsample.0"] = size
            for name, conv in block.named_children():
                if name.startswith("conv"):
                    found[f"{stage}.{index}.{name}"] = size
                    size = output_size(conv, size)
    return found


def live_positions(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
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
    for name, size in input_sizes(model, image_size).items():
        conv = model.get_submodule(name)
        kernel, padding = conv.kernel_size[0], conv.padding[0]
        low, high = live_positions(size, kernel, conv.stride[0], padding)
        if output_size(conv, size) == 1 and high - low < kernel:
            _set_kernel_(conv, conv.weight.detach()[:, :, low:high, low:high].clone(), 0)
            conv.stock = kernel, padding
    return model


def trim_channels_(model: nn.Module) -> nn.Module:
    """Leave out, in place, channels that no weight reads or writes; `untrimmed` is the way back.

    Channels that are added to each other come and go together.
    """
    norms = dict(_followed_by_norms(model))
    for writers, readers in channel_groups(model):
        written = [layer.weight.flatten(1).any(1) for layer in writers]
        there = torch.stack([_by_input(layer) for layer in readers] + written).any(0)
        there[0] |= not there.any()  # a layer without channels is none
        if not there.all():
            for layer in writers + [norms[layer] for layer in writers if layer in norms]:
                _keep_channels_(layer, 0, there)
            for layer in readers:
                _keep_channels_(layer, 1, there)
    return model


def untrimmed(model: nn.Module) -> nn.Module:
    """A copy with torchvision's shapes; weights that were left out are zero, BatchNorm of channels,
    whose output nobody reads, is as initialised."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        for dim in list(getattr(layer, "there", {})):
            _restore_channels_(layer, dim)
        if hasattr(layer, "stock"):
            kernel, padding = layer.stock
            after = kernel - padding - layer.kernel_size[0]
            _set_kernel_(layer, F.pad(layer.weight.detach(), 2 * (padding, after)), padding)
            del layer.stock
    return model


def _keep_channels_(layer: nn.Module, dim: int, there: Tensor) -> None:
    """Leave a layer only these of its output (`dim` 0) or input (1) channels."""
    _each_tensor_(layer, dim, lambda name, tensor: tensor[(slice(None),) * dim + (there,)])
    before = getattr(layer, "there", {})
    if dim in before:  # of those that were there
        there = before[dim].masked_scatter(before[dim], there)
    layer.there = {**before, dim: there}


def _restore_channels_(layer: nn.Module, dim: int) -> None:
    there = layer.there.pop(dim)

    def whole(name: str, tensor: Tensor) -> Tensor:
        shape = (*tensor.shape[:dim], len(there), *tensor.shape[dim + 1 :])
        one = isinstance(layer, nn.BatchNorm2d) and name in ("weight", "running_var")
        new = tensor.new_full(shape, float(one))
        new[(slice(None),) * dim + (there.to(new.device),)] = tensor
        return new

    _each_tensor_(layer, dim, whole)


def _each_tensor_(layer: nn.Module, dim: int, change: Callable[[str, Tensor], Tensor]) -> None:
    """Replace a layer's parameters and buffers that have this dimension."""
    for name, old in [*layer.named_parameters(), *layer.named_buffers()]:
        if old.dim() > dim:
            new = change(name, old.detach())
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(layer, name, new)


def _set_kernel_(conv: nn.Conv2d, weight: Tensor, padding: int) -> None:
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.kernel_size, conv.padding = tuple(weight.shape[2:]), (padding, padding)


# --- convolutions as matrix products --------------------------------------------------------------


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
    """conv2d whose weight gradient is a sum of matrix products over the unfolded input.

    oneDNN's own gradient is no faster, and much slower on small maps. Its threads wait for each
    other by spinning, whatever OpenMP's policy: beside one busy process a step took 30 times as
    long.
    """

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
        patches, grad = patches.permute(0, 1, 2, 4, 5, 3), grad.permute(0, 2, 3, 1)
        images = max(1, UNFOLDED // (patches[0].numel() * x.element_size()))
        exact = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros(weight.shape[0], patches[0, 0, 0].numel(), dtype=exact)
        for some, theirs in zip(grad.split(images), patches.split(images), strict=True):
            rows = theirs.reshape(-1, grad_weight.shape[1])
            grad_weight += some.reshape(-1, weight.shape[0]).t() @ rows
        grad_weight = grad_weight.to(weight.dtype)
        grad_weight = grad_weight.view(weight.shape[0], kernel, kernel, -1).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None


def use_matmul_convs_(model: nn.Module) -> nn.Module:
    """Make the convolutions of a torchvision ResNet `MatmulConv2d`; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = MatmulConv2d
    return model


# --- BatchNorm ------------------------------------------------------------------------------------


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose convolutions do their BatchNorm's work: the same function.

    In a torchvision ResNet each BatchNorm is defined right behind the convolution it follows.
    """
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    for conv, norm in _followed_by_norms(model):
        model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        model.set_submodule(names[norm], nn.Identity())
    return model


def _followed_by_norms(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, its BatchNorm)."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    return [(a, b) for a, b in itertools.pairwise(layers) if isinstance(b, nn.BatchNorm2d)]


def inference_copy(
    model: nn.Module, device: torch.device, bf16: bool, image_size: int
) -> nn.Module:
    """A copy for fast forward passes only: BatchNorm folded, no gradients, all in bf16 or fp32."""
    model = trim_channels_(trim_(fold_batchnorm(model), image_size))
    model = use_matmul_convs_(model).requires_grad_(False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return model.to(device, dtype, memory_format=torch.channels_last)


# --- channels -------------------------------------------------------------------------------------


def remove_channels_(model: nn.Module) -> None:
    """Remove channels that nobody reads or that are always zero from a folded ResNet.

    Channels that are added to each other (those of the stem and all blocks of a stage) come and go
    together. As many stay as make the number a multiple of BLOCK.
    """
    groups = channel_groups(model)
    while True:
        before = sum(int(m.weight.count_nonzero()) for m in _layers(model))
        for writers, readers in groups:
            read = torch.stack([_by_input(reader) for reader in readers]).any(0)
            written = torch.stack([w.weight.flatten(1).any(1) | (w.bias > 0) for w in writers]).any(
                0
            )
            alive = read & written
            for writer in writers:
                writer.weight[~alive], writer.bias[~alive] = 0, 0
            for reader in readers:
                reader.weight[:, ~alive] = 0
        if before == sum(int(m.weight.count_nonzero()) for m in _layers(model)):
            break
    for writers, readers in groups:
        alive = torch.stack([_by_input(reader) for reader in readers]).any(0)
        count = int(alive.sum())
        rounded = max(math.ceil(count / BLOCK), 1) * BLOCK  # a layer without channels is none
        alive[(~alive).nonzero()[: rounded - count]] = True
        for writer in writers:
            replace_(writer, writer.weight[alive], writer.bias[alive])
        for reader in readers:
            replace_(reader, reader.weight[:, alive], reader.bias)


def channel_groups(model: nn.Module) -> list[tuple[list[nn.Module], list[nn.Module]]]:
    """(layers that write, layers that read) for each set of channels of a ResNet."""
    groups, writers, readers = [], [model.conv1], []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            convs = [module for name, module in block.named_children() if name[:4] == "conv"]
            readers.append(convs[0])
            if block.downsample is not None:
                readers.append(block.downsample[0])
                groups.append((writers, readers))
                writers, readers = [block.downsample[0]], []
            groups += [([a], [b]) for a, b in itertools.pairwise(convs)]
            writers.append(convs[-1])
    groups.append((writers, [*readers, model.fc]))
    return groups


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _by_input(layer: nn.Module) -> Tensor:
    """Which input channels have a weight that is not zero."""
    return layer.weight.transpose(0, 1).flatten(1).any(1)


def replace_(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give `layer` other weights, of any shape."""
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
        layer.kernel_size = tuple(weight.shape[2:])
    else:
        layer.out_features, layer.in_features = weight.shape
