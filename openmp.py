"""How OpenMP's threads wait for each other: briefly, so that training can share its machine.

Imported before torch, which reads these variables once, when it is loaded. Waiting threads spin, by
default for so long that on a machine with anything else to do they keep a core from the thread that
they wait for: one busy process beside it made a training step 24 times as slow on two cores, and
makes it twice as slow now (docs/experiments.md). Who has set any of these variables is left alone.
"""

import os

WAITING = {
    "GOMP_SPINCOUNT": "2000",  # GNU's, which PyTorch's wheels for Linux bring: turns of a loop
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's, of conda and macOS: milliseconds
}
NAMES = {"OMP_WAIT_POLICY", *WAITING}

if not NAMES & os.environ.keys():
    os.environ.update(WAITING)
