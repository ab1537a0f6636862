"""A pruned network trained fast on a CPU: only weights that are not zero are multiplied, and only
they get gradients.

    forward = SparseForward(model, image_size=28)   # a torchvision ResNet of basic blocks
    loss(forward(images)).backward()                # gradients of the model's own parameters

As in sparse.py a vector register holds one value of 16 images, a convolution is one loop over its
weights. Its gradient by the input is a convolution again, with the same weights transposed and
mirrored; that by a weight is the sum of products of two maps, one of them shifted. Activations are
float32 (tiles, channels, positions, images of a tile); BatchNorm, ReLU and the rest are PyTorch's.
"""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import llvmsource
import plan
from llvmsource import PTR
from plan import Map

PAYS = 1 / 8  # of the dense network's multiply-adds: with more, it is as fast (LOG.md)


class Convolution:
    """One convolution of a network, whose weights that are not zero stay where they are.

    For square maps of `size` pixels a side in tiles of `images`.
    """

    def __init__(self, conv: nn.Conv2d, size: int, images: int):
        weight = conv.weight.detach()
        o, c, kernel, _ = weight.shape
        stride, padding = conv.stride[0], conv.padding[0]
        self.size, self.stride = size, stride
        self.size_out = (size + 2 * padding - kernel) // stride + 1
        self.images = images
        back = kernel - 1 - padding
        self.padded = Map(0, c, size, padding)
        self.spread = Map(0, o, size, back)  # the gradient, its pixels `stride` apart
        # The numbers of the weights, from 1, take the weights' place: exact below 2**24.
        numbers = torch.arange(1.0, weight.numel() + 1).view_as(weight) * (weight != 0)
        mirrored = numbers.transpose(0, 1).flip(2, 3)
        y, dx = Map(0, o, self.size_out, 0), Map(0, c, size, 0)
        self.forward = plan.product("", numbers, torch.zeros(o), self.padded, y, stride, padding)
        self.backward = plan.product("", mirrored, torch.zeros(c), self.spread, dx, 1, back)
        self.filled = [p.values.nonzero().squeeze(1) for p in (self.forward, self.backward)]
        products = zip((self.forward, self.backward), self.filled, strict=True)
        self.numbers = [p.values[filled].long() - 1 for p, filled in products]

    def write(self, code: llvmsource.Code, n: int) -> None:
        """The functions forward<n>(x, y, padded) and
        backward<n>(x, dy, dx, padded, spread, sums)."""
        pad = code.spread(self.size, self.padded, 1, f"pad{n}")
        spread = code.spread(self.size_out, self.spread, self.stride, f"spread{n}")
        forward = code.product(self.forward, f"product{n}")
        backward = code.product(self.backward, f"transposed{n}")
        gradient = code.gradient(self.forward, f"gradient{n}")
        function, b = code.function(f"forward{n}", [PTR] * 3)
        x, y, padded = function.args
        b.call(pad, [x, padded])
        b.call(forward, [padded, y, y])
        b.ret_void()
        function, b = code.function(f"backward{n}", [PTR] * 6)
        x, dy, dx, padded, scattered, sums = function.args
        b.call(pad, [x, padded])
        b.call(gradient, [padded, dy, sums])
        b.call(spread, [dy, scattered])
        b.call(backward, [scattered, dx, dx])
        b.ret_void()

    def set(self, weight: Tensor) -> None:
        """Take over the values of `weight`."""
        for p, filled, numbers in zip(
            (self.forward, self.backward), self.filled, self.numbers, strict=True
        ):
            p.values[filled] = weight.detach().flatten()[numbers]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, engine: "SparseForward", n: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.engine, ctx.n = engine, n
        conv = engine.convolutions[n]
        conv.set(weight)
        y = x.new_empty(len(x), conv.forward.target.channels, conv.size_out**2, conv.images)
        function = getattr(engine.compiled, f"forward{n}")

        def tile(t: int, scratch: list[Tensor]) -> None:
            function(_at(x, t), _at(y, t), scratch[0].data_ptr())

        engine.each_tile(len(x), n, tile)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x, weight), engine, n = ctx.saved_tensors, ctx.engine, ctx.n
        conv, dy, dx = engine.convolutions[n], dy.contiguous(), torch.empty_like(x)
        function = getattr(engine.compiled, f"backward{n}")
        # Each tile has sums of its own: added in whatever order, they would be rounded differently.
        sums = torch.zeros(len(x), len(conv.forward.values))

        def tile(t: int, scratch: list[Tensor]) -> None:
            padded, spread = (memory.data_ptr() for memory in scratch)
            function(_at(x, t), _at(dy, t), _at(dx, t), padded, spread, _at(sums, t))

        engine.each_tile(len(x), n, tile)
        dweight = torch.zeros(weight.numel())
        dweight[conv.numbers[0]] = sums.sum(0)[conv.filled[0]]
        return dx, dweight.view_as(weight), None, None


def _at(x: Tensor, tile: int) -> int:
    """The address of a tile of contiguous `x`."""
    return x.data_ptr() + 4 * tile * x.stride(0)


class SparseForward:
    """`model(images)`, with gradients, of a ResNet of basic blocks in training.

    Weights that are zero when this is made stay zero: they are neither multiplied nor get a
    gradient. The first convolution is dense. The number of images must be a multiple of `images`,
    those of a tile. Compiled when it is first called.
    """

    def __init__(self, model: nn.Module, image_size: int):
        self.model = model
        self.images, _ = llvmsource.host()
        self.convolutions: list[Convolution] = []
        self.numbers: dict[nn.Module, int] = {}
        probe = torch.zeros(1, 3, image_size, image_size)
        with torch.no_grad():
            size = model.maxpool(model.conv1(probe)).shape[-1]
        for block in self._blocks():
            convs = [(block.conv1, size)]
            if block.downsample is not None:
                convs.append((block.downsample[0], size))
            for conv, at in convs:
                self._add(conv, at)
            size = self.convolutions[self.numbers[block.conv1]].size_out
            self._add(block.conv2, size)
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads)
        self._maps: list[dict[tuple, Tensor]] = [{} for _ in range(self.threads)]

    @property
    def multiply_adds(self) -> int:
        """For one forward pass of one image, without the first convolution and the classifier."""
        return sum(len(conv.numbers[0]) * conv.size_out**2 for conv in self.convolutions)

    @property
    def dense_multiply_adds(self) -> int:
        """The same if no weight was zero."""
        return sum(
            conv.weight.numel() * self.convolutions[n].size_out ** 2
            for conv, n in self.numbers.items()
        )

    @functools.cached_property
    def compiled(self) -> llvmsource.Compiled:
        code, names = llvmsource.Code(self.images), {}
        for n, conv in enumerate(self.convolutions):
            conv.write(code, n)
            names |= {f"forward{n}": [ctypes.c_void_p] * 3, f"backward{n}": [ctypes.c_void_p] * 6}
        return llvmsource.Compiled(code, names)

    def _blocks(self) -> list[nn.Module]:
        m = self.model
        return [block for stage in (m.layer1, m.layer2, m.layer3, m.layer4) for block in stage]

    def _add(self, conv: nn.Conv2d, size: int) -> None:
        self.numbers[conv] = len(self.convolutions)
        self.convolutions.append(Convolution(conv, size, self.images))

    def _map(self, thread: int, m: Map, kind: str) -> Tensor:
        """Memory of a thread for a map; what is written there is the same places each time."""
        key = kind, m.channels, m.size, m.border
        if key not in self._maps[thread]:
            self._maps[thread][key] = torch.zeros(m.channels * m.stride * self.images)
        return self._maps[thread][key]

    def each_tile(self, tiles: int, n: int, work: Callable[[int, list[Tensor]], None]) -> None:
        """work(tile, [padded, spread]) for all tiles, in as many threads as PyTorch has."""
        conv = self.convolutions[n]
        left = iter(range(tiles))  # shared: a thread that is held up leaves its tiles to others

        def run(thread: int) -> None:
            padded = self._map(thread, conv.padded, "padded")
            spread = self._map(thread, conv.spread, f"spread {conv.stride}")
            for tile in left:
                work(tile, [padded, spread])

        others = [self._pool.submit(run, thread) for thread in range(1, min(self.threads, tiles))]
        run(0)
        for other in others:
            other.result()

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return _Convolve.apply(x, conv.weight, self, self.numbers[conv])

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of `images` (N, 3, H, H)."""
        m = self.model
        x = m.maxpool(m.relu(m.bn1(m.conv1(images)))).float()
        n, channels, height, width = x.shape
        x = x.reshape(-1, self.images, channels, height * width).permute(0, 2, 3, 1).contiguous()
        with torch.autocast(x.device.type, enabled=False):
            for block in self._blocks():
                shortcut = x
                if block.downsample is not None:
                    shortcut = block.downsample[1](self._conv(block.downsample[0], x))
                x = block.relu(block.bn1(self._conv(block.conv1, x)))
                x = block.relu(block.bn2(self._conv(block.conv2, x)) + shortcut)
            return m.fc(x.mean(2).transpose(1, 2).reshape(n, -1))


def pays(model: nn.Module, image_size: int) -> SparseForward | None:
    """A SparseForward, where it is faster than the model itself: for few weights, on the CPU."""
    if hasattr(model.layer1[0], "conv3") or model.conv1.weight.device.type != "cpu":
        return None  # bottlenecks are not pruned here
    forward = SparseForward(model, image_size)
    return forward if forward.multiply_adds < PAYS * forward.dense_multiply_adds else None
