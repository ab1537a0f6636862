"""Fast inference of sparse networks on a CPU: only non-zero weights are multiplied.

    engine = SparseResNet(model, image_size=28)   # of any torchvision ResNet; BatchNorm is folded
    logits = engine(images)                       # as model(images), up to rounding

A vector register holds one value of 16 images (8 with AVX2, 4 with NEON): a multiply-add with one
weight serves them all, and no index is looked up per image. Each convolution is one loop over its
non-zero weights, output channel by output channel. The sums of the output channel, at up to 28
positions, stay in registers while each weight adds its multiple of a shifted input feature map,
whose offset is read once for all positions. For small batches a register holds several neighboring
positions of fewer images, so that each thread has a tile. The code (llvm_source.py) is written and
compiled when an engine of its shape is first called with such a batch (docs/speed.md has times).
"""

import functools
import threading

import torch
from torch import Tensor, nn

from engine import llvm_source, plan
from engine.plan import Plan
from engine.threads import Argument, address, default_threads, share_tiles


class _TileRunner:
    """The machine code of a plan, and scratch memory for each call that is running it."""

    def __init__(self, tiles: Plan):
        self.images = tiles.images
        write = functools.partial(self._write, tiles)
        self._code = llvm_source.compile_once(tiles.shape, write)["run"]  # lives as long as this
        self._address = address(self._code)
        self._tables = [table.clone() for table in tiles.tables]  # nobody else can move these
        self._addresses = llvm_source.addresses(self._tables)
        # The last vector may reach beyond the last cell. Where borders are not cleared for each
        # tile, they stay zero.
        self._floats = (tiles.cells + tiles.positions) * tiles.images
        self._idle: list[Tensor] = []

    @staticmethod
    def _write(tiles: Plan) -> tuple[llvm_source.Code, dict]:
        code = llvm_source.PlanCode(tiles)
        return code, {"run": code.run}

    def run(self, images: Tensor, logits: Tensor, threads: int) -> None:
        """Write the logits of all images."""
        n = len(images)
        tiles = -(-n // self.images)
        threads = max(1, min(threads, tiles))
        scratch = self._idle.pop() if self._idle else None
        if scratch is None or len(scratch) < threads:
            scratch = torch.zeros(threads, self._floats, dtype=torch.float32)
        numbers = images.data_ptr(), n, *images.stride(), logits.data_ptr()
        arguments = [
            *map(Argument, numbers),
            Argument(scratch.data_ptr(), per_thread=4 * self._floats),
            Argument(0, per_tile=1),
            Argument(self._addresses.data_ptr()),
        ]  # of PlanCode's `run`
        share_tiles(threads, tiles, self._address, arguments)
        self._idle.append(scratch)


class SparseResNet(nn.Module):
    """The function of a torchvision ResNet without its zero weights; on the CPU, no gradients.

    `grey`: the images have three equal channels, and only the first is read. By default this is so
    if all weights of the other two channels are zero, as in a network pruned for gray images. Any
    number of threads can call one engine at the same time. Copies and pickles are compiled again,
    for the machine that they are on.
    """

    def __init__(self, model: nn.Module, image_size: int, grey: bool | None = None):
        super().__init__()
        if grey is None:
            grey = not model.conv1.weight[:, 1:].any()
        self._plan = functools.partial(Plan, plan.sparse_copy(model, grey), image_size)
        self._prepare()
        self.eval()

    def _prepare(self) -> None:
        """Set what belongs to this machine and process, and is neither copied nor pickled."""
        self.lanes, _ = llvm_source.host()
        self.largest = self._plan(images=self.lanes, positions=1)
        self.values = nn.ParameterList(
            nn.Parameter(product.values, requires_grad=False) for product in self.largest.products
        )
        self.threads = default_threads()
        self._runners: dict[int, _TileRunner] = {}
        self._compiling = threading.Lock()

    def __getstate__(self) -> dict:
        own = ("largest", "_runners", "_compiling")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, classes), of `images`, float32 (N, 3, H, H) in any layout.

        Raises ValueError for images of another shape, dtype or device.
        """
        n, size = len(images), self.largest.image.size
        kind = images.dtype, images.device.type
        if images.shape[1:] != (3, size, size) or kind != (torch.float32, "cpu"):
            raise ValueError(
                f"expected float32 (N, 3, {size}, {size}) on the CPU, got {images.dtype} "
                f"{tuple(images.shape)} on {images.device}"
            )
        logits = torch.empty(n, self.largest.logits.channels, dtype=torch.float32)
        self._runner(self._tile_size(n)).run(images, logits, self.threads)
        return logits

    def _tile_size(self, n: int) -> int:
        """Images of a tile, a power of two, at most `lanes`: small enough that `n` images are a
        tile for each thread."""
        share = -(-n // max(1, self.threads))
        return min(self.lanes, 1 << max(0, share - 1).bit_length())

    def _runner(self, images: int) -> _TileRunner:
        with self._compiling:
            if images not in self._runners:
                tiles = self.largest
                if images < self.lanes:
                    # Positions of several images start anywhere in a cache line. Vectors of 16
                    # would often take two.
                    positions = max(1, min(self.lanes, 8) // images)
                    tiles = self._plan(images=images, positions=positions, reuse=images > 1)
                self._runners[images] = _TileRunner(tiles)
            return self._runners[images]
