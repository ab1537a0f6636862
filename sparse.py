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

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor, nn

from plan import Plan, Product

F32, I32, I64, PTR, VOID = (
    ir.FloatType(),
    ir.IntType(32),
    ir.IntType(64),
    ir.PointerType(),
    ir.VoidType(),
)

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
                    total = self._max(b, zero, total) if p.relu else total
                    if len(keep) < width:  # the border stays zero
                        kept = [cell in keep for cell in range(width) for _ in range(images)]
                        mask = ir.Constant(ir.VectorType(ir.IntType(1), vector.count), kept)
                        total = b.select(mask, total, self._load(b, target, place, vector))
                    self._store(b, total, target, place)
            if p.pool:
                pooled = p.pool.target
                to = self._at(b, scratch, b.add(I64(pooled.base), b.mul(o, I64(pooled.stride))))
                for place, window in p.pool.windows(p.target):
                    best = self._load(b, target, window[0])
                    for other in window[1:]:
                        best = self._max(b, best, self._load(b, target, other))
                    self._store(b, best, to, place)

        _loop(b, I64(0), I64(len(p.bias)), 1, row)
        b.ret_void()
        return function

    def _max(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger; `y` if one of them is NaN. One instruction in this form alone."""
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    def _main(self, steps: list[ir.Function]) -> None:
        """void run(images, n, strides n, c, h, w, logits, scratch, tile): one tile of images.

        Images are float32 with these strides in elements, logits (n, classes). A tile's missing
        images are copies of the last. An image with a pixel that is not finite has logits that are
        NaN, as in the dense network, which multiplies it by zero as well.
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

        def pixel(c: ir.Value, y: ir.Value, x: ir.Value, spoilt: ir.Value) -> list[ir.Value]:
            at = b.add(b.add(b.mul(c, sc), b.mul(y, sh)), b.mul(x, sw))
            value = ir.Constant(self.cell, ir.Undefined)
            for lane, source in enumerate(sources):
                one = b.load(float_at(source, at), typ=F32)
                value = b.insert_element(value, one, I32(lane))
            place = self._entry(b, plan.pixels, b.add(b.mul(y, size), x))
            place = b.add(b.sext(place, I64), b.mul(c, I64(m.stride)))
            self._store(b, value, scratch, b.add(place, I64(m.base)))
            return [b.fadd(spoilt, b.fmul(value, zero))]

        m, size = plan.image, I64(plan.image.size)
        zero = ir.Constant(self.cell, [0.0] * plan.images)
        (spoilt,) = _loop(b, I64(0), I64(plan.image.channels), 1, lambda c, s: _loop(
            b, I64(0), size, 1, lambda y, s: _loop(
                b, I64(0), size, 1, lambda x, s: pixel(c, y, x, s), [s]), [s]), [zero])  # fmt: skip
        for step in steps:
            b.call(step, [scratch])
        classes = plan.logits.channels

        def write(k: ir.Value) -> None:
            value = self._load(b, scratch, b.add(I64(plan.logits.base), k))
            value = b.fadd(value, spoilt)
            for lane, i in enumerate(lanes):
                at = float_at(logits, b.add(b.mul(i, I64(classes)), k))
                b.store(b.extract_element(value, I32(lane)), at)

        _loop(b, I64(0), I64(classes), 1, write)

        b.ret_void()


class _Compiled:
    """A plan's code, and scratch memories for as many tiles as are worked on at once."""

    def __init__(self, plan: Plan, registers: int):
        self.plan = plan  # holds the tensors that the code reads
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        module = llvm.parse_assembly(str(_Code(plan, registers).module))
        self._engine = llvm.create_mcjit_compiler(module, machine)  # holds the code
        self._engine.finalize_object()
        kinds = [ctypes.c_void_p, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 2, ctypes.c_int64]
        self.run = ctypes.CFUNCTYPE(None, *kinds)(self._engine.get_function_address("run"))
        self._idle: list[Tensor] = []

    @contextlib.contextmanager
    def scratch(self) -> Iterator[int]:
        """The address of a scratch memory that nobody else uses meanwhile."""
        try:
            memory = self._idle.pop()
        except IndexError:
            # The last vector may reach beyond. Borders are zero, and stay it.
            floats = (self.plan.cells + self.plan.positions) * self.plan.images
            memory = torch.zeros(floats)
        yield memory.data_ptr()
        self._idle.append(memory)


class SparseResNet(nn.Module):
    """A torchvision ResNet's function, without its zeros; on the CPU, without gradients.

    `grey`: the images' three channels are equal, and only the first is read. Any number of threads
    can use one engine at the same time. Copies and pickles are compiled anew, for the machine that
    they are on.
    """

    def __init__(self, model: nn.Module, image_size: int, grey: bool = True):
        super().__init__()
        lanes, _ = _host()
        size = image_size, 1 if grey else 3
        self.many = Plan(model, *size, images=lanes, positions=1)
        self.few = Plan(model, *size, images=1, positions=lanes)
        self._prepare()
        self.eval()

    def _prepare(self) -> None:
        """What belongs to this machine and process, and is neither copied nor pickled."""
        self.values = nn.ParameterList(
            nn.Parameter(product.values, requires_grad=False) for product in self.many.products
        )
        _, self._registers = _host()
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads)  # its threads sleep while they wait
        self._compiled: dict[int, _Compiled] = {}
        self._compiling = threading.Lock()

    def __getstate__(self) -> dict:
        own = ("_pool", "_compiled", "_compiling")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, classes), of `images`, float32 (N, 3, H, H) in any layout.

        Raises ValueError for images of another shape or dtype.
        """
        n, size = len(images), self.many.image.size
        if images.shape[1:] != (3, size, size) or images.dtype != torch.float32:
            raise ValueError(f"expected float32 (N, 3, {size}, {size}), got {tuple(images.shape)}")
        logits = torch.empty(n, self.many.logits.channels)
        plan = self.few if 4 * n <= 3 * self.many.images else self.many  # measured: as fast at 12
        code = self._code(plan)
        tiles = -(-n // plan.images)
        left = iter(range(tiles))  # shared: a thread that is held up leaves its tiles to others

        def run() -> None:
            with code.scratch() as memory:
                for tile in left:
                    places = logits.data_ptr(), memory, tile
                    code.run(images.data_ptr(), n, *images.stride(), *places)

        others = [self._pool.submit(run) for _ in range(1, min(self.threads, tiles))]
        run()
        for other in others:
            if not other.cancel():  # not begun: the pool is at another call's tiles
                other.result()
        return logits

    def _code(self, plan: Plan) -> _Compiled:
        with self._compiling:
            if plan.images not in self._compiled:
                self._compiled[plan.images] = _Compiled(plan, self._registers)
            return self._compiled[plan.images]


def _host() -> tuple[int, int]:
    """Floats in a vector register, and how many of these there are."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    return (8, 16) if features.get("avx") else (4, 32 if "neon" in features else 16)
