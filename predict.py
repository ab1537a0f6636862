"""Classify images with the weights of a network and write the predictions as CSV.

    python predict.py -w pruned_resnet18.pth                # the Fashion-MNIST test images
    python predict.py -w pruned_resnet18.pth photos/ a.png  # your own

Writes submission.csv (header id,pred) and prints the number of parameters and, where the labels
are known, the accuracy. docs/own-images.md says what the ids are.
`-w` takes a file of train.py, or any state dict of a torchvision ResNet18 or ResNet50, plain or
with the masks of torch.nn.utils.prune.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import csv
import itertools
import json
import time
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import models
from engine import plan, rewrite

SHEET = 64  # images that --show shows
MOST_BATCH = 1_000_000  # images at a time; PyTorch takes no number above 2**63


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify images and write the predictions as CSV. Without IMAGES: the test "
        "images of the data set that the weights were trained on."
    )
    what = parser.add_argument_group("what is classified")
    what.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGES",
        help="image files, folders of them, IDX files (also .gz), or .npy arrays (uint8)",
    )
    what.add_argument(
        "-w", "--weights", type=Path, required=True, metavar="FILE", help="weights of a ResNet"
    )
    what.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="without IMAGES: folder with the data set, or an image folder with test/ (default: "
        "found or fetched)",
    )
    what.add_argument(
        "--invert",
        action="store_true",
        help="invert all images: for dark on light ones (Fashion-MNIST's are light on dark)",
    )
    checkpoint.add_image_flags(what)
    result = parser.add_argument_group("what is written")
    result.add_argument(
        "-o", "--output", type=checkpoint.output_path, default="submission.csv", metavar="FILE",
        help="CSV with the columns id,pred (default: submission.csv); - for standard output",
    )  # fmt: skip
    result.add_argument("--names", action="store_true", help="class names instead of numbers")
    result.add_argument(
        "--probs", action="store_true", help="one more column for each class, its probability"
    )
    result.add_argument(
        "--show", type=checkpoint.output_path, metavar="FILE",
        help=f"write a picture of the first {SHEET} images and their predictions (PNG)",
    )  # fmt: skip
    result.add_argument(
        "--json", action="store_true", help="print the result as one line of JSON, for programs"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--tta", action="store_true", help="average each image's logits with its mirror image's"
    )
    how.add_argument(
        "--device", choices=models.DEVICES, default="auto", help="default: auto, the best there is"
    )
    how.add_argument(
        "--engine",
        choices=("auto", "dense", "sparse"),
        default="auto",
        help="sparse skips the zeros, on the CPU only; auto: where it is faster (default)",
    )
    how.add_argument(
        "--batch-size", type=int, metavar="N",
        help="images at a time (default: 250, fewer of more than 64 pixels a side)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.batch_size is not None and not 1 <= args.batch_size <= MOST_BATCH:
        parser.error(f"--batch-size {args.batch_size}: must be from 1 to {MOST_BATCH:,}")
    return args


def choose_engine(
    wanted: str, model: nn.Module, meta: dict, device: torch.device
) -> tuple[str, nn.Module]:
    """("dense" or "sparse", what runs the network)."""
    size, grey = meta["image_size"], meta["grey"]
    if wanted == "auto":
        wanted = "sparse" if plan.sparse_is_faster(model, size, device) else "dense"
    if wanted == "dense":
        return wanted, rewrite.inference_copy(model, device, bf16=False, image_size=size)
    for wrong, reason in (
        (device.type != "cpu", f"runs on the CPU, not on {device.type}"),
        (
            size > plan.MAX_IMAGE_SIZE,
            f"for images of up to {plan.MAX_IMAGE_SIZE} pixels, not {size}",
        ),
    ):
        if wrong:
            raise models.DeviceError(f"--engine sparse: {reason}; leave --engine out")
    from engine import inference  # and llvmlite

    return wanted, inference.SparseResNet(model, size, grey)


def gather(paths: list[Path]) -> tuple[list[tuple[Path, list[Path]]], list[str]]:
    """Each of `paths` with its image files, none for an IDX or .npy file; and lines for the user.

    Raises DataError for files that cannot be classified, as far as headers show it.
    """
    found, left_out = [], []
    for path in paths:
        if not path.exists():
            raise data.DataError(f"{path}: there is no such file or folder")
        if path.is_dir():
            files, others = data.walk(path)
            left_out += others
            if not files:
                raise data.DataError(
                    f"{path}: there are no images that Pillow decodes in this folder"
                )
        elif data.is_image(path):
            files = [path]
        else:
            files = []
            if path.is_file():  # pipes can be read only once
                next(data.stream(path, 1))
        found.append((path, files))
    _, notes = data.inspect([file for _, files in found for file in files], left_out)
    return found, notes


def file_ids(found: list[tuple[Path, list[Path]]]) -> list[list[str]]:
    """The ids of the image files in `found`: their names, below their folder.

    If two files have the same name, the ids are all paths as they were given. Raises DataError if
    two of these are the same in UTF-8.
    """
    below = [[f.relative_to(path) if f != path else Path(f.name) for f in fs] for path, fs in found]
    given = [files for _, files in found]
    everything = list(itertools.chain(*given))
    for names in below, given:
        ids = [[data.as_utf8(name.as_posix()) for name in part] for part in names]
        counts = Counter(itertools.chain(*ids))
        pairs = set(zip(itertools.chain(*ids), everything, strict=True))
        if len(pairs) == len(counts) == len(set(everything)):  # an id for each file, and no other
            return ids
    (name, _), *_ = counts.most_common(1)
    raise data.DataError(f"{name}: two names, of which one is not UTF-8, read so; rename one")


def chunks(
    found: list[tuple[Path, list[Path]]], image_size: int, grey: bool, background: int = 0
) -> Iterator[tuple[list, Tensor, None]]:
    """(ids, uint8 images, no labels) of the files in `found`, some at a time. Raises DataError.

    `background` is the color of what is transparent, 0 (black) to 255 (white).
    The ids of image files are those of `file_ids`, that of an image in an IDX or .npy file its
    number, counted on over such files.
    """
    counted, most = 0, data.chunk_size(image_size, grey)
    for (path, files), ids in zip(found, file_ids(found), strict=True):
        for start in range(0, len(files), most):
            part = slice(start, start + most)
            yield ids[part], data.read_images(files[part], image_size, grey, background), None
        if not files:
            for images in data.stream(path, most):
                numbers = list(range(counted, counted + len(images)))
                yield numbers, data.resize(images, image_size, grey), None
                counted += len(images)


def test_images(source: data.Source, background: int = 0) -> Iterator[tuple[list, Tensor, Tensor]]:
    """(ids, uint8 images, labels) of the test images, some at a time. Raises DataError.

    The ids are numbers from 0; for an image folder, the files' names below the folder test/.
    `background` as in `data.read_image`.
    """
    ids: Iterator = itertools.count()
    if source.name == "folder":
        ids = iter(file_ids([(source.splits["test"], data.source_files(source, "test"))])[0])
    for images_u8, labels in data.iter_batches(source, "test", background):
        yield list(itertools.islice(ids, len(labels))), images_u8, labels


def predict(args: argparse.Namespace) -> None:
    """Check all arguments, predict, write."""
    device = models.choose_device(args.device)
    model, meta = checkpoint.load(args.weights, device, args.stem)
    said = args.image_size, args.color, args.stem
    assumed = checkpoint.fill_missing_meta_(meta, args.weights, *said)
    inputs = [args.weights, *args.images]
    background = 255 if args.invert else 0  # black once it is inverted
    if args.images:
        found, notes = gather(args.images)
        notes += [f"--data {args.data} is not used: IMAGES are given"] if args.data else []
        inputs += [file for _, files in found for file in files]
        parts = chunks(found, meta["image_size"], meta["grey"], background)
        classes = meta.get("classes") or [str(number) for number in range(meta["num_classes"])]
    else:
        source = data.find_for_weights(args.weights, meta, args.data)
        inputs += data.source_files(source, "test")
        parts, classes = test_images(source, background), source.classes
        notes = list(source.notes)
    notes += [] if args.names else data.order_note(classes)
    classes = [name.encode(errors="backslashreplace").decode() for name in classes]  # of any file
    if args.probs and (taken := {"id", "pred"} & set(classes)):
        raise data.DataError(
            f"--probs: a class is named {taken.pop()}, as the first columns are; leave --probs out"
        )
    if not args.images and "dataset" not in meta:
        notes.append(
            f"{args.weights} does not name its classes: taken to be those of {source.path}"
        )
    if args.show and args.show.suffix.lower() not in ("", ".png"):
        reason = "the picture is written as PNG; end its name in .png"
        raise checkpoint.CheckpointError(f"--show {args.show}: {reason}")
    outputs = [path for path in (args.output, args.show) if path is not None]
    for i, path in enumerate(outputs):
        checkpoint.check_output(path, *outputs[:i], *inputs)
    # Standard output has the predictions alone, if they go there.
    occupied = any(map(checkpoint.is_stdout, outputs))
    if args.json and not occupied:  # a result, not a message: it must not get lost
        checkpoint.check_output(checkpoint.output_path("-"))
    if args.show:
        _import_plots()
    engine, model = choose_engine(args.engine, model, meta, device)
    parts = itertools.chain([next(parts)], parts)  # most bad files are found by now
    for note in [assumed, *notes] if assumed else notes:
        print(f"predict.py: {runtime.printable(note)}", file=sys.stderr)
    done, right, seconds = write_predictions(args, model, parts, classes)
    report = {
        "weights": str(args.weights),
        "arch": meta["arch"],
        "parameters": meta["parameters"],
        "images": done,
        "accuracy": None if args.images else right / done,
        "tta": args.tta,
        "engine": engine,
        "device": device.type,
        "seconds": round(seconds, 3),
        "output": str(args.output),
    }
    if args.json:
        text = json.dumps(report)
        if not occupied:
            runtime.print_result(text)
            return
    else:
        accuracy = "" if args.images else f"test accuracy {right / done:.2%}"
        accuracy += " with mirror images, " if accuracy and args.tta else ", " if accuracy else ""
        text = (
            f"{meta['arch']}, {meta['parameters']:,} parameters: {accuracy}{done:,} images in "
            f"{seconds:.1f} s on {device.type} ({engine}), predictions in {args.output}"
        )
    print(text, file=sys.stderr if occupied else sys.stdout)


def _import_plots() -> types.ModuleType:
    """matplotlib takes a second, and a folder for its cache. Raises CheckpointError."""
    try:
        from runlog import plots
    except OSError as error:
        raise checkpoint.CheckpointError(f"--show: {error}") from None
    return plots


def to_csv(rows: Iterable[Sequence]) -> bytes:
    """Rows as CSV in UTF-8. Lines end in a line feed; names with a carriage return are quoted."""
    lines: list[str] = []
    ended = types.SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    csv.writer(ended).writerows(rows)  # it quotes the characters that its lines end in
    return "".join(lines).encode()


def write_predictions(
    args: argparse.Namespace, model: nn.Module, parts: Iterable[tuple], classes: Sequence[str]
) -> tuple[int, int, float]:
    """Write the CSV and, with --show, the picture; returns images, correct predictions, seconds."""
    done, right, seconds, shown = 0, 0, 0.0, []
    bar = tqdm(unit=" images", leave=False, disable=None)
    with checkpoint.writing(args.output) as file, bar:
        for ids, images_u8, labels in parts:
            if args.invert:
                images_u8 = 255 - images_u8
            began = time.perf_counter()
            logits = models.infer(model, images_u8, args.batch_size, args.tta).cpu()
            predictions = models.check_finite(logits, args.weights).argmax(1)
            seconds += time.perf_counter() - began
            names = [classes[k] for k in predictions]
            columns = [ids, names if args.names else predictions.tolist()]
            if args.probs:
                columns += logits.softmax(1).numpy().round(5).astype(str).T.tolist()
            if done == 0:
                file.write(to_csv([["id", "pred", *(classes if args.probs else [])]]))
            file.write(to_csv(zip(*columns, strict=True)))
            if args.show and len(shown) < SHEET:
                certainty = logits.softmax(1).amax(1)
                titles = [f"{n}\n{c:.0%}" for n, c in zip(names, certainty, strict=True)]
                shown += list(zip(images_u8, titles, strict=True))[: SHEET - len(shown)]
            if labels is not None:
                right += int((predictions == labels).sum())
            done += len(ids)
            bar.update(len(ids))
    if args.show:
        images, titles = zip(*shown, strict=True)
        checkpoint.write(args.show, _import_plots().sheet(torch.stack(images), titles))
    return done, right, seconds


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        predict(args)
    except runtime.UserError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
