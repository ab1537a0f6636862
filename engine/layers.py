"""The one description of a torchvision ResNet: its layers in the order of computation, the feature
maps that they read and write, and the kernel positions that can matter.

Feature maps are numbered: 0 is the image, n is the output of the n-th layer. Feature maps and
kernels are square.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class Pool(NamedTuple):
    """A max-pool."""

    kernel_size: int
    stride: int
    padding: int

    def windows(self, size: int) -> list[list[tuple[int, int]]]:
        """The pixels (y, x) of a feature map of `size` that each output, row by row, is the largest
        of."""

        def inputs(output: int) -> range:
            start = output * self.stride - self.padding
            return range(max(start, 0), min(start + self.kernel_size, size))

        outputs = itertools.product(range(output_size(self, size)), repeat=2)
        return [[*itertools.product(inputs(y), inputs(x))] for y, x in outputs]


@dataclass(frozen=True)
class Layer:
    """A convolution and what follows it: BatchNorm, the sum with a shortcut, ReLU, max-pool."""

    name: str  # of the convolution
    conv: nn.Conv2d
    norm: nn.Module  # nn.Identity where BatchNorm is folded
    reads: int  # number of a feature map
    writes: int
    adds: int | None = None  # number of the shortcut's feature map, added before the ReLU
    relu: bool = True
    pool: Pool | None = None


def layers(model: nn.Module) -> list[Layer]:
    """All but the classifier, which reads the mean of the last feature map."""
    found: list[Layer] = []

    def add(name: str, conv: nn.Conv2d, norm: nn.Module, reads: int, **options) -> int:
        found.append(Layer(name, conv, norm, reads, len(found) + 1, **options))
        return len(found)

    pool = model.maxpool
    pool = Pool(pool.kernel_size, pool.stride, pool.padding) if hasattr(pool, "stride") else None
    x = add("conv1", model.conv1, model.bn1, 0, pool=pool)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(model.get_submodule(stage)):
            name, inner, shortcut = f"{stage}.{index}", x, x
            *convs, last = [
                (f"{name}.conv{n}", block.get_submodule(f"conv{n}"), block.get_submodule(f"bn{n}"))
                for n in range(1, 4 if hasattr(block, "conv3") else 3)  # Bottleneck or BasicBlock
            ]
            for conv in convs:
                inner = add(*conv, inner)
            if block.downsample is not None:
                shortcut = add(f"{name}.downsample.0", *block.downsample, x, relu=False)
            x = add(*last, inner, adds=shortcut)
    return found


def output_size(layer: nn.Conv2d | Pool, size: int) -> int:
    """Pixels a side of the feature map that `layer` makes of one of `size`."""
    kernel, stride, padding = (
        value[0] if isinstance(value, tuple) else value
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    return (size + 2 * padding - kernel) // stride + 1


def map_sizes(model: nn.Module, image_size: int) -> list[int]:
    """Pixels a side of each feature map, by its number."""
    sizes = [image_size]
    for layer in layers(model):
        size = output_size(layer.conv, sizes[layer.reads])
        sizes.append(output_size(layer.pool, size) if layer.pool else size)
    return sizes


def live_positions(size: int, kernel: int, stride: int, padding: int) -> slice:
    """The kernel positions, along one axis, that meet a feature map of `size` pixels and not only
    its padding."""
    outputs = range((size + 2 * padding - kernel) // stride + 1)
    live = [
        position
        for position in range(kernel)
        if any(0 <= output * stride - padding + position < size for output in outputs)
    ]
    return slice(live[0], live[-1] + 1)


def live_kernel(conv: nn.Conv2d, size: int) -> tuple[slice, ...]:
    """Index of the weights (O, C, K, K) that can matter where `conv` reads `size` x `size`."""
    live = live_positions(size, conv.kernel_size[0], conv.stride[0], conv.padding[0])
    return ..., live, live


def channel_groups(model: nn.Module) -> list[tuple[list[Layer], list[nn.Module]]]:
    """(layers that write, modules that read) for each set of channels.

    Feature maps that are added to each other are one set.
    """
    group, writers, readers = {0: 0}, defaultdict(list), defaultdict(list)
    for layer in layers(model):
        group[layer.writes] = layer.writes if layer.adds is None else group[layer.adds]
        writers[group[layer.writes]].append(layer)
        readers[group[layer.reads]].append(layer.conv)
    readers[group[layer.writes]].append(model.fc)
    return [(writers[number], readers[number]) for number in writers]
