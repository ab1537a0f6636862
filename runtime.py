"""What every script needs around its work: OpenMP's threads, messages, signals, locks, processes.

Imported before torch, which reads OpenMP's variables once, when it is loaded. By default OpenMP's
threads spin while they wait for each other. On a shared machine a spinning thread occupies the core
that the thread it waits for needs: one busy process beside it made a training step 24 times as slow
on two cores, and makes it twice as slow with these settings (docs/experiments.md). If the user has
set any of the variables, or has imported torch already, they are left alone.
"""

import os
import signal
import sys
from pathlib import Path

OPENMP_WAITING = {
    "GOMP_SPINCOUNT": "2000",  # GNU's, in PyTorch's wheels for Linux: turns of a loop
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's, in conda and on macOS: milliseconds
}
OPENMP_VARIABLES = {"OMP_WAIT_POLICY", *OPENMP_WAITING}

if "torch" not in sys.modules and not OPENMP_VARIABLES & os.environ.keys():
    os.environ.update(OPENMP_WAITING)

_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
_ours = _script.parent == Path(__file__).resolve().parent  # not another program that imports us
if _ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of imports, until `run`

# ruff: noqa: E402
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


OUT_OF_MEMORY = "out of memory; smaller images need less"


class UserError(Exception):
    """What was asked for cannot be done. The message is one line for the user; a script prints it
    and ends with exit code 2."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` on one line, without control codes: names of files and tensors can hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ParallelError(UserError):
    """The processes cannot work together."""


# --- messages and exit codes --------------------------------------------------------------------


class _Lossy(io.RawIOBase):
    """Standard output or error for messages, which may be lost: they must not end the work.

    The first loss on standard output is reported on standard error. A closed pipe raises
    BrokenPipeError, as everywhere.
    """

    strict = False  # within `print_result`: nothing may be lost

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw
        self._failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, text: bytes) -> int:
        try:
            return self._raw.write(text)
        except OSError as error:
            known, self._failed = self._failed, True
            if _Lossy.strict or isinstance(error, BrokenPipeError):
                raise
            if not known and self.fileno() == 1:
                print(
                    f"warning: standard output cannot be written ({error.strerror}); messages are "
                    "lost",
                    file=sys.stderr,
                )
            return len(text)


def _open_streams() -> None:
    """Make standard output and error accept every message, also if they are closed, full or ASCII.

    A closed descriptor is opened, so that no file gets its number. Characters that a stream cannot
    encode are written as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode, errors="backslashreplace"))  # noqa: SIM115
        elif number and hasattr(stream, "buffer"):  # notebooks and IDLE have streams of their own
            raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between
            lines = stream.line_buffering or stream.write_through
            buffer = io.BufferedWriter(_Lossy(raw))
            setattr(
                sys,
                name,
                io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=lines),
            )


def print_result(text: str) -> None:
    """Print what a program may read on standard output. In a script, raises OSError if that fails.

    All else that scripts print are messages, which may be lost.
    """
    _Lossy.strict = True
    try:
        print(text, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None
    finally:
        _Lossy.strict = False


def run(main: Callable[[], int]) -> int:
    """Run a script; returns its exit code.

    It is main's, whether or not its messages could be printed; 130 after Ctrl-C or SIGTERM, which
    are treated alike so that both clean up; 141 if the reader of a pipe is gone; 2, with one line,
    if the system refuses a file or another thread.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by the script, for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no advice on its cache folder
    os.environ["MPLBACKEND"] = "agg"  # a notebook's shell names one that may not be installed
    tqdm.monitor_interval = 0  # no thread that watches the bars
    np.finfo(np.float64)  # before denormal numbers are off: older NumPys warn of their absence
    torch.set_flush_denormal(True)  # they are ten times slower on a CPU
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, not at exit, where nothing can be caught
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C again: no traceback of the exit
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`; Python writes what is left once more, at exit
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        return 141
    except MemoryError:
        print(f"{Path(sys.argv[0]).name}: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError):
            known = [str(part) for part in (error.filename, error.strerror) if part]
            text = ": ".join(known) or str(error)
            if "temporary directory" in text:  # torch, matplotlib and exports need one
                text += "; set TMPDIR to a writable folder"
        elif "start new thread" in str(error):
            text = "the system allows no more threads (ulimit -u); set a smaller OMP_NUM_THREADS"
        elif "out of memory" in str(error) or "can't allocate memory" in str(error):
            text = OUT_OF_MEMORY
        else:
            raise
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        return 2


# --- locks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Within: no other process holds the lock file `path`, which stays; killed processes hold none.

    Raises BlockingIOError if another process holds it (`wait`: waits instead), and OSError if it
    cannot be opened. Where there are no locks, as on some network file systems, a warning says so.
    """
    with path.open("a") as file:
        try:
            if fcntl is None:
                raise OSError(0, "not on this system")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            print(
                f"warning: {path}: cannot be locked ({error.strerror}), so nothing stops a second "
                "process; start one at a time",
                file=sys.stderr,
            )
        yield


# --- several processes (torchrun) ---------------------------------------------------------------


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Within: the processes that torchrun started, if any, form a group on "cuda" or the CPU.

    Raises ParallelError if torchrun's variables are incomplete.
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
            place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= there:
                raise ParallelError(
                    f"more processes than GPUs on this machine ({there}): start fewer, or give "
                    "--device cpu"
                )
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if cuda else "gloo")
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here. Raises ParallelError if one has ended."""
    if world_size() > 1:
        try:
            dist.barrier()
        except RuntimeError as error:
            raise ParallelError(f"cannot reach the other processes ({error})") from None


def world_size() -> int:
    """How many processes train together (torchrun)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; only 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_shard(batch: Tensor) -> Tensor:
    """The part of a batch, (N, ...), that this process trains on."""
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
