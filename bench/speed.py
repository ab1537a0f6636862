"""Every speed figure of the README, measured side by side on this machine.

    uv run --group bench -m bench.speed                   # 6 minutes on 2 cores
    uv run --group bench -m bench.speed --only predict    # 2 minutes

Prints a table for each part and ends with one line of JSON. What is compared runs in turns, so that
a machine that slows down slows down all; shown are medians, and the JSON holds the spread as well.
"""

import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

import checkpoint
import data
import distill
import export
import models
import prune
import train
from engine import inference, rewrite
from runlog import record

WEIGHTS = Path(__file__).resolve().parent.parent / "pruned_resnet18.pth"
SHIPPED = sorted(WEIGHTS.parent.glob("pruned_resnet18*.pth"))
BATCHES = (1, 32, 256, 1024)
WAY_BATCHES = (1, 256)
PARTS = ("train", "files", "bits", "predict", "shipped", "ways", "start", "shared")
BITS = (32, 16, 8, 7, 6, 5, 4, 3)
ROUNDS = 5  # of all that is compared, in turns
SECONDS = 0.3  # at least, that each is run in a round


def alternate(
    runs: dict[str, Callable[[], object]], seconds: float | None = None, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds of one call of each of `runs`: a figure, itself a mean, for each of `rounds`."""
    seconds, rounds = SECONDS if seconds is None else seconds, rounds or ROUNDS
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm up
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < seconds:
                run()
                calls += 1
            times[name].append((time.perf_counter() - began) / calls)
    return times


class Figures:
    """Medians for the tables, and the ranges they lie in: nested dicts of the same shape."""

    def __init__(self):
        self.medians: dict = {}
        self.ranges: dict = {}

    def add(self, figures: list[float], *keys: str, digits: int = 0) -> None:
        low, middle, high = min(figures), statistics.median(figures), max(figures)
        for tree, value in (
            (self.medians, round(middle, digits)),
            (self.ranges, [round(low, digits), round(high, digits)]),
        ):
            for key in keys[:-1]:
                tree = tree.setdefault(key, {})
            tree[keys[-1]] = value


# --- predict ------------------------------------------------------------------------------------


def engines(model: nn.Module, device: torch.device, example: Tensor) -> dict[str, Callable]:
    """What runs the network, by name: each takes float32 images (N, 3, H, H), gives logits."""
    fp32 = model.to(device)
    bf16 = rewrite.inference_copy(model, device, True, example.shape[-1])
    made: dict[str, Callable] = {
        "dense_fp32": fp32,
        "dense_bf16": lambda images: bf16(images.to(torch.bfloat16)),
    }
    if device.type != "cpu":
        return made
    made["sparse"] = inference.SparseResNet(model, example.shape[-1])
    threads = torch.get_num_threads()
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime: not installed (--group bench)", file=sys.stderr)
    else:
        file = export.to_onnx(model, example)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options)
        made["onnxruntime"] = lambda images: session.run(None, {"images": images.numpy()})[0]
    try:
        import openvino
    except ImportError:
        print("openvino: not installed (--group bench)", file=sys.stderr)
    else:
        made["openvino"] = OpenVino(openvino, model, threads)
    return made


class OpenVino:
    """The network compiled by OpenVINO for each batch size it meets, in OpenVINO's own choice of
    precision (bf16 where the CPU has it)."""

    def __init__(self, openvino, model: nn.Module, threads: int):
        self.openvino, self.model = openvino, model
        self.config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.compiled: dict[int, object] = {}

    def __call__(self, images: Tensor) -> object:
        if len(images) not in self.compiled:
            converted = self.openvino.convert_model(self.model, example_input=images)
            converted.reshape(list(images.shape))
            compiled = self.openvino.compile_model(converted, "CPU", self.config)
            self.compiled[len(images)] = compiled.create_infer_request()
        return self.compiled[len(images)].infer([images.numpy()])[0]


@torch.inference_mode()
def predict(weights: Path, source: data.Source, device: torch.device) -> Figures:
    """Images per second: forward passes of batches that are in memory."""
    model, _ = checkpoint.load(weights)
    images_u8, _ = data.load(source, "test")
    images = models.normalize(images_u8[: max(BATCHES)]).contiguous().to(device)
    made = engines(model, device, images[:2].cpu())
    results = Figures()
    print(f"{'images/s':14}" + "".join(f"{f'batch {n}':>12}" for n in BATCHES), flush=True)
    for n in BATCHES:
        batch = images[:n].clone()

        def run(engine: Callable, batch: Tensor = batch) -> None:
            engine(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()

        times = alternate({name: lambda e=engine: run(e) for name, engine in made.items()})
        for name, seconds in times.items():
            results.add([n / s for s in seconds], name, str(n))
    for name, row in results.medians.items():
        print(f"{name:14}" + "".join(f"{row[str(n)]:>12,.0f}" for n in BATCHES))
    return results


@torch.inference_mode()
def ways(weights: Path, source: data.Source) -> Figures:
    """What leaves this project, each way in one thread: kB, images per second, equal predictions.

    And images per second of one sparse engine that 1 and 2 threads share, each a batch at a time.
    """
    model, meta = checkpoint.load(weights)
    size = meta.get("image_size", 28)
    images_u8, _ = data.load(source, "test")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = models.infer(model, images_u8).argmax(1)
    results, engines = Figures(), {}

    def normalized(engine: Callable) -> Callable:
        return lambda images_u8: engine(models.normalize(images_u8).contiguous())

    engine = inference.SparseResNet(model, size)
    results.add([weights.stat().st_size], "sparse", "bytes")
    engines["sparse"] = normalized(engine)
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (16, 8):
            path, name = Path(scratch) / "bits.pth", f"{bits} bits"
            checkpoint.save(path, model, meta, bits)
            results.add([path.stat().st_size], name, "bytes")
            engines[name] = normalized(inference.SparseResNet(checkpoint.load(path)[0], size))
    for bits in (32, 8) if export.compiler() else ():
        name = f"c {bits} bits"
        _, written = export.c_file(model, meta, "net", bits, [])
        results.add([written.table_bytes], name, "bytes")
        engines[name] = export.CLibrary(written.text(), "net", meta["num_classes"])
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime: not installed (--group bench)", file=sys.stderr)
    else:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        slim = export.ExportModel(model, size, meta.get("grey", True)).eval()
        for name, module in (("onnx", slim), ("onnx stock", export.ReferenceModel(model).eval())):
            file = export.to_onnx(module, images_u8[:2])
            session = onnxruntime.InferenceSession(file, options)
            results.add([len(file)], name, "bytes")
            engines[name] = lambda images, session=session: torch.from_numpy(
                session.run(None, {"images": images.numpy()})[0]
            )
    for name, run in engines.items():
        logits = torch.cat([run(part) for part in images_u8.split(250)])
        results.add([int((logits.argmax(1) == expected).sum())], name, "equal")
        results.add([len(expected)], name, "of")
    for n in WAY_BATCHES:
        batch = images_u8[:n].clone()
        runs = {name: lambda run=run, batch=batch: run(batch) for name, run in engines.items()}
        for name, seconds in alternate(runs).items():
            results.add([n / s for s in seconds], name, str(n))
        serving(engine, models.normalize(batch).contiguous(), results)
    torch.set_num_threads(threads)
    print(f"\n{'way out':14}{'kB':>10}{'equal':>8}{'batch 1':>10}{'batch 256':>11}")
    for name, row in results.medians.items():
        size = f"{row['bytes'] / 1000:,.0f}" if "bytes" in row else ""
        rates = [f"{row[str(n)]:,.0f}" for n in WAY_BATCHES]
        print(f"{name:14}{size:>10}{row.get('equal', ''):>8}{rates[0]:>10}{rates[-1]:>11}")
    return results


def serving(engine: Callable, images: Tensor, results: Figures) -> None:
    """Images per second of one engine that 1 and 2 threads give a batch at a time."""
    n = len(images)
    repeats = max(2000 // n, 1)

    def serve() -> None:
        for _ in range(repeats):
            engine(images)

    def shared(threads: int) -> None:
        for done in [pool.submit(serve) for _ in range(threads)]:
            done.result()

    with ThreadPoolExecutor(2) as pool:
        runs = {threads: lambda threads=threads: shared(threads) for threads in (1, 2)}
        for threads, seconds in alternate(runs).items():
            rates = [threads * repeats * n / s for s in seconds]
            results.add(rates, f"threads {threads}", str(n))


def shipped() -> Figures:
    """Multiply-adds, and images per second of `engine`, of the weights in this repository."""
    results, engines = Figures(), {}
    for path in SHIPPED:
        model, meta = checkpoint.load(path)
        engines[path.name] = inference.SparseResNet(model, meta["image_size"])
        results.add([engines[path.name].many.multiply_adds], path.name, "multiply_adds")
    images = torch.randn(max(WAY_BATCHES), 3, 28, 28)
    images[:, 1:] = images[:, :1]
    for n in WAY_BATCHES:
        batch = images[:n].clone()
        runs = {name: lambda e=engine, batch=batch: e(batch) for name, engine in engines.items()}
        for name, seconds in alternate(runs).items():
            results.add([n / s for s in seconds], name, str(n))
    print(f"\n{'weights':28}{'multiply-adds':>14}{'batch 1':>10}{'batch 256':>11}")
    for name, row in results.medians.items():
        rates = [f"{row[str(n)]:,.0f}" for n in WAY_BATCHES]
        print(f"{name:28}{row['multiply_adds']:>14,}{rates[0]:>10}{rates[-1]:>11}")
    return results


# --- train --------------------------------------------------------------------------------------


def training(source: data.Source, device: torch.device) -> Figures:
    """Seconds of one step of distillation while pruning: as train.py does it, the bare work of its
    networks on a batch that is there already, and the way such a loop is usually written."""
    recipe = train.RECIPES["cpu"]
    stage, few = recipe.pruned[-1], (16 if device.type == "cpu" else 200) * recipe.batch_size
    images, setup = train.prepare(source, replace(recipe, images=few), device)

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        return images.batches(torch.Generator(device).manual_seed(0))

    rates = [1e-3] * images.steps

    plain_teacher = models.build("resnet50", images.classes).to(device).eval()
    teacher = setup.frozen(plain_teacher)
    network = distill.TrainState(models.build("resnet18", images.classes), stage, setup)
    network.cut(100_000, [])
    bare = distill.TrainState(models.build("resnet18", images.classes), stage, setup)
    fixed, targets = next(iter(batches()))

    def ours() -> None:
        progress = distill.Progress(images.steps, images.classes, device)
        answers = distill.Teacher([teacher])
        distill.train_epoch(network, batches(), answers, rates, progress, distill.Stop())

    def only_networks() -> None:
        for _ in rates:
            with torch.no_grad():
                teacher(fixed.to(next(teacher.parameters()).dtype))
            with setup.autocast():
                logits = bare.model(fixed)
            bare.optimizer.zero_grad()
            F.cross_entropy(logits.float(), targets).backward()
            bare.optimizer.step()

    usual = UsualLoop(images, stage, device, plain_teacher)
    # The first two differ by a few percent, which takes more rounds to see.
    steps = alternate({"ours": ours, "bare": only_networks}, seconds=0, rounds=2 * ROUNDS)
    steps |= alternate({"usual": usual}, seconds=0)
    results = Figures()
    for name, seconds in steps.items():
        results.add([1000 * s / images.steps for s in seconds], name, digits=1)
    row = results.medians
    row["ours_over_bare"] = round(row["ours"] / row["bare"], 3)
    row["usual_over_ours"] = round(row["usual"] / row["ours"], 2)
    row["peak_memory_mb"] = models.peak_memory_mb(device)
    print(f"\n{'step of ' + str(recipe.batch_size) + ' images':36}{'ms':>8}")
    for name, title in (
        ("ours", "train.py"),
        ("bare", "its networks alone, on a fixed batch"),
        ("usual", "PIL, DataLoader, fp32, eager"),
    ):
        print(f"{title:36}{row[name]:>8,.1f}")
    return results


class UsualLoop:
    """The same training as most people write it: PIL transforms in DataLoader workers, plain
    networks in fp32, masks from torch.nn.utils.prune, metrics read at each step."""

    def __init__(
        self,
        images: distill.TrainingData,
        stage: distill.Stage,
        device: torch.device,
        teacher: nn.Module,
    ):
        recipe = images.recipe
        self.device, self.stage, self.teacher = device, stage, teacher
        self.mixup = torch.distributions.Beta(recipe.mixup_alpha, recipe.mixup_alpha)
        transform = v2.Compose(
            [
                v2.Grayscale(3),
                v2.RandomResizedCrop(images.images_u8.shape[-1], recipe.crop_scale),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )
        samples = [
            (Image.fromarray(image.numpy()), int(label))
            for image, label in zip(images.images_u8.cpu(), images.labels, strict=True)
        ]
        self.loader = DataLoader(
            samples,
            recipe.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=os.cpu_count(),
            persistent_workers=True,
            collate_fn=Collate(transform),
        )
        model = models.build("resnet18", images.classes).to(device)
        self.model = prune.with_masks(model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.accuracy = MulticlassAccuracy(10, average="micro").to(device)

    def __call__(self) -> None:
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            share = self.mixup.sample().item()
            images = share * images + (1 - share) * images.roll(1, 0)
            targets = F.one_hot(labels, 10).float()
            targets = share * targets + (1 - share) * targets.roll(1, 0)
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            logits = self.model(images)
            kd = self.stage.kd_weight, self.stage.temperature
            loss = distill.distillation_loss(logits, teacher_logits, targets, *kd)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), distill.MAX_GRAD_NORM)
            self.optimizer.step()
            loss.item(), self.accuracy(logits, labels).item()


class Collate:
    """Transform and stack a list of (PIL image, label), in a worker."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, samples: list) -> tuple[Tensor, Tensor]:
        images = torch.stack([self.transform(image) for image, _ in samples])
        return images, torch.tensor([label for _, label in samples])


# --- files --------------------------------------------------------------------------------------


def files(weights: Path) -> Figures:
    """Bytes of the weights as we write them and as a plain state dict, and seconds to load them."""
    model, meta = checkpoint.load(weights)
    kind = meta["arch"], meta["num_classes"], False, meta["stem"]
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.pth"
        torch.save(model.state_dict(), plain)
        times = alternate(
            {
                "pruned": lambda: checkpoint.load(weights),
                "plain": lambda: models.build(*kind).load_state_dict(torch.load(plain)),
            }
        )
        results = Figures()
        for name, path in (("pruned", weights), ("plain", plain)):
            results.add([path.stat().st_size], name, "bytes")
            results.add([1000 * s for s in times[name]], name, "load_ms")
    print(f"\n{'file':36}{'kB':>8}{'load, ms':>12}")
    for name, title in (("pruned", weights.name), ("plain", "torch.save(model.state_dict())")):
        row = results.medians[name]
        print(f"{title:36}{row['bytes'] / 1000:>8,.0f}{row['load_ms']:>12,.0f}")
    return results


@torch.inference_mode()
def bits(weights: Path, source: data.Source) -> Figures:
    """Weights of fewer bits: bytes of the file, predictions that change, test accuracy."""
    model, meta = checkpoint.load(weights)
    images_u8, labels = data.load(source, "test")
    results, expected = Figures(), models.infer(model, images_u8).argmax(1)
    print(f"\n{'bits':>6}{'kB':>8}{'changed':>10}{'test accuracy':>16}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bits.pth"
        for n in BITS:
            checkpoint.save(path, model, meta, n)
            logits = models.infer(checkpoint.load(path)[0], images_u8)
            row = {
                "bytes": path.stat().st_size,
                "changed": int((logits.argmax(1) != expected).sum()),
                "of": len(labels),
                "percent": 100 * models.accuracy(logits, labels),
            }
            for name, figure in row.items():
                results.add([figure], str(n), name, digits=2 * (name == "percent"))
            print(f"{n:>6}{row['bytes'] / 1000:>8,.0f}{row['changed']:>10}{row['percent']:>15.2f}%")
    return results


# --- the start of a process ---------------------------------------------------------------------


def start(weights: Path, source: data.Source) -> Figures:
    """Seconds of whole processes: Python with PyTorch, an engine's first answer, predict.py."""
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "out.csv")
        first = (
            "import torch, checkpoint; from engine import inference; "
            f"model, _ = checkpoint.load({str(weights)!r}); "
            "inference.SparseResNet(model, 28)(torch.zeros(1, 3, 28, 28))"
        )
        flags = ["-w", str(weights), "--data", str(source.path), "-o", output]
        commands = {
            "torch": ["-c", "import torch"],
            "first answer": ["-c", first],
            "predict.py": ["predict.py", *flags],
        }

        def run(arguments: list[str]) -> None:
            command = [sys.executable, *arguments]
            subprocess.run(command, cwd=WEIGHTS.parent, stdout=subprocess.DEVNULL, check=True)

        runs = {name: lambda a=arguments: run(a) for name, arguments in commands.items()}
        results = Figures()
        print(f"\n{'process':36}{'s':>8}")
        for name, seconds in alternate(runs, seconds=0, rounds=min(ROUNDS, 3)).items():
            results.add(seconds, name, digits=1)
            print(f"{name:36}{results.medians[name]:>8.1f}")
    return results


# --- a machine that is shared ---------------------------------------------------------------------


def shared() -> Figures:
    """Milliseconds of a training step and of dense inference, alone and beside one busy process,
    with our waiting policy (runtime.py) and with OpenMP's own."""
    others = {
        name: value for name, value in os.environ.items() if name not in runtime.OPENMP_VARIABLES
    }
    child = [sys.executable, "-c", "from bench import speed; speed.steps()"]
    busy = [sys.executable, "-c", "while True: pass"]
    results = Figures()
    print(f"\n{'ms':36}{'step':>9}{'batch 1':>9}{'batch 256':>11}")
    for state in ("quiet", "busy"):
        # LLVM's default, so that runtime.py finds a policy that was chosen, and leaves GNU's alone.
        for policy, more in (
            ("ours", runtime.OPENMP_WAITING),
            ("default", {"KMP_BLOCKTIME": "200"}),
        ):
            # In a session of its own, or the scheduler counts it and us as one.
            beside = subprocess.Popen(busy, start_new_session=True) if state == "busy" else None
            try:
                done = subprocess.run(
                    child, env=others | more, cwd=WEIGHTS.parent, stdout=subprocess.PIPE, check=True
                )
            finally:
                if beside is not None:
                    beside.kill()
                    beside.wait()
            row = json.loads(done.stdout)
            for name, figures in row.items():
                results.add(figures, policy, state, name, digits=1)
            row = results.medians[policy][state].values()
            title = f"{state}, {'runtime.py' if policy == 'ours' else 'as OpenMP waits by itself'}"
            print(f"{title:36}" + "".join(f"{ms:>9,.1f}" for ms in row), flush=True)
    return results


def steps() -> None:
    """Print milliseconds of single steps and forward passes of a ResNet18, at most 15 s of each."""
    setup = distill.Context(
        torch.device("cpu"), models.bf16_is_faster(torch.device("cpu")), 28, True
    )
    network = distill.TrainState(models.build("resnet18", 10), distill.Stage(1), setup)
    network.model.train()
    model = models.build("resnet18", 10).eval()
    images = models.normalize(torch.randint(256, (256, 28, 28), dtype=torch.uint8))
    targets = torch.eye(10)[torch.arange(256) % 10]
    results = {}
    for name, run, most in (
        ("step", lambda: network.step(images, targets, None, 0.0)[0].item(), 20),
        ("batch 1", torch.no_grad()(lambda: model(images[:1])), 200),
        ("batch 256", torch.no_grad()(lambda: model(images)), 20),
    ):
        times, began = [], time.perf_counter()
        while len(times) < most + 2 and (len(times) < 4 or time.perf_counter() - began < 15):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        results[name] = times[2:]  # without those that warm up
    print(json.dumps(results))


# --- command line -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the README's speed figures.")
    parser.add_argument("--only", choices=PARTS, help="one part of the figures")
    parser.add_argument(
        "-w", "--weights", type=Path, default=WEIGHTS, metavar="FILE",
        help="of the network that predicts (default: pruned_resnet18.pth)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the images")
    parser.add_argument("--device", choices=models.DEVICES, default="auto", help="default: auto")
    args = parser.parse_args(argv)
    if args.only is None:
        return all_parts(argv or sys.argv[1:])
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of OpenVINO's use of torch.jit
    try:
        device = models.choose_device(args.device)
        source = data.find(args.data)
        part = {
            "predict": lambda: predict(args.weights, source, device),
            "train": lambda: training(source, device),
            "files": lambda: files(args.weights),
            "bits": lambda: bits(args.weights, source),
            "start": lambda: start(args.weights, source),
            "shipped": shipped,
            "ways": lambda: ways(args.weights, source),
            "shared": shared,
        }[args.only]()
    except (models.DeviceError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"bench/speed.py: {error}", file=sys.stderr)
        return 2
    machine = {"device": models.device_name(device), "threads": torch.get_num_threads()}
    figures = {args.only: part.medians, "ranges": {args.only: part.ranges}}
    print(json.dumps({**machine, "commit": record.commit(), **figures}), flush=True)
    return 0


def all_parts(flags: list[str]) -> int:
    """Each part in a process of its own (training and OpenVINO crash in the same), then one line
    of JSON for all."""
    together: dict = {}
    for part in PARTS:
        command = [sys.executable, "-m", "bench.speed", *flags, "--only", part]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if not line.startswith("{"):
                    print(line, end="", flush=True)
                    continue
                figures = json.loads(line)
                ranges = {**together.get("ranges", {}), **figures.pop("ranges")}
                together |= {**figures, "ranges": ranges}
        if process.returncode:
            return process.returncode
    print(json.dumps(together))
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
