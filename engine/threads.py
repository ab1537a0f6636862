"""A batch's tiles shared out to threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def share_tiles(
    pool: ThreadPoolExecutor, threads: int, tiles: int, work: Callable[[Iterator[int], int], None]
) -> None:
    """Call work(tiles, thread) in up to `threads` threads, of which the caller's is number 0.

    The iterator over range(tiles) is shared: a thread that is slowed down leaves its tiles to
    others. Raises what `work` raises.
    """
    remaining = iter(range(tiles))
    others = [pool.submit(work, remaining, n) for n in range(1, min(threads, tiles))]
    work(remaining, 0)
    for other in others:
        if not other.cancel():  # not begun: the pool is busy with another call
            other.result()
