"""The same function with less work: every rewrite is exact, but for rounding.

Of a torchvision ResNet: `trim_` removes kernel positions that see only padding, `trim_channels_`
channels without weights, both until `untrimmed`. `use_matmul_convs_` makes convolutions matrix
products where these are faster. `fold_batchnorm` folds BatchNorm into the convolution before it.
`remove_channels_` removes channels that are unused or always zero.

At 28x28 the feature maps of torchvision's network shrink to 1x1. There, most of a kernel sees only
padding, and a convolution is a matrix product. oneDNN's convolutions, above all their weight
gradients, are much slower.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine import layers

MATMUL_SIZE = 13  # pixels a side of the largest map whose weight gradient is a matrix product
UNFOLDED = 2**24  # bytes of unfolded input at a time: what a cache holds
BLOCK = 16  # channels that onnxruntime computes together; other multiples are slow


# --- kernel positions and channels that cannot matter ---------------------------------------------


def trim_(model: nn.Module, image_size: int) -> nn.Module:
    """Remove, in place, kernel positions that see only padding; `untrimmed` restores the shapes.

    For images of `image_size` pixels a side. A convolution with one output position becomes a
    smaller one without padding: at 28x28, layer4's 3x3 kernels become 2x2 and 1x1. What is removed
    is 62 % of ResNet18's weights, which no step has to clip, update or mask any more.
    """
    sizes = layers.map_sizes(model, image_size)
    for layer in layers.layers(model):
        conv, size = layer.conv, sizes[layer.reads]
        live = conv.weight.detach()[layers.live_kernel(conv, size)]
        if layers.output_size(conv, size) == 1 and live.shape != conv.weight.shape:
            conv.stock = conv.kernel_size[0], conv.padding[0]
            _set_kernel_(conv, live.clone(), 0)
    return model


def trim_channels_(model: nn.Module, multiple: int = 1) -> nn.Module:
    """Remove, in place, channels without weights, but leave a `multiple` of channels; `untrimmed`
    restores the shapes.

    A channel stays if any weight reads or writes it. Channels that are added to each other stay or
    go together.
    """
    for writers, readers in layers.channel_groups(model):
        written = [layer.conv.weight.flatten(1).any(1) for layer in writers]
        kept = torch.stack([*map(_read_channels, readers), *written]).any(0)
        count = int(kept.sum())
        rounded = max(-(-count // multiple), 1) * multiple  # a layer needs a channel
        kept[(~kept).nonzero()[: rounded - count]] = True
        if not kept.all():
            for layer in writers:
                _keep_channels_(layer.conv, 0, kept)
                _keep_channels_(layer.norm, 0, kept)
            for module in readers:
                _keep_channels_(module, 1, kept)
    return model


def remove_channels_(model: nn.Module) -> None:
    """Remove, in place, channels that are unused or always zero from a ResNet without BatchNorm.

    Channels that are added to each other stay or go together. A multiple of BLOCK stays.
    """
    groups = layers.channel_groups(model)
    before = None
    while before != (count := sum(int(p.count_nonzero()) for p in model.parameters())):
        before = count
        for writers, readers in groups:
            convs = [layer.conv for layer in writers]
            read = torch.stack([*map(_read_channels, readers)]).any(0)
            written = torch.stack([c.weight.flatten(1).any(1) | (c.bias > 0) for c in convs]).any(0)
            dead = ~(read & written)
            for conv in convs:
                conv.weight[dead], conv.bias[dead] = 0, 0
            for module in readers:
                module.weight[:, dead] = 0
    trim_channels_(model, BLOCK)


def _read_channels(module: nn.Module) -> Tensor:
    """Which input channels have a weight that is not zero: bool (C,)."""
    return module.weight.transpose(0, 1).flatten(1).any(1)


def untrimmed(model: nn.Module) -> nn.Module:
    """A copy with torchvision's shapes: removed weights are zero, BatchNorm of removed channels is
    as initialized."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for dim in list(getattr(module, "kept_channels", {})):
            _restore_channels_(module, dim)
        if hasattr(module, "stock"):
            kernel, padding = module.stock
            after = kernel - padding - module.kernel_size[0]
            _set_kernel_(module, F.pad(module.weight.detach(), 2 * (padding, after)), padding)
            del module.stock
    return model


def _keep_channels_(module: nn.Module, dim: int, kept: Tensor) -> None:
    """Keep only these of the output (`dim` 0) or input (1) channels."""
    _each_tensor_(module, dim, lambda name, tensor: tensor[(slice(None),) * dim + (kept,)])
    before = getattr(module, "kept_channels", {})
    if dim in before:  # removed channels are in neither mask
        kept = before[dim].masked_scatter(before[dim], kept.to(before[dim].device))
    module.kept_channels = {**before, dim: kept}


def _restore_channels_(module: nn.Module, dim: int) -> None:
    kept = module.kept_channels.pop(dim)

    def whole(name: str, tensor: Tensor) -> Tensor:
        shape = (*tensor.shape[:dim], len(kept), *tensor.shape[dim + 1 :])
        one = isinstance(module, nn.BatchNorm2d) and name in ("weight", "running_var")
        new = tensor.new_full(shape, float(one))
        new[(slice(None),) * dim + (kept.to(new.device),)] = tensor
        return new

    _each_tensor_(module, dim, whole)


def _each_tensor_(module: nn.Module, dim: int, change: Callable[[str, Tensor], Tensor]) -> None:
    """Replace parameters and buffers that have this dimension."""
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        if old.dim() > dim:
            new = change(name, old.detach())
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, name, new)
    _set_sizes_(module)


def _set_sizes_(module: nn.Module) -> None:
    """Let the module's attributes tell the shape of its weight."""
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
        module.kernel_size = tuple(module.weight.shape[2:])


def _set_kernel_(conv: nn.Conv2d, weight: Tensor, padding: int) -> None:
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.padding = padding, padding
    _set_sizes_(conv)


# --- convolutions as matrix products --------------------------------------------------------------


class MatmulConv2d(nn.Conv2d):
    """nn.Conv2d (square, no groups) as matrix products where these are faster.

    The same function and, but for rounding, the same gradients. A training step of 256 images in
    bf16 on two AVX-512/AMX cores, with `trim_`: ResNet18 333 -> 125 to 157 ms, ResNet50 1,160 ->
    390 ms. On large maps unfolding costs more than it saves: a quarter of ResNet18's channels at
    stride 1 takes 400 ms with products on all maps, 275 with oneDNN's gradients on those of 28 and
    14 pixels a side.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        size, weight, bias = x.shape[-1], self.weight, self.bias
        if x.device.type != "cpu":
            return super().forward(x)
        if kernel == 1 and padding == 0:
            x = x.permute(0, 2, 3, 1)[:, ::stride, ::stride]  # in this order its gradient is NHWC
            # As one 2-D product: on 4-D strided input F.linear is a product per row, with copies.
            rows = F.linear(x.reshape(-1, x.shape[-1]), weight.flatten(1), bias)
            return rows.view(*x.shape[:3], -1).permute(0, 3, 1, 2)
        if kernel == size and padding == 0:
            x = x.permute(0, 2, 3, 1).flatten(1)
            weight = weight.permute(0, 2, 3, 1).flatten(1)
            return F.linear(x, weight, bias)[:, :, None, None]
        small = (size + 2 * padding - kernel) // stride + 1 <= MATMUL_SIZE
        if small and bias is None and torch.is_grad_enabled():
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
                x, weight = x.to(dtype), weight.to(dtype)
            return _Conv2dMatmulWeightGrad.apply(x, weight, stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)


class _Conv2dMatmulWeightGrad(torch.autograd.Function):
    """conv2d whose weight gradient is a sum of matrix products over the unfolded input.

    oneDNN's own gradient is much slower on small feature maps. Its threads spin while they wait for
    each other, whatever OpenMP's policy: beside one busy process a step of the stock network took
    26 times as long.
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
    """A copy in eval mode whose BatchNorm is folded into the convolutions: the same function."""
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules()}
    for layer in layers.layers(model):
        if isinstance(layer.norm, nn.BatchNorm2d):
            model.set_submodule(layer.name, fuse_conv_bn_eval(layer.conv, layer.norm))
            model.set_submodule(names[layer.norm], nn.Identity())
    return model


def inference_copy(
    model: nn.Module, device: torch.device, bf16: bool, image_size: int
) -> nn.Module:
    """A copy for fast forward passes: BatchNorm folded, no gradients, bf16 or fp32 weights."""
    model = trim_channels_(trim_(fold_batchnorm(model), image_size))
    model = use_matmul_convs_(model).requires_grad_(False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return model.to(device, dtype, memory_format=torch.channels_last)


def merge_input_channels_(conv: nn.Conv2d) -> None:
    """Three equal input channels become one, with the sum of their weights."""
    _set_kernel_(conv, conv.weight.detach().sum(1, keepdim=True), conv.padding[0])
