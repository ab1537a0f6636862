"""Custom data sets: makes sets of 1,000 to 2,000 images and trains on each.

    uv run --with scikit-learn tests/small_sets.py                  # --quick, about 5 minutes a set
    uv run --with scikit-learn tests/small_sets.py digits --full    # the full chain

The images are made in data/small/, in the layout of a custom data set; the runs are in runs/ and
resume where they were stopped. Prints the rows of the table in docs/own-images.md.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import data
import train
from runlog import record

Rng = np.random.Generator
Images = Iterator[tuple[str, str, Image.Image]]  # split, class, image


def digits() -> Images:
    """scikit-learn's, 8x8; a support vector machine has 98.6 % on this test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    for name, x, y in (("train", split[0], split[2]), ("test", split[1], split[3])):
        for pixels, label in zip(x, y, strict=True):
            image = (pixels.reshape(8, 8) * 255 / 16).round().astype(np.uint8)
            yield name, str(label), Image.fromarray(image)


def garments() -> Images:
    """Of each class of Fashion-MNIST 200 images for training, and 200 of its test images."""
    source = data.find()
    for split in ("train", "test"):
        images, labels = data.load(source, split)
        for label, name in enumerate(data.CLASSES):
            for image in images[labels == label][:200]:
                yield split, name.replace("/", "-"), Image.fromarray(image.numpy())


def letters() -> Images:
    """A to Z in matplotlib's twelve DejaVu faces."""
    yield from _written([chr(65 + i) for i in range(26)], train=60, test=20)


def numbers() -> Images:
    """00 to 99 in the same faces: many classes, few images of each."""
    yield from _written([f"{i:02}" for i in range(100)], train=20, test=10)


def _written(words: list[str], train: int, test: int, size: int = 32) -> Images:
    """Light on dark, in one of twelve faces, turned, shifted and noisy."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [
        path
        for path in sorted(folder.glob("DejaVuS*.ttf"))
        if "Display" not in path.name
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        for word in words:
            for _ in range(n):
                points = rng.uniform(0.55, 0.8) * size / len(word) ** 0.5
                font = ImageFont.truetype(faces[rng.integers(len(faces))], points)
                image = Image.new("L", (size, size))
                place = size / 2 + rng.uniform(-2.5, 2.5, 2)
                ImageDraw.Draw(image).text(tuple(place), word, 255, font, anchor="mm")
                image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
                yield split, word, _noisy(np.asarray(image), rng)


def shapes() -> Images:
    """Six shapes of any color on any other, 40x40."""
    yield from _drawn(("cross", "disc", "ring", "square", "star", "triangle"), 40, 200, 60)


def two() -> Images:
    """Stars and triangles, 64x64."""
    yield from _drawn(("star", "triangle"), 64, 500, 150)


def _drawn(names: tuple[str, ...], size: int, train: int, test: int) -> Images:
    rng = np.random.default_rng(0)

    def polygon(radii: list[float]) -> list[tuple[float, float]]:
        """A closed line around a random place, at these distances, turned at random."""
        centre, radius = rng.uniform(0.4, 0.6, 2) * size, rng.uniform(0.2, 0.38) * size
        start = rng.uniform(0, 2 * math.pi)
        angles = start + 2 * math.pi * np.arange(len(radii)) / len(radii)
        around = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]
        return [tuple(point) for point in centre + radius * around]

    arm = [1.0, 0.42, 0.42]  # end and both inner corners, 30 degrees apart
    outlines = {
        "cross": 4 * arm,
        "disc": 60 * [1.0],
        "ring": 60 * [1.0],
        "square": 4 * [1.0],
        "star": 5 * [1.0, 0.4],
        "triangle": 3 * [1.0],
    }
    for split, n in (("train", train), ("test", test)):
        for name in names:
            for _ in range(n):
                colors = rng.integers(0, 256, (2, 3))
                while np.abs(colors[0] - colors[1]).sum() < 150:
                    colors = rng.integers(0, 256, (2, 3))
                front, back = (tuple(int(c) for c in color) for color in colors)
                image = Image.new("RGB", (size, size), back)
                points = polygon(outlines[name])
                ImageDraw.Draw(image).polygon(points, front)
                if name == "ring":
                    centre = np.mean(points, 0)
                    inner = [tuple(centre + 0.55 * (point - centre)) for point in points]
                    ImageDraw.Draw(image).polygon(inner, back)
                yield split, name, _noisy(np.asarray(image), rng)


def _noisy(image: np.ndarray, rng: Rng) -> Image.Image:
    noise = rng.normal(0, 20, image.shape)
    return Image.fromarray((image + noise).round().clip(0, 255).astype(np.uint8))


# Images, and the flags that they are trained with.
SETS: dict[str, tuple[Callable[[], Images], list[str]]] = {
    "digits": (digits, ["--no-flip"]),
    "garments": (garments, []),
    "letters": (letters, ["--image-size", "32", "--no-flip"]),
    "numbers": (numbers, ["--image-size", "32", "--no-flip"]),
    "shapes": (shapes, ["--image-size", "40"]),
    "two": (two, ["--image-size", "64"]),
}


def make(name: str, folder: Path) -> Path:
    """The images as files in `folder`/`name`, unless they are there."""
    place, unfinished = folder / name, folder / f".{name}"
    if not place.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        for n, (split, label, image) in enumerate(SETS[name][0]()):
            path = unfinished / split / label / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        unfinished.rename(place)
    return place


def row(name: str, place: Path, run: Path) -> str:
    """A row of the table: the data set, and accuracies on its test images."""
    known = json.loads((run / "run.json").read_text())
    images = {split: len(data.image_files(place / split)) for split in ("train", "test")}
    first = data.image_files(place / "train")[0]
    with Image.open(first) as image:
        size = f"{image.width}x{image.height}{'' if image.mode == 'L' else ', color'}"
    by_stage = {stage["stage"]: stage["test_accuracy"] for stage in known["stages"]}
    command = "train.py --quick" if known["settings"]["quick"] else "train.py"
    return (
        f"| {name}, `{command}` | {images['train']:,} + {images['test']:,} | {known['classes']} | "
        f"{size} | {by_stage['student']:.1%} | {known['stages'][-1]['test_accuracy']:.1%} | "
        f"{known['minutes']:.0f} |"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=", ".join(SETS))
    parser.add_argument("--full", action="store_true", help="the full chain instead of --quick")
    args = parser.parse_args(argv)
    rows = []
    for name in args.sets:
        place = make(name, data.CACHE_DIR / "small")
        run = f"{'full' if args.full else 'quick'}-{name}-seed0"
        flags = ["--data", str(place), "--name", run, *SETS[name][1]]
        flags += [] if args.full else ["--quick"]
        began = time.perf_counter()
        if code := train.main(flags):
            return code
        print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes from start to end")
        rows.append(row(name, place, record.RUNS / run))
    print("\n| set | images, training + test | classes | size | unpruned | 100,000 | minutes |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
