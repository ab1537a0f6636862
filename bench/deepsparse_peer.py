"""Measure DeepSparse for bench/speed.py, in the environment of its own that DeepSparse needs.

    python deepsparse_peer.py FILE.onnx SECONDS BATCH [BATCH ...]

FILE takes one float32 input (N, 3, H, H): normalized grey images as three equal channels. Prints
one line of JSON: images per second, by batch size. Each batch size runs for at least SECONDS after
one call that warms up. Ends with 1 if DeepSparse would leave a part of the network to ONNX Runtime.
"""

import json
import sys
import time

import deepsparse
import numpy as np
import onnx


def main() -> None:
    file, seconds, *batches = sys.argv[1:]
    (given,) = onnx.load(file).graph.input
    shape = [size.dim_value for size in given.type.tensor_type.shape.dim[1:]]
    rates = {}
    for batch in map(int, batches):
        images = np.random.default_rng(0).uniform(-1, 1, (batch, 1, *shape[1:]))
        images = np.ascontiguousarray(np.broadcast_to(images, (batch, *shape)), np.float32)
        engine = deepsparse.Engine(file, batch_size=batch)
        if engine.fraction_of_supported_ops < 1:  # the rest would run dense, in ONNX Runtime
            sys.exit("DeepSparse does not support all operators of the file")
        engine.run([images])
        began, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - began < float(seconds):
            engine.run([images])
            calls += 1
        rates[batch] = batch * calls / (time.perf_counter() - began)
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
