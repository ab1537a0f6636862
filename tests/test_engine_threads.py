import ctypes
import os
import threading
import time
from collections import Counter

import pytest

from engine import threads
from engine.threads import Argument

CALLED = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def run(count, tiles, pause=0.0):
    """What share_tiles called: (tile, a sum of all that an argument can depend on, thread)."""
    calls = []

    def function(tile, number, thread):
        calls.append((tile, number, thread))
        time.sleep(pause)

    compiled = CALLED(function)
    arguments = Argument(0, 1), Argument(7, 100, 10_000), Argument(0, 0, 1)
    threads.share_tiles(count, tiles, threads.address(compiled), arguments)
    return calls


@pytest.mark.parametrize("count, tiles", [(1, 3), (2, 1), (2, 40), (4, 40), (3, 0)])
def test_each_tile_is_called_once(count, tiles):
    for _ in range(20):
        calls = run(count, tiles)
        assert sorted(tile for tile, _, _ in calls) == [*range(tiles)]
        assert all(number == 7 + 100 * tile + 10_000 * thread for tile, number, thread in calls)
        assert {thread for *_, thread in calls} <= {*range(count)}


def test_sleeping_threads_are_woken_and_help():
    run(3, 30)
    time.sleep(0.05)
    assert {thread for *_, thread in run(3, 30, pause=0.002)} == {0, 1, 2}


def test_a_slow_thread_leaves_its_tiles_to_others():
    me = threading.get_ident()

    def function(tile, number, thread):
        calls.append(thread)
        time.sleep(0.1 if threading.get_ident() == me else 0.002)

    calls, compiled = [], CALLED(function)
    arguments = Argument(0, 1), Argument(0), Argument(0, 0, 1)
    threads.share_tiles(2, 30, threads.address(compiled), arguments)
    assert len(calls) == 30
    assert Counter(calls)[1] > 20


def test_an_interrupted_caller_waits_for_the_others(monkeypatch):
    sleep, ended, raised = time.sleep, [], []

    def function(tile, number, thread):
        sleep(0.05 + 0.1 * thread)
        ended.append(tile)

    def interrupted(seconds):
        if raised:
            sleep(seconds)
        else:
            raised.append(seconds)
            raise KeyboardInterrupt

    compiled = CALLED(function)
    arguments = Argument(0, 1), Argument(0), Argument(0, 0, 1)
    monkeypatch.setattr(threads.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):  # while the other thread has its tile
        threads.share_tiles(2, 2, threads.address(compiled), arguments)
    assert sorted(ended) == [0, 1]
    monkeypatch.undo()
    assert not any(worker.taken.locked() for worker in threads._workers._all)
    assert len(run(2, 30)) == 30


def test_who_finds_no_free_thread_works_alone():
    results = {}

    def call(name):
        results[name] = run(2, 20, pause=0.002)

    callers = [threading.Thread(target=call, args=(name,)) for name in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for calls in results.values():
        assert sorted(tile for tile, _, _ in calls) == [*range(20)]
    assert len(results) == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    run(2, 10)
    child = os.fork()
    if child == 0:
        used = {thread for *_, thread in run(2, 30, pause=0.002)}
        os._exit(0 if used == {0, 1} else 1)
    assert os.waitpid(child, 0)[1] == 0
