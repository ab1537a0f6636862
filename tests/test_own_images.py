"""One's own images: reading them, training on them, classifying them."""

import csv
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny as shrunk
import torch
import torchvision
from PIL import Image

import checkpoint
import data
import distill
import models
import predict
import train
from runlog import estimate


@pytest.fixture
def folder(tmp_path):
    """Three classes of 40x40 grey images: bright at the left, in the middle, at the right."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 6)):
        for label, name in enumerate(("left", "middle", "right")):
            place = tmp_path / "own" / split / name
            place.mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 60, (40, 40), dtype=np.uint8)
                image[:, 13 * label : 13 * label + 13] += 150
                Image.fromarray(image).save(place / f"{i}.png")
    return tmp_path / "own"


def color(folder, n=8, classes=10):
    """CIFAR-10's shape: 32x32 in color, ten classes."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        place = folder / "train" / f"class{label:02}"
        place.mkdir(parents=True)
        for i in range(n):
            image = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            row = 3 * (label % 10)
            image[row : row + 3, :, label % 3] += 150
            Image.fromarray(image).save(place / f"{i}.png")
    return folder


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_grey_folder_through_the_whole_chain(tiny, drawn, folder, tmp_path, capsys):
    flags = ["--quick", "--device", "cpu", "--data", str(folder), "--image-size", "30"]
    assert train.main([*flags, "--name", "own"]) == 0
    run = tmp_path / "runs" / "own"
    model, meta = checkpoint.load(run / "pruned_resnet18.pth")
    assert meta["parameters"] == 100_000 and meta["classes"] == ["left", "middle", "right"]
    assert (meta["image_size"], meta["grey"], meta["dataset"]) == (30, True, "folder")
    assert not model.conv1.weight[:, 1:].any()  # grey: one channel's weights are enough
    for picture in ("confusion", "mistakes", "layers", "curves"):
        assert (run / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    weights, out = ["-w", str(run / "pruned_resnet18.pth")], tmp_path / "out.csv"
    write = ["-o", str(out), "--names", "--probs"]
    for engine in ("sparse", "dense"):
        assert predict.main([*weights, *write, "--data", str(folder), "--engine", engine]) == 0
        assert "test accuracy" in capsys.readouterr().out and len(read_rows(out)) == 18
    sheet = tmp_path / "sheet.png"
    images = [str(folder / "test"), str(folder / "train" / "left" / "0.png")]
    assert predict.main([*weights, *write, *images, "--show", str(sheet), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 19 and report["accuracy"] is None
    rows = read_rows(out)
    assert rows[0]["id"] == "left/0.png" and rows[-1]["id"] == "0.png"
    assert list(rows[0]) == ["id", "pred", "left", "middle", "right"]
    for row in rows:
        probs = [float(row[name]) for name in meta["classes"]]
        assert sum(probs) == pytest.approx(1, abs=1e-3)
        assert row["pred"] == meta["classes"][int(np.argmax(probs))]
    assert sheet.read_bytes()[:4] == b"\x89PNG"


def test_images_that_were_added_are_noticed(tiny, folder, monkeypatch, capsys):
    flags = ["--quick", "--device", "cpu", "--data", str(folder)]
    monkeypatch.setattr(estimate, "print_plan", lambda *args: None)
    monkeypatch.setattr(train, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main(flags) == 130
    assert train.main(flags) == 130
    (folder / "train" / "left" / "0.png").rename(folder / "train" / "left" / "more.png")
    assert train.main(flags) == 2
    assert "(the images have changed)" in capsys.readouterr().err
    for name in ("up", "down"):
        (folder / "train" / name).mkdir()
        Image.new("RGB", (40, 40)).save(folder / "train" / name / "0.png")
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "grey: True, now False; classes: [], now ['down', 'up']" in error


@pytest.mark.parametrize(
    ("size", "stem"),
    [(32, 4), *(pytest.param(size, 2, marks=pytest.mark.slow) for size in (40, 64))],
)
def test_color_images_through_the_whole_chain(size, stem, tiny, tmp_path, capsys):
    folder = color(tmp_path / "cifar")
    flags = ["--quick", "--device", "cpu", "--data", str(folder)]
    flags += ["--image-size", str(size), "--stem", str(stem)]
    assert train.main([*flags, "--name", "color"]) == 0
    assert " - " in capsys.readouterr().out  # no test images, no test accuracy
    model, meta = checkpoint.load(tmp_path / "runs" / "color" / "pruned_resnet18.pth")
    assert meta["parameters"] == 100_000 and not meta["grey"]
    assert (meta["image_size"], meta["stem"]) == (size, stem)
    assert all(model.conv1.weight[:, channel].any() for channel in range(3))
    weights = str(tmp_path / "runs" / "color" / "pruned_resnet18.pth")
    predictions = []
    for engine in ("sparse", "dense"):
        out = tmp_path / f"{engine}.csv"
        images = str(folder / "train")
        assert predict.main(["-w", weights, "-o", str(out), "--engine", engine, images]) == 0
        predictions.append(read_rows(out))
    assert predictions[0] == predictions[1] and len(predictions[0]) == 80
    assert predict.main(["-w", weights, "-o", str(out)]) == 2
    assert "give IMAGES" in capsys.readouterr().err


def test_a_part_of_the_images_has_a_fifth_as_many_for_validation(tmp_path):
    place = color(tmp_path / "own", n=8, classes=3)
    shutil.copytree(place / "train", place / "val")
    batches = distill.Batches(images=15)
    loaded = data.load_train(data.find(place), False)
    images, _ = train.prepare(data.find(place), loaded, batches, torch.device("cpu"))
    assert len(images.labels) == 15
    assert images.val[1].tolist() == [0, 1, 2]  # they lie class by class


@pytest.mark.parametrize(("n", "classes"), [(12, 2), (2, 100)])
def test_few_and_many_classes(n, classes, tiny, tmp_path, capsys):
    """Even of two images of a class, one is held out for validation."""
    folder = color(tmp_path / "own", n, classes)
    flags = ["--quick", "--device", "cpu", "--data", str(folder), "--name", "own", "--no-flip"]
    assert train.main(flags) == 0
    _, meta = checkpoint.load(tmp_path / "runs" / "own" / "pruned_resnet18.pth")
    assert meta["parameters"] == 100_000 and len(meta["classes"]) == classes
    printed = capsys.readouterr().out
    assert ", never flipped" in printed and "none for validation" not in printed
    record = json.loads((tmp_path / "runs" / "own" / "run.json").read_text())
    assert record["settings"]["flip"] is False
    if n > 2:  # the tiny validation has no image of some of the hundred classes: uneven
        assert "val_balanced" not in record["stages"][-1]


def test_uneven_classes_have_balanced_accuracy_and_one_for_each(tiny, folder, tmp_path, capsys):
    for i in range(6, 30):
        (folder / "train" / "left" / f"{i}.png").unlink()
    (folder / "test" / "right" / "0.png").unlink()
    flags = ["--quick", "--device", "cpu", "--data", str(folder), "--name", "own"]
    assert train.main(flags) == 0
    assert "val bal." in capsys.readouterr().out
    run = tmp_path / "runs" / "own"
    record = json.loads((run / "run.json").read_text())
    model, _ = checkpoint.load(run / "pruned_resnet18.pth")
    source = data.find(folder)
    _, val = data.load_train(source, full_train=False)
    for split, (images, labels) in (("val", val), ("test", data.load(source, "test"))):
        right = models.infer(model, images).argmax(1) == labels
        by_class = [right[labels == c].float().mean().item() for c in range(3)]
        balanced = record["stages"][-1][f"{split}_balanced"]
        assert balanced == pytest.approx(np.mean(by_class), abs=1e-6)
        if split == "val":
            known = dict(zip(source.classes, by_class, strict=True))
            assert record["val_by_class"] == pytest.approx(known)


def test_only_images_that_stay_of_their_class_are_mirrored(tiny, folder):
    def flip(*flags, name="folder"):
        args = train.parse([*tiny, "--data", str(folder), *flags])
        source = replace(data.find(folder), name=name)
        return train.chain_settings(args, source, torch.device("cpu"), stem=4)["flip"]

    assert flip() and not flip("--no-flip")
    known = {name: flip(name=name) for name in data.DATASETS}
    assert known == {"fashion-mnist": True, "mnist": False, "kmnist": False, "cifar10": True}


def test_without_flip_no_image_is_mirrored():
    images_u8 = torch.arange(28, dtype=torch.uint8).expand(100, 28, 28).contiguous()
    batches = distill.Batches(batch_size=50, crop_scale=(0.85, 1.0), mixup_alpha=0, erasing=0)
    for flip in (True, False):
        images = distill.TrainingData(images_u8, torch.zeros(100).long(), 2, batches, flip=flip)
        batch, _ = next(iter(images.batches(torch.Generator().manual_seed(0))))
        mirrored = (batch[:, 0, 14, 0] > batch[:, 0, 14, -1]).sum()
        assert 10 < mirrored < 40 if flip else mirrored == 0


def test_images_of_all_kinds_are_read(tmp_path):
    grey = (np.arange(28 * 28).reshape(28, 28) % 256).astype(np.uint8)
    rgb = np.stack([grey, grey.T, 255 - grey], 2)
    made = {
        "grey.png": Image.fromarray(grey),
        "rgb.png": Image.fromarray(rgb),
        "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "palette.png": Image.fromarray(rgb).quantize(8),
        "alpha.png": Image.fromarray(np.dstack([rgb, grey])),
        "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
        "bits.png": Image.fromarray(grey > 127),
        "large.png": Image.fromarray(np.kron(grey, np.ones((3, 2), np.uint8))),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
    files = [tmp_path / name for name in made]
    assert data.read_images(files, 28, grey=True).shape == (8, 28, 28)
    images = data.read_images(files, 28, grey=False)
    assert images.shape == (8, 3, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(images[2], images[0])
    assert torch.equal(images[1], torch.from_numpy(rgb).permute(2, 0, 1))
    black = rgb.astype(float) * grey[:, :, None] / 255  # transparent: black
    assert np.abs(images[4].permute(1, 2, 0).numpy() - black).max() <= 1


def test_all_files_that_cannot_be_read_are_named(folder, tmp_path, tiny, capsys):
    place = folder / "train" / "left"
    (place / "text.png").write_text("no image")
    (place / "empty.jpg").write_bytes(b"")
    whole = (place / "0.png").read_bytes()
    (place / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert train.main(["--quick", "--device", "cpu", "--data", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "text.png" in error and "empty.jpg (empty)" in error
    for name in ("text.png", "empty.jpg"):
        (place / name).unlink()
    assert train.main(["--quick", "--device", "cpu", "--data", str(folder)]) == 2
    assert "cut.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no train", "has no folder train/"),
        ("two names", "train/, training/ are all for the split train"),
        ("classes alone", "move its folders of images (left/, middle/, right/) to"),
        ("classes alone", "/test/ for predictions"),
        ("other names", "rename those with folders of classes (test_set/, training_set/)"),
        ("folder above", "did you mean"),
        ("two above", "did you mean"),
        ("by name", "give --dataset or --data, not both"),
        ("empty class", "no images of this class"),
        ("lost class", "train/new: a link that leads nowhere"),
        ("lost split", "own/val: a link that leads nowhere"),
        ("one class", "at least two"),
        ("unknown class", "no such class in"),
        ("size", "--image-size 4"),
        ("flat test", "no images in folders of classes (test/<class>/*.png)"),
        ("typo", "own-typo: there is no such folder"),
    ],
)
def test_folders_that_cannot_be_trained_on(change, message, folder, tiny, capsys):
    more = []
    if change == "no train":
        (folder / "train").rename(folder / "Validation")
    if change == "two names":
        (folder / "training").mkdir()
    if change == "classes alone":
        shutil.rmtree(folder / "test")
        (folder / "train").rename(folder.parent / "classes")
        folder = folder.parent / "classes"
    if change == "other names":
        (folder / "train").rename(folder / "training_set")
        (folder / "test").rename(folder / "test_set")
    if change.endswith("above"):
        above = folder.parent / "above" / ("x" if change == "two above" else "")
        above.mkdir(parents=True)
        folder = folder.rename(above / "own").parents[change == "two above"]
    if change == "by name":
        more = ["--dataset", "kmnist"]
    if change == "empty class":
        (folder / "train" / "new").mkdir()
    if change == "lost class":
        (folder / "train" / "new").symlink_to(folder / "gone")
    if change == "lost split":
        (folder / "val").symlink_to(folder / "gone")
    if change == "one class":
        for name in ("left", "middle"):
            for split in ("train", "test"):
                (folder / split / name).rename(folder / f"{split}-{name}")
    if change == "unknown class":
        (folder / "test" / "else").mkdir()
    if change == "size":
        more = ["--image-size", "4"]
    if change == "flat test":
        shutil.rmtree(folder / "test")
        (folder / "test").mkdir()
        shutil.copy(next((folder / "train").rglob("*.png")), folder / "test" / "1.png")
    if change == "typo":
        folder, more = folder.with_name("own-typo"), ["--dataset", "kmnist"]
    assert train.main(["--quick", "--device", "cpu", "--data", str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_validation_images_of_ones_own(folder):
    (folder / "test").rename(folder / "val")
    source = data.find(folder)
    (images, labels), val = data.load_train(source, full_train=False)
    assert len(images) == 90 and len(val[1]) == 18 and labels[:10].unique().numel() > 1
    (images, _), val = data.load_train(source, full_train=True)
    assert len(images) == 108 and val is None


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_torchvisions_data_sets_by_name(name, monkeypatch, tmp_path):
    class Fake:
        """What torchvision's MNIST and CIFAR10 look like from outside."""

        def __init__(self, root, train, download):
            n = 50 if train else 20
            self.classes = list("0123456789")
            if name == "mnist":
                self.data = torch.full((n, 28, 28), 7, dtype=torch.uint8)
                self.targets = torch.arange(n) % 10
            else:
                self.data = np.full((n, 32, 32, 3), (1, 2, 3), dtype=np.uint8)
                self.targets = [i % 10 for i in range(n)]

    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    monkeypatch.setitem(data.LABEL_COUNTS, "mnist", ((5,) * 10, (2,) * 10))
    source = data.find(tmp_path, name)
    size = {"mnist": 28, "cifar10": 32}[name]
    assert (source.image_size, source.grey) == (size, name == "mnist")
    images, labels = data.load(source, "test")
    assert len(images) == 20 and labels.dtype == torch.int64
    if name == "cifar10":
        assert images[3, :, 5, 5].tolist() == [1, 2, 3]
    assert data.load(data.find(tmp_path, name, 16), "train")[0].shape[-2:] == (16, 16)


def test_a_data_set_that_cannot_be_had_is_said_so(monkeypatch, tmp_path):
    downloads, cache = [], tmp_path / "cache"

    def refuse(root, train, download):
        downloads.append(download)
        (root / "KMNIST" / "raw").mkdir(parents=True, exist_ok=True)  # as torchvision does
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "KMNIST", refuse)
    monkeypatch.setattr(data, "CACHE_DIR", cache)
    with pytest.raises(data.DataError, match="kmnist was not found and could not be downloaded"):
        data.find(dataset="kmnist")
    assert not list(cache.iterdir()) and any(downloads)
    downloads.clear()
    with pytest.raises(data.DataError, match="complete files of kmnist nor a folder train/ or"):
        data.find(tmp_path, "kmnist")  # nothing is downloaded into a folder of the user's
    assert not any(downloads)


@pytest.mark.parametrize("color", [False, True])
def test_16_bits_of_pnm_and_colors(color, tmp_path):
    """PIL keeps 8 bits of color PNM files, and 32 of gray ones."""
    shape = (8, 8, 3) if color else (8, 8)
    pixels = np.arange(np.prod(shape)).reshape(shape) * 300
    path = tmp_path / "a.pnm"
    head = f"{'P6' if color else 'P5'} 8 8 65535\n".encode()
    path.write_bytes(head + pixels.astype(">u2").tobytes())
    assert (data.inspect([path])[0][0] in data.GREY) != color
    image = data.read_image(path, 8, grey=not color).squeeze()
    expected = torch.from_numpy((pixels >> 8).astype(np.uint8))
    difference = image.int() - (expected.permute(2, 0, 1) if color else expected).int()
    assert difference.abs().max() <= 1  # PIL rounds


def write_png(path, depth, color, row, transparent=b""):
    """8x8 pixels, all rows the same bytes; `color` and `transparent` as PNG's IHDR and tRNS."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, color, 0, 0, 0))]
    parts += [(b"tRNS", transparent)] if transparent else []
    parts += [(b"IDAT", zlib.compress(8 * (b"\0" + row))), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in parts:
        content += struct.pack(">I", len(part)) + kind + part
        content += struct.pack(">I", zlib.crc32(kind + part))
    path.write_bytes(content)


def test_dark_colors_of_16_bits_are_refused(tmp_path):
    """12 bits in 16, as cameras have: PIL keeps the highest 8."""
    for name, most in (("bright", 65535), ("dark", 4095)):
        write_png(tmp_path / f"{name}.png", 16, 2, struct.pack(">24H", *[most] * 24))
    assert (data.read_image(tmp_path / "bright.png", 8, grey=True) == 255).all()
    with pytest.raises(ValueError, match="at most 12 of its 16 bits"):
        data.read_image(tmp_path / "dark.png", 8, grey=True)
    with pytest.raises(data.DataError, match="scale its pixels to 16 bits"):  # to its end
        data.read_images([tmp_path / "dark.png"], 8, grey=True)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_black_at_any_depth(depth, tmp_path):
    most = 2**depth - 1
    values = [0, 0, 0, 0, most, most, most, most]  # the white half is transparent
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = int(bits, 2).to_bytes(depth, "big")
    for name, transparent in (("clear", struct.pack(">H", most)), ("opaque", b"")):
        write_png(tmp_path / f"{name}.png", depth, 0, row, transparent)
    opaque = data.read_image(tmp_path / "opaque.png", 8, grey=True)[0, 0]
    assert opaque.tolist() == [0, 0, 0, 0, 255, 255, 255, 255]
    assert not data.read_image(tmp_path / "clear.png", 8, grey=True).any()
    with Image.open(tmp_path / "clear.png") as image:
        before = image.info["transparency"]
        data.read_image(image, 8, grey=True)
        assert image.info["transparency"] == before  # the caller's image is left alone
    white = data.read_image(tmp_path / "clear.png", 8, grey=True, background=255)[0, 0]
    assert white.tolist() == [0, 0, 0, 0, 255, 255, 255, 255]


def test_what_is_transparent_is_black_also_if_all_is_inverted(tmp_path, shipped_like):
    """A black square on nothing, as of an icon: one on white before it is inverted."""
    alpha = np.zeros((28, 28), np.uint8)
    alpha[8:20, 8:20] = 255
    icon = Image.fromarray(np.dstack([np.zeros((28, 28, 3), np.uint8), alpha]))
    icon.save(tmp_path / "icon.png")
    Image.fromarray(alpha).save(tmp_path / "expected.png")
    results = []
    for name, more in (("icon.png", ["--invert"]), ("expected.png", [])):
        out = tmp_path / "out.csv"
        flags = ["-w", str(shipped_like), "-o", str(out), "--probs", *more]
        assert predict.main([*flags, str(tmp_path / name)]) == 0
        results.append([list(row.values())[1:] for row in read_rows(out)])
    assert results[0] == results[1]


def test_what_is_transparent_is_black_in_a_folder_test_as_well(folder, tmp_path, narrow):
    weights = weights_for(tmp_path / "w.pth", data.find(folder).classes)
    flags = ["-w", str(weights), "-o", str(tmp_path / "out.csv"), "--probs", "--data", str(folder)]
    results = []
    for image, more in (
        (Image.new("RGBA", (28, 28)), ["--invert"]),
        (Image.new("L", (28, 28)), []),
    ):
        for path in (folder / "test").rglob("*.png"):
            image.save(path)
        assert predict.main([*flags, *more]) == 0
        results.append((tmp_path / "out.csv").read_text())
    assert results[0] == results[1]


def test_a_palette_with_alpha_is_black_where_it_is_transparent():
    image = Image.new("P", (8, 8))
    image.putpalette([255, 255, 255, 0, 255, 255, 255, 255], "RGBA")
    image.putpixel((3, 0), 1)
    assert data.read_image(image, 8, grey=True)[0, 0].tolist() == [0, 0, 0, 255, 0, 0, 0, 0]


def test_a_transparent_color_of_16_bits_is_refused(tmp_path):
    """PIL keeps 8 bits of the pixels, and 16 of what is transparent."""
    row = struct.pack(">24H", *range(0, 24_000, 1000))
    write_png(tmp_path / "a.png", 16, 2, row, struct.pack(">3H", 0, 1000, 2000))
    for read in (lambda p: data.inspect([p]), lambda p: data.read_images([p], 8, grey=False)):
        with pytest.raises(data.DataError, match="one of them is transparent"):
            read(tmp_path / "a.png")


def test_signed_numbers_of_fits_are_no_images(tmp_path):
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16"]
    cards += ["NAXIS   =                    2", "NAXIS1  =                    8"]
    header = "".join(card.ljust(80) for card in [*cards, "NAXIS2  =                    8", "END"])
    (tmp_path / "a.fits").write_bytes(header.ljust(2880).encode() + bytes(2880))
    assert not data.is_image(tmp_path / "a.fits")
    with pytest.raises(data.DataError, match="FITS is not supported"):
        data.inspect([tmp_path / "a.fits"])


def test_images_are_known_by_content_where_names_do_not_tell(tmp_path):
    """As downloads that are named by a hash; pipes are left out, as they may never end."""
    Image.new("L", (8, 8)).save(tmp_path / "0a1b", "png")
    (tmp_path / "notes").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    images, others = data.walk(tmp_path)
    assert [path.name for path in images] == ["0a1b", "gone.png"]
    assert [path.name for path in others] == ["notes", "pipe.png"]


def test_idx_and_npy_files_are_streamed(tmp_path, shipped_like, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 7)
    images = shrunk.images()["test_images"]
    raw = shrunk.idx_bytes(images)
    (tmp_path / "a-idx3-ubyte").write_bytes(raw)
    (tmp_path / "b.gz").write_bytes(gzip.compress(raw))
    np.save(tmp_path / "c.npy", images)
    np.save(tmp_path / "d.npy", np.repeat(images[..., None], 3, 3))
    results = []
    for name in ("a-idx3-ubyte", "b.gz", "c.npy", "d.npy"):
        out = tmp_path / "out.csv"
        assert predict.main(["-w", str(shipped_like), "-o", str(out), str(tmp_path / name)]) == 0
        results.append(read_rows(out))
    assert results[0] == results[1] == results[2] == results[3]
    (tmp_path / "D.NPY").write_bytes((tmp_path / "c.npy").read_bytes())  # the content decides
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "c.npy").read_bytes()))
    os.mkfifo(tmp_path / "pipe")
    for name in ("D.NPY", "packed", "pipe"):
        with ThreadPoolExecutor(1) as thread:
            if name == "pipe":
                thread.submit((tmp_path / name).write_bytes, (tmp_path / "c.npy").read_bytes())
            flags = ["-w", str(shipped_like), "-o", str(out), str(tmp_path / name)]
            assert predict.main(flags) == 0
        assert read_rows(out) == results[0]
    assert [int(row["id"]) for row in results[0]] == list(range(40))
    inverted = ["--invert", str(tmp_path / "a-idx3-ubyte")]
    (tmp_path / "e").write_bytes(shrunk.idx_bytes(255 - images))
    assert predict.main(["-w", str(shipped_like), "-o", str(out), str(tmp_path / "e")]) == 0
    expected = read_rows(out)
    assert predict.main(["-w", str(shipped_like), "-o", str(out), *inverted]) == 0
    assert read_rows(out) == expected


BAD = {
    "missing": None,
    "empty": b"",
    "text": b"hello, world, this is no image",
    "lies": shrunk.idx_bytes(np.zeros((9, 28, 28), np.uint8))[:-1],
    "longer": shrunk.idx_bytes(np.zeros((9, 28, 28), np.uint8)) + b"x",
    "huge": bytes((0, 0, 8, 3)) + b"\x7f\xff\xff\xff" * 3,
    "large": bytes((0, 0, 8, 3)) + b"\x7f\xff\xff\xff" + b"\x00\x00\x10\x00" * 2,
    "none.gz": gzip.compress(b""),
    "cut.gz": gzip.compress(shrunk.idx_bytes(np.ones((9, 28, 28), np.uint8)))[:-9],
    "text.png": b"no image",
    "broken.npy": b"\x93NUMPY\x01\x00",
    "channels last": shrunk.idx_bytes(np.zeros((28, 28, 4), np.uint8)),
}


@pytest.mark.parametrize("name", [*BAD, "float.npy", "objects.npy", "fortran.npy", "folder"])
def test_files_that_cannot_be_classified(name, tmp_path, shipped_like, capsys):
    path, out = tmp_path / name, tmp_path / "out.csv"
    if BAD.get(name) is not None:
        path.write_bytes(BAD[name])
    if name == "float.npy":
        np.save(path, np.zeros((3, 28, 28)))
    if name == "fortran.npy":
        np.save(path, np.asfortranarray(np.zeros((3, 28, 28), np.uint8)))
    if name == "objects.npy":
        np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    if name == "folder":
        path.mkdir()
    out.write_text("precious")
    assert predict.main(["-w", str(shipped_like), "-o", str(out), str(path)]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1 and error.startswith("predict.py: ")
    assert name != "fortran.npy" or "Fortran order" in error
    assert out.read_text() == "precious"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def saved(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def test_16_bits_are_their_highest_8_or_refused(tmp_path):
    bright = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000) + 5
    for name in ("a.png", "a.tif"):
        (image,) = data.read_images([saved(tmp_path / name, bright)], 8, grey=True)
        assert torch.equal(image, torch.from_numpy((bright >> 8).astype(np.uint8)))
    black = saved(tmp_path / "black.png", 0 * bright)
    assert not data.read_images([black], 8, grey=True).any()
    bad = [
        saved(tmp_path / "small.png", bright // 300),
        saved(tmp_path / "12.png", bright // 16),
        saved(tmp_path / "float.tif", bright.astype(np.float32)),
        saved(tmp_path / "32.tif", bright.astype(np.int32)),
    ]
    for path in bad:
        with pytest.raises(data.DataError, match=path.name):
            data.read_images([path, black], 8, grey=True)
    with pytest.raises(data.DataError, match=r"float.tif.*unsigned"):
        data.inspect(bad)  # only what headers show


def test_hidden_folders_are_skipped_and_links_followed_once(folder, tmp_path):
    hidden = [folder / "train" / ".git", folder / "train" / "left" / ".ipynb_checkpoints"]
    for place in (*hidden, folder / "test" / ".cache"):
        place.mkdir()
        (place / "x.png").write_text("no image")
    (folder / "train" / "right").rename(tmp_path / "elsewhere")
    (folder / "train" / "right").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "left" / "loop").symlink_to(folder / "train" / "left")
    (folder / "train" / "left" / "more").symlink_to(folder / "test" / "left")
    (folder / "train" / "left" / "link.png").symlink_to(folder / "test" / "left" / "0.png")
    source = data.find(folder)
    assert source.classes == ("left", "middle", "right")
    assert data.load(source, "train")[1].bincount().tolist() == [37, 30, 30]
    (tmp_path / ".photos").symlink_to(folder / "test")  # the root may be hidden
    assert len(data.image_files(tmp_path / ".photos")) == 18


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_of_few_images_one_of_each_class_is_held_out(n, tmp_path):
    source = data.find(color(tmp_path / "few", n=n))
    if n == 1:
        with pytest.raises(data.DataError, match="no class has two images"):
            data.load_train(source, full_train=False)
    else:
        (_, train), (_, val) = data.load_train(source, full_train=False)
        assert val.bincount().tolist() == [1] * 10 and len(train) == 10 * (n - 1)
    assert len(data.load_train(source, full_train=True)[0][1]) == 10 * n


def test_grey_arrays_and_color_files_on_one_picture(tmp_path):
    weights, array = tmp_path / "plain.pth", tmp_path / "grey.npy"
    torch.save(models.build("resnet18", 3).state_dict(), weights)
    np.save(array, np.zeros((3, 28, 28), np.uint8))
    image = saved(tmp_path / "a.png", np.zeros((30, 20, 3), np.uint8))
    flags = ["-w", str(weights), "--color", "-o", str(tmp_path / "x.csv"), str(array), str(image)]
    assert predict.main([*flags, "--show", str(tmp_path / "sheet.png")]) == 0
    assert len(read_rows(tmp_path / "x.csv")) == 4


def test_a_bad_file_is_found_before_the_first_image_is_classified(
    tmp_path, shipped_like, capsys, monkeypatch
):
    monkeypatch.setattr(models, "infer", None)
    good, short = tmp_path / "good.npy", tmp_path / "short.npy"
    np.save(good, np.zeros((3, 28, 28), np.uint8))
    short.write_bytes(good.read_bytes()[:-1])
    (tmp_path / "text.png").write_text("no image")
    out = str(tmp_path / "x.csv")
    for bad in ("short.npy", "text.png", "absent.npy"):
        flags = ["-w", str(shipped_like), "-o", out, str(good), str(tmp_path / bad)]
        assert predict.main(flags) == 2
        error = capsys.readouterr().err
        assert bad in error and error.count("\n") == 1


# --- files and folders that others have made ------------------------------------------------------

TURNS = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
}


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return {"exif": tags.tobytes()}


def kinds_of_images():
    """Names, images, options to save them, by which an EXIF orientation could be lost."""
    rng = np.random.default_rng(0)
    grey, alpha = (rng.integers(0, 256, (24, 40), dtype=np.uint8) for _ in range(2))
    rgb = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    palette = Image.fromarray(rgb).quantize(16)
    return {
        "grey.png": (Image.fromarray(grey), {}),
        "grey-alpha.png": (grey_alpha, {}),
        "rgba.png": (Image.fromarray(np.dstack([rgb, alpha])), {}),
        "palette.png": (palette, {}),
        "transparent-color.png": (palette, {"transparency": 3}),
        "transparent-grey.png": (Image.fromarray(grey), {"transparency": int(grey[0, 0])}),
        "16-bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "16-bits.tif": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "grey.tif": (Image.fromarray(grey), {}),
        "rgba.webp": (Image.fromarray(np.dstack([rgb, alpha])), {"lossless": True}),
    }


@pytest.mark.parametrize("name", kinds_of_images())
def test_the_exif_orientation_turns_images_of_every_kind(name, tmp_path):
    image, options = kinds_of_images()[name]
    for orientation, turn in TURNS.items():
        image.save(tmp_path / name, **options, **exif(orientation))
        image.transpose(turn).save(tmp_path / f"turned-{name}", **options)
        for grey in (True, False):
            pair = [tmp_path / name, tmp_path / f"turned-{name}"]
            read, expected = data.read_images(pair, 28, grey)
            assert (read.int() - expected.int()).abs().max() <= 1, orientation  # WebP's own


def test_all_that_pillow_decodes_is_read_and_the_rest_is_named(folder, tmp_path, capsys):
    place = folder / "train" / "left"
    for i, suffix in enumerate((".jfif", ".JPE", ".qoi", ".tga")):
        with Image.open(place / f"{i}.png") as image:
            image.convert("RGB").save(place / f"x{suffix.lower()}")
        (place / f"x{suffix.lower()}").rename(place / f"x{suffix}")
    for name in ("a.heic", "b.eps", "c.txt", ".hidden"):
        (place / name).write_text("")
    with Image.open(place / "0.png") as image:
        image.save(folder / "test" / "loose.png")
        image.save(folder / "train" / "no suffix", "webp")
        image.save(folder / "above.png")
    (folder / "train" / "notes.csv").write_text("")
    (folder / "LICENSE").write_text("no image")
    source = data.find(folder)
    assert data.load(source, "train")[1].bincount().tolist() == [34, 30, 30]
    loose, left_out = source.notes
    assert "left out, in no folder of a class (4)" in loose and "LICENSE" not in loose
    assert all(name in loose for name in ("loose.png", "no suffix", "above.png", "notes.csv"))
    assert "not images that Pillow decodes (3)" in left_out and "hidden" not in left_out
    assert all(name in left_out for name in ("a.heic", "b.eps", "c.txt"))


def test_a_training_says_what_it_leaves_out_once(folder, tiny, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "print_plan", lambda *args: None)
    monkeypatch.setattr(train, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    (folder / "train" / "left" / "a.heic").touch()
    (folder / "spare").mkdir()
    assert train.main(["--quick", "--device", "cpu", "--data", str(folder)]) == 130
    error = capsys.readouterr().err
    assert error.count("a.heic") == 1 and error.count("not used: spare/") == 1


def test_predictions_say_what_they_leave_out(folder, tmp_path, shipped_like, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out.csv"
    photos.mkdir()
    with Image.open(folder / "test" / "left" / "0.png") as image:
        image.save(photos / "a.jpg")
        (photos / "a.jpg").rename(photos / "a.jfif")
        image.save(photos / "b.gif", save_all=True, append_images=[image.rotate(90)])
        image.save(photos / "c.tif", save_all=True, append_images=[image.rotate(90)])
        image.save(photos / "d.tif")
        image.save(photos / "e.png")
    (photos / "e.png").rename(tmp_path / "upload")  # no suffix, but given by name
    (photos / "f.heic").touch()
    flags = ["-w", str(shipped_like), "-o", str(out), str(photos), str(tmp_path / "upload")]
    assert predict.main(flags) == 0
    error = capsys.readouterr().err
    assert [row["id"] for row in read_rows(out)] == ["a.jfif", "b.gif", "c.tif", "d.tif", "upload"]
    frames, left_out = error.splitlines()[-2:]
    assert (
        "several frames or pages, the first is used (2)" in frames
        and "b.gif" in frames
        and "c.tif" in frames
    )
    assert "left out, not images that Pillow decodes (1)" in left_out and "f.heic" in left_out


def test_an_image_of_a_format_without_a_decoder_is_refused(tmp_path):
    """As EPS, which needs a program that could do more than draw."""
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path, "eps")
    with pytest.raises(data.DataError, match="EPS is not supported"):
        data.read_images([path], 28, grey=True)


@pytest.mark.parametrize(
    "names", [("training", "valid", "testing"), ("TRAIN", "Validation", "Test")]
)
def test_usual_names_of_the_splits_are_known_and_other_folders_named(names, folder):
    shutil.copytree(folder / "test", folder / names[1])
    (folder / "train").rename(folder / names[0])
    (folder / "test").rename(folder / names[2])
    (folder / "extra").mkdir()
    source = data.find(folder)
    assert len(data.load_train(source, full_train=False)[1][1]) == 18
    assert data.has_split(source, "test") and len(data.load(source, "test")[1]) == 18
    (note,) = source.notes
    assert "not used: extra/" in note


def names_of(split):
    """How the folders of the classes of a split are really called."""
    return sorted(os.fsencode(path.name) for path in split.iterdir())


def test_one_name_in_two_unicode_forms_is_one_class(folder):
    composed = "caf\u00e9"
    apart = unicodedata.normalize("NFD", composed)
    assert composed != apart
    (folder / "train" / "left").rename(folder / "train" / composed)
    (folder / "train" / "middle").rename(folder / "train" / apart)
    (folder / "test" / "left").rename(folder / "test" / apart)
    shutil.rmtree(folder / "test" / "middle")
    if len(names_of(folder / "train")) == 2:
        pytest.skip("this file system knows one form only")
    source = data.find(folder)
    assert source.classes == (composed, "right")
    assert data.load(source, "train")[1].bincount().tolist() == [60, 30]
    assert data.load(source, "test")[1].bincount().tolist() == [6, 6]
    assert "taken for one class" in source.notes[0]


@pytest.fixture
def not_utf8(folder):
    """The same with names of files and a class in Latin-1."""
    bad = os.fsdecode(b"caf\xe9")
    (folder / "train" / "left").rename(folder / "train" / bad)
    (folder / "test" / "left").rename(folder / "test" / bad)
    (folder / "train" / bad / "0.png").rename(folder / "train" / bad / f"{bad}.png")
    (folder / "test" / bad / "0.png").rename(folder / "test" / bad / f"{bad}.png")
    return folder


def test_a_folder_with_names_that_are_not_utf8_can_be_trained_on(not_utf8, tiny):
    folder, source = not_utf8, data.find(not_utf8)
    assert source.classes[0] == "caf\\xe9" and data.digest(source)
    args = train.parse([*tiny, "--data", str(folder)])
    assert train.check(args, source, torch.device("cpu"), data.load(source, "train")[0])


def test_names_that_are_not_utf8_are_escaped_in_the_csv(not_utf8, tmp_path, shipped_like):
    out = tmp_path / "out.csv"
    show = ["--show", str(tmp_path / "sheet.png")]
    flags = ["-w", str(shipped_like), "-o", str(out), *show, str(not_utf8 / "test")]
    assert predict.main(flags) == 0
    assert "caf\\xe9/caf\\xe9.png" in [row["id"] for row in read_rows(out)]


def test_names_in_a_locale_without_utf8(folder):
    (folder / "train" / "left").rename(folder / "train" / "\u77ed\u8896")
    (folder / "test" / "left").rename(folder / "test" / "\u77ed\u8896")
    code = "import data; s = data.find('own'); print(ascii(s.classes), data.digest(s))"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.parent,
        env=os.environ
        | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(Path(data.__file__).parent)},
        capture_output=True,
        text=True,
    )
    source = data.find(folder)
    expected = f"{source.classes!a} {data.digest(source)}\n"
    assert printed.stdout == expected, printed.stderr


def test_numbers_as_names_of_classes_are_said_to_be_sorted_as_text(tmp_path):
    place = tmp_path / "numbers"
    for n in range(1, 12):
        (place / "train" / f"{n}").mkdir(parents=True)
        Image.new("L", (8, 8)).save(place / "train" / f"{n}" / "0.png")
    (note,) = data.order_note(data.find(place).classes)
    assert "0 is 1, 1 is 10, 2 is 11, 3 is 2" in note
    for n in range(1, 10):
        (place / "train" / f"{n}").rename(place / "train" / f"{n:02}")
    assert data.order_note(data.find(place).classes) == []
    assert data.order_note(data.CLASSES) == data.order_note(["b10", "b9", "a"]) == []


# --- the weights' classes and images ------------------------------------------------------------


def weights_for(path, classes, **meta):
    """A network that says what it is for."""
    torch.manual_seed(0)
    model = models.build("resnet18", len(classes))
    known = {"arch": "resnet18", "num_classes": len(classes), "classes": list(classes)}
    known |= {"dataset": "folder", "image_size": 28, "grey": True, **meta}
    checkpoint.save(path, model, known)
    return path


@pytest.fixture
def predicted(tmp_path, capsys, narrow):
    """Rows of the CSV of `predict.py --data folder`, and both streams."""

    def predicted(folder, classes, **meta):
        weights, out = weights_for(tmp_path / "w.pth", classes, **meta), tmp_path / "out.csv"
        code = predict.main(["-w", str(weights), "-o", str(out), "--data", str(folder), "--names"])
        written = capsys.readouterr()
        return read_rows(out) if code == 0 else code, written.out, written.err

    return predicted


def test_a_teacher_that_does_not_say_its_images_is_named(folder, tmp_path, narrow, capsys):
    path = tmp_path / "plain.pth"
    torch.save(models.build("resnet18", 3).state_dict(), path)
    source = data.find(folder)
    train.check_given("teacher", path, source, None, data.load(source, "train")[0])
    error = capsys.readouterr().err
    assert f"{path} does not say its classes and images" in error and "stem 4" in error


def test_the_weights_decide_the_order_of_the_classes(folder, predicted):
    rows, printed, _ = predicted(folder, ["right", "left", "middle"])
    assert [row["id"] for row in rows[:2]] == ["right/0.png", "right/1.png"]  # in their order
    hits = sum(row["id"].startswith(row["pred"] + "/") for row in rows)
    assert len(rows) == 18 and f"test accuracy {hits / 18:.2%}" in printed


@pytest.mark.parametrize("train_too", [True, False])
def test_test_images_may_lack_a_class(train_too, folder, predicted):
    if not train_too:
        shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "test" / "middle")
    rows, _, error = predicted(folder, ["left", "middle", "right"])
    assert len(rows) == 12 and "has no images of the classes middle" in error
    code, _, error = predicted(folder, ["left", "middle", "wrong"])
    assert code == 2 and "trained for the classes left, middle, wrong" in error and "right" in error


def test_the_weights_decide_whether_images_are_grey(folder, predicted, monkeypatch):
    for path in data.image_files(folder):
        with Image.open(path) as image:
            image.convert("RGB").save(path)
    shapes, infer = [], models.infer
    monkeypatch.setattr(models, "infer", lambda m, x, *a: shapes.append(x.shape) or infer(m, x, *a))
    for grey in (True, False):
        predicted(folder, ["left", "middle", "right"], grey=grey)
    assert [len(shape) for shape in shapes] == [3, 4]


def test_images_of_one_name_in_two_folders_have_ids_of_their_own(folder, tmp_path, shipped_like):
    out = tmp_path / "out.csv"
    places = [str(folder / "test" / name) for name in ("left", "right")]
    assert predict.main(["-w", str(shipped_like), "-o", str(out), *places]) == 0
    ids = [row["id"] for row in read_rows(out)]
    assert ids == [f"{place}/{i}.png" for place in places for i in range(6)]
    assert predict.main(["-w", str(shipped_like), "-o", str(out), places[0]]) == 0
    assert [row["id"] for row in read_rows(out)] == [f"{i}.png" for i in range(6)]


def test_an_id_stands_for_one_file(tmp_path):
    """A folder, and one inside of it, whose images have the names of the other's."""
    above, inside = tmp_path / "photos", tmp_path / "photos" / "cats"
    both, inner = [above / "1.png", inside / "1.png"], [inside / "1.png"]
    ids = predict.file_ids([(above, both), (inside, inner)])
    assert ids == [[str(path) for path in part] for part in (both, inner)]
    assert predict.file_ids([(above, both), (above, both)]) == 2 * [["1.png", "cats/1.png"]]
