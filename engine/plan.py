"""A pruned network as a list of sparse products: `inference.py` compiles it, `c_source.py` writes
it as C.

Each convolution is a loop over its non-zero weights, output channel by output channel (README.md
has the loops around it): each weight adds its multiple of a shifted input feature map. BatchNorm is
folded in, kernel positions that see only padding are left out, identical input channels are merged.
"""

import copy
import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import layers, rewrite

MAX_IMAGE_SIZE = 64  # pixels a side of the images for `inference.py`, whose code has every position
# The most multiply-adds with which skipping zeros is faster than dense products, in fp32 and in
# bf16: this part of the dense network's, and so many for each activation on feature maps of at
# least so many pixels. A dense network of few channels spends most of its time on these, so that
# it can be slower even without zeros (measured in fp32 only).
MAX_MAC_RATIO = 1 / 4, 1 / 6
ACTIVATION_MACS = 75, 50
ACTIVATION_PIXELS = 16
# A part of the input channels is to stay in the L1 cache, 32 or 48 kB, while all rows add its
# weights. Each part reads and writes the sums once more, so a row must have some weights in it.
L1_BYTES = 36_000
PART_WEIGHTS = 6
PIECE = 28  # positions at a time, with 32 registers


@dataclass(frozen=True)
class FeatureMap:
    """Activations of a tile of images: (channels, phases, phases, side, side) with a zero border.

    A convolution of stride s reads every s-th pixel. These are neighbors if there are s phases:
    phase (i, j) has every s-th pixel of every s-th row, from row i and pixel j on. Without phases a
    border is shared: that to the right of a row is that to the left of the next, and that below a
    channel is that above the next. Offsets are counted in cells; a cell holds one value of each
    image of the tile.
    """

    base: int  # offset in the scratch memory; until all are known, a number
    channels: int
    size: int  # pixels a side
    border: int
    phases: int = 1

    @property
    def side(self) -> int:
        borders = 1 if self.phases == 1 else 2
        return -(-(self.size + borders * self.border) // self.phases)

    @property
    def stride(self) -> int:
        """Cells of a channel."""
        return (self.phases * self.side) ** 2

    @property
    def cells(self) -> int:
        after = self.border * (self.side + 1) if self.phases == 1 else 0  # the last channel
        return self.channels * self.stride + after

    @property
    def zeros(self) -> list[int]:
        """Offsets of the border of a channel, which is above it and to its left."""
        pixels = itertools.product(range(self.size), repeat=2)
        return sorted({*range(self.stride)} - {self.at(*pixel) for pixel in pixels})

    def at(self, y: int, x: int) -> int:
        """Offset of a pixel in its channel; the border has negative coordinates."""
        (y, i), (x, j) = (divmod(v + self.border, self.phases) for v in (y, x))
        return ((i * self.phases + j) * self.side + y) * self.side + x


class Vector(NamedTuple):
    """Positions that are computed together."""

    read: int  # offset in the source, added to that of a weight
    write: int  # offset in the target
    cells: tuple[int, ...]  # from `write` on; the others between them belong to the border


class SparseWeight(NamedTuple):
    """The values of a weight (O, C, K, K) that are not zero."""

    shape: torch.Size
    places: Tensor  # int32 (values,): indices into the flattened weight
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "SparseWeight":
        flat = weight.detach().flatten()
        places = flat.nonzero().squeeze(1)
        return cls(weight.shape, places.int(), flat[places])


@dataclass
class Product:
    """target[o, write] (+)= bias[o] + sum over the weights w of row o: w * source[offset + read].

    Rows are output channels. `starts`, `offsets` and `values` are their non-zero weights, as in a
    CSR matrix: one for each part of the input channels, one after the other. With `pool`, all rows
    share the one channel of `target`, and the max-pool writes each to `pooled`. With `copy`, the
    weights are an identity, and only the layout changes.
    """

    name: str  # of the layer
    source: FeatureMap
    target: FeatureMap
    vectors: tuple[Vector, ...]
    starts: Tensor  # int32 (parts * rows + 1,)
    offsets: Tensor  # int32 (weights,)
    values: Tensor  # float32 (weights,)
    bias: Tensor  # float32 (rows,)
    add: bool = False  # to the values in target
    relu: bool = False
    pool: layers.Pool | None = None
    pooled: FeatureMap | None = None
    copy: bool = False
    unroll: int = 1  # weights at a time; rows are padded with zeros

    parts: Tensor = field(init=False)  # int32 (1,): how many

    def __post_init__(self):
        count = (len(self.starts) - 1) // len(self.bias)
        self.parts = torch.tensor([count], dtype=torch.int32)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All that differs between networks of one shape."""
        return self.starts, self.offsets, self.values, self.bias, self.parts

    @property
    def split(self) -> bool:
        return int(self.parts) > 1

    @property
    def shape(self) -> tuple:
        """All that its code depends on, except where the feature maps are."""
        options = self.add, self.relu, self.unroll, self.pool, self.pooled, self.split
        return len(self.bias), self.vectors, self.target.stride, *options


def _vectors(
    source: FeatureMap, target: FeatureMap, step: int, positions: int
) -> tuple[Vector, ...]:
    """The fewest vectors that cover all positions of `target`; these are `step` apart in
    `source`."""
    vectors: list[Vector] = []
    for y, x in itertools.product(range(target.size), repeat=2):
        read, write = (y * source.side + x) * step, target.at(y, x)
        if vectors:
            last = vectors[-1]
            if read - last.read == write - last.write < positions:
                vectors[-1] = last._replace(cells=(*last.cells, read - last.read))
                continue
        vectors.append(Vector(read, write, (0,)))
    return tuple(vectors)


def product(
    name: str,
    weight: SparseWeight,
    bias: Tensor,
    source: FeatureMap,
    target: FeatureMap,
    stride: int,
    padding: int,
    images: int = 1,
    positions: int = 1,
    **options,
) -> Product:
    """A convolution with `weight` and `bias` (O,) from `source` to `target`, for tiles of `images`
    images, in vectors of at most `positions` positions; `options` are fields of Product."""
    vectors = _vectors(source, target, stride // source.phases, positions)
    # With few vectors a register would wait for its own last sum: several sums take turns.
    unroll = 4 if len(vectors) == 1 else 2 if len(vectors) <= 4 else 1
    rows, channels, kernel, _ = weight.shape
    live = layers.live_positions(source.size, kernel, stride, padding)
    places = weight.places.long()
    ky, kx = places // kernel % kernel, places % kernel
    used = (ky >= live.start) & (ky < live.stop) & (kx >= live.start) & (kx < live.stop)
    places, ky, kx = places[used], ky[used], kx[used]
    o, c = places // (channels * kernel**2), places // kernel**2 % channels
    parts = 1
    if images > 1 and "pool" not in options:
        lines = -(-PIECE // target.size)  # of the output's pixels, computed together
        lines = min((lines - 1) * stride + kernel, source.side)  # of the input's, read for them
        size = 4 * images * len(c.unique()) * lines * source.side
        parts = max(1, min(round(size / L1_BYTES), len(o) // (PART_WEIGHTS * rows)))
    # Each part has about as many weights: those up to and with a channel's tell which it is in.
    part = (c.bincount().cumsum(0)[c] - 1) * parts // max(len(c), 1)
    row, order = (part * rows + o).sort(stable=True)
    c, ky, kx, values_used = c[order], ky[order], kx[order], weight.values[used][order]
    counts = torch.bincount(row, minlength=parts * rows)
    starts = torch.cat([torch.zeros(1).long(), (-(-counts // unroll) * unroll).cumsum(0)])
    place = starts[row] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    span = range(kernel)
    within = torch.tensor([[source.at(y - padding, x - padding) for x in span] for y in span])
    # Weights that pad a row are zero, and read a position that exists.
    offsets = within[live, live][0, 0].repeat(int(starts[-1]))
    offsets[place] = c * source.stride + within[ky, kx]
    values = torch.zeros(len(offsets), dtype=torch.float32)
    values[place] = values_used
    table = starts.int(), offsets.int(), values, bias.clone()
    return Product(name, source, target, vectors, *table, unroll=unroll, **options)


def few_multiply_adds(model: nn.Module, image_size: int, bf16: bool) -> bool:
    """Whether `model` has so many zeros, or so few channels, that skipping zeros is faster.

    Compared with its dense products in this precision. Weights that only meet padding do not count.
    """
    sizes, bound, needed = layers.map_sizes(model, image_size), 0.0, 0
    for layer in layers.layers(model):
        conv, size = layer.conv, sizes[layer.reads]
        weight = conv.weight[layers.live_kernel(conv, size)]
        positions = layers.output_size(conv, size) ** 2
        needed += int(weight.count_nonzero()) * positions
        bound += MAX_MAC_RATIO[bf16] * weight.numel() * positions
        if positions >= ACTIVATION_PIXELS:
            bound += ACTIVATION_MACS[bf16] * len(weight) * positions
    return needed < bound


def sparse_is_faster(
    model: nn.Module, image_size: int, device: torch.device, bf16: bool = False
) -> bool:
    """Whether inference that skips the zeros is faster than `rewrite.inference_copy`."""
    if device.type != "cpu" or image_size > MAX_IMAGE_SIZE:
        return False
    return few_multiply_adds(rewrite.trim_channels_(copy.deepcopy(model)), image_size, bf16)


def sparse_copy(model: nn.Module, grey: bool) -> nn.Module:
    """The network that plans are made from: `model` with BatchNorm folded, without channels that
    have no weights, and with sparse weights of the convolutions, for images of one channel or of
    three."""
    network = rewrite.fold_batchnorm(model).cpu().float().requires_grad_(False)
    if grey:
        rewrite.merge_input_channels_(network.conv1)
    rewrite.trim_channels_(network)
    for layer in layers.layers(network):
        weight = SparseWeight.of(layer.conv.weight)
        del layer.conv.weight  # the parameter
        layer.conv.weight = weight
    return network


class Plan:
    """A network from `sparse_copy` as a list of products, and the memory that they work in.

    A tile has `images` images. A vector holds one value of each image at up to `positions`
    positions.

    With `reuse`, later feature maps overwrite earlier ones, and their borders must be cleared:
    `cleared[0]` before the image is written, `cleared[n]` before the n-th product. Without, only
    feature maps of the same layout share memory, and borders stay zero.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        images: int,
        positions: int,
        reuse: bool = True,
    ):
        self.images, self.positions = images, positions
        self.products: list[Product] = []
        self._maps = 0
        phases = network.conv1.stride[0] if positions > 1 else 1
        self.image = self._map(
            network.conv1.in_channels, image_size, network.conv1.padding[0], phases
        )
        pixels = itertools.product(range(image_size), repeat=2)
        self.pixels = torch.tensor([self.image.at(*p) for p in pixels], dtype=torch.int32)
        maps, copies = {0: self.image}, {}
        for layer in layers.layers(network):
            maps[layer.writes] = self._layer(layer, maps, copies)
            x = maps[layer.writes]
        # The classifier takes the mean over the last feature map: each pixel has its share.
        weight = network.fc.weight[:, :, None, None].expand(-1, -1, x.size, x.size) / x.size**2
        self.logits = self._map(len(weight), 1, 0)
        self._product("fc", SparseWeight.of(weight), network.fc.bias, x, self.logits, 1, 0)
        self._place(reuse)

    @property
    def tables(self) -> list[Tensor]:
        """All that differs between networks of one shape."""
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

    def _map(self, channels: int, size: int, border: int, phases: int = 1) -> FeatureMap:
        self._maps += 1
        return FeatureMap(self._maps, channels, size, border, phases)

    def _product(self, *arguments, **options) -> None:
        options |= {"images": self.images, "positions": self.positions}
        self.products.append(product(*arguments, **options))

    def _layer(
        self, layer: layers.Layer, maps: dict[int, FeatureMap], copies: dict[int, FeatureMap]
    ) -> FeatureMap:
        """Add a layer; returns the feature map that it writes."""
        conv, source, options = layer.conv, maps[layer.reads], {"relu": layer.relu}
        channels, size = conv.out_channels, layers.output_size(conv, source.size)
        if layer.adds is not None:  # in place
            target = result = maps[layer.adds]
            options["add"] = True
        elif layer.pool is not None:
            # Each channel goes through the pool before the next is computed. After the ReLU, a
            # border of zeros changes no maximum.
            result = self._map(channels, layers.output_size(layer.pool, size), 1)
            target = self._map(1, size, layer.pool.padding)
            options |= {"pool": layer.pool, "pooled": result}
        else:
            target = result = self._map(channels, size, int(size > 1))
        stride, padding = conv.stride[0], conv.padding[0]
        if self.positions > 1 and stride > source.phases:  # vectors need the pixels side by side
            if layer.reads not in copies:
                copy = self._map(source.channels, source.size, source.border, stride)
                eye = torch.eye(source.channels, dtype=torch.float32)
                same = SparseWeight.of(eye[:, :, None, None])
                none = torch.zeros(source.channels, dtype=torch.float32)
                self._product(f"{layer.name}.input", same, none, source, copy, 1, 0, copy=True)
                copies[layer.reads] = copy
            source = copies[layer.reads]
        self._product(
            layer.name, conv.weight, conv.bias, source, target, stride, padding, **options
        )
        return result

    def _place(self, reuse: bool) -> None:
        """Set the base of each feature map, `cells` (the size of the memory) and `cleared`."""
        used = [(self.image,), *((p.source, p.target, p.pooled) for p in self.products)]
        steps: dict[FeatureMap, list[int]] = defaultdict(list)
        for step, maps in enumerate(used):
            for m in filter(None, maps):
                steps[m].append(step)
        placed: dict[FeatureMap, FeatureMap] = {}
        for new, at in steps.items():
            base, layout = 0, replace(new, base=0)
            for old, m in sorted(placed.items(), key=lambda pair: pair[1].base):
                shared = steps[old][-1] < at[0] and (reuse or replace(m, base=0) == layout)
                if not shared and base + new.cells > m.base:
                    base = max(base, m.base + m.cells)
            placed[new] = replace(new, base=base)
        self.cells = max(m.base + m.cells for m in placed.values())
        self.cleared: list[list[FeatureMap]] = [[] for _ in used]
        order = [*placed.values()]
        for n, (new, m) in enumerate(placed.items()):
            others = order[n + 1 :] + order[:n]  # since this memory was written for the last tile
            there = [o for o in others if o.base < m.base + m.cells and m.base < o.base + o.cells]
            if m.border and there and there[-1] != m:
                self.cleared[steps[new][0]].append(m)
        self.image, self.logits = placed[self.image], placed[self.logits]
        for p in self.products:
            p.source, p.target = placed[p.source], placed[p.target]
            p.pooled = placed.get(p.pooled)
