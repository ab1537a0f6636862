"""Several processes as one (torchrun): each has the whole batch and trains on a share of it."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ParallelError(Exception):
    """The processes cannot work together; the message is one line for the user."""


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
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


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()


def processes() -> int:
    """How many processes train together (torchrun); each has the whole batch and trains a share."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process() -> int:
    """The number of this one; only 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(batch: Tensor) -> Tensor:
    """The part of a batch that this process trains on."""
    return batch if processes() == 1 else batch.tensor_split(processes())[process()]


def say(text: str) -> None:
    if process() == 0:
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
