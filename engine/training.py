"""A pruned network trained fast on a CPU: only weights that are not zero are multiplied, and only
they get gradients.

    forward = SparseForward(model, image_size=28)   # a torchvision ResNet of basic blocks
    loss(forward(images)).backward()                # gradients of the model's own parameters

As in inference.py a vector register holds one value of 16 images, a convolution is one loop over
its weights. Its gradient by the input is a convolution again, with the same weights transposed and
mirrored; that by a weight is the sum of products of two maps, one of them shifted. Activations are
float32 (tiles, channels, positions, images of a tile). What is not multiplied costs as much as what
is: maps are larger than caches, so each is read as seldom as BatchNorm's statistics allow, twice
forward and twice backward, and its memory is used again in the next step.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from llvmlite import ir
from torch import Tensor, nn

from engine import llvm_gradients, llvm_source, plan, rewrite
from engine.plan import Map

# Of the dense network's multiply-adds; with more, that is as fast: in fp32, in bf16.
MAX_MAC_RATIO = 1 / 4, 1 / 8


def _flat(x: Tensor) -> Tensor:
    """All of a dense tensor, in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


def _at(x: Tensor, tile: int = 0) -> int:
    """The address of a tile of contiguous `x`."""
    return x.data_ptr() + 4 * tile * x.stride(0)


class Unit:
    """A convolution, whose weights that are not zero stay where they are, its BatchNorm and ReLU.

    For square maps of `size` pixels a side in tiles of `images`. `relu`: not behind a downsample.
    `adds`: the shortcut, before the ReLU. `onto`: its gradient is added to another's, that of the
    shortcut. `first`: nobody asks for a gradient by its input.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        size: int,
        images: int,
        relu: bool = True,
        adds: bool = False,
        onto: bool = False,
        first: bool = False,
    ):
        self.conv, self.norm = conv, norm
        self.relu, self.adds, self.first = relu, adds, first
        weight = conv.weight.detach()
        self.channels, c, kernel, _ = weight.shape
        self.stride, padding = conv.stride[0], conv.padding[0]
        self.size, self.size_out = size, rewrite.output_size(conv, size)
        back = kernel - 1 - padding
        self.padded = Map(0, c, size, padding)
        self.spread = Map(0, self.channels, size, back)  # the gradient, its pixels `stride` apart
        # The numbers of the weights, from 1, take the weights' place: exact below 2**24.
        numbers = torch.empty_like(weight)
        _flat(numbers).copy_(torch.arange(1.0, weight.numel() + 1))
        numbers = numbers * (weight != 0)
        y, dx = Map(0, self.channels, self.size_out, 0), Map(0, c, size, 0)
        zeros = torch.zeros(self.channels), torch.zeros(c)
        self.products = [plan.product("", numbers, zeros[0], self.padded, y, self.stride, padding)]
        if not first:
            mirrored = numbers.transpose(0, 1).flip(2, 3)
            args = mirrored, zeros[1], self.spread, dx, 1, back
            self.products.append(plan.product("", *args, add=onto))
        self.tables = llvm_source.addresses([t for p in self.products for t in p.tables])
        self.filled = [p.values.nonzero().squeeze(1) for p in self.products]
        pairs = zip(self.products, self.filled, strict=True)
        self.numbers = [p.values[filled].long() - 1 for p, filled in pairs]
        row = int(self.products[0].first.diff().max())  # weights of the fullest output channel
        self.scratch = {
            "padded": self.padded.channels * self.padded.stride * images,
            "spread": self.spread.channels * self.spread.stride * images,
            "row": row * images,
        }

    @property
    def shape(self) -> tuple:
        """All that its code depends on."""
        maps = self.size, self.size_out, self.padded, self.spread
        products = tuple(p.shape for p in self.products)
        return *products, *maps, self.stride, self.relu, self.adds, self.first

    def write(self, code: llvm_gradients.TrainingCode, n: int) -> dict[str, ir.Function]:
        """Its functions forward<n>(x, padded, y, sums, tables), backward<n>(x, dy, y, factors,
        padded, spread, row, sums, dx, tables), and as in llvmgrad normalize<n>, norm_gradient<n>.
        """
        channels, positions = self.channels, self.size_out**2
        moments = code.moments(channels, positions)
        pad = code.pad(self.size, self.padded)
        product = code.product(self.products[0])
        combine = code.combine(self.size_out, self.spread, self.stride)
        gradient = code.gradient(self.products[0], self.spread, self.stride)
        normalize = code.normalize(channels, positions, self.adds, self.relu)
        norm_gradient = code.norm_gradient(channels, positions, self.relu)
        forward, b = code.function(f"forward{n}", [llvm_source.PTR] * 5)
        x, padded, y, sums, tables = forward.args
        b.call(pad, [x, padded])
        b.call(product, [padded, y, y, tables])
        b.call(moments, [y, sums])
        b.ret_void()
        backward, b = code.function(f"backward{n}", [llvm_source.PTR] * 10)
        x, dy, y, factors, padded, spread, row, sums, dx, tables = backward.args
        b.call(pad, [x, padded])
        b.call(combine, [dy, y, factors, spread])
        b.call(gradient, [padded, spread, row, sums, tables])
        if not self.first:
            transposed, others = code.product(self.products[1]), len(self.products[0].tables)
            b.call(transposed, [spread, dx, dx, code.after(b, tables, others)])
        b.ret_void()
        functions = {
            "forward": forward,
            "normalize": normalize,
            "norm_gradient": norm_gradient,
            "backward": backward,
        }
        return {f"{name}{n}": function for name, function in functions.items()}

    def set(self) -> None:
        """Take over the values of the weights."""
        values = _flat(self.conv.weight.detach())
        for p, filled, numbers in zip(self.products, self.filled, self.numbers, strict=True):
            p.values[filled] = values[numbers]

    def statistics(self, moments: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Mean and variance, float64 (channels,), of `n` values a channel, from `moments` (tiles,
        2, channels); BatchNorm's running ones follow."""
        means, squares = moments.double().unbind(1)
        mean = means.mean(0)  # of tiles of equal size; Chan et al., 1983
        variance = squares.sum(0) / n + (means - mean).square().mean(0)
        norm = self.norm
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((variance * (n / (n - 1))).float(), norm.momentum)
        return mean, variance


class _Body(torch.autograd.Function):
    """All units of a SparseForward, as one function of their parameters."""

    @staticmethod
    def forward(ctx, engine: "SparseForward", images: Tensor, *parameters: Tensor) -> Tensor:
        ctx.engine = engine
        return engine.forward(images)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return None, None, *ctx.engine.backward(dy.contiguous())


class SparseForward:
    """`model(images)`, with gradients, of a ResNet of basic blocks in training.

    Weights that are zero when this is made stay zero: they are neither multiplied nor get a
    gradient. The number of images must be a multiple of `images`, those of a tile. Each call's
    gradients must be asked for before the next call. Compiled when it is first called.
    """

    def __init__(self, model: nn.Module, image_size: int):
        self.model = model
        self.images, _ = llvm_source.host()
        self.units: list[Unit] = []
        stem = self._add(model.conv1, model.bn1, image_size, first=True)
        self.pool, size = None, stem.size_out
        if not isinstance(model.maxpool, nn.Identity):
            pool = model.maxpool
            self.pool = pool.kernel_size, pool.stride, pool.padding
            size = rewrite.output_size(pool, size)
        self.pooled = size
        self.blocks: list[tuple[Unit, Unit, Unit | None]] = []
        for block in [
            b for m in (model.layer1, model.layer2, model.layer3, model.layer4) for b in m
        ]:
            inner = self._add(block.conv1, block.bn1, size, onto=True)
            outer = self._add(block.conv2, block.bn2, inner.size_out, adds=True)
            down = None
            if block.downsample is not None:
                down = self._add(*block.downsample, size, relu=False)
            self.blocks.append((inner, outer, down))
            size = inner.size_out
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads)
        self._memory: dict[tuple, Tensor] = {}

    def _add(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, size: int, **options) -> Unit:
        self.units.append(Unit(conv, norm, size, self.images, **options))
        return self.units[-1]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all units, in the order of the gradients from `backward`."""
        units = self.units
        return [p for u in units for p in (u.conv.weight, u.norm.weight, u.norm.bias)]

    @property
    def multiply_adds(self) -> int:
        """For one forward pass of one image, without the classifier."""
        return sum(len(unit.numbers[0]) * unit.size_out**2 for unit in self.units)

    @property
    def dense_multiply_adds(self) -> int:
        """The same if no weight was zero."""
        return sum(unit.conv.weight.numel() * unit.size_out**2 for unit in self.units)

    @functools.cached_property
    def compiled(self) -> llvm_source.Compiled:
        shape = self.images, self.pool, *(unit.shape for unit in self.units)
        return llvm_source.compiled(shape, self._write)

    def _write(self) -> tuple[llvm_gradients.TrainingCode, dict[str, ir.Function]]:
        code, functions = llvm_gradients.TrainingCode(self.images), {}
        for n, unit in enumerate(self.units):
            functions |= unit.write(code, n)
        if self.pool is not None:
            stem = self.units[0]
            shape = stem.channels, stem.size_out, self.pool
            functions |= {"pool": code.pool(*shape), "pool_gradient": code.pool_gradient(*shape)}
        return code, functions

    def _map(self, key: object, *shape: int, zero: bool = False) -> Tensor:
        """Memory that is the same at each call; `key` is its owner's."""
        kept = self._memory.get((key, *shape))
        if kept is None:
            kept = self._memory[(key, *shape)] = (torch.zeros if zero else torch.empty)(shape)
        return kept

    def _each_tile(self, tiles: int, work: Callable[[int, int], None]) -> None:
        """work(tile, thread) for all tiles, in as many threads as PyTorch has."""
        left = iter(range(tiles))  # shared: a thread that is held up leaves its tiles to others

        def run(thread: int) -> None:
            for tile in left:
                work(tile, thread)

        others = [self._pool.submit(run, thread) for thread in range(1, min(self.threads, tiles))]
        run(0)
        for other in others:
            other.result()

    def _scratch(self, unit: Unit, kinds: tuple[str, ...]) -> list[list[int]]:
        """For each thread, addresses of memories of these kinds. Borders are zero, and stay it, as
        all units of equal shapes write the same places."""
        shapes = {
            "padded": (unit.padded.size, unit.padded.border),
            "spread": (unit.spread.size, unit.spread.border, unit.stride, unit.size_out),
            "row": (),
        }

        def memory(kind: str, thread: int) -> int:
            key = (kind, thread, *shapes[kind])
            return _at(self._map(key, unit.scratch[kind], zero=True))

        return [[memory(kind, thread) for kind in kinds] for thread in range(self.threads)]

    def _unit(self, unit: Unit, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """What the unit makes of `x` (tiles, channels, positions, images of a tile)."""
        unit.set()
        n, tiles = self.units.index(unit), len(x)
        shape = tiles, unit.channels, unit.size_out**2, self.images
        raw, y = self._map((n, "raw"), *shape), self._map((n, "y"), *shape)
        moments = self._map("sums", tiles, 2, unit.channels)
        scratch = self._scratch(unit, ("padded",))
        first, tables = getattr(self.compiled, f"forward{n}"), _at(unit.tables)
        self._each_tile(
            tiles,
            lambda t, i: first(_at(x, t), *scratch[i], _at(raw, t), _at(moments, t), tables),
        )
        mean, variance = unit.statistics(moments, raw.numel() // unit.channels)
        inverse = (variance + unit.norm.eps).rsqrt()
        scale = unit.norm.weight.detach() * inverse
        shift = (unit.norm.bias.detach() - mean * scale).float()
        scale = scale.float()
        second = getattr(self.compiled, f"normalize{n}")
        added = y if shortcut is None else shortcut
        channels = _at(scale), _at(shift)
        self._each_tile(
            tiles, lambda t, i: second(_at(raw, t), _at(added, t), _at(y, t), *channels)
        )
        unit.kept = x, raw, y, mean, inverse
        return y

    def _unit_gradient(self, unit: Unit, dy: Tensor, dx: Tensor | None) -> None:
        """The gradients of the unit's parameters, and that of its input, in `dx`, or added to it;
        `dy` becomes the gradient of what the ReLU is of."""
        n, tiles = self.units.index(unit), len(dy)
        x, raw, y, mean, inverse = unit.kept
        sums = self._map("sums", tiles, 2, unit.channels)
        middle = mean.float()
        first = getattr(self.compiled, f"norm_gradient{n}")
        self._each_tile(
            tiles,
            lambda t, i: first(_at(dy, t), _at(y, t), _at(raw, t), _at(middle), _at(sums, t)),
        )
        # Ioffe and Szegedy, arXiv 1502.03167: what the mean and the variance carry is subtracted.
        total, product = sums.double().sum(0)
        values = raw.numel() // unit.channels
        factor = unit.norm.weight.detach() * inverse
        slope = -factor * inverse.square() * product / values
        constant = -factor * total / values - slope * mean
        factors = torch.stack((factor, slope, constant)).float()
        # Each tile has sums of its own: added in whatever order, they would be rounded differently.
        products = self._map((n, "gradients"), tiles, len(unit.products[0].values))
        scratch = self._scratch(unit, ("padded", "spread", "row"))
        second, tables = getattr(self.compiled, f"backward{n}"), _at(unit.tables)

        def work(t: int, i: int) -> None:
            to = 0 if dx is None else _at(dx, t)
            inputs = _at(x, t), _at(dy, t), _at(raw, t), _at(factors)
            second(*inputs, *scratch[i], _at(products, t), to, tables)

        self._each_tile(tiles, work)
        weight = torch.zeros_like(unit.conv.weight)
        _flat(weight)[unit.numbers[0]] = products.sum(0)[unit.filled[0]]
        unit.gradients = weight, (product * inverse).float(), total.float()

    def forward(self, images: Tensor) -> Tensor:
        """The last maps, float32 (tiles, channels, positions, images of a tile)."""
        x = images.reshape(-1, self.images, images.shape[1], images[0, 0].numel())
        y = self._unit(self.units[0], x.permute(0, 2, 3, 1).contiguous())
        if self.pool is not None:
            full, tiles, channels = y, len(y), y.shape[1]
            y = self._map("pooled", tiles, channels, self.pooled**2, self.images)
            pool = self.compiled.pool
            self._each_tile(tiles, lambda t, i: pool(_at(full, t), _at(y, t)))
        for inner, outer, down in self.blocks:
            shortcut = y if down is None else self._unit(down, y)
            y = self._unit(outer, self._unit(inner, y), shortcut)
        return y.detach()

    def backward(self, dy: Tensor) -> list[Tensor]:
        """Gradients of `parameters`, from that of the last maps."""
        current = self._map("d", *dy.shape).copy_(dy)
        for inner, outer, down in reversed(self.blocks):
            x, between = inner.kept[0], outer.kept[0]
            middle = self._map("inner", *between.shape)
            self._unit_gradient(outer, current, middle)
            if down is not None:
                behind, current = current, self._map("d", *x.shape)
                self._unit_gradient(down, behind, current)
            self._unit_gradient(inner, middle, current)
        stem = self.units[0]
        if self.pool is not None:
            x, pooled, dy = stem.kept[2], self.blocks[0][0].kept[0], current
            current = self._map("d of the stem", *x.shape)  # may be as small as dy
            pool = self.compiled.pool_gradient
            self._each_tile(
                len(x),
                lambda t, i: pool(_at(x, t), _at(pooled, t), _at(dy, t), _at(current, t)),
            )
        self._unit_gradient(stem, current, None)
        return [gradient for unit in self.units for gradient in unit.gradients]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of float32 `images` (N, 3, H, H)."""
        with torch.autocast(images.device.type, enabled=False):
            y = _Body.apply(self, images, *self.parameters)
            return self.model.fc(y.mean(2).transpose(1, 2).reshape(len(images), -1))


def sparse_forward_if_faster(model: nn.Module, image_size: int, bf16: bool) -> SparseForward | None:
    """A SparseForward, where it is faster than the model itself: for few weights, on the CPU."""
    if hasattr(model.layer1[0], "conv3") or model.conv1.weight.device.type != "cpu":
        return None  # bottlenecks are not pruned here
    forward = SparseForward(model, image_size)
    few = forward.multiply_adds < MAX_MAC_RATIO[bf16] * forward.dense_multiply_adds
    return forward if few else None
