import pickle

import pytest
import torch
from PIL import Image

import checkpoint
import models
from bench import tables


@pytest.mark.parametrize("path", tables.SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_network_comes_with_all_it_needs(path):
    name = path.stem.replace("-", "_")
    model = torch.hub.load(str(tables.ROOT), name, source="local", verbose=False)
    expected, meta = checkpoint.load(path)
    assert not model.training and list(model.classes) == meta["classes"] and model.image_size == 28
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model(model.transform(images))
    assert torch.equal(logits, models.infer(expected, images))
    as_pil = model.transform(Image.fromarray(images[0].numpy()))
    assert torch.equal(as_pil, model.transform(images[:1]))
    assert model.transform(Image.new("RGBA", (50, 40))).shape == (1, 3, 28, 28)
    assert model.transform(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)).shape == (2, 3, 28, 28)
    assert "conv1.weight" in model.state_dict() and len(pickle.dumps(model.state_dict())) > 0


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_dense_architectures(arch):
    model = torch.hub.load(
        str(tables.ROOT), arch, source="local", num_classes=3, stem=2, verbose=False
    )
    assert not model.training and model.fc.out_features == 3
    assert model.conv1.kernel_size == (3, 3)


def test_only_networks_are_entry_points():
    import hubconf

    names = {n for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")}
    assert names == {"pruned_resnet18", "pruned_resnet18_stem2", *models.ARCHITECTURES}
    assert {"torch", "torchvision"} <= set(hubconf.dependencies)
