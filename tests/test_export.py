import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import damage

import checkpoint
import export
import models
import prune


def images(n, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("budget", [20_000, 100_000])
def test_a_slim_network_computes_the_same_with_fewer_channels(budget, resnet18):
    masks = prune.all_reachable(resnet18, 28, grey=True)
    prune.merge_grey_input_(resnet18)
    prune.apply_(resnet18, prune.choose_masks(resnet18, masks, budget, 28, grey=True))
    slim, batch = export.ExportModel(resnet18, 28, grey=True).eval(), images(9, 28, 28)
    torch.testing.assert_close(slim(batch), models.infer(resnet18, batch), atol=1e-4, rtol=0)
    parameters = sum(p.numel() for p in slim.parameters())
    assert parameters < 5_000_000 * (1 if budget == 100_000 else 0.5)
    assert slim.model.layer4[1].conv2.kernel_size == (1, 1)
    assert slim.model.layer4[0].conv1.kernel_size == (2, 2)


def test_constant_channels_stay_and_numbers_of_channels_are_multiples_of_a_block(resnet18):
    with torch.no_grad():
        resnet18.layer1[0].conv1.weight[3] = 0  # constant, but not zero, and read
        resnet18.layer1[0].bn1.bias[3] = 5
        resnet18.layer2[1].conv1.weight.zero_()
        resnet18.layer2[1].bn1.bias.fill_(-1)
        resnet18.layer2[1].bn1.running_mean.zero_()
        resnet18.fc.weight[:, 10:50] = 0
        resnet18.layer4[1].conv1.weight[:, 10:50] = 0
    slim, batch = export.ExportModel(resnet18.eval(), 28, grey=True).eval(), images(9, 28, 28)
    torch.testing.assert_close(slim(batch), models.infer(resnet18, batch), atol=1e-4, rtol=0)
    assert slim.model.layer2[1].conv2.in_channels == 16  # of none that matter
    assert slim.model.fc.in_features == 480  # of 472


def test_the_check_computes_no_channels_that_a_narrow_network_lacks(resnet18, monkeypatch):
    prune.apply_width_(resnet18.eval(), 1 / 8)
    whole, computed, batch = models.infer(resnet18, images(9, 28, 28)), [], images(9, 28, 28)
    infer = models.infer
    monkeypatch.setattr(models, "infer", lambda model, x: computed.append(model) or infer(model, x))
    logits = export.logits_of(resnet18, batch, "narrow.pth")
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    assert [model.fc.in_features for model in computed] == [64]
    assert resnet18.fc.in_features == 512  # it is written unchanged


@pytest.mark.parametrize("stem", models.STEMS)
@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_dense_color_networks(arch, stem, narrow):
    torch.manual_seed(0)
    model, batch = models.build(arch, 3, stem=stem).eval(), images(3, 3, 40, 40)
    slim = export.ExportModel(model, 40, grey=False).eval()
    torch.testing.assert_close(slim(batch), models.infer(model, batch), atol=1e-4, rtol=1e-4)


def test_the_onnx_file_is_checked_and_written(tmp_path, shipped_like, tiny_data, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs --group export")
    pytest.importorskip("onnxscript", reason="needs --group export")
    out = tmp_path / "net.onnx"
    flags = ["-w", str(shipped_like), "-o", str(out), "--data", str(tiny_data)]
    assert export.main(flags) == 0
    assert "40 of 40 test images as in PyTorch" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out)
    batch = images(5, 28, 28)
    (logits,) = session.run(None, {"images": batch.numpy()})
    expected = models.infer(checkpoint.load(shipped_like)[0], batch)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


def test_one_test_image_is_enough_and_large_logits_may_differ_by_more(
    tmp_path, shipped_like, capsys
):
    pytest.importorskip("onnxruntime", reason="needs --group export")
    pytest.importorskip("onnxscript", reason="needs --group export")
    model, meta = checkpoint.load(shipped_like)
    with torch.no_grad():
        model.fc.weight *= 1e4
    meta["classes"] = sorted(name.replace("/", "-") for name in meta["classes"])
    for name in meta["classes"]:
        (tmp_path / "own" / "test" / name).mkdir(parents=True)
    Image.new("L", (28, 28), 99).save(tmp_path / "own" / "test" / name / "1.png")
    weights = tmp_path / "w.pth"
    checkpoint.save(weights, model, {**meta, "dataset": "folder"})
    flags = ["-w", str(weights), "--data", str(tmp_path / "own")]
    assert export.main(flags) == 0
    captured = capsys.readouterr()
    assert "1 of 1 test images as in PyTorch" in captured.out
    assert "has no images of the classes" in captured.err and captured.err.count("\n") == 1


def test_bad_input_gets_one_line(tmp_path, capsys, shipped_like):
    assert export.main(["-w", str(tmp_path / "absent.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: ") and error.count("\n") == 1
    assert export.main(["-w", ".", "--c"]) == 2
    assert "cannot be loaded: Is a directory" in capsys.readouterr().err
    assert export.main(["-w", str(shipped_like), "--c", "-o", str(tmp_path / "no" / "x.c")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, flags, writes",
    [("x.c", [], ".onnx"), ("x.onnx", ["--c"], ".c"), ("x.C", ["--bits", "8"], ".pth")],
)
def test_an_output_named_as_another_format_is_refused(name, flags, writes, tmp_path, capsys):
    assert export.main(["-w", "pruned_resnet18.pth", "-o", str(tmp_path / name), *flags]) == 2
    error = capsys.readouterr().err
    assert name in error and error.endswith(f"these flags write {writes}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [16, 8, 5])
def test_fewer_bits_are_written_beside_the_weights(bits, shipped_like, tiny_data, tmp_path, capsys):
    weights = tmp_path / "w.pth"
    weights.write_bytes(shipped_like.read_bytes())
    assert export.main(["-w", str(weights), "--bits", str(bits), "--data", str(tiny_data)]) == 0
    smaller = tmp_path / f"w-{bits}bit.pth"
    assert smaller.stat().st_size < (0.7 if bits == 16 else 0.5) * weights.stat().st_size
    printed = capsys.readouterr().out
    assert str(smaller) in printed and "of 40 test images as before, test accuracy" in printed
    assert checkpoint.load(smaller)[1]["parameters"] == 100_000


def test_own_images_that_are_given_are_what_it_is_checked_with(
    tmp_path, shipped_like, monkeypatch, capsys
):
    monkeypatch.setattr(export, "NOISE", 50)
    model, meta = checkpoint.load(shipped_like)
    for name in meta["classes"]:
        place = tmp_path / "own" / "test" / name.replace("/", "-")
        place.mkdir(parents=True)
        Image.new("L", (28, 28), 99).save(place / "1.png")
    meta["classes"] = sorted(name.replace("/", "-") for name in meta["classes"])
    checkpoint.save(tmp_path / "w.pth", model, {**meta, "dataset": "folder"})
    flags = ["-w", str(tmp_path / "w.pth"), "--bits", "8"]
    assert export.main([*flags, "--data", str(tmp_path / "own")]) == 0
    assert "of 10 test images" in capsys.readouterr().out
    assert export.main(flags) == 0
    assert "of 50 random images" in capsys.readouterr().out


def test_plain_files_and_outputs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "NOISE", 50)
    weights, half = tmp_path / "plain.pth", tmp_path / "half.pth"
    torch.save(models.build("resnet18", 3, stem=2).state_dict(), weights)
    flags = ["-w", str(weights), "--bits", "8", "-o", str(half)]
    assert export.main([*flags, "--image-size", "32", "--color", "--stem", "2"]) == 0
    assert capsys.readouterr().err.endswith("taken to be 32x32, color, scaled to [-1, 1]\n")
    meta = checkpoint.load(half)[1]
    assert (meta["image_size"], meta["grey"], meta["stem"]) == (32, False, 2)
    assert export.main(flags) == 0
    assert "taken to be 28x28, grayscale, stem 1" in capsys.readouterr().err
    assert export.main([*flags, "-o", str(weights)]) == 2
    assert "the same file as" in capsys.readouterr().err


def test_the_c_file_is_checked_and_written(shipped_like, tiny_data, tmp_path, capsys, monkeypatch):
    flags = ["-w", str(shipped_like), "--c", "--data", str(tiny_data), "-o"]
    if export.compiler():
        assert export.main([*flags, str(tmp_path / "net.c")]) == 0
        assert "40 of 40 test images as in PyTorch" in capsys.readouterr().out
        assert "void net_logits(" in (tmp_path / "net.c").read_text()
        assert "test images: " in (tmp_path / "net.c").read_text().split("*/")[0]
        monkeypatch.setattr(export.CLibrary, "__call__", lambda self, x: torch.zeros(len(x), 10))
        assert export.main([*flags, str(tmp_path / "wrong.c")]) == 2
        assert "differs by" in capsys.readouterr().err
    monkeypatch.setattr(export, "compiler", lambda: None)
    for file, said in (("other-8bit.c", "other-8bit.c"), ("a b.c", "a_b.c")):  # in the command
        assert export.main([*flags, str(tmp_path / file)]) == 0
        assert "there is no C compiler" in capsys.readouterr().out
        assert f"-march=native -c {said}\n" in (tmp_path / file).read_text()
    assert not (tmp_path / "wrong.c").exists()


@pytest.mark.skipif(not export.compiler(), reason="needs a C compiler")
@pytest.mark.parametrize(
    ("owner", "name"), [(export.ctypes, "CDLL"), (export.tempfile, "TemporaryDirectory")]
)
def test_a_temporary_folder_that_does_not_serve_stops_no_c_file(
    owner, name, shipped_like, tmp_path, monkeypatch, capsys
):
    """As with noexec, or on a read-only file system."""

    def refuse(*args, **kwargs):
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(export, "NOISE", 2)
    assert export.main(["-w", str(shipped_like), "--c", "-o", str(tmp_path / "net.c")]) == 0
    printed = capsys.readouterr().out
    assert "not compared" in printed and "failed to map" in printed and "TMPDIR" in printed
    assert (tmp_path / "net.c").exists()


@pytest.mark.parametrize(
    ("named", "said"),
    [("gcc '-O2", "CC=gcc '-O2: not a command (No closing quotation)"), ("{}", "cannot be run")],
)
def test_a_compiler_that_is_none_is_one_line(
    named, said, shipped_like, tmp_path, monkeypatch, capsys
):
    (tmp_path / "cc").write_text("no program")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", named.format(tmp_path / "cc"))
    monkeypatch.setattr(export, "NOISE", 2)
    assert export.main(["-w", str(shipped_like), "--c", "-o", str(tmp_path / "net.c")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "net.c").exists()


@pytest.mark.parametrize("flags", [["--c"], ["--bits", "8"]])
def test_a_network_whose_logits_are_not_finite_is_not_exported(
    flags, narrow_resnet18, tmp_path, monkeypatch, capsys
):
    for name in ("layer1.0.conv2", "layer2.0.conv2"):
        narrow_resnet18.get_submodule(name).weight.data *= 1e30
    torch.save(narrow_resnet18.state_dict(), tmp_path / "large.pth")
    monkeypatch.setattr(export, "NOISE", 2)
    assert export.main(["-w", str(tmp_path / "large.pth"), *flags]) == 2
    assert "gives logits that are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["large.pth"]


@pytest.mark.parametrize("kind", ["NaN", "code", "miscounted", "classes", "bomb", "stem"])
def test_no_c_file_of_a_hostile_one(kind, shipped_like, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "w.pth"
    weights.write_bytes(shipped_like.read_bytes())
    damage(weights, kind)
    assert export.main(["-w", str(weights), "--c"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [weights]
