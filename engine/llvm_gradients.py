"""LLVM code that training needs beside the products: gradients of weights, BatchNorm, ReLU and
max-pool, each for one tile of images.

Feature maps are (channels, positions, images of a tile), without a border unless a `FeatureMap`
says so. Values of channels are float32 (channels,); the sums of a tile are two such rows, one after
the other.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

from llvmlite import ir

from engine.llvm_source import F32, I64, Code, Run, equal_pieces, for_range
from engine.plan import FeatureMap, Product


class TrainingCode(Code):
    """A module of these functions."""

    def _channels(self, b: ir.IRBuilder, channels: int, body: Callable) -> None:
        for_range(b, I64(0), I64(channels), 1, body)

    def _sweep(
        self, b: ir.IRBuilder, n: int, body: Callable, carried: Sequence[ir.Value] = ()
    ) -> list[ir.Value]:
        """Write `for i in range(n): carried = body(i, *carried)`, unrolled; returns `carried`."""
        step = next(s for s in (7, 4, 3, 2, 1) if n % s == 0)

        def several(i: ir.Value, *current: ir.Value) -> Sequence[ir.Value]:
            for k in range(step):
                current = body(b.add(i, I64(k)), *current) or ()
            return current

        return for_range(b, I64(0), I64(n), step, several, carried)

    def _number(self, b: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
        """base[index], the same for all images."""
        return self._splat(b, self._float(b, base, index), self.cell)

    def _total(self, b: ir.IRBuilder, value: ir.Value, base: ir.Value, index: ir.Value) -> ir.Value:
        """base[index] = the sum of `value` over the images."""
        add_up = self.intrinsic(f"llvm.vector.reduce.fadd.v{self.images}f32", F32, F32, self.cell)
        total = b.call(add_up, [F32(0.0), value], fastmath=("reassoc",))
        b.store(total, b.gep(base, [index], source_etype=F32))
        return total

    def pad(self, size: int, target: FeatureMap) -> ir.Function:
        """void (x, target): copy a feature map of `size` pixels a side inside the border of
        `target`."""

        def body(b: ir.IRBuilder, x: ir.Value, to: ir.Value) -> None:
            self._each_pixel(b, size, target, 1, to, lambda c, at: self._load(b, x, at))

        return self._shared(("pad", target.channels, size, target.border), 2, body)

    def _each_pixel(
        self,
        b: ir.IRBuilder,
        size: int,
        target: FeatureMap,
        step: int,
        to: ir.Value,
        value: Callable[[ir.Value, ir.Value], ir.Value],
    ) -> None:
        """Store value(channel, offset) for each pixel, in every `step`-th pixel of every `step`-th
        row of `target`."""

        def row(c: ir.Value, y: ir.Value) -> None:
            read = b.mul(b.add(b.mul(c, I64(size)), y), I64(size))
            line = b.add(b.mul(c, I64(target.side)), b.mul(y, I64(step)))
            written = b.add(b.mul(line, I64(target.side)), I64(target.at(0, 0)))

            def pixel(x: ir.Value) -> None:
                place = b.add(written, b.mul(x, I64(step)))
                self._store(b, value(c, b.add(read, x)), to, place)

            self._sweep(b, size, pixel)

        self._channels(b, target.channels, lambda c: for_range(
            b, I64(0), I64(size), 1, lambda y: row(c, y)))  # fmt: skip

    def moments(self, channels: int, positions: int) -> ir.Function:
        """void (x, sums): each channel's mean, and its sum of squared differences from the mean."""

        def body(b: ir.IRBuilder, x: ir.Value, sums: ir.Value) -> None:
            share = F32(1 / (positions * self.images))

            def channel(c: ir.Value) -> None:
                at = self._at(b, x, b.mul(c, I64(positions)))
                (total,) = self._sweep(
                    b, positions, lambda i, s: [b.fadd(s, self._load(b, at, i))], [self.zero]
                )
                mean = b.fmul(self._total(b, total, sums, c), share)
                b.store(mean, b.gep(sums, [c], source_etype=F32))
                mean = self._splat(b, mean, self.cell)

                def square(i: ir.Value, total: ir.Value) -> list[ir.Value]:
                    distance = b.fsub(self._load(b, at, i), mean)
                    return [b.call(self._multiply_add(self.cell), [distance, distance, total])]

                (total,) = self._sweep(b, positions, square, [self.zero])
                self._total(b, total, sums, b.add(c, I64(channels)))

            self._channels(b, channels, channel)

        return self._shared(("moments", channels, positions), 2, body)

    def normalize(self, channels: int, positions: int, add: bool, relu: bool) -> ir.Function:
        """void (x, shortcut, y, scale, shift): y = relu(x * scale + shift + shortcut)."""

        def body(b: ir.IRBuilder, *arguments: ir.Value) -> None:
            x, shortcut, y, scale, shift = arguments

            def channel(c: ir.Value) -> None:
                factor, summand = self._number(b, scale, c), self._number(b, shift, c)
                first = b.mul(c, I64(positions))

                def position(i: ir.Value) -> None:
                    at = b.add(first, i)
                    inputs = [self._load(b, x, at), factor, summand]
                    value = b.call(self._multiply_add(self.cell), inputs)
                    value = b.fadd(value, self._load(b, shortcut, at)) if add else value
                    self._store(b, self._max(b, self.zero, value) if relu else value, y, at)

                self._sweep(b, positions, position)

            self._channels(b, channels, channel)

        return self._shared(("normalize", channels, positions, int(add), int(relu)), 5, body)

    def norm_gradient(self, channels: int, positions: int, relu: bool) -> ir.Function:
        """void (dy, y, x, mean, sums): the sums of dy, and of dy * (x - mean). With `relu`, dy is
        first set to 0 where y is 0."""

        def body(b: ir.IRBuilder, *arguments: ir.Value) -> None:
            dy, y, x, mean, sums = arguments

            def channel(c: ir.Value) -> None:
                middle, first = self._number(b, mean, c), b.mul(c, I64(positions))

                def position(i: ir.Value, total: ir.Value, product: ir.Value) -> list[ir.Value]:
                    at = b.add(first, i)
                    value = self._load(b, dy, at)
                    if relu:
                        active = b.fcmp_ordered(">", self._load(b, y, at), self.zero)
                        value = b.select(active, value, self.zero)
                        self._store(b, value, dy, at)
                    inputs = [value, b.fsub(self._load(b, x, at), middle), product]
                    return [b.fadd(total, value), b.call(self._multiply_add(self.cell), inputs)]

                totals = self._sweep(b, positions, position, [self.zero, self.zero])
                for row, total in enumerate(totals):
                    self._total(b, total, sums, b.add(c, I64(row * channels)))

            self._channels(b, channels, channel)

        return self._shared(("norm_gradient", channels, positions, int(relu)), 5, body)

    def combine(self, size: int, target: FeatureMap, step: int) -> ir.Function:
        """void (dy, x, factors, target): factors[0] * dy + factors[1] * x + factors[2], in every
        `step`-th pixel of every `step`-th row of `target`; each of the factors is (channels,)."""

        def body(b: ir.IRBuilder, *arguments: ir.Value) -> None:
            dy, x, factors, to = arguments

            def value(c: ir.Value, at: ir.Value) -> ir.Value:
                a, k, constant = (
                    self._number(b, factors, b.add(c, I64(row * target.channels)))
                    for row in range(3)
                )
                inner = b.call(self._multiply_add(self.cell), [self._load(b, x, at), k, constant])
                return b.call(self._multiply_add(self.cell), [self._load(b, dy, at), a, inner])

            self._each_pixel(b, size, target, step, to, value)

        return self._shared(("combine", target.channels, size, target.border, step), 4, body)

    def gradient(self, p: Product, spread: FeatureMap, step: int) -> ir.Function:
        """void (source, gradient, row, sums, tables): the gradient of each weight of `p`, float32
        in the order of p.values.

        `gradient` has the layout of `spread`, its pixels `step` apart. `row` is scratch memory: a
        cell for each weight of an output channel.
        """
        key = "gradient", p.shape, spread, step
        return self._shared(key, 5, lambda b, *args: self._gradient(b, p, spread, step, *args))

    def _gradient(
        self,
        b: ir.IRBuilder,
        p: Product,
        spread: FeatureMap,
        step: int,
        source: ir.Value,
        gradient: ir.Value,
        partial: ir.Value,
        results: ir.Value,
        tables: ir.Value,
    ) -> None:
        starts, offsets = (self._table(b, tables, n) for n in range(2))
        multiply_add = self._multiply_add(self.cell)
        pixels = itertools.product(range(p.target.size), repeat=2)
        held_at = [spread.at(y * step, x * step) for y, x in pixels]
        pairs = [v._replace(write=at) for v, at in zip(p.vectors, held_at, strict=True)]
        runs = equal_pieces(pairs, self.sums + 1)  # one register is the sum, the others are held
        whole = len(runs) == runs[0].count == 1

        def row(o: ir.Value) -> None:
            start, stop = (self._integer(b, starts, b.add(o, I64(i))) for i in (0, 1))
            first_held = self._at(b, gradient, b.mul(o, I64(spread.stride)))

            def piece(run: Run, i: ir.Value) -> None:
                inputs = self._at(b, source, b.mul(i, I64(run.read)))
                at = self._at(b, first_held, b.mul(i, I64(run.write)))
                held = [self._load(b, at, pair.write) for pair in run.vectors]
                first = b.icmp_signed("==", i, I64(0)) if run is runs[0] else ir.IntType(1)(0)

                def weight(k: ir.Value) -> None:
                    shifted = self._one_register(b, inputs, self._integer(b, offsets, k))
                    kept, total = b.sub(k, start), self.zero
                    if not whole:
                        total = b.select(first, total, self._load(b, partial, kept))
                    for pair, factor in zip(run.vectors, held, strict=True):
                        x = self._load(b, shifted, pair.read)
                        total = b.call(multiply_add, [x, factor, total])
                    if whole:
                        self._total(b, total, results, k)
                    else:
                        self._store(b, total, partial, kept)

                for_range(b, start, stop, 1, weight)

            for run in runs:
                for_range(b, I64(0), I64(run.count), 1, functools.partial(piece, run))
            if not whole:

                def finish(k: ir.Value) -> None:
                    self._total(b, self._load(b, partial, b.sub(k, start)), results, k)

                for_range(b, start, stop, 1, finish)

        self._channels(b, len(p.bias), row)

    def _each_window(
        self,
        b: ir.IRBuilder,
        channels: int,
        size: int,
        windows: tuple[int, int],
        table: ir.Value,
        body: Callable,
    ) -> None:
        """body(offset of the output, offsets of its inputs) for each window of a max-pool.

        `windows` is the shape of `table`, int32: for each window, offsets in a channel.
        """
        count, inputs = windows

        def window(c: ir.Value, n: ir.Value) -> None:
            first, row = b.mul(c, I64(size * size)), b.mul(n, I64(inputs))
            places = [self._integer(b, table, b.add(row, I64(i))) for i in range(inputs)]
            body(b.add(b.mul(c, I64(count)), n), [b.add(first, place) for place in places])

        self._channels(b, channels, lambda c: for_range(
            b, I64(0), I64(count), 1, lambda n: window(c, n)))  # fmt: skip

    def pool(self, channels: int, size: int, windows: tuple[int, int]) -> ir.Function:
        """void (x, y, table): the largest input of each window."""

        def body(b: ir.IRBuilder, x: ir.Value, y: ir.Value, table: ir.Value) -> None:
            def window(at: ir.Value, places: list[ir.Value]) -> None:
                best = self._load(b, x, places[0])
                for place in places[1:]:
                    best = self._max(b, best, self._load(b, x, place))
                self._store(b, best, y, at)

            self._each_window(b, channels, size, windows, table, window)

        return self._shared(("pool", channels, size, *windows), 3, body)

    def pool_gradient(self, channels: int, size: int, windows: tuple[int, int]) -> ir.Function:
        """void (x, y, dy, dx, table): dy of each window goes to the first of its largest inputs, as
        in PyTorch."""

        def body(b: ir.IRBuilder, *arguments: ir.Value) -> None:
            x, y, dy, dx, table = arguments
            self._sweep(b, channels * size * size, lambda i: self._store(b, self.zero, dx, i))

            def window(at: ir.Value, places: list[ir.Value]) -> None:
                best, rest = self._load(b, y, at), self._load(b, dy, at)
                for place in places:
                    hit = b.fcmp_ordered("==", self._load(b, x, place), best)
                    before = self._load(b, dx, place)
                    self._store(b, b.fadd(before, b.select(hit, rest, self.zero)), dx, place)
                    rest = b.select(hit, self.zero, rest)

            self._each_window(b, channels, size, windows, table, window)

        return self._shared(("pool_gradient", channels, size, *windows), 5, body)
