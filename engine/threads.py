"""A batch's tiles shared out to threads, by machine code.

To wake a sleeping thread takes as long as the network takes for four images, and so does handing
over Python's lock. So a thread takes one tile after the other without Python, and looks for more
work for a moment (SPINS, less than 0.1 ms) before it sleeps.
"""

import ctypes
import functools
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from llvmlite import ir

from engine import llvm_source
from engine.llvm_source import I32, I64, PTR, VOID

SPINS = 4_000  # looks for work before a thread sleeps
IDLE, POSTED, RUNNING = range(3)  # states of a worker
STATE, SHARE, JOB, THREAD = range(4)  # int64 of a worker
FUNCTION, NEXT, TILES, ARGUMENTS = range(4)  # int64 of a job


class Argument(NamedTuple):
    """A function gets first + tile * per_tile + thread * per_thread."""

    first: int
    per_tile: int = 0
    per_thread: int = 0


# --- machine code -------------------------------------------------------------------------------


def _field(b: ir.IRBuilder, base: ir.Value, index: int) -> ir.Value:
    return b.gep(base, [I64(index)], source_etype=I64)


def _number(b: ir.IRBuilder, base: ir.Value, index: int) -> ir.Value:
    return b.load(_field(b, base, index), typ=I64)


def _call(b: ir.IRBuilder, function: ir.Value, arguments: Sequence[ir.Value]) -> None:
    kind = ir.FunctionType(VOID, [argument.type for argument in arguments])
    b.call(b.inttoptr(function, kind.as_pointer()), arguments)


def _write_share(count: int) -> tuple[llvm_source.Code, dict[str, ir.Function]]:
    """void share(job, thread): call the job's function of `count` arguments for tiles that no other
    thread has taken, until there are none."""
    code = llvm_source.Code(1)
    function, b = code.function("share", [PTR, I64])
    job, thread = function.args
    head, body, end = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    tile = b.atomic_rmw("add", _field(b, job, NEXT), I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", tile, _number(b, job, TILES)), body, end)
    b.position_at_end(body)
    arguments = []
    for n in range(count):
        first, *steps = (_number(b, job, ARGUMENTS + 3 * n + i) for i in range(3))
        for step, times in zip(steps, (tile, thread), strict=True):
            first = b.add(first, b.mul(step, times))
        arguments.append(first)
    _call(b, _number(b, job, FUNCTION), arguments)
    b.branch(head)
    b.position_at_end(end)
    b.ret_void()
    return code, {"share": function}


def _write_waiting() -> tuple[llvm_source.Code, dict[str, ir.Function]]:
    """void post(worker, share, job, thread): give work to an idle worker. void serve(worker,
    spins): do what is posted, until nothing has been for `spins` looks. void finish(worker, spins):
    take back what has not begun, and wait for what has, for `spins` looks at most."""
    code = llvm_source.Code(1)

    def pause(b: ir.IRBuilder) -> None:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            b.call(code.intrinsic("llvm.x86.sse2.pause", VOID), [])
        elif machine in ("arm64", "aarch64"):
            b.call(code.intrinsic("llvm.aarch64.hint", VOID, I32), [I32(1)])

    def is_now(b: ir.IRBuilder, worker: ir.Value, state: int) -> ir.Value:
        now = b.load_atomic(_field(b, worker, STATE), "acquire", 8, typ=I64)
        return b.icmp_signed("==", now, I64(state))

    def change(b: ir.IRBuilder, worker: ir.Value, before: int, after: int) -> ir.Value:
        """Whether the state was `before`, and now is `after`."""
        state = _field(b, worker, STATE)
        pair = b.cmpxchg(state, I64(before), I64(after), "acq_rel", "acquire")
        return b.extract_value(pair, 1)

    def spin(b: ir.IRBuilder, spins: ir.Value, found: Callable[[], ir.Value]) -> ir.Block:
        """Look until it is found; the builder is then there, the block is for when it is not."""
        before, head, more = b.block, b.append_basic_block(), b.append_basic_block()
        there, gone = b.append_basic_block(), b.append_basic_block()
        b.branch(head)
        b.position_at_end(head)
        n = b.phi(I64)
        n.add_incoming(I64(0), before)
        b.cbranch(found(), there, more)
        b.position_at_end(more)
        pause(b)
        following = b.add(n, I64(1))
        n.add_incoming(following, more)
        b.cbranch(b.icmp_signed("<", following, spins), head, gone)
        b.position_at_end(there)
        return gone

    post, b = code.function("post", [PTR, I64, I64, I64])
    worker, *values = post.args
    for index, value in zip((SHARE, JOB, THREAD), values, strict=True):
        b.store(value, _field(b, worker, index))
    b.atomic_rmw("xchg", _field(b, worker, STATE), I64(POSTED), "release")
    b.ret_void()

    serve, b = code.function("serve", [PTR, I64])
    worker, spins = serve.args
    start, mine = b.append_basic_block(), b.append_basic_block()
    b.branch(start)
    b.position_at_end(start)
    gone = spin(b, spins, lambda: is_now(b, worker, POSTED))
    b.cbranch(change(b, worker, POSTED, RUNNING), mine, start)  # it may have been taken back
    b.position_at_end(mine)
    _call(b, _number(b, worker, SHARE), [_number(b, worker, JOB), _number(b, worker, THREAD)])
    b.atomic_rmw("xchg", _field(b, worker, STATE), I64(IDLE), "release")
    b.branch(start)
    b.position_at_end(gone)
    b.ret_void()

    finish, b = code.function("finish", [PTR, I64])
    worker, spins = finish.args
    with b.if_then(change(b, worker, POSTED, IDLE)):
        b.ret_void()
    gone = spin(b, spins, lambda: is_now(b, worker, IDLE))
    b.ret_void()
    b.position_at_end(gone)
    b.ret_void()
    return code, {"post": post, "serve": serve, "finish": finish}


@functools.cache
def _waiting() -> dict[str, Callable[..., None]]:
    return llvm_source.compile_once(("waiting",), _write_waiting)


@functools.cache
def _share(count: int) -> Callable[[int, int], None]:
    return llvm_source.compile_once(("share", count), lambda: _write_share(count))["share"]


def address(function: Callable) -> int:
    """Of compiled code."""
    return ctypes.cast(function, ctypes.c_void_p).value


# --- workers ------------------------------------------------------------------------------------


class _Worker:
    """A thread that waits for shares of jobs. Only who holds `taken` may post one."""

    def __init__(self):
        self._fields = (ctypes.c_int64 * 4)(IDLE)
        self._address = ctypes.addressof(self._fields)
        self._code = _waiting()
        self._lock = threading.Lock()
        self._asleep = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.taken = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._serve, daemon=True).start()

    def post(self, share: int, job: int, thread: int) -> None:
        with self._lock:
            self._code["post"](self._address, share, job, thread)
            if self._asleep:
                self._wake.put(None)
                self._asleep = False

    def finish(self) -> None:
        """Take back what has not begun; return when the worker is idle."""
        self._code["finish"](self._address, SPINS)
        while self._fields[STATE] != IDLE:  # it computes its last tile
            time.sleep(1e-4)
            self._code["finish"](self._address, SPINS)

    def _serve(self) -> None:
        while True:
            self._code["serve"](self._address, SPINS)
            with self._lock:
                if self._fields[STATE] == POSTED:
                    continue
                self._asleep = True
            self._wake.get()


class _Workers:
    """The workers of this process."""

    def __init__(self):
        self._all: list[_Worker] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> list[_Worker]:
        """At most `count` workers that nobody else has taken."""
        taken = []
        with self._lock:
            for worker in self._all:
                if len(taken) < count and worker.taken.acquire(blocking=False):
                    taken.append(worker)
            while len(taken) < count and len(self._all) < max(count, os.cpu_count() or 1):
                worker = _Worker()
                try:
                    worker.start()
                except RuntimeError:  # the system has no more threads
                    break
                worker.taken.acquire()
                self._all.append(worker)
                taken.append(worker)
        return taken


_workers = _Workers()
if hasattr(os, "register_at_fork"):  # a child process has none of these threads
    os.register_at_fork(after_in_child=_workers.__init__)


def default_threads() -> int:
    """As many as PyTorch uses, but not more than there are cores."""
    return min(torch.get_num_threads(), os.cpu_count() or 1)


def share_tiles(threads: int, tiles: int, function: int, arguments: Sequence[Argument]) -> None:
    """Call the function at this address for all tiles, in up to `threads` threads; the caller's is
    number 0. A thread that is slowed down leaves its tiles to others."""
    flat = [number for argument in arguments for number in argument]
    job = (ctypes.c_int64 * (ARGUMENTS + len(flat)))(function, 0, tiles, *flat)
    share, place = _share(len(arguments)), ctypes.addressof(job)
    helpers = _workers.take(max(0, min(threads, tiles) - 1))
    try:
        for thread, worker in enumerate(helpers, 1):
            worker.post(address(share), place, thread)
        share(place, 0)
    finally:
        _finish(helpers)


def _finish(helpers: list[_Worker]) -> None:
    """Wait for all of them, whatever is raised meanwhile: they use the caller's memory."""
    raised = None
    while helpers:
        try:
            helpers[-1].finish()
            helpers.pop().taken.release()
        except BaseException as error:  # Ctrl-C
            raised = error
    if raised is not None:
        raise raised
