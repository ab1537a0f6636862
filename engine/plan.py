"""What a pruned network computes, as a list of sparse products: what `inference.py` compiles and
`c_source.py` writes as C.

Each convolution is one loop over its weights that are not zero, output channel by output channel:
each weight adds its multiple of a shifted input map. BatchNorm is folded in, taps that only ever
meet padding are left out, equal input channels are one.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import prune
from engine import rewrite

MAX_IMAGE_SIZE = 64  # pixels a side of the images for `inference.py`, whose code has every position
MAX_DENSITY = 1 / 4  # of the weights that meet a map: with more, dense products are as fast


@dataclass(frozen=True)
class Map:
    """Activations of a tile of images: (channels, phases, phases, side, side) with a zero border.

    What a convolution of stride s reads for neighbouring outputs is side by side if there are s
    phases: (i, j) has every s-th pixel of every s-th row, from pixel j and row i on. All places are
    counted in cells, each of which holds one value of every image of the tile.
    """

    base: int  # where it begins in the scratch memory
    channels: int
    size: int
    border: int
    phases: int = 1

    @property
    def side(self) -> int:
        return -(-(self.size + 2 * self.border) // self.phases)

    @property
    def stride(self) -> int:
        return (self.phases * self.side) ** 2

    def at(self, y: int, x: int) -> int:
        """Offset of a pixel in its channel; the border is at negative places."""
        (y, i), (x, j) = (divmod(v + self.border, self.phases) for v in (y, x))
        return ((i * self.phases + j) * self.side + y) * self.side + x


@dataclass(frozen=True)
class Pool:
    """Maxima of a map's windows of `kernel` x `kernel` positions, `stride` apart."""

    target: Map
    kernel: int
    stride: int
    padding: int

    def windows(self, source: Map) -> list[tuple[int, list[int]]]:
        """(offset of an output, offsets of the inputs within the map that it is the largest of)."""
        places = itertools.product(range(self.target.size), repeat=2)
        return [
            (self.target.at(*place), [source.at(*at) for at in self._window(source.size, *place)])
            for place in places
        ]

    def _window(self, size: int, y: int, x: int) -> list[tuple[int, int]]:
        rows, columns = (
            [tap + v * self.stride - self.padding for tap in range(self.kernel)] for v in (y, x)
        )
        return [
            (r, c)
            for r, c in itertools.product(rows, columns)
            if 0 <= min(r, c) <= max(r, c) < size
        ]


Vector = tuple[int, int, tuple[int, ...]]  # in, out, cells from there on that are meant


@dataclass
class Product:
    """target[o, out] (+)= bias[o] + sum over the row's weights w at tap t: w * source[t + in].

    Rows are output channels; `first`, `taps` and `values` are their weights that are not zero, as
    in a CSR matrix. With `pool`, the rows share one map, of which maxima go on. With `copy`, the
    weights are the identity's, and only the layout changes.
    """

    name: str  # of the layer
    source: Map
    target: Map
    vectors: tuple[Vector, ...]
    first: Tensor  # int32 (rows + 1,)
    taps: Tensor  # int32 (weights,)
    values: Tensor  # float32 (weights,)
    bias: Tensor  # float32 (rows,)
    add: bool = False  # onto what is in target
    relu: bool = False
    pool: Pool | None = None
    copy: bool = False
    unroll: int = 1  # weights at a time; rows are filled up with zeros

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What differs from one network to another of the same shape."""
        return self.first, self.taps, self.values, self.bias

    @property
    def shape(self) -> tuple:
        """All that its code depends on, beside where the maps are."""
        options = self.add, self.relu, self.unroll, self.pool
        return len(self.bias), self.vectors, self.target.stride, *options


def _vectors(source: Map, target: Map, step: int, positions: int) -> tuple[Vector, ...]:
    """As few vectors as cover all positions of `target`, which are `step` apart in `source`."""
    vectors: list[Vector] = []
    for y, x in itertools.product(range(target.size), repeat=2):
        read, written = (y * source.side + x) * step, target.at(y, x)
        if vectors:
            begin, to, cells = vectors[-1]
            if read - begin == written - to < positions:
                vectors[-1] = begin, to, (*cells, read - begin)
                continue
        vectors.append((read, written, (0,)))
    return tuple(vectors)


def product(
    name: str,
    weight: Tensor,
    bias: Tensor,
    source: Map,
    target: Map,
    stride: int,
    padding: int,
    positions: int = 1,
    **options,
) -> Product:
    """A convolution with `weight` (O, C, K, K) from `source` to `target`, in vectors of at most
    `positions`."""
    vectors = _vectors(source, target, stride // source.phases, positions)
    # With few vectors a register would wait for its own last sum: several sums take turns.
    unroll = 4 if len(vectors) == 1 else 2 if len(vectors) <= 4 else 1
    kernel = weight.shape[-1]
    low, high = rewrite.live_positions(source.size, kernel, stride, padding)
    live = torch.zeros_like(weight)
    live[:, :, low:high, low:high] = weight[:, :, low:high, low:high]
    o, c, ky, kx = live.nonzero(as_tuple=True)
    counts = torch.bincount(o, minlength=len(weight))
    first = torch.cat([torch.zeros(1).long(), (-(-counts // unroll) * unroll).cumsum(0)])
    place = first[o] + torch.arange(len(o)) - (counts.cumsum(0) - counts)[o]
    span = range(kernel)
    within = torch.tensor([[source.at(y - padding, x - padding) for x in span] for y in span])
    taps = within[low, low].repeat(int(first[-1]))  # of the zeros that fill up a row
    taps[place] = c * source.stride + within[ky, kx]
    values = torch.zeros(len(taps))
    values[place] = live[o, c, ky, kx]
    rows = first.int(), taps.int(), values, bias.clone()
    return Product(name, source, target, vectors, *rows, unroll=unroll, **options)


def sparse_is_faster(model: nn.Module, image_size: int, device: torch.device) -> bool:
    """Whether skipping the zeros is faster than multiplying them: for few weights, on the CPU."""
    if device.type != "cpu" or image_size > MAX_IMAGE_SIZE:
        return False
    live = 0.0
    for name, size in rewrite.input_sizes(model, image_size).items():
        conv = model.get_submodule(name)
        kernel = conv.kernel_size[0]
        low, high = rewrite.live_positions(size, kernel, conv.stride[0], conv.padding[0])
        live += conv.weight.numel() * ((high - low) / kernel) ** 2
    return sum(int(w.count_nonzero()) for w in prune.weights(model).values()) < MAX_DENSITY * live


class Plan:
    """A torchvision ResNet as a list of products, and the memory that they work in.

    A tile has `images` images, a vector one value of each at up to `positions` positions.
    """

    def __init__(
        self, model: nn.Module, image_size: int, channels: int, images: int, positions: int
    ):
        model = rewrite.fold_batchnorm(model).cpu().float().requires_grad_(False)
        self.images, self.positions = images, positions
        self.cells = 0  # of memory
        self.products: list[Product] = []
        self._middle: dict[tuple[int, ...], Map] = {}
        self._splits: dict[int, Map] = {}  # of a block, by the place of what was copied
        phases = model.conv1.stride[0] if positions > 1 else 1
        self.image = self._map(channels, image_size, model.conv1.padding[0], phases)
        places = itertools.product(range(image_size), repeat=2)
        self.pixels = torch.tensor([self.image.at(*p) for p in places], dtype=torch.int32)
        x = self._stem(model, channels)
        for stage in range(1, 5):
            for index, block in enumerate(model.get_submodule(f"layer{stage}")):
                x = self._block(f"layer{stage}.{index}", block, x)
        # The mean over the last map is left to the classifier: each pixel has its share.
        weight = model.fc.weight[:, :, None, None].expand(-1, -1, x.size, x.size) / x.size**2
        self.logits = self._map(len(weight), 1, 0)
        self._product("fc", weight, model.fc.bias, x, self.logits, 1, 0)

    @property
    def tables(self) -> list[Tensor]:
        """What differs from one network to another of the same shape."""
        return [self.pixels, *(table for p in self.products for table in p.tables)]

    @property
    def shape(self) -> tuple:
        """All that its code depends on."""
        products = tuple((p.source, p.target, p.shape) for p in self.products)
        return self.images, self.positions, self.image, self.logits, products

    @property
    def multiply_adds(self) -> int:
        """For one image: each weight times the positions it is used at."""
        return sum(int(p.values.count_nonzero()) * p.target.size**2 for p in self.products)

    def _map(self, channels: int, size: int, border: int, phases: int = 1) -> Map:
        new = Map(self.cells, channels, size, border, phases)
        self.cells += channels * new.stride
        return new

    def _product(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor,
        source: Map,
        target: Map,
        stride: int,
        padding: int,
        **options,
    ) -> None:
        args = weight, bias, source, target, stride, padding, self.positions
        self.products.append(product(name, *args, **options))

    def _conv(self, name: str, conv: nn.Conv2d, source: Map, target: Map, **options) -> None:
        stride, padding = conv.stride[0], conv.padding[0]
        if self.positions > 1 and stride > source.phases:  # a copy, so that vectors can be read
            if source.base not in self._splits:
                split = self._map(source.channels, source.size, source.border, stride)
                same = torch.eye(source.channels)[:, :, None, None], torch.zeros(source.channels)
                self._product(f"{name}.input", *same, source, split, 1, 0, copy=True)
                self._splits[source.base] = split
            source = self._splits[source.base]
        self._product(name, conv.weight, conv.bias, source, target, stride, padding, **options)

    def _stem(self, model: nn.Module, channels: int) -> Map:
        conv, pool = model.conv1, model.maxpool
        if channels == 1:  # three equal channels are one, with the sum of their weights
            conv.weight = nn.Parameter(conv.weight.sum(1, keepdim=True), requires_grad=False)
        size = rewrite.output_size(conv, self.image.size)
        if isinstance(pool, nn.Identity):
            target = self._map(conv.out_channels, size, 1)
            self._conv("conv1", conv, self.image, target, relu=True)
            return target
        target = self._map(conv.out_channels, rewrite.output_size(pool, size), 1)
        # Each channel goes through the pool before the next is made. After the ReLU, a border of
        # zeros is as good as none.
        one = self._map(1, size, pool.padding)
        pooled = Pool(target, pool.kernel_size, pool.stride, pool.padding)
        self._conv("conv1", conv, self.image, one, relu=True, pool=pooled)
        return target

    def _block(self, name: str, block: nn.Module, x: Map) -> Map:
        """A BasicBlock or Bottleneck; its last convolution adds to what the shortcut left."""
        convs = [
            (f"{name}.{child}", module)
            for child, module in block.named_children()
            if child.startswith("conv")
        ]
        self._splits.clear()
        size, source = x.size, x
        for index, (conv_name, conv) in enumerate(convs[:-1]):
            size = rewrite.output_size(conv, size)
            key = index, conv.out_channels, size
            if key not in self._middle:
                self._middle[key] = self._map(conv.out_channels, size, int(size > 1))
            self._conv(conv_name, conv, source, self._middle[key], relu=True)
            source = self._middle[key]
        target = x
        if block.downsample is not None:
            target = self._map(convs[-1][1].out_channels, size, int(size > 1))
            self._conv(f"{name}.downsample", block.downsample[0], x, target)
        self._conv(*convs[-1], source, target, relu=True, add=True)
        return target
