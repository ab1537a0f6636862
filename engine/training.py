"""Fast training of sparse networks on a CPU: zero weights are not multiplied and get no gradients.

    forward = SparseForward(model, image_size=28)   # a torchvision ResNet of basic blocks
    loss(forward(images)).backward()                # gradients of the model's own parameters

As in inference.py a vector register holds one value of 16 images, and a convolution is one loop
over its weights. The gradient of its input is a convolution with the same weights, transposed and
mirrored. The gradient of a weight is the sum of products of two feature maps, one of them shifted.
Activations are float32 (tiles, channels, positions, images of a tile). Reading and writing them
costs as much as the products, because they are larger than the caches: each is read as seldom as
BatchNorm's statistics allow, twice forward and twice backward, and its memory is used again in the
next step.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Hashable

import torch
from llvmlite import ir
from torch import Tensor, nn

from engine import layers, llvm_gradients, llvm_source, plan
from engine.plan import FeatureMap, SparseWeight
from engine.threads import Argument, address, default_threads, share_tiles


def _flat(x: Tensor) -> Tensor:
    """All of a dense tensor, in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


def _whole(x: Tensor) -> Argument:
    """The address of `x`, for any tile."""
    return Argument(x.data_ptr())


def _each(x: Tensor) -> Argument:
    """The address of the part of contiguous `x` (tiles, ...) that belongs to a tile."""
    return Argument(x.data_ptr(), per_tile=4 * x.stride(0))


def _windows(pool: layers.Pool, size: int) -> Tensor:
    """Offsets of the inputs of each window of a max-pool, int32 (windows, inputs)."""
    windows = [[y * size + x for y, x in window] for window in pool.windows(size)]
    longest = max(map(len, windows))
    # A window at the border repeats its last input, which changes no maximum.
    full = [window + window[-1:] * (longest - len(window)) for window in windows]
    return torch.tensor(full, dtype=torch.int32)


class SparseLayer:
    """A layer whose zero weights stay zero, in training; it reads feature maps of `size` pixels.

    `accumulate`: the gradient of its input is added to that of another layer with the same input.
    """

    def __init__(self, layer: layers.Layer, size: int, images: int, accumulate: bool):
        self.layer, self.conv, self.norm = layer, layer.conv, layer.norm
        weight = self.conv.weight.detach()
        self.channels, c, kernel, _ = weight.shape
        self.stride, padding = self.conv.stride[0], self.conv.padding[0]
        self.size, self.size_out = size, layers.output_size(self.conv, size)
        back = kernel - 1 - padding
        self.padded = FeatureMap(0, c, size, padding)
        self.spread = FeatureMap(0, self.channels, size, back)  # gradients, `stride` pixels apart
        # Numbers from 1 take the place of the weights: exact below 2**24.
        numbers = torch.empty_like(weight)
        _flat(numbers).copy_(torch.arange(1.0, weight.numel() + 1))
        numbers = numbers * (weight != 0)
        mirrored = numbers.transpose(0, 1).flip(2, 3)
        y, dx = FeatureMap(0, self.channels, self.size_out, 0), FeatureMap(0, c, size, 0)
        zeros = weight.new_zeros(self.channels), weight.new_zeros(c)
        numbers, mirrored = map(SparseWeight.of, (numbers, mirrored))
        self.products = [plan.product("", numbers, zeros[0], self.padded, y, self.stride, padding)]
        if layer.reads != 0:  # nothing needs the gradient of the image
            args = mirrored, zeros[1], self.spread, dx, 1, back
            self.products.append(plan.product("", *args, add=accumulate))
        self.tables = llvm_source.addresses([t for p in self.products for t in p.tables])
        self.filled = [p.values.nonzero().squeeze(1) for p in self.products]
        pairs = zip(self.products, self.filled, strict=True)
        self.numbers = [p.values[filled].long() - 1 for p, filled in pairs]
        self.windows = None if layer.pool is None else _windows(layer.pool, self.size_out)
        longest = int(self.products[0].starts.diff().max())  # weights of an output channel
        self.scratch = {
            "padded": self.padded.cells * images,
            "spread": self.spread.cells * images,
            "row": longest * images,
        }

    @property
    def shape(self) -> tuple:
        """All that its code depends on."""
        maps = self.size, self.size_out, self.padded, self.spread
        windows = None if self.windows is None else tuple(self.windows.shape)
        options = self.layer.relu, self.layer.adds is not None, windows
        return *(p.shape for p in self.products), *maps, self.stride, *options

    def write(self, code: llvm_gradients.TrainingCode, n: int) -> dict[Hashable, ir.Function]:
        """Its functions: (n, "forward") is (x, padded, y, sums, tables), (n, "backward") is (x, dy,
        y, factors, padded, spread, row, sums, dx, tables), the others are as in llvm_gradients."""
        channels, positions, adds = self.channels, self.size_out**2, self.layer.adds is not None
        moments = code.moments(channels, positions)
        pad = code.pad(self.size, self.padded)
        product = code.product(self.products[0])
        combine = code.combine(self.size_out, self.spread, self.stride)
        gradient = code.gradient(self.products[0], self.spread, self.stride)
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
        for transposed in self.products[1:]:
            own = code.after(b, tables, len(self.products[0].tables))
            b.call(code.product(transposed), [spread, dx, dx, own])
        b.ret_void()
        functions = {
            (n, "forward"): forward,
            (n, "normalize"): code.normalize(channels, positions, adds, self.layer.relu),
            (n, "norm_gradient"): code.norm_gradient(channels, positions, self.layer.relu),
            (n, "backward"): backward,
        }
        if self.windows is not None:
            shape = channels, self.size_out, tuple(self.windows.shape)
            functions[n, "pool"] = code.pool(*shape)
            functions[n, "pool_gradient"] = code.pool_gradient(*shape)
        return functions

    def load_weights(self) -> None:
        """Copy the weights into the products."""
        values = _flat(self.conv.weight.detach())
        for p, filled, numbers in zip(self.products, self.filled, self.numbers, strict=True):
            p.values[filled] = values[numbers]

    def statistics(self, moments: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Mean and variance, float64 (channels,), of `n` values a channel, from `moments` (tiles,
        2, channels); updates BatchNorm's running statistics."""
        means, squares = moments.double().unbind(1)
        mean = means.mean(0)  # of tiles of equal size; Chan et al., 1983
        variance = squares.sum(0) / n + (means - mean).square().mean(0)
        norm = self.norm
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((variance * (n / (n - 1))).float(), norm.momentum)
        return mean, variance


class _Body(torch.autograd.Function):
    """All layers of a SparseForward but the classifier, as one function of their parameters."""

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
    gradient. The number of images must be a multiple of `images`, those of a tile. Call backward
    before the next forward pass. Compiled at the first call.
    """

    def __init__(self, model: nn.Module, image_size: int):
        self.model = model
        self.images, _ = llvm_source.host()
        found, sizes = layers.layers(model), layers.map_sizes(model, image_size)
        self.layers: list[SparseLayer] = []
        for n, layer in enumerate(found, 1):
            # Backward passes go through the layers in reverse.
            accumulate = any(layer.reads in (later.reads, later.adds) for later in found[n:])
            self.layers.append(SparseLayer(layer, sizes[layer.reads], self.images, accumulate))
        self.threads = default_threads()
        self._memory: dict[tuple, Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all layers, in the order of the gradients from `backward`."""
        return [p for own in self.layers for p in (own.conv.weight, own.norm.weight, own.norm.bias)]

    @functools.cached_property
    def functions(self) -> dict[Hashable, Callable[..., None]]:
        """The machine code, by (number of the layer, name)."""
        shape = self.images, *(own.shape for own in self.layers)
        return llvm_source.compile_once(shape, self._write)

    def _write(self) -> tuple[llvm_gradients.TrainingCode, dict[Hashable, ir.Function]]:
        code, functions = llvm_gradients.TrainingCode(self.images), {}
        for n, own in enumerate(self.layers):
            functions |= own.write(code, n)
        return code, functions

    def _reuse(self, key: Hashable, *shape: int, zero: bool = False) -> Tensor:
        """The memory of this key and shape, the same at each call."""
        kept = self._memory.get((key, *shape))
        if kept is None:
            kept = self._memory[(key, *shape)] = (torch.zeros if zero else torch.empty)(shape)
        return kept

    def _run(self, n: int, name: str, tiles: int, *arguments: Argument) -> None:
        """A function of layer n, for all tiles."""
        share_tiles(self.threads, tiles, address(self.functions[n, name]), arguments)

    def _scratch(self, own: SparseLayer, *kinds: str) -> list[Argument]:
        """A scratch memory of each of these kinds for each thread. Borders are zero and stay zero,
        because all layers of equal shapes write the same positions."""
        shapes = {
            "padded": (own.padded.size, own.padded.border),
            "spread": (own.spread.size, own.spread.border, own.stride, own.size_out),
            "row": (),
        }

        def memory(kind: str) -> Argument:
            shape = self.threads, own.scratch[kind]
            x = self._reuse((kind, *shapes[kind]), *shape, zero=True)
            return Argument(x.data_ptr(), per_thread=4 * x.stride(0))

        return [memory(kind) for kind in kinds]

    def _layer(self, n: int, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """The output of layer n; activations are (tiles, channels, positions, images of a tile)."""
        own, tiles = self.layers[n], len(x)
        own.load_weights()
        shape = tiles, own.channels, own.size_out**2, self.images
        raw, y = self._reuse((n, "raw"), *shape), self._reuse((n, "y"), *shape)
        moments = self._reuse("sums", tiles, 2, own.channels)
        (padded,) = self._scratch(own, "padded")
        arguments = _each(x), padded, _each(raw), _each(moments), _whole(own.tables)
        self._run(n, "forward", tiles, *arguments)
        mean, variance = own.statistics(moments, raw.numel() // own.channels)
        inverse = (variance + own.norm.eps).rsqrt()
        scale = own.norm.weight.detach() * inverse
        shift = (own.norm.bias.detach() - mean * scale).float()
        scale = scale.float()
        added = y if shortcut is None else shortcut
        arguments = _each(raw), _each(added), _each(y), _whole(scale), _whole(shift)
        self._run(n, "normalize", tiles, *arguments)
        out = y
        if own.windows is not None:
            out = self._reuse((n, "pooled"), *shape[:2], len(own.windows), self.images)
            self._run(n, "pool", tiles, _each(y), _each(out), _whole(own.windows))
        own.kept = x, raw, y, out, mean, inverse
        return out

    def _layer_gradient(self, n: int, dy: Tensor, dx: Tensor | None) -> None:
        """Compute the gradients of layer n's parameters, and that of its input in `dx` (or add it
        to `dx`); `dy` becomes the gradient of the ReLU's input."""
        own, tiles = self.layers[n], len(dy)
        x, raw, y, out, mean, inverse = own.kept
        if own.windows is not None:
            pooled, dy = dy, self._reuse((n, "unpooled"), *y.shape)
            arguments = _each(y), _each(out), _each(pooled), _each(dy), _whole(own.windows)
            self._run(n, "pool_gradient", tiles, *arguments)
        sums = self._reuse("sums", tiles, 2, own.channels)
        middle = mean.float()
        arguments = _each(dy), _each(y), _each(raw), _whole(middle), _each(sums)
        self._run(n, "norm_gradient", tiles, *arguments)
        # Ioffe and Szegedy, arXiv 1502.03167: subtract the gradients through mean and variance.
        total, product = sums.double().sum(0)
        values = raw.numel() // own.channels
        factor = own.norm.weight.detach() * inverse
        slope = -factor * inverse.square() * product / values
        constant = -factor * total / values - slope * mean
        factors = torch.stack((factor, slope, constant)).float()
        # Each tile has its own sums: one sum would depend on the order of the threads.
        products = self._reuse((n, "gradients"), tiles, len(own.products[0].values))
        inputs = _each(x), _each(dy), _each(raw), _whole(factors)
        scratch = self._scratch(own, "padded", "spread", "row")
        results = _each(products), Argument(0) if dx is None else _each(dx)
        self._run(n, "backward", tiles, *inputs, *scratch, *results, _whole(own.tables))
        weight = torch.zeros_like(own.conv.weight)
        _flat(weight)[own.numbers[0]] = products.sum(0)[own.filled[0]]
        own.gradients = weight, (product * inverse).float(), total.float()

    def forward(self, images: Tensor) -> Tensor:
        """The last feature map, float32 (tiles, channels, positions, images of a tile)."""
        x = images.reshape(-1, self.images, images.shape[1], images[0, 0].numel())
        maps = {0: x.permute(0, 2, 3, 1).contiguous(), None: None}
        for n, own in enumerate(self.layers):
            layer = own.layer
            y = maps[layer.writes] = self._layer(n, maps[layer.reads], maps[layer.adds])
        return y.detach()

    def _gradient_like(self, x: Tensor, used: Collection[Tensor]) -> Tensor:
        """Memory for a gradient of the shape of `x` that is none of `used`."""
        for n in itertools.count():
            memory = self._reuse((n, "gradient"), *x.shape)
            if all(memory is not other for other in used):
                return memory

    def backward(self, dy: Tensor) -> list[Tensor]:
        """Gradients of `parameters`, from that of the last feature map."""
        gradients = {len(self.layers): self._gradient_like(dy, ()).copy_(dy)}
        for n, own in reversed([*enumerate(self.layers)]):
            layer = own.layer
            current = gradients[layer.writes]
            if layer.adds is not None:
                gradients[layer.adds] = current  # after _layer_gradient
            if layer.reads not in gradients and layer.reads != 0:
                gradients[layer.reads] = self._gradient_like(own.kept[0], gradients.values())
            self._layer_gradient(n, current, gradients.get(layer.reads))
            del gradients[layer.writes]
        return [gradient for own in self.layers for gradient in own.gradients]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of float32 `images` (N, 3, H, H)."""
        with torch.autocast(images.device.type, enabled=False):
            y = _Body.apply(self, images, *self.parameters)
            return self.model.fc(y.mean(2).transpose(1, 2).reshape(len(images), -1))


def sparse_forward_if_faster(model: nn.Module, image_size: int, bf16: bool) -> SparseForward | None:
    """A SparseForward if it is faster than the model, on the CPU; else None."""
    if hasattr(model.layer1[0], "conv3") or model.conv1.weight.device.type != "cpu":
        return None  # SparseForward is for basic blocks
    few = plan.few_multiply_adds(model, image_size, bf16)
    return SparseForward(model, image_size) if few else None
