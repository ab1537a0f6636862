"""Measure the speed figures of README.md and docs/, side by side on this machine.

    uv run --group bench -m bench.speed                         # 10 minutes on 2 cores
    uv run --group bench -m bench.speed --only inference        # one part
    uv run --group bench -m bench.speed --deepsparse ENV/bin/python

Prints the figures of each part and, as its last line, the content of bench/bench.json. What is
compared runs in turns, so that a machine that slows down slows down all; figures are medians.
DeepSparse runs only in a Python 3.11 environment of its own:

    uv venv --python 3.11 ENV
    uv pip install --python ENV/bin/python deepsparse==1.8.0 'numpy<2' setuptools
"""

import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

import checkpoint
import data
import distill
import export
import models
import prune
import train
from bench import ROOT, SHIPPED
from engine import inference, rewrite
from runlog import record

OURS = "this project"
BATCHES = (1, 16, 64, 256, 1024)
EXPORT_BATCHES = (1, 256)
BITS = (32, 16, 8, 4)
STEPS = 16  # of a training round
ROUNDS = 5
SECONDS = 0.3  # each round runs what it measures for at least so long


def medians(
    runs: dict[Hashable, Callable[[], object]],
    seconds: float | None = None,
    peer: Callable[[], dict[Hashable, float]] = dict,
) -> dict[Hashable, float]:
    """Median seconds of one call of each of `runs`, which take turns for ROUNDS rounds.

    `peer` is called once a round, and returns seconds that it measured itself.
    """
    seconds, rounds = SECONDS if seconds is None else seconds, []
    for run in runs.values():  # warm up
        run()
    for _ in range(ROUNDS):
        times = peer()
        for name, run in runs.items():
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < seconds:
                run()
                calls += 1
            times[name] = (time.perf_counter() - began) / calls
        rounds.append(times)
    return {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}


def show(title: str, rows: dict[str, dict[str, object]]) -> None:
    """Print a table with a line for each of `rows`."""
    print(f"\n{title}\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}", flush=True)


def by_batch(times: dict[tuple[str, int], float]) -> dict[str, dict[str, int]]:
    """Images/s by name and batch size, of seconds of a batch."""
    table: dict[str, dict[str, int]] = {}
    for (name, n), seconds in times.items():
        table.setdefault(name, {})[f"batch {n}"] = round(n / seconds)
    return table


# --- inference ----------------------------------------------------------------------------------


def engines(model: nn.Module, file: bytes, device: torch.device, size: int) -> dict[str, Callable]:
    """What runs the network, by name: functions of float32 images (N, 3, H, H)."""
    bf16 = rewrite.inference_copy(model, device, True, size)
    made: dict[str, Callable] = {
        "PyTorch, dense, fp32": model.to(device),
        "PyTorch, dense, bf16, BatchNorm folded": lambda images: bf16(images.to(torch.bfloat16)),
    }
    if device.type != "cpu":
        return made
    for name, build in (("ONNX Runtime, dense", onnxruntime), ("OpenVINO, dense", openvino)):
        try:
            made = {name: build(file, torch.get_num_threads()), **made}
        except ImportError:
            print(f"{name}: left out, it is not installed (--group bench)", file=sys.stderr)
    return {OURS: inference.SparseResNet(model, size), **made}


def onnx_with_zeros(model: nn.Module, images: Tensor) -> bytes:
    """The network of float32 images as ONNX, BatchNorm folded, for any batch size.

    By the older of PyTorch's exporters: DeepSparse supports none of the other's graph.
    """
    file, names = io.BytesIO(), {"input_names": ["images"], "output_names": ["logits"]}
    axes = {"dynamo": False, "opset_version": 13, "dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(rewrite.fold_batchnorm(model).float(), (images,), file, **names, **axes)
    return file.getvalue()


def onnxruntime(file: bytes, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options)
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def openvino(file: bytes, threads: int) -> Callable:
    """In the precision that OpenVINO chooses (bf16 where the CPU has it), compiled for each batch
    size."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    core, compiled = openvino.Core(), {}

    def run(images: Tensor) -> object:
        if len(images) not in compiled:
            model = core.read_model(file)
            model.reshape(list(images.shape))
            compiled[len(images)] = core.compile_model(model, "CPU", config).create_infer_request()
        return compiled[len(images)].infer([images.numpy()])[0]

    return run


def deepsparse(python: Path | None, file: bytes) -> Callable[[], dict]:
    """A peer for `medians`: DeepSparse, run by the interpreter `python`."""
    if python is None:
        print("DeepSparse: left out, no interpreter was given (--deepsparse)", file=sys.stderr)
        return dict
    script = Path(__file__).with_name("deepsparse_peer.py")

    def turn() -> dict[tuple[str, int], float]:
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "network.onnx"
            onnx.write_bytes(file)
            command = [python, script, onnx, SECONDS, *BATCHES]
            quiet = os.environ | {"NM_DISABLE_ANALYTICS": "True"}
            done = subprocess.run(map(str, command), env=quiet, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"--deepsparse {python}: {reason}")
        rates = json.loads(done.stdout.splitlines()[-1])
        return {("DeepSparse 1.8", int(n)): int(n) / rate for n, rate in rates.items()}

    return turn


def matrix_gflops(side: int = 2048) -> int:
    """fp32 GFLOP/s of a matrix product, the better of PyTorch's and NumPy's BLAS libraries."""
    a = torch.randn(side, side)
    times = medians({"torch": lambda: a @ a, "numpy": lambda: np.matmul(a.numpy(), a.numpy())})
    return round(2 * side**3 / min(times.values()) / 1e9)


def run(engine: Callable[[Tensor], object], images: Tensor) -> None:
    engine(images)
    if images.is_cuda:
        torch.cuda.synchronize()


@torch.inference_mode()
def measure_inference(args: argparse.Namespace, device: torch.device) -> dict:
    """Images/s of forward passes of the included networks, for batches that are in memory."""
    figures = {"gflops": matrix_gflops() if device.type == "cpu" else None, "networks": {}}
    for path in SHIPPED:
        model, meta = checkpoint.load(path)
        size = meta["image_size"]
        grey = torch.rand(max(BATCHES), 1, size, size) * 2 - 1
        images = grey.expand(-1, 3, -1, -1).contiguous()
        file = onnx_with_zeros(model, images[:1]) if device.type == "cpu" else b""
        peer = deepsparse(args.deepsparse, file) if device.type == "cpu" else dict
        runs = {
            (name, n): functools.partial(run, engine, images[:n].clone().to(device))
            for name, engine in engines(model, file, device, size).items()
            for n in BATCHES
        }
        rates = by_batch(medians(runs, peer=peer))
        rates = {OURS: rates.pop(OURS, {}), **rates} if device.type == "cpu" else rates
        show(f"{path.name}, images/s", rates)
        multiply_adds = inference.SparseResNet(model, size).largest.multiply_adds
        figures["networks"][path.name] = {"multiply_adds": multiply_adds, "images/s": rates}
    print(f"\nfp32 matrix product: {figures['gflops']} GFLOP/s")
    return figures


# --- training -----------------------------------------------------------------------------------


def measure_training(args: argparse.Namespace, device: torch.device) -> dict:
    """Milliseconds of a step of distillation of a pruned ResNet18 from a ResNet50: train.py's, and
    the same written as is usual."""
    settings, training = distill.Batches(), distill.Training(epochs=1)
    settings = distill.Batches(images=STEPS * settings.batch_size)
    source = data.find(args.data)
    images, context = train.prepare(source, data.load_train(source, False), settings, device)
    plain_teacher = models.build("resnet50", images.classes).to(device).eval()
    teacher = distill.Teacher([context.inference_copy(plain_teacher)])
    network = distill.TrainState(models.build("resnet18", images.classes), training, context)
    network.prune_to(100_000, [])
    rates = [1e-3] * images.steps

    def ours() -> None:
        progress = distill.Progress(images.steps, images.classes, device)
        batches = images.batches(Generator(device).manual_seed(0))
        distill.train_epoch(network, batches, teacher, rates, progress, distill.Stop())

    usual = usual_loop(images, training, device, plain_teacher, rewrite.untrimmed(network.model))
    runs = {
        "`train.py`": ours,
        "PIL in DataLoader workers, dense, fp32, metrics read at each step": usual,
    }
    times = medians(runs, seconds=0)
    rows = {name: {"ms": round(1000 * s / images.steps)} for name, s in times.items()}
    show(f"distillation step, {images.batch_size} images", rows)
    return rows


class PilImages(Dataset):
    """Images and labels of `data`, transformed one by one, as torchvision's data sets do it."""

    def __init__(self, data: distill.TrainingData):
        self.images = [Image.fromarray(image.numpy()) for image in data.images_u8.cpu()]
        self.labels = data.labels.tolist()
        self.transform = v2.Compose(
            [
                v2.Grayscale(3),
                v2.RandomResizedCrop(data.images_u8.shape[-1], data.settings.crop_scale),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.RandomErasing(data.settings.erasing, scale=(0.02, 0.25), value="random"),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def usual_loop(
    data: distill.TrainingData,
    training: distill.Training,
    device: torch.device,
    teacher: nn.Module,
    pruned: nn.Module,
) -> Callable[[], None]:
    """An epoch of the same training as it is usually written: PIL transforms in DataLoader workers,
    dense networks in fp32, masks of torch.nn.utils.prune, metrics read at each step."""
    mixup = torch.distributions.Beta(data.settings.mixup_alpha, data.settings.mixup_alpha)
    workers = {"num_workers": os.cpu_count(), "persistent_workers": True}
    loader = DataLoader(PilImages(data), data.batch_size, shuffle=True, drop_last=True, **workers)
    model = models.build("resnet18", data.classes)
    model.load_state_dict(pruned.state_dict())
    model = prune.with_masks(model.to(device))
    decay = {"momentum": distill.MOMENTUM, "weight_decay": training.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, nesterov=True, **decay)
    metric = MulticlassAccuracy(data.classes, average="micro").to(device)

    def epoch() -> None:
        model.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            weight = mixup.sample().item()
            images = weight * images + (1 - weight) * images.roll(1, 0)
            targets = F.one_hot(labels, data.classes).float()
            targets = weight * targets + (1 - weight) * targets.roll(1, 0)
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = model(images)
            kd = training.kd_weight, training.temperature
            loss = distill.distillation_loss(logits, teacher_logits, targets, *kd)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), distill.MAX_GRAD_NORM)
            optimizer.step()
            loss.item(), metric(logits, labels).item()

    return epoch


# --- files --------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_bits(args: argparse.Namespace, device: torch.device) -> dict:
    """Quantized weights: size of the file, predictions that change, test accuracy."""
    model, meta = checkpoint.load(args.weights)
    images_u8, labels = data.load(data.find_for_weights(args.weights, meta, args.data), "test")
    rows, expected = {}, models.infer(model, images_u8).argmax(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.pth"
        for bits in BITS:
            checkpoint.save(path, model, meta, bits)
            logits = models.infer(checkpoint.load(path)[0], images_u8)
            rows[str(bits)] = {
                "kB": round(path.stat().st_size / 1000),
                "changed predictions": int((logits.argmax(1) != expected).sum()),
                "test accuracy": f"{models.accuracy(logits, labels):.2%}",
            }
    show("bits", rows)
    return rows


@torch.inference_mode()
def measure_export(args: argparse.Namespace, device: torch.device) -> dict:
    """Each way to run the network elsewhere, in one thread: kB, equal predictions, images/s."""
    torch.set_num_threads(1)
    model, meta = checkpoint.load(args.weights)
    images_u8, _ = data.load(data.find_for_weights(args.weights, meta, args.data), "test")
    expected, size = models.infer(model, images_u8).argmax(1), meta["image_size"]
    runs, rows = {}, {}

    def add(name: str, size_bytes: int, engine: Callable[[Tensor], object]) -> None:
        logits = torch.cat([torch.as_tensor(engine(part)) for part in images_u8.split(250)])
        equal = int((logits.argmax(1) == expected).sum())
        rows[name] = {"kB": round(size_bytes / 1000), "equal predictions": equal}
        for n in EXPORT_BATCHES:
            runs[name, n] = functools.partial(engine, images_u8[:n].clone())

    def sparse(model: nn.Module) -> Callable:
        engine = inference.SparseResNet(model, size)
        return lambda images_u8: engine(models.normalize(images_u8).contiguous())

    with tempfile.TemporaryDirectory() as folder:
        for bits in (32, 16, 8):
            path = Path(folder) / "network.pth"
            checkpoint.save(path, model, meta, bits)
            add(f"`.pth`, {bits} bits", path.stat().st_size, sparse(checkpoint.load(path)[0]))
    for bits in (32, 8) if export.compiler() else ():
        _, source = export.c_file(model, meta, "net", bits)
        library = export.CLibrary(source.text(), "net", meta["num_classes"])
        add(f"`.c`, {bits} bits", source.table_bytes, library)
    for name, module in (
        ("`.onnx`", export.ExportModel(model, size, meta.get("grey", True))),
        ("`.onnx`, nothing removed", export.ReferenceModel(model)),
    ):
        file = export.to_onnx(module.eval(), images_u8[:2])
        add(name, len(file), onnxruntime(file, 1))
    rates = by_batch(medians(runs))
    rows = {name: row | rates[name] for name, row in rows.items()}
    show("export, images/s in one thread", rows)
    return rows


# --- start --------------------------------------------------------------------------------------


def measure_start(args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds of whole processes."""
    first = (
        "import torch, checkpoint; from engine import inference; "
        f"model, meta = checkpoint.load({str(args.weights)!r}); size = meta['image_size']; "
        "inference.SparseResNet(model, size)(torch.zeros(1, 3, size, size))"
    )
    folder = data.find(args.data).path
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["-w", args.weights, "--data", folder, "-o", Path(scratch) / "out.csv"]
        commands = {
            "Python, `import torch`": ["-c", "import torch"],
            "load weights, build an engine, classify one image": ["-c", first],
            "`predict.py`, 10,000 images": ["predict.py", *flags],
        }

        def start(arguments: list) -> None:
            command = [sys.executable, *map(str, arguments)]
            subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

        runs = {name: functools.partial(start, flags) for name, flags in commands.items()}
        times = medians(runs, seconds=0)
    rows = {name: {"seconds": round(seconds, 1)} for name, seconds in times.items()}
    show("processes, from start to end", rows)
    return rows


# --- command line -------------------------------------------------------------------------------

MEASURES = {
    "train": measure_training,
    "bits": measure_bits,
    "inference": measure_inference,
    "export": measure_export,
    "start": measure_start,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the speed figures of the documents.")
    parser.add_argument("--only", choices=MEASURES, help="one part (default: all)")
    parser.add_argument(
        "-w", "--weights", type=Path, default=SHIPPED[0], metavar="FILE",
        help="network of the parts bits, export and start (default: pruned_resnet18.pth)",
    )  # fmt: skip
    parser.add_argument(
        "--deepsparse", type=Path, metavar="PYTHON",
        help="interpreter of an environment that has DeepSparse (default: it is left out)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the images")
    parser.add_argument("--device", choices=models.DEVICES, default="auto", help="default: auto")
    args = parser.parse_args(argv)
    if args.deepsparse is not None and not args.deepsparse.exists():
        parser.error(f"--deepsparse {args.deepsparse}: there is no such file")
    if args.only is None:
        return all_parts(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", "You are using the legacy TorchScript", DeprecationWarning)
    try:
        device = models.choose_device(args.device)
        name = models.device_name(device)
        name += f", {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
        machine = {"device": name, "threads": torch.get_num_threads()}
        figures = MEASURES[args.only](args, device)
    except (OSError, runtime.UserError) as error:
        print(f"bench/speed.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**machine, "commit": record.commit(), args.only: figures}), flush=True)
    return 0


def all_parts(flags: list[str]) -> int:
    """Each part in a process of its own (OpenVINO's threads and training's crash in the same), then
    one line of JSON for all."""
    together: dict = {}
    for part in MEASURES:
        command = [sys.executable, "-m", "bench.speed", *flags, "--only", part]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    together |= json.loads(line)
                else:
                    print(line, end="", flush=True)
        if process.returncode:
            return process.returncode
    print(json.dumps(together))
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
