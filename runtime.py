"""What every script needs before and after its work: how threads wait, several processes, signals.

Imported before torch, which reads OpenMP's variables once, when it is loaded. By default OpenMP's
threads spin while they wait for each other. On a shared machine a spinning thread occupies the core
that the thread it waits for needs: one busy process beside it made a training step 24 times as slow
on two cores, and makes it twice as slow with these settings (docs/experiments.md). If the user has
set any of the variables, they are left alone.
"""

import os

OPENMP_WAITING = {
    "GOMP_SPINCOUNT": "2000",  # GNU's, in PyTorch's wheels for Linux: turns of a loop
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's, in conda and on macOS: milliseconds
}
OPENMP_VARIABLES = {"OMP_WAIT_POLICY", *OPENMP_WAITING}

if not OPENMP_VARIABLES & os.environ.keys():
    os.environ.update(OPENMP_WAITING)

# ruff: noqa: E402
import contextlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ParallelError(Exception):
    """The processes cannot work together; the message is one line for the user."""


# --- the end of a script ----------------------------------------------------------------------


def run(main: Callable[[], int]) -> int:
    """The exit code of a script: main's, 130 after Ctrl-C or SIGTERM, 141 if a pipe was closed.

    SIGTERM is as Ctrl-C, so that what cleans up behind one cleans up behind the other.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, not at exit, where nothing can be caught
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`; Python writes what is left once more, at exit
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return 141


# --- several processes (torchrun) ---------------------------------------------------------------


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Within: the processes that torchrun started, if it did, work as one on "cuda" or the CPU.

    Raises ParallelError.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in os.environ]:
            raise ParallelError(
                f"WORLD_SIZE is set, but not {', '.join(missing)}: start several processes with "
                "torchrun, or unset it"
            )
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def world_size() -> int:
    """How many processes train together (torchrun); each has the whole batch and trains a share."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; only 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_shard(batch: Tensor) -> Tensor:
    """The part of a batch that this process trains on."""
    return batch if world_size() == 1 else batch.tensor_split(world_size())[rank()]


def print_rank0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # each process's loss depends on every x
        return _MeanOverProcesses.forward(ctx, grad)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all processes together (nn.SyncBatchNorm needs GPUs).

    Each process must have the same number of images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(self.weight.dtype)
        mean = _MeanOverProcesses.apply(values.mean((0, 2, 3)))
        centered = values - mean[:, None, None]
        variance = _MeanOverProcesses.apply(centered.square().mean((0, 2, 3)))
        with torch.no_grad():
            n = dist.get_world_size() * x.numel() / x.shape[1]
            # update_bn asks for plain averages by setting the momentum to None
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batchnorm_(model: nn.Module) -> nn.Module:
    """Make every BatchNorm a `SyncBatchNorm2d`; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
