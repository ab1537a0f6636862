"""The pruned network run fast on a CPU: only weights that are not zero are multiplied.

    engine = SparseResNet(model, image_size=28)   # from any torchvision ResNet, BatchNorm folded
    logits = engine(images)                       # as model(images), up to rounding

A vector register holds one value of 16 images (8 without AVX-512), so that a multiply-add with one
weight serves them all and no index is ever looked up per image. Each convolution is one loop over
its weights that are not zero, output channel by output channel: the channel's map, in pieces of up
to 28 positions, stays in registers while each weight adds its multiple of a shifted input map,
whose place is read once for the whole piece. For few images the registers hold 16 neighbouring
positions of one image instead. The code for that (llvm_source.py) is written and compiled when an
engine of its shape is first called, in 0.2 to 0.4 s.
"""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from engine import llvm_source
from engine.plan import Plan


class _Compiled:
    """A plan's code, and scratch memories for as many tiles as are worked on at once."""

    def __init__(self, plan: Plan):
        self.plan = plan  # holds the tensors that the code reads
        self._addresses = llvm_source.addresses(plan.tables)
        self._functions = llvm_source.compiled(plan.shape, self._write)
        self._idle: list[Tensor] = []

    def _write(self) -> tuple[llvm_source.Code, dict]:
        code = llvm_source.Engine(self.plan)
        return code, {"run": code.run}

    def run(self, *arguments: int) -> None:
        """One tile; arguments as of llvm_source.Engine's `run`, but the tables."""
        self._functions.run(*arguments, self._addresses.data_ptr())

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
        lanes, _ = llvm_source.host()
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
                self._compiled[plan.images] = _Compiled(plan)
            return self._compiled[plan.images]
