"""How every script ends when it is told to stop, or when nobody reads what it prints."""

import os
import signal
import sys
from collections.abc import Callable


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
