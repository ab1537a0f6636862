import gzip
import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from tiny import idx_bytes

import data


def test_validation_is_fixed_stratified_and_apart_from_training():
    labels = torch.arange(600) % 10
    train, val = data.split_validation(labels, 50)
    assert labels[val].bincount().tolist() == [5] * 10
    assert sorted(train.tolist() + val.tolist()) == list(range(600))
    assert torch.equal(val, data.split_validation(labels, 50)[1])


# --- finding, checking, fetching ----------------------------------------------------------------


@pytest.fixture
def archives(tmp_path, tiny_data):
    """The tiny files as .gz."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for name in data.FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((tiny_data / name).read_bytes()))
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No images on this machine, and a cache folder that is still empty."""
    monkeypatch.setattr(data, "DEBIAN_DIR", tmp_path / "usr/share/datasets/fashion-mnist")
    monkeypatch.setattr(data, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN_CACHE", tmp_path / "cache" / "debian")
    return tmp_path / "cache"


def test_archives_raw_files_and_torchvisions_layout_read_alike(archives, tiny_data, tiny_images):
    layout = archives.parent / "layout"
    shutil.copytree(archives, layout / "FashionMNIST" / "raw")
    for folder in (archives, tiny_data, layout):
        images, labels = data.load(data.find(folder), "train")
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), tiny_images["train_images"])
        assert np.array_equal(labels.numpy(), tiny_images["train_labels"])


def test_a_truncated_archive_is_refused(archives):
    damage(archives)
    with pytest.raises(data.DataError, match=r"t10k-images.*damaged"):
        data.load(data.find(archives), "test")
    data.load(data.find(archives), "train")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t10k-images-idx3-ubyte", b""),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((40, 28, 28), np.uint8))),  # another set's
        ("t10k-images-idx3-ubyte", bytes((0, 0, 8, 3)) + b"\xff" * 12),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.arange(40, dtype=np.uint8) % 10)),
        ("t10k-labels-idx1-ubyte", "train-labels-idx1-ubyte"),  # good, but not here
    ],
    ids=["empty", "images", "header", "labels", "swapped"],
)
def test_files_of_other_content_are_refused(tmp_path, tiny_data, name, content, packed):
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    if isinstance(content, str):
        content = (tiny_data / content).read_bytes()
    (tmp_path / name).unlink()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(data.DataError, match=rf"{path.name}: damaged, or not Fashion-MNIST's.*MD5"):
        data.load(data.find(tmp_path), "test")


@pytest.mark.skipif(not data.DEBIAN_DIR.exists(), reason="needs the images, and fetches none")
def test_the_images_packed_again_are_the_same(tmp_path):
    for name in data.FILES:
        (tmp_path / f"{name}.gz").symlink_to(data.DEBIAN_DIR / f"{name}.gz")
    again = tmp_path / "t10k-images-idx3-ubyte.gz"
    again.unlink()
    content = gzip.decompress((data.DEBIAN_DIR / again.name).read_bytes())
    again.write_bytes(gzip.compress(content, 1))
    images, labels = data.load(data.find(tmp_path), "test")
    expected = data.load(data.find(data.DEBIAN_DIR), "test")
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def test_a_given_folder_without_the_files_is_refused_even_if_others_have_them(tmp_path):
    with pytest.raises(data.DataError, match="neither the four"):
        data.find(tmp_path)
    with pytest.raises(data.DataError, match="no such folder"):
        data.find(tmp_path / "absent")
    (tmp_path / "file.zip").touch()
    with pytest.raises(data.DataError, match="is not a folder"):
        data.find(tmp_path / "file.zip")


def test_debians_folder_comes_before_a_download(archives, nowhere):
    shutil.copytree(archives, data.DEBIAN_DIR)
    assert data.find().path == data.DEBIAN_DIR


def test_torchvision_downloads_once(archives, nowhere, monkeypatch):
    calls = []

    def download(root, download):
        calls.append(root)
        shutil.copytree(archives, root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    assert data.find().path == nowhere / "FashionMNIST" / "raw" == data.find().path
    assert calls == [nowhere]


def refuse(*args, **kwargs):
    raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_debians_package_is_fetched_without_root(archives, nowhere, monkeypatch, tmp_path):
    """dpkg-deb is the real one; apt-get is a stand-in that has the package at hand."""
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    tree, commands = tmp_path / "tree", tmp_path / "bin"
    shutil.copytree(archives, tree / data.DEBIAN_DIR.relative_to("/"))
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\n"
        "Description: images\n"
    )
    package = tmp_path / "dataset-fashion-mnist_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", tree, package], check=True, capture_output=True)
    commands.mkdir()
    apt = commands / "apt-get"
    apt.write_text(f'#!/bin/sh\ncase "$*" in *" download "*) cp {package} . ;; esac\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    assert len(data.load(data.find(), "test")[0]) == 40
    assert [path.name for path in nowhere.iterdir()] == ["debian"]


def test_without_any_source_the_message_names_the_ways_out(nowhere, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(data.DataError) as caught:
        data.find()
    message = str(caught.value)
    assert "--data DIR" in message and "dataset-fashion-mnist" in message
    assert "Error downloading" in message and "\n" not in message


def damage(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "debian"])
def test_half_a_download_in_our_cache_is_fetched_again(place, archives, nowhere, monkeypatch):
    fetch_from(archives, [], monkeypatch)
    shutil.copytree(archives, nowhere / place)
    damage(nowhere / place)
    assert len(data.load(data.find(), "test")[0]) == 40


@pytest.mark.parametrize("dataset", ["fashion-mnist", "mnist"])
def test_whole_files_in_our_cache_outlast_a_failed_download(
    dataset, archives, nowhere, monkeypatch
):
    raw = nowhere / {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[dataset] / "raw"
    shutil.copytree(archives, raw)
    damage(raw)
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", refuse)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data.find(dataset=dataset)
    assert sorted(path.name for path in raw.iterdir()) == sorted(
        f"{name}.gz" for name in data.FILES if name != "t10k-images-idx3-ubyte"
    )


def test_a_users_damaged_folder_is_not_repaired(archives):
    damage(archives)
    with pytest.raises(data.DataError, match="damaged"):
        data.load(data.find(archives), "test")
    assert (archives / "t10k-images-idx3-ubyte.gz").stat().st_size == 100


def fetch_from(archives, calls, monkeypatch):
    """Let torchvision download from `archives`, which takes a while, and note what it asks for."""

    def fetch(url, download_root, filename, md5):
        calls.append(filename)
        content = (archives / filename).read_bytes()
        with (Path(download_root) / filename).open("wb") as file:
            file.write(content[:100])
            file.flush()
            threading.Event().wait(0.1)
            file.write(content[100:])
        (Path(download_root) / filename).with_suffix("").write_bytes(gzip.decompress(content))

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)


def test_who_starts_while_another_fetches_waits_for_it(archives, nowhere, monkeypatch):
    calls, found = [], []
    fetch_from(archives, calls, monkeypatch)
    threads = [
        threading.Thread(target=lambda: found.append(len(data.load(data.find(), "test")[0])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        threading.Event().wait(0.15)
    for thread in threads:
        thread.join()
    assert found == [40] * 3 and len(calls) == len(data.FILES)


@pytest.mark.parametrize("packed", [True, False])
def test_half_an_mnist_in_our_cache_is_fetched_again(packed, archives, nowhere, monkeypatch):
    """Of unpacked files, torchvision sees only that they are there."""
    calls, raw = [], nowhere / "MNIST" / "raw"
    fetch_from(archives, calls, monkeypatch)
    labels = [data.load(data.find(archives), split)[1] for split in ("train", "test")]
    counts = tuple(tuple(each.bincount(minlength=10).tolist()) for each in labels)
    monkeypatch.setitem(data.LABEL_COUNTS, "mnist", counts)
    monkeypatch.setattr(data, "CONTENT_MD5", {})  # these labels are no Fashion-MNIST here
    raw.mkdir(parents=True)
    for path in archives.iterdir():
        content = path.read_bytes()
        whole = path.name if packed else path.stem
        (raw / whole).write_bytes(content if packed else gzip.decompress(content))
    cut = raw / ("t10k-images-idx3-ubyte.gz" if packed else "t10k-images-idx3-ubyte")
    cut.write_bytes(cut.read_bytes()[:100])
    assert len(data.load(data.find(dataset="mnist"), "test")[0]) == 40
    assert len(calls) == len(data.FILES)


@pytest.mark.parametrize("dataset", ["mnist", "kmnist"])
def test_unpacked_files_of_another_data_set_are_not_taken_for_it(dataset, tmp_path):
    """torchvision looks at their names alone. KMNIST has as many images of a class as they."""
    raw = tmp_path / data.TORCHVISION[dataset] / "raw"
    raw.mkdir(parents=True)
    for name in data.FILES:
        with data._unpacked(data._idx_path(data.find().path, name)) as file:
            (raw / name).write_bytes(file.read())
    with pytest.raises(
        data.DataError, match=f"raw: the labels in this folder are not those of {dataset}"
    ):
        data.find(tmp_path, dataset)


def test_fashion_mnists_validation_images_stay_the_same():
    labels = torch.arange(10).repeat(6000)
    _, val = data.split_validation(labels, 5000)
    assert labels[val].bincount().tolist() == [500] * 10
    assert hashlib.md5(val.numpy().tobytes()).hexdigest() == "c0b313ff744b2496463611dc53dd25d2"
