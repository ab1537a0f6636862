"""A plan, or a part of it, as LLVM's intermediate representation and as machine code.

All shapes are constants of the code. All that differs between networks of one shape is in tables,
whose addresses are arguments: so each shape is compiled once. A vector register holds one value of
16 images (8 with AVX2, 4 with NEON), or neighboring positions of fewer images. Memory is addressed
in cells; a cell holds one value of each image of a tile.
"""

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from ctypes import CFUNCTYPE, c_int64, c_void_p
from typing import NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from engine.plan import FeatureMap, Plan, Product, Vector

F32, I32, I64, PTR, VOID = (
    ir.FloatType(),
    ir.IntType(32),
    ir.IntType(64),
    ir.PointerType(),
    ir.VoidType(),
)
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()


def for_range(
    b: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    step: int,
    body: Callable[..., Sequence[ir.Value]],
    carried: Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """Write `for i in range(start, stop, step): carried = body(i, *carried)`; returns `carried`."""
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


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Addresses of contiguous tensors, a table for the code: int64 (tensors,)."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


class Run(NamedTuple):
    """Pieces of a product's vectors at equal distances: one loop computes them."""

    vectors: list[Vector]  # of the first piece
    count: int  # of pieces
    read: int  # from one piece to the next, in cells of the source ...
    write: int  # ... and of the target


def equal_pieces(vectors: Sequence[Vector], most: int) -> list[Run]:
    """`vectors` in pieces of at most `most`, all of about the same length.

    Many differ only in their place, as the rows of a feature map do. They share one copy of the
    code, which is then up to five times as small, and as fast to compile.
    """
    vectors = list(vectors)
    length = -(-len(vectors) // -(-len(vectors) // most))
    runs: list[Run] = []
    for start in range(0, len(vectors), length):
        piece = vectors[start : start + length]
        if runs:
            first, count, read, write = runs[-1]
            if count == 1:
                read, write = piece[0].read - first[0].read, piece[0].write - first[0].write
            moved = (
                v._replace(read=v.read + count * read, write=v.write + count * write) for v in first
            )
            if piece == [*moved]:
                runs[-1] = Run(first, count + 1, read, write)
                continue
        runs.append(Run(piece, 1, 0, 0))
    return runs


class Code:
    """An LLVM module of functions for tiles of `images` images; each shape is written once."""

    def __init__(self, images: int):
        self.images = images
        self.sums = host()[1] - 4  # registers beside the weight, its offset and the zero
        self.cell = ir.VectorType(F32, images)
        self.zero = ir.Constant(self.cell, [0.0] * images)
        self.module = ir.Module()
        self.written: dict[tuple, ir.Function] = {}

    def function(self, name: str, arguments: Sequence[ir.Type]) -> tuple[ir.Function, ir.IRBuilder]:
        function = ir.Function(self.module, ir.FunctionType(VOID, arguments), name)
        return function, ir.IRBuilder(function.append_basic_block())

    def _shared(self, key: tuple, pointers: int, body: Callable) -> ir.Function:
        """The function void (pointers) for this key; `body(b, *arguments)` writes it."""
        if key not in self.written:
            function, b = self.function(f"{key[0]}{len(self.written)}", [PTR] * pointers)
            self.written[key] = function
            body(b, *function.args)
            b.ret_void()
        return self.written[key]

    def _at(self, b: ir.IRBuilder, base: ir.Value, offset) -> ir.Value:
        offset = I64(offset) if isinstance(offset, int) else offset
        return b.gep(base, [offset], source_etype=self.cell)

    def _one_register(self, b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
        """This address as a sum that is made once. LLVM would leave it to each load, and on Intel's
        processors a multiply-add whose operand is at the sum of two registers is two operations."""
        at = self._at(b, base, offset)
        return b.asm(ir.FunctionType(PTR, [PTR]), "", "=r,0", [at], False)

    def _load(self, b: ir.IRBuilder, base: ir.Value, offset, typ: ir.Type = None) -> ir.Value:
        return b.load(self._at(b, base, offset), typ=typ or self.cell, align=4 * self.images)

    def _store(self, b: ir.IRBuilder, value: ir.Value, base: ir.Value, offset) -> None:
        b.store(value, self._at(b, base, offset), align=4 * self.images)

    def _splat(self, b: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
        undefined = ir.Constant(vector, ir.Undefined)
        one = b.insert_element(undefined, value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
        return b.shuffle_vector(one, undefined, zeros)

    def intrinsic(self, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
        return self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(result, arguments), name
        )

    def _multiply_add(self, vector: ir.VectorType) -> ir.Function:
        return self.intrinsic(f"llvm.fmuladd.v{vector.count}f32", vector, *[vector] * 3)

    def after(self, b: ir.IRBuilder, tables: ir.Value, n: int) -> ir.Value:
        """The tables after the first `n`."""
        return b.gep(tables, [I64(n)], source_etype=PTR)

    def _table(self, b: ir.IRBuilder, tables: ir.Value, n: int) -> ir.Value:
        return b.load(self.after(b, tables, n), typ=PTR)

    def _integer(self, b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
        """table[index], an int32."""
        return b.sext(b.load(b.gep(table, [index], source_etype=I32), typ=I32), I64)

    def _float(self, b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
        return b.load(b.gep(table, [index], source_etype=F32), typ=F32)

    def product(self, p: Product) -> ir.Function:
        """void (source, target, pooled, tables): a product of this shape for one tile."""
        return self._shared(("product", p.shape), 4, lambda b, *args: self._product(b, p, *args))

    def _product(
        self,
        b: ir.IRBuilder,
        p: Product,
        source: ir.Value,
        targets: ir.Value,
        pooled: ir.Value,
        tables: ir.Value,
    ) -> None:
        starts, offsets, values, biases, parts = (self._table(b, tables, n) for n in range(5))
        images, widest = self.images, max(v.cells[-1] + 1 for v in p.vectors)
        width = 1 << (widest - 1).bit_length()  # of a vector, in cells
        vector = ir.VectorType(F32, width * images)
        multiply_add = self._multiply_add(vector)
        zero, lowest = (ir.Constant(vector, [value] * vector.count) for value in (0.0, -math.inf))
        runs = equal_pieces(p.vectors, self.sums // p.unroll)
        rows = I64(len(p.bias))

        def each_piece(body: Callable) -> None:
            """Write body(vectors, offset in the source, offset in the target) for each piece."""
            for vectors, count, *steps in runs:

                def piece(i: ir.Value, vectors=vectors, steps=steps) -> None:
                    body(vectors, *(b.mul(i, I64(step)) for step in steps))

                for_range(b, I64(0), I64(count), 1, piece)

        def row(n: ir.Value, o: ir.Value, piece: tuple, first=None, last=None) -> None:
            """Row n of the weights, for a piece of channel o; `first` and `last`: of the parts, or
            None."""
            vectors, read, write = piece
            start, stop = (self._integer(b, starts, b.add(n, I64(i))) for i in (0, 1))
            inputs = self._at(b, source, read)
            target = self._at(b, channel(o), write)
            bias = self._splat(b, self._float(b, biases, o), vector)

            def start_at(v: Vector) -> ir.Value:
                if not p.add and first is None:
                    return bias
                before = self._load(b, target, v.write, vector)
                total = b.fadd(bias, before) if p.add else bias
                return total if first is None else b.select(first, total, before)

            def add_weight(k: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                new = []
                for i in range(p.unroll):
                    at = b.add(k, I64(i))
                    value = self._splat(b, self._float(b, values, at), vector)
                    shifted = self._one_register(b, inputs, self._integer(b, offsets, at))
                    for v in vectors:
                        x = self._load(b, shifted, v.read, vector)
                        new.append(b.call(multiply_add, [x, value, sums[len(new)]]))
                return new

            sums = [start_at(v) for v in vectors] + [zero] * (len(vectors) * (p.unroll - 1))
            sums = for_range(b, start, stop, p.unroll, add_weight, sums)
            floor = zero if last is None else b.select(last, zero, lowest)
            for i, v in enumerate(vectors):
                total = sums[i]
                for other in sums[i + len(vectors) :: len(vectors)]:
                    total = b.fadd(total, other)
                total = self._max(b, floor, total) if p.relu else total
                if len(v.cells) < width:  # the border stays zero
                    kept = [cell in v.cells for cell in range(width) for _ in range(images)]
                    mask = ir.Constant(ir.VectorType(ir.IntType(1), vector.count), kept)
                    total = b.select(mask, total, self._load(b, target, v.write, vector))
                self._store(b, total, target, v.write)

        def channel(o: ir.Value) -> ir.Value:
            return self._at(b, targets, b.mul(o, I64(0 if p.pool else p.target.stride)))

        def pool(o: ir.Value) -> None:
            to = self._at(b, pooled, b.mul(o, I64(p.pooled.stride)))
            for n, window in enumerate(p.pool.windows(p.target.size)):
                best, *others = (self._load(b, targets, p.target.at(*at)) for at in window)
                for other in others:
                    best = self._max(b, best, other)
                self._store(b, best, to, p.pooled.at(*divmod(n, p.pooled.size)))

        def part(n: ir.Value, count: ir.Value, piece: tuple) -> None:
            ends = (b.icmp_signed("==", n, end) for end in (I64(0), b.sub(count, I64(1))))
            begin, (first, last) = b.mul(n, rows), ends
            for_range(b, I64(0), rows, 1, lambda o: row(b.add(begin, o), o, piece, first, last))

        def whole(o: ir.Value) -> None:
            each_piece(lambda *piece: row(o, o, piece))
            if p.pool:
                pool(o)

        if p.split:
            count = self._integer(b, parts, I64(0))
            each_piece(
                lambda *piece: for_range(b, I64(0), count, 1, lambda n: part(n, count, piece))
            )
        else:
            for_range(b, I64(0), rows, 1, whole)

    def _clear(self, b: ir.IRBuilder, scratch: ir.Value, maps: Sequence[FeatureMap]) -> None:
        """Zeros in the borders."""
        for m in maps:
            after = range(m.channels * m.stride, m.cells)

            def channel(c: ir.Value, m=m) -> None:
                start = self._at(b, scratch, b.add(b.mul(c, I64(m.stride)), I64(m.base)))
                for place in m.zeros:
                    self._store(b, self.zero, start, place)

            for_range(b, I64(0), I64(m.channels), 1, channel)
            for place in after:
                self._store(b, self.zero, scratch, m.base + place)

    def _max(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger; `y` if one of them is NaN. One instruction in this form alone."""
        return b.select(b.fcmp_ordered(">", x, y), x, y)


class PlanCode(Code):
    """The function `run`: a whole plan for one tile."""

    def __init__(self, plan: Plan):
        super().__init__(plan.images)
        self.plan = plan
        self.run = self._run([self.product(p) for p in plan.products])

    def _run(self, steps: list[ir.Function]) -> ir.Function:
        """void run(images, n, strides n, c, h, w, logits, scratch, tile, tables): one tile.

        Images are float32 with these strides in elements, logits (n, classes). The last tile is
        filled up with copies of the last image. An image with a pixel that is not finite gets NaN
        logits, as in the dense network, which multiplies that pixel by zero as well.
        """
        function, b = self.function("run", [PTR, I64, I64, I64, I64, I64, PTR, PTR, I64, PTR])
        images, n, sn, sc, sh, sw, logits, scratch, tile, tables = function.args
        pixels = self._table(b, tables, 0)
        plan = self.plan

        def float_at(base: ir.Value, offset: ir.Value) -> ir.Value:
            return b.gep(base, [offset], source_etype=F32)

        lanes = []
        for lane in range(plan.images):
            i, end = b.add(b.mul(tile, I64(plan.images)), I64(lane)), b.sub(n, I64(1))
            lanes.append(b.select(b.icmp_signed("<", i, end), i, end))
        sources = [float_at(images, b.mul(i, sn)) for i in lanes]

        def pixel(c: ir.Value, y: ir.Value, x: ir.Value, poison: ir.Value) -> list[ir.Value]:
            at = b.add(b.add(b.mul(c, sc), b.mul(y, sh)), b.mul(x, sw))
            value = ir.Constant(self.cell, ir.Undefined)
            for lane, source in enumerate(sources):
                one = b.load(float_at(source, at), typ=F32)
                value = b.insert_element(value, one, I32(lane))
            place = self._integer(b, pixels, b.add(b.mul(y, size), x))
            place = b.add(place, b.mul(c, I64(m.stride)))
            self._store(b, value, scratch, b.add(place, I64(m.base)))
            return [b.fadd(poison, b.fmul(value, self.zero))]

        m, size = plan.image, I64(plan.image.size)
        self._clear(b, scratch, plan.cleared[0])
        (poison,) = for_range(b, I64(0), I64(plan.image.channels), 1, lambda c, s: for_range(
            b, I64(0), size, 1, lambda y, s: for_range(
                b, I64(0), size, 1, lambda x, s: pixel(c, y, x, s), [s]), [s]),
            [self.zero])  # fmt: skip
        for i, (step, product) in enumerate(zip(steps, plan.products, strict=True)):
            self._clear(b, scratch, plan.cleared[1 + i])
            own = self.after(b, tables, 1 + i * len(product.tables))
            pooled = product.pooled or product.target
            places = [m.base for m in (product.source, product.target, pooled)]
            b.call(step, [*(self._at(b, scratch, place) for place in places), own])
        classes = plan.logits.channels

        def write(k: ir.Value) -> None:
            value = self._load(b, scratch, b.add(I64(plan.logits.base), k))
            value = b.fadd(value, poison)
            for lane, i in enumerate(lanes):
                at = float_at(logits, b.add(b.mul(i, I64(classes)), k))
                b.store(b.extract_element(value, I32(lane)), at)

        for_range(b, I64(0), I64(classes), 1, write)
        b.ret_void()
        return function


class MachineCode:
    """`functions`, compiled for this machine, each a callable of addresses and integers."""

    def __init__(self, code: Code, functions: dict[Hashable, ir.Function]):
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        module = llvm.parse_assembly(str(code.module))
        self._compiler = llvm.create_mcjit_compiler(module, machine)  # holds the code
        self._compiler.finalize_object()
        self.functions = {key: self._callable(function) for key, function in functions.items()}

    def _callable(self, function: ir.Function) -> Callable[..., None]:
        types = [c_void_p if argument.type == PTR else c_int64 for argument in function.args]
        callable_ = CFUNCTYPE(None, *types)(self._compiler.get_function_address(function.name))
        callable_.code = self  # lives as long
        return callable_


_cache: dict[tuple, MachineCode] = {}
_compiling = threading.Lock()


def compile_once(
    shape: tuple, write: Callable[[], tuple[Code, dict[Hashable, ir.Function]]]
) -> dict[Hashable, Callable[..., None]]:
    """The functions that `write` returns as machine code, compiled once a process and `shape`."""
    with _compiling:
        key = host(), shape
        if key not in _cache:
            _cache[key] = MachineCode(*write())
        return _cache[key].functions


def host() -> tuple[int, int]:
    """(floats in a vector register, number of vector registers) of this machine."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    return (8, 16) if features.get("avx") else (4, 32 if "neon" in features else 16)
