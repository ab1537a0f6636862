"""One's own images: reading them, training on them, classifying them."""

import csv
import gzip
import json

import numpy as np
import pytest
import tiny as shrunk
import torch
import torchvision
from PIL import Image

import checkpoint
import data
import predict
import train


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


def colour(folder, n=8, classes=10):
    """CIFAR-10's shape: 32x32 in colour, ten classes."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        place = folder / "train" / f"class{label}"
        place.mkdir(parents=True)
        for i in range(n):
            image = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            image[3 * label : 3 * label + 3, :, label % 3] += 150
            Image.fromarray(image).save(place / f"{i}.png")
    return folder


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_grey_folder_through_the_whole_chain(tiny, folder, tmp_path, capsys):
    flags = ["--quick", "--device", "cpu", "--data", str(folder), "--image-size", "40"]
    assert train.main([*flags, "--name", "own"]) == 0
    run = tmp_path / "runs" / "own"
    model, meta = checkpoint.load(run / "pruned_resnet18.pth")
    assert meta["parameters"] == 100_000 and meta["classes"] == ["left", "middle", "right"]
    assert (meta["image_size"], meta["grey"], meta["dataset"]) == (40, True, "folder")
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


def test_colour_images_through_the_whole_chain(tiny, tmp_path, capsys):
    folder = colour(tmp_path / "cifar")
    flags = ["--quick", "--device", "cpu", "--data", str(folder), "--image-size", "32"]
    assert train.main([*flags, "--name", "colour"]) == 0
    assert " - " in capsys.readouterr().out  # no test images, no test accuracy
    model, meta = checkpoint.load(tmp_path / "runs" / "colour" / "pruned_resnet18.pth")
    assert meta["parameters"] == 100_000 and not meta["grey"]
    assert all(model.conv1.weight[:, channel].any() for channel in range(3))
    weights = str(tmp_path / "runs" / "colour" / "pruned_resnet18.pth")
    predictions = []
    for engine in ("sparse", "dense"):
        out = tmp_path / f"{engine}.csv"
        images = str(folder / "train")
        assert predict.main(["-w", weights, "-o", str(out), "--engine", engine, images]) == 0
        predictions.append(read_rows(out))
    assert predictions[0] == predictions[1] and len(predictions[0]) == 80
    assert predict.main(["-w", weights, "-o", str(out)]) == 2
    assert "give IMAGES" in capsys.readouterr().err


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
        ("empty class", "no images of this class"),
        ("one class", "at least two"),
        ("unknown class", "no such class in"),
        ("size", "--image-size 4"),
    ],
)
def test_folders_that_cannot_be_trained_on(change, message, folder, tiny, capsys):
    more = []
    if change == "empty class":
        (folder / "train" / "new").mkdir()
    if change == "one class":
        for name in ("left", "middle"):
            for split in ("train", "test"):
                (folder / split / name).rename(folder / f"{split}-{name}")
    if change == "unknown class":
        (folder / "test" / "else").mkdir()
    if change == "size":
        more = ["--image-size", "4"]
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
    source = data.find(tmp_path, name)
    size = {"mnist": 28, "cifar10": 32}[name]
    assert (source.image_size, source.grey) == (size, name == "mnist")
    images, labels = data.load(source, "test")
    assert len(images) == 20 and labels.dtype == torch.int64
    if name == "cifar10":
        assert images[3, :, 5, 5].tolist() == [1, 2, 3]
    assert data.load(data.find(tmp_path, name, 16), "train")[0].shape[-2:] == (16, 16)


def test_a_data_set_that_cannot_be_had_is_said_so(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "KMNIST", refuse)
    with pytest.raises(data.DataError, match="kmnist is not there, and not to be had"):
        data.find(tmp_path, "kmnist")


def test_idx_and_npy_files_are_streamed(tmp_path, shipped_like, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 7)
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
}


@pytest.mark.parametrize("name", [*BAD, "float.npy", "objects.npy", "folder"])
def test_files_that_cannot_be_classified(name, tmp_path, shipped_like, capsys):
    path, out = tmp_path / name, tmp_path / "out.csv"
    if BAD.get(name) is not None:
        path.write_bytes(BAD[name])
    if name == "float.npy":
        np.save(path, np.zeros((3, 28, 28)))
    if name == "objects.npy":
        np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    if name == "folder":
        path.mkdir()
    out.write_text("precious")
    assert predict.main(["-w", str(shipped_like), "-o", str(out), str(path)]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1 and error.startswith("predict.py: ")
    assert out.read_text() == "precious"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
