"""A million images through predict.py: `uv run tests/load.py` (a minute, 1 GB of disk).

The test images, once and a hundred times over, as IDX files: time, memory and predictions side by
side. Ends with 1 if predictions differ, or memory grows by more than a tenth.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402


def write_idx(path: Path, times: int) -> None:
    """The test images, `times` times over."""
    images = data.load(data.find(None), "test")[0].numpy()
    count, height, width = images.shape
    with path.open("wb") as file:
        file.write(bytes([0, 0, 8, 3]))  # unsigned bytes in three dimensions
        for size in (count * times, height, width):
            file.write(size.to_bytes(4, "big"))
        for _ in range(times):
            file.write(images.tobytes())


def predict(images: Path, output: Path) -> tuple[dict, float]:
    """What predict.py reports, and the most memory it used, in MB."""
    command = [sys.executable, str(ROOT / "predict.py"), "-w", str(ROOT / "pruned_resnet18.pth")]
    command += [str(images), "--output", str(output), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    report = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"predict.py ended with {status}"
    return report, usage.ru_maxrss / 1e3


def main() -> int:
    print("| images | seconds | images/s | most memory, MB |\n|---|---|---|---|")
    predictions, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 100):
            images, output = Path(folder, "images-idx3-ubyte"), Path(folder, "predictions.csv")
            write_idx(images, times)
            report, peak = predict(images, output)
            n, seconds = report["images"], report["seconds"]
            print(f"| {n:,} | {seconds:.1f} | {n / seconds:,.0f} | {peak:,.0f} |", flush=True)
            with output.open() as file:
                predictions.append([row["pred"] for row in csv.DictReader(file)])
            memory.append(peak)
    once, often = predictions
    same = often == once * 100
    print(f"predictions {'the same' if same else 'DIFFER'}")
    return int(not same or memory[1] > 1.1 * memory[0])


if __name__ == "__main__":
    sys.exit(main())
