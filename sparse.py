"""The pruned network run fast on a CPU: only weights that are not zero are multiplied.

    engine = SparseResNet(model, image_size=28)   # from any torchvision ResNet, BatchNorm folded
    logits = engine(images)                       # as model(images), up to rounding

A vector register holds one value of 16 images (8 without AVX-512), so that a multiply-add with one
weight serves them all and no index is ever looked up per image. Each convolution is one loop over
its weights that are not zero, output channel by output channel: the channel's map, in pieces of up
to 28 positions, stays in registers while each weight adds its multiple of a shifted input map,
whose place is read once for the whole piece. For few images the registers hold 16 neighbouring
positions of one image instead. The code for that, with every shape a constant, is written as LLVM's
intermediate language and compiled when the engine is first called, in 0.2 to 0.4 s.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor, nn

import rewrite

F32, I32, I64, PTR, VOID = (
    ir.FloatType(),
    ir.IntType(32),
    ir.IntType(64),
    ir.PointerType(),
    ir.VoidType(),
)

LARGEST = 64  # pixels a side of the images: every position becomes code of its own

# --- what is computed ---------------------------------------------------------------------------


@dataclass
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


@dataclass
class Product:
    """target[o, out] (+)= bias[o] + sum over the row's weights w at tap t: w * source[t + in].

    Rows are output channels; `first`, `taps` and `values` are their weights that are not zero, as
    in a CSR matrix. With `pool`, the rows share one map, of which (outputs, inputs) maxima go on.
    """

    source: Map
    target: Map
    vectors: list[tuple[int, int, list[int]]]  # (in, out, cells from there on that are meant)
    first: Tensor  # int32 (rows + 1,)
    taps: Tensor  # int32 (weights,)
    values: Tensor  # float32 (weights,)
    bias: Tensor  # float32 (rows,)
    add: bool = False  # onto what is in target
    relu: bool = False
    pool: tuple[Map, list[tuple[int, list[int]]]] | None = None
    unroll: int = 1  # weights at a time; rows are filled up with zeros


def _size(size: int, layer: nn.Conv2d | nn.MaxPool2d) -> int:
    """Side of the map behind `layer`."""
    kernel, stride, padding = (
        value[0] if isinstance(value, tuple) else value
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    return (size + 2 * padding - kernel) // stride + 1


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
        phases = model.conv1.stride[0] if positions > 1 else 1
        self.image = self._map(channels, image_size, model.conv1.padding[0], phases)
        places = itertools.product(range(image_size), repeat=2)
        self.pixels = torch.tensor([self.image.at(*p) for p in places], dtype=torch.int32)
        x = self._stem(model, channels)
        for block in (b for stage in range(1, 5) for b in model.get_submodule(f"layer{stage}")):
            x = self._block(block, x)
        # The mean over the last map is left to the classifier: each pixel has its share.
        weight = model.fc.weight[:, :, None, None].expand(-1, -1, x.size, x.size) / x.size**2
        self.logits = self._map(len(weight), 1, 0)
        self._product(weight, model.fc.bias, x, self.logits, 1, 0)

    @property
    def multiply_adds(self) -> int:
        """For one image: each weight times the positions it is used at."""
        return sum(int(p.values.count_nonzero()) * p.target.size**2 for p in self.products)

    def _map(self, channels: int, size: int, border: int, phases: int = 1) -> Map:
        new = Map(self.cells, channels, size, border, phases)
        self.cells += channels * new.stride
        return new

    def _vectors(self, source: Map, target: Map, step: int) -> list[tuple[int, int, list[int]]]:
        """As few vectors as cover all positions of `target`, which are `step` apart in `source`."""
        vectors: list[tuple[int, int, list[int]]] = []
        for y, x in itertools.product(range(target.size), repeat=2):
            read, written = (y * source.side + x) * step, target.at(y, x)
            if vectors and read - vectors[-1][0] == written - vectors[-1][1] < self.positions:
                vectors[-1][2].append(read - vectors[-1][0])
            else:
                vectors.append((read, written, [0]))
        return vectors

    def _product(
        self,
        weight: Tensor,
        bias: Tensor,
        source: Map,
        target: Map,
        stride: int,
        padding: int,
        **options,
    ) -> None:
        """Add a convolution with `weight` (O, C, K, K) from `source` to `target`."""
        vectors = self._vectors(source, target, stride // source.phases)
        # With few vectors a register would wait for its own last sum: several sums take turns.
        unroll = 4 if len(vectors) == 1 else 2 if len(vectors) <= 4 else 1
        kernel = weight.shape[-1]
        low, high = rewrite.live_taps(source.size, kernel, stride, padding)
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
        product = Product(
            source,
            target,
            vectors,
            first.int(),
            taps.int(),
            values,
            bias.clone(),
            unroll=unroll,
            **options,
        )
        self.products.append(product)

    def _conv(self, conv: nn.Conv2d, source: Map, target: Map, **options) -> None:
        stride = conv.stride[0]
        if self.positions > 1 and stride > source.phases:  # a copy, so that vectors can be read
            split = self._map(source.channels, source.size, source.border, stride)
            same = torch.eye(source.channels)[:, :, None, None]
            self._product(same, torch.zeros(source.channels), source, split, 1, 0)
            source = split
        self._product(conv.weight, conv.bias, source, target, stride, conv.padding[0], **options)

    def _stem(self, model: nn.Module, channels: int) -> Map:
        conv, pool = model.conv1, model.maxpool
        if channels == 1:  # three equal channels are one, with the sum of their weights
            conv.weight = nn.Parameter(conv.weight.sum(1, keepdim=True), requires_grad=False)
        size = _size(self.image.size, conv)
        if isinstance(pool, nn.Identity):
            target = self._map(conv.out_channels, size, 1)
            self._conv(conv, self.image, target, relu=True)
            return target
        target = self._map(conv.out_channels, _size(size, pool), 1)
        one = self._map(1, size, 0)  # each channel goes through the pool before the next is made
        maxima = []
        for y in range(target.size):
            for x in range(target.size):
                rows, columns = (
                    [v * pool.stride - pool.padding + tap for tap in range(pool.kernel_size)]
                    for v in (y, x)
                )
                window = [
                    (r, c) for r in rows for c in columns if 0 <= min(r, c) <= max(r, c) < size
                ]
                maxima.append((target.at(y, x), [one.at(*place) for place in window]))
        self._conv(conv, self.image, one, relu=True, pool=(target, maxima))
        return target

    def _block(self, block: nn.Module, x: Map) -> Map:
        """A BasicBlock or Bottleneck; its last convolution adds to what the shortcut left."""
        convs = [module for name, module in block.named_children() if name.startswith("conv")]
        size, source = x.size, x
        for index, conv in enumerate(convs[:-1]):
            size = _size(size, conv)
            key = index, conv.out_channels, size
            if key not in self._middle:
                self._middle[key] = self._map(conv.out_channels, size, int(size > 1))
            self._conv(conv, source, self._middle[key], relu=True)
            source = self._middle[key]
        target = x
        if block.downsample is not None:
            target = self._map(convs[-1].out_channels, size, int(size > 1))
            self._conv(block.downsample[0], x, target)
        self._conv(convs[-1], source, target, relu=True, add=True)
        return target


# --- the code that computes it ------------------------------------------------------------------


def _loop(
    b: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    step: int,
    body: Callable[..., Sequence[ir.Value]],
    carried: Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """for i in range(start, stop, step): carried = body(i, *carried); returns the last of them."""
    before, head = b.block, b.append_basic_block()
    done = b.function.append_basic_block()
    b.cbranch(b.icmp_signed("<", start, stop), head, done)
    b.position_at_end(head)
    index = b.phi(start.type)
    index.add_incoming(start, before)
    current = [b.phi(value.type) for value in carried]
    for phi, value in zip(current, carried, strict=True):
        phi.add_incoming(value, before)
    new = body(index, *current) or ()
    following, after = b.add(index, index.type(step)), b.block
    for phi, value in zip([index, *current], [following, *new], strict=True):
        phi.add_incoming(value, after)
    b.cbranch(b.icmp_signed("<", following, stop), head, done)
    b.position_at_end(done)
    results = [b.phi(value.type) for value in carried]
    for phi, first, last in zip(results, carried, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, after)
    return results


class _Code:
    """LLVM's intermediate language for a plan."""

    def __init__(self, plan: Plan, registers: int):
        self.plan = plan
        self.sums = registers - 4  # what is left after the weight, its place and the zero
        self.cell = ir.VectorType(F32, plan.images)
        self.module = ir.Module()
        steps = [self._function(product, f"product{i}") for i, product in enumerate(plan.products)]
        self._main(steps)

    # scratch memory is addressed in cells
    def _at(self, b: ir.IRBuilder, base: ir.Value, offset) -> ir.Value:
        offset = I64(offset) if isinstance(offset, int) else offset
        return b.gep(base, [offset], source_etype=self.cell)

    def _load(self, b: ir.IRBuilder, base: ir.Value, offset, typ: ir.Type = None) -> ir.Value:
        return b.load(self._at(b, base, offset), typ=typ or self.cell, align=4 * self.plan.images)

    def _store(self, b: ir.IRBuilder, value: ir.Value, base: ir.Value, offset) -> None:
        b.store(value, self._at(b, base, offset), align=4 * self.plan.images)

    def _splat(self, b: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
        undefined = ir.Constant(vector, ir.Undefined)
        one = b.insert_element(undefined, value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
        return b.shuffle_vector(one, undefined, zeros)

    def _multiply_add(self, vector: ir.VectorType) -> ir.Function:
        name = f"llvm.fmuladd.v{vector.count}f32"
        return self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(vector, [vector] * 3), name
        )

    def _entry(self, b: ir.IRBuilder, tensor: Tensor, index: ir.Value) -> ir.Value:
        """tensor[index]; its address becomes a constant of the code."""
        typ = {torch.int32: I32, torch.float32: F32}[tensor.dtype]
        base = I64(tensor.data_ptr()).inttoptr(PTR)
        return b.load(b.gep(base, [index], source_etype=typ), typ=typ)

    def _function(self, p: Product, name: str) -> ir.Function:
        """void name(scratch): one product for one tile."""
        function = ir.Function(self.module, ir.FunctionType(VOID, [PTR]), name)
        b = ir.IRBuilder(function.append_basic_block())
        images, widest = self.plan.images, max(keep[-1] + 1 for _, _, keep in p.vectors)
        width = 1 << (widest - 1).bit_length()  # of a vector, in cells
        vector = ir.VectorType(F32, width * images)
        multiply_add = self._multiply_add(vector)
        scratch, zero = function.args[0], ir.Constant(vector, [0.0] * vector.count)
        source = self._at(b, scratch, p.source.base)
        pieces = -(-len(p.vectors) // (self.sums // p.unroll))
        size = -(-len(p.vectors) // pieces)

        def row(o: ir.Value) -> None:
            start, stop = (self._entry(b, p.first, b.add(o, I64(i))) for i in (0, 1))
            start, stop = b.sext(start, I64), b.sext(stop, I64)
            stride = 0 if p.pool else p.target.stride
            target = self._at(b, scratch, b.add(I64(p.target.base), b.mul(o, I64(stride))))
            bias = self._splat(b, self._entry(b, p.bias, o), vector)
            for begin in range(0, len(p.vectors), size):
                piece = p.vectors[begin : begin + size]

                def add_weight(k: ir.Value, *sums: ir.Value, piece=piece) -> list[ir.Value]:
                    new = []
                    for i in range(p.unroll):
                        at = b.add(k, I64(i))
                        value = self._splat(b, self._entry(b, p.values, at), vector)
                        tap = self._at(b, source, b.sext(self._entry(b, p.taps, at), I64))
                        for place, _, _ in piece:
                            x = self._load(b, tap, place, vector)
                            new.append(b.call(multiply_add, [x, value, sums[len(new)]]))
                    return new

                sums = [
                    b.fadd(bias, self._load(b, target, place, vector)) if p.add else bias
                    for _, place, _ in piece
                ]
                sums += [zero] * (len(piece) * (p.unroll - 1))
                sums = _loop(b, start, stop, p.unroll, add_weight, sums)
                for i, (_, place, keep) in enumerate(piece):
                    total = sums[i]
                    for other in sums[i + len(piece) :: len(piece)]:
                        total = b.fadd(total, other)
                    total = self._max(b, total, zero) if p.relu else total
                    if len(keep) < width:  # the border stays zero
                        kept = [cell in keep for cell in range(width) for _ in range(images)]
                        mask = ir.Constant(ir.VectorType(ir.IntType(1), vector.count), kept)
                        total = b.select(mask, total, self._load(b, target, place, vector))
                    self._store(b, total, target, place)
            if p.pool:
                pooled, maxima = p.pool
                to = self._at(b, scratch, b.add(I64(pooled.base), b.mul(o, I64(pooled.stride))))
                for place, window in maxima:
                    best = self._load(b, target, window[0])
                    for other in window[1:]:
                        best = self._max(b, best, self._load(b, target, other))
                    self._store(b, best, to, place)

        _loop(b, I64(0), I64(len(p.bias)), 1, row)
        b.ret_void()
        return function

    def _max(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    def _main(self, steps: list[ir.Function]) -> None:
        """void run(images, n, strides n, c, h, w, logits, scratch, tile): one tile of images.

        Images are float32 with these strides in elements, logits (n, classes). A tile's missing
        images are copies of the last.
        """
        types = [PTR, I64, I64, I64, I64, I64, PTR, PTR, I64]
        function = ir.Function(self.module, ir.FunctionType(VOID, types), "run")
        images, n, sn, sc, sh, sw, logits, scratch, tile = function.args
        b = ir.IRBuilder(function.append_basic_block())
        plan = self.plan

        def float_at(base: ir.Value, offset: ir.Value) -> ir.Value:
            return b.gep(base, [offset], source_etype=F32)

        lanes = []
        for lane in range(plan.images):
            i, end = b.add(b.mul(tile, I64(plan.images)), I64(lane)), b.sub(n, I64(1))
            lanes.append(b.select(b.icmp_signed("<", i, end), i, end))
        sources = [float_at(images, b.mul(i, sn)) for i in lanes]

        def pixel(c: ir.Value, y: ir.Value, x: ir.Value) -> None:
            at = b.add(b.add(b.mul(c, sc), b.mul(y, sh)), b.mul(x, sw))
            value = ir.Constant(self.cell, ir.Undefined)
            for lane, source in enumerate(sources):
                one = b.load(float_at(source, at), typ=F32)
                value = b.insert_element(value, one, I32(lane))
            place = self._entry(b, plan.pixels, b.add(b.mul(y, size), x))
            place = b.add(b.sext(place, I64), b.mul(c, I64(m.stride)))
            self._store(b, value, scratch, b.add(place, I64(m.base)))

        m, size = plan.image, I64(plan.image.size)
        _loop(b, I64(0), I64(plan.image.channels), 1, lambda c: _loop(
            b, I64(0), size, 1, lambda y: _loop(
                b, I64(0), size, 1, lambda x: pixel(c, y, x))))  # fmt: skip
        for step in steps:
            b.call(step, [scratch])
        classes = plan.logits.channels

        def write(k: ir.Value) -> None:
            value = self._load(b, scratch, b.add(I64(plan.logits.base), k))
            for lane, i in enumerate(lanes):
                at = float_at(logits, b.add(b.mul(i, I64(classes)), k))
                b.store(b.extract_element(value, I32(lane)), at)

        _loop(b, I64(0), I64(classes), 1, write)

        b.ret_void()


class _Compiled:
    """A plan's code, and one scratch memory per thread."""

    def __init__(self, plan: Plan, registers: int, threads: int):
        self.plan = plan  # holds the tensors that the code reads
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        module = llvm.parse_assembly(str(_Code(plan, registers).module))
        self._engine = llvm.create_mcjit_compiler(module, machine)  # holds the code
        self._engine.finalize_object()
        kinds = [ctypes.c_void_p, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 2, ctypes.c_int64]
        self.run = ctypes.CFUNCTYPE(None, *kinds)(self._engine.get_function_address("run"))
        floats = (plan.cells + plan.positions) * plan.images  # the last vector may reach beyond
        self.scratch = [torch.zeros(floats) for _ in range(threads)]  # borders: zero


class SparseResNet(nn.Module):
    """A torchvision ResNet's function, without its zeros; on the CPU, without gradients.

    `grey`: the images' three channels are equal, and only the first is read.
    """

    def __init__(self, model: nn.Module, image_size: int, grey: bool = True):
        super().__init__()
        lanes, self._registers = _host()
        size = image_size, 1 if grey else 3
        self.many = Plan(model, *size, images=lanes, positions=1)
        self.few = Plan(model, *size, images=1, positions=lanes)
        self.values = nn.ParameterList(
            nn.Parameter(product.values, requires_grad=False) for product in self.many.products
        )
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads)
        self._compiled: dict[int, _Compiled] = {}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, classes), of `images`, float32 (N, 3, H, H) in any layout."""
        n, size = len(images), self.many.image.size
        if images.shape[1:] != (3, size, size) or images.dtype != torch.float32:
            raise ValueError(f"expected float32 (N, 3, {size}, {size}), got {tuple(images.shape)}")
        logits = torch.empty(n, self.many.logits.channels)
        plan = self.few if 4 * n <= 3 * self.many.images else self.many  # measured: as fast at 12
        code = self._code(plan)
        tiles = -(-n // plan.images)
        left = iter(range(tiles))  # shared: a thread that is held up leaves its tiles to others

        def run(memory: Tensor) -> None:
            places = logits.data_ptr(), memory.data_ptr()
            for tile in left:
                code.run(images.data_ptr(), n, *images.stride(), *places, tile)

        others = [self._pool.submit(run, memory) for memory in code.scratch[1:tiles]]
        run(code.scratch[0])
        for other in others:
            other.result()
        return logits

    def _code(self, plan: Plan) -> _Compiled:
        if plan.images not in self._compiled:
            self._compiled[plan.images] = _Compiled(plan, self._registers, self.threads)
        return self._compiled[plan.images]


def _host() -> tuple[int, int]:
    """Floats in a vector register, and how many of these there are."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    return (8, 16) if features.get("avx") else (4, 32 if "neon" in features else 16)
