import pytest
import torch

import checkpoint
import data
import models


def test_normalize_gives_three_equal_channels_from_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    out = models.normalize(images)
    assert out.shape == (3, 3, 28, 28) and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[:, :, 5, 7], torch.tensor([[-1.0], [1.0], [-0.6]]).expand(3, 3))
    color = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(models.normalize(color), (color / 255 - 0.5) / 0.5)


def test_infer_does_not_depend_on_the_batch_size_and_averages_mirror_images(resnet18):
    images = torch.randint(256, (7, 28, 28), dtype=torch.uint8)
    whole = models.infer(resnet18, images)
    assert whole.shape == (7, 10) and whole.dtype == torch.float32 and not resnet18.training
    torch.testing.assert_close(models.infer(resnet18, images, 3), whole, atol=1e-5, rtol=1e-5)
    mirrored = models.infer(resnet18, images.flip(-1))
    both = models.infer(resnet18, images, tta=True)
    torch.testing.assert_close(both, (whole + mirrored) / 2, atol=1e-5, rtol=1e-5)


def test_infer_refuses_images_of_another_size_than_the_networks(resnet18, tmp_path):
    meta = {"arch": "resnet18", "num_classes": 10, "image_size": 56}
    checkpoint.save(tmp_path / "w.pth", resnet18, meta)
    model, _ = checkpoint.load(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="28 pixels a side for a network trained on 56"):
        models.infer(model, torch.zeros(2, 28, 28, dtype=torch.uint8))
    images = data.resize(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), 56, grey=True)
    assert models.infer(model, images).shape == (2, 10)


def test_accuracy_counts_right_answers():
    logits = torch.eye(10)[torch.tensor([3, 1, 4, 1])]
    assert models.accuracy(logits, torch.tensor([3, 1, 4, 5])) == 0.75


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize(("stem", "sides"), [(4, (7, 1)), (2, (14, 2)), (1, (28, 4))])
def test_the_stem_decides_the_side_of_all_maps(arch, stem, sides):
    model = models.build(arch, 10, stem=stem).eval()
    images = torch.randn(2, 3, 28, 28)
    first = model.layer1(model.maxpool(model.bn1(model.conv1(images))))
    last = model.layer4(model.layer3(model.layer2(first)))
    assert (first.shape[-1], last.shape[-1]) == sides
    assert model(images).shape == (2, 10)


def test_unknown_stems_are_refused():
    with pytest.raises(ValueError, match="unknown stem 3"):
        models.build("resnet18", 10, stem=3)


def test_unknown_architectures_and_absent_devices_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="resnet34"):
        models.build("resnet34", 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(models.DeviceError, match="--device cuda"):
        models.choose_device("cuda")
    assert models.choose_device("cpu").type == "cpu"


def test_a_gpu_on_which_nothing_runs_is_not_chosen(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", refuse)
    assert models.choose_device("auto").type != "cuda"
    with pytest.raises(models.DeviceError, match="--device cuda"):
        models.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    assert models.choose_device("cpu").type == "cpu"  # and asks nothing of the GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_computes_what_the_cpu_computes(resnet18):
    images = torch.randint(256, (16, 28, 28), dtype=torch.uint8)
    expected = models.infer(resnet18, images)
    torch.testing.assert_close(
        models.infer(resnet18.cuda(), images).cpu(), expected, atol=1e-2, rtol=1e-2
    )
