import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from test_own_images import exif, kinds_of_images

import checkpoint
import data
import models
from bench import tables


def hub(name, **options):
    return torch.hub.load(str(tables.ROOT), name, source="local", verbose=False, **options)


@pytest.mark.parametrize("path", tables.SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_network_comes_with_all_it_needs(path):
    model = hub(path.stem.replace("-", "_"))
    expected, meta = checkpoint.load(path)
    assert not model.training and list(model.classes) == meta["classes"] and model.image_size == 28
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model(model.transform(images))
    assert torch.equal(logits, models.infer(expected, images))
    assert "conv1.weight" in model.state_dict() and len(pickle.dumps(model.state_dict())) > 0


@pytest.fixture(scope="module")
def transform():
    return hub("_transform", image_size=28, grey=True)


@pytest.mark.parametrize("name", kinds_of_images())
def test_image_files_are_read_as_in_predictions(name, transform, tmp_path):
    image, options = kinds_of_images()[name]
    image.save(path := tmp_path / name, **options, **exif(6))
    expected = models.normalize(data.read_images([path], 28, grey=True))
    with Image.open(path) as opened:
        assert torch.equal(transform(opened), expected)
    assert torch.equal(transform(path), expected) and torch.equal(transform(str(path)), expected)


def test_arrays_and_tensors_are_read_alike(transform):
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    expected = transform(Image.fromarray(grey))
    assert expected.shape == (1, 3, 28, 28)
    wide = torch.from_numpy(grey)
    for same in (grey, grey[None], wide, wide[None], wide[None, None], grey[::-1][::-1]):
        assert torch.equal(transform(same), expected)
    color = np.stack([grey, grey // 2, 255 - grey], 2)
    expected = transform(color)
    assert (expected - transform(Image.fromarray(color))).abs().max() < 0.02  # another rounding
    channels_first = torch.from_numpy(color).permute(2, 0, 1)
    for same in (color[None], channels_first[None], channels_first[None].numpy()):
        assert torch.equal(transform(same), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(5, 28, 28), "must be uint8"),
        (np.random.default_rng(0).random((28, 28)), "must be uint8"),
        (np.zeros((28, 28), np.uint16), "must be uint8"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), "one image in color or three"),
        (torch.zeros(1, 4, 28, 28, dtype=torch.uint8), "expected"),
        (torch.zeros(28, dtype=torch.uint8), "expected"),
        (np.zeros((28, 28, 1), np.uint8), "expected"),
        (np.zeros((28, 28, 4), np.uint8), "expected"),
        ([1, 2], "not a list"),
        (Image.new("F", (28, 28)), "not unsigned numbers"),
    ],
    ids=range(10),
)
def test_pixels_that_could_be_misread_are_refused(images, message, transform):
    with pytest.raises((TypeError, ValueError), match=message):
        transform(images)


def test_a_model_can_be_saved_whole_copied_and_sent_to_workers(tmp_path):
    """Also to a process that does not know this project and has its own module `models`."""
    model = hub("pruned_resnet18")
    torch.save(model, tmp_path / "whole.pth")
    image = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
    logits = model(model.transform(image))
    again = copy.deepcopy(model)
    assert torch.equal(again(again.transform(image)), logits)
    np.save(tmp_path / "image.npy", image.numpy())
    (tmp_path / "models.py").write_text("mine = True")
    (tmp_path / "worker.py").write_text(
        "import models, numpy, torch\n"
        "model = torch.load('whole.pth', weights_only=False)\n"
        "logits = model(model.transform(numpy.load('image.npy')))\n"
        "torch.save(logits, 'logits.pth')\n"
        "assert models.mine\n"
    )
    done = subprocess.run(
        [sys.executable, "worker.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pth"), logits)


def test_modules_of_the_same_names_do_not_collide(tmp_path, monkeypatch):
    """Imported before and after: `data`, a package with a submodule, and `models`."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("mine = True")
    (tmp_path / "data" / "loader.py").write_text("")
    (tmp_path / "models.py").write_text("mine = True")
    for name in ("checkpoint", "data", "models", "prune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = __import__("data.loader")
    assert before.mine
    model = hub("pruned_resnet18")
    after = __import__("models")
    assert after.mine and sys.modules["data"] is before and "data.loader" in sys.modules
    assert "checkpoint" not in sys.modules and str(tables.ROOT) not in sys.path[:1]
    assert model.transform(Image.new("RGBA", (50, 40))).shape == (1, 3, 28, 28)
    for name in ("data", "data.loader", "models"):
        monkeypatch.delitem(sys.modules, name)


def test_several_threads_may_load_networks():
    names = [path.stem.replace("-", "_") for path in tables.SHIPPED] * 3
    before = set(sys.modules)
    with ThreadPoolExecutor(len(names)) as threads:
        loaded = list(threads.map(hub, names))
    assert all(len(model.classes) == 10 for model in loaded)
    assert not {"checkpoint", "data", "models", "runtime"} & (set(sys.modules) - before)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_dense_architectures(arch):
    model = hub(arch, num_classes=3, stem=2)
    assert not model.training and model.fc.out_features == 3
    assert model.conv1.kernel_size == (3, 3)


def test_only_networks_are_entry_points():
    import hubconf

    names = {n for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")}
    shipped = {path.stem.replace("-", "_") for path in tables.SHIPPED}
    assert names == shipped | {*models.ARCHITECTURES}
    assert all(getattr(hubconf, name).__doc__ for name in names)
    assert {"torch", "torchvision"} <= set(hubconf.dependencies)
