"""What each of two processes does, in a module of its own: spawned processes import all of it."""

import torch
import torch.distributed as dist

import runtime


def batchnorm(rank, port, results):
    """Put out, gradient and statistics for this process's half of a batch into `results`."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5, dtype=torch.double) * 3 + 1
    layer = runtime.synchronize_batchnorm_(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double())
    mine = x[4 * rank : 4 * rank + 4].requires_grad_()
    out = layer(mine)
    (out**3).sum().backward()
    results[rank] = (out.detach(), mine.grad, layer[0].running_mean, layer[0].running_var)
    dist.destroy_process_group()
