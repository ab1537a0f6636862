import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import KINDS, damage

import checkpoint
import data
import models
import predict
from bench import tables

SCRIPT = Path(predict.__file__)


@pytest.fixture
def flags(tmp_path, shipped_like, tiny_data):
    """predict.main's flags with good weights, and an output that must not be lost."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(shipped_like.read_bytes())
    (tmp_path / "submission.csv").write_text("precious")
    return ["-w", str(weights), "-o", str(tmp_path / "submission.csv"), "--data", str(tiny_data)]


def fails(flags, capsys, tmp_path):
    """The one line on stderr of a run that fails and leaves everything as it was."""
    before = sorted(tmp_path.iterdir())
    assert predict.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: ") and error.count("\n") == 1
    assert (tmp_path / "submission.csv").read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == before
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_bad_weights(kind, flags, capsys, tmp_path, monkeypatch):
    engine = ("dense", "sparse")[KINDS.index(kind) % 2]
    monkeypatch.chdir(tmp_path)
    damage(tmp_path / "weights.pth", kind)
    assert "weights.pth" in fails([*flags, "--engine", engine], capsys, tmp_path)


@pytest.mark.parametrize("name, reason", [("a.pth", "Git LFS"), ("a.safetensors", "convert it")])
def test_files_of_another_kind_are_named(name, reason, flags, capsys, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / name).write_bytes(pointer if name == "a.pth" else b"\x08\0\0\0\0\0\0\0{}      ")
    assert reason in fails([*flags, "-w", str(tmp_path / name)], capsys, tmp_path)
    if name == "a.pth":
        image = tmp_path / "a.png"
        image.write_bytes(pointer)
        assert reason in fails([*flags, str(image)], capsys, tmp_path)


def test_a_wrong_number_of_classes(flags, capsys, tmp_path):
    model, meta = models.build("resnet18", 7), {"arch": "resnet18", "num_classes": 7}
    checkpoint.save(tmp_path / "weights.pth", model, meta)
    assert "has 7 classes" in fails(flags, capsys, tmp_path)


def test_bad_outputs_are_found_before_the_work(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "infer", None)
    weights = tmp_path / "weights.pth"
    for bad in (tmp_path / "absent" / "out.csv", tmp_path, weights):
        error = fails([*flags, "-o", str(bad)], capsys, tmp_path)
        assert "cannot be written" in error
        assert bad.parent.exists() or f"there is no folder {bad.parent}" in error


def test_missing_images_and_devices(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in fails([*flags, "--device", "cuda"], capsys, tmp_path)
    monkeypatch.setattr(models, "choose_device", lambda wanted: torch.device("meta"))
    only = "--engine sparse: runs on the CPU"
    assert only in fails([*flags, "--engine", "sparse"], capsys, tmp_path)
    monkeypatch.undo()
    assert "absent" in fails([*flags, "--data", str(tmp_path / "absent")], capsys, tmp_path)
    typo = str(tmp_path / "typo.png")
    assert f"{typo}: there is no such file or folder\n" in fails([*flags, typo], capsys, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["-w", "x", "--batch-size", "0"],
        ["-w", "x", "--batch-size", "1" + 20 * "0"],
        ["-w", "x", "--gray"],
    ],
)
def test_wrong_usage_is_argparses(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(wrong)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_mirror_images_and_batch_sizes_reach_the_network(flags, tmp_path, tiny_data, capsys):
    model, _ = checkpoint.load(tmp_path / "weights.pth")
    images, _ = data.load(data.find(tiny_data), "test")
    for more, options in (
        ([], {}),
        (["--batch-size", "7"], {"batch_size": 7}),
        (["--tta"], {"tta": True}),
        (["--engine", "dense"], {}),
        (["--engine", "sparse"], {}),
    ):
        assert predict.main([*flags, *more]) == 0
        expected = models.infer(model, images, **options).argmax(1).tolist()
        with (tmp_path / "submission.csv").open() as file:
            assert [int(row["pred"]) for row in csv.DictReader(file)] == expected
        printed = capsys.readouterr().out
        assert ("with mirror images" in printed) == ("--tta" in more)
        assert ("(dense)" in printed) == ("dense" in more)  # mostly zeros: sparse by itself


def test_outputs_that_would_destroy_something_are_refused(flags, capsys, tmp_path):
    images, sheet = tmp_path / "images.npy", tmp_path / "images.png"
    np.save(images, np.zeros((3, 28, 28), np.uint8))
    sheet.symlink_to(images)
    weights, output = tmp_path / "weights.png", tmp_path / "output.png"
    weights.symlink_to(flags[1])
    output.symlink_to(flags[3])
    for bad in (
        ["-o", flags[1]],
        ["--show", str(weights)],
        ["--show", str(output)],
        ["-o", "-", "--show", "/dev/stdout"],
        ["-o", str(images), str(images)],
        ["--show", str(sheet), str(images)],
        ["-o", str(Path(flags[5]) / "t10k-images-idx3-ubyte")],
    ):
        assert "the same file as" in fails([*flags, *bad], capsys, tmp_path)


def test_a_picture_that_is_not_a_png_is_refused(flags, capsys, tmp_path):
    error = fails([*flags, "--show", str(tmp_path / "picture.svg")], capsys, tmp_path)
    assert "end its name in .png" in error


def test_other_class_names_are_refused_and_shown(flags, capsys, tmp_path):
    model, meta = checkpoint.load(flags[1])
    names = ["cat", *meta["classes"][1:]]
    checkpoint.save(tmp_path / "weights.pth", model, {**meta, "classes": names})
    error = fails(flags, capsys, tmp_path)
    assert "cat, Trouser" in error and "T-shirt/top, Trouser" in error


def plain(path, stem=4):
    torch.manual_seed(0)
    model = models.build("resnet18", 3, stem=stem).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), path)
    return model


@pytest.mark.parametrize("stem", models.STEMS)
def test_plain_files_are_for_the_images_that_the_user_says(stem, tmp_path, capsys):
    weights, out = tmp_path / "plain.pth", tmp_path / "out.csv"
    model = plain(weights, stem)
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    flags = ["-w", str(weights), "-o", str(out), str(tmp_path / "images.npy"), "--probs"]
    said = ["--image-size", "32", "--color", "--stem", str(stem)]
    assert predict.main([*flags, *said]) == 0
    silent = f"predict.py: {weights} does not say what images it is for: taken to be "
    assert capsys.readouterr().err == f"{silent}32x32, color, scaled to [-1, 1]\n"
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    expected = models.infer(model, torch.from_numpy(images)).softmax(1)
    got = torch.tensor([[float(row[k]) for k in "012"] for row in rows])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert predict.main(flags) == 0
    guess = "" if stem == 4 else ", stem 1"
    assert capsys.readouterr().err == (
        f"{silent}28x28, grayscale{guess}, scaled to [-1, 1]; --image-size, --color and --stem say "
        "otherwise\n"
    )


def test_a_file_that_names_no_classes_is_compared_with_named_ones(tmp_path, tiny_data, capsys):
    torch.save(models.build("resnet18", 10).state_dict(), tmp_path / "plain.pth")
    flags = ["-w", str(tmp_path / "plain.pth"), "-o", str(tmp_path / "out.csv")]
    assert predict.main([*flags, "--data", str(tiny_data)]) == 0
    error = capsys.readouterr().err
    assert f"does not name its classes: taken to be those of {tiny_data}\n" in error


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_outputs_that_are_no_numbers_are_no_predictions(engine, narrow_resnet18, tmp_path, capsys):
    for name in ("layer1.0.conv2", "layer2.0.conv2"):
        narrow_resnet18.get_submodule(name).weight.data *= 1e30
    torch.save(narrow_resnet18.state_dict(), tmp_path / "large.pth")
    np.save(tmp_path / "images.npy", np.full((2, 28, 28), 200, np.uint8))
    out = tmp_path / "out.csv"
    flags = ["-w", str(tmp_path / "large.pth"), str(tmp_path / "images.npy"), "-o", str(out)]
    assert predict.main([*flags, "--engine", engine]) == 2
    error = capsys.readouterr().err
    assert "large.pth: gives logits that are not finite" in error and not out.exists()


@pytest.mark.parametrize("name", ["a\rb", "a\nb", 'a"b', "a,b", "a\r\nb", "ab "])
def test_any_name_is_one_field_of_the_table(name):
    rows = [["id", name], [name, "0"]]
    text = predict.to_csv(rows).decode()
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows
    assert predict.to_csv([["a", 1], ["b", 2]]) == b"a,1\nb,2\n"


def test_a_class_named_as_a_column_is_refused_with_probs(narrow_resnet18, tmp_path, capsys):
    meta = {"arch": "resnet18", "num_classes": 10, "classes": ["id", *"abcdefghi"]}
    checkpoint.save(tmp_path / "a.pth", narrow_resnet18, {**meta, "image_size": 28, "grey": True})
    np.save(tmp_path / "images.npy", np.zeros((1, 28, 28), np.uint8))
    flags = ["-w", str(tmp_path / "a.pth"), str(tmp_path / "images.npy")]
    out = ["-o", str(tmp_path / "out.csv")]
    assert predict.main([*flags, *out, "--probs"]) == 2
    assert "a class is named id" in capsys.readouterr().err
    assert predict.main([*flags, *out]) == 0


def test_names_that_are_the_same_as_text_are_refused(tmp_path):
    files = [tmp_path / os.fsdecode(b"\xe9.png"), tmp_path / "\\xe9.png"]
    with pytest.raises(data.DataError, match="rename one"):
        predict.file_ids([(tmp_path, files)])
    assert predict.file_ids([(tmp_path, files[:1])]) == [["\\xe9.png"]]


def test_messages_are_one_line_whatever_the_names(flags, tmp_path, capsys):
    bad = tmp_path / "bad\n\x1b[31mname.png"
    bad.write_text("x")
    assert predict.main([*flags[:2], *flags[4:], "-o", str(tmp_path / "out.csv"), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad\\n\\x1b[31mname.png" in error


def test_weights_cannot_come_from_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert predict.main(["-w", str(tmp_path / "pipe")]) == 2
    assert (
        "pipe: cannot be loaded: a pipe can be read only once; give a file"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["--image-size", "32"], "--image-size 32, but it is for 28x28, grayscale images"),
        (["--color"], "--color, but it is for"),
        (["--stem", "2"], "--stem 2, but its stem is 4; leave --stem out"),
        (["--image-size", "4"], "must be from 8 to 512"),
    ],
)
def test_flags_against_what_the_file_says(said, message, flags, capsys, tmp_path):
    assert message in fails([*flags, *said], capsys, tmp_path)
    if said[1:] not in (["4"], ["2"]):
        assert predict.main([*flags, "--image-size", "28", "--stem", "4"]) == 0


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
@pytest.mark.parametrize("json", [[], ["--json"]])
def test_predictions_on_standard_output_stand_there_alone(output, json, flags, capfd):
    assert predict.main([*flags[:2], *flags[4:], "-o", output, *json]) == 0
    written = capfd.readouterr()
    assert written.out.startswith("id,pred\n0,") and written.out.count("\n") == 41
    assert "100" in written.err


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
def test_predictions_are_added_to_a_log(output, flags, tmp_path, capfd):
    log = tmp_path / "log"
    log.write_text("before\n")
    standard = os.dup(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
    try:
        assert predict.main([*flags[:2], *flags[4:], "-o", output]) == 0
    finally:
        os.dup2(standard, 1)
        os.close(standard)
    before, predictions = log.read_text().split("\n", 1)
    assert before == "before" and "100" in capfd.readouterr().err
    assert predictions.startswith("id,pred\n0,") and predictions.count("\n") == 41


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_it_leaves_everything_as_it_was(number, flags, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = sorted(tmp_path.iterdir())
    # What a shell starts in the background ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, SCRIPT, *flags[:4], pipe], stderr=subprocess.PIPE)
    with pipe.open("wb") as file:  # 30,000 images are announced, 20,000 come
        header = bytes((0, 0, 8, 3)) + np.array((30_000, 28, 28), ">i4").tobytes()
        file.write(header + bytes(20_000 * 28 * 28))
        file.flush()
        while sorted(tmp_path.iterdir()) == before:
            time.sleep(0.05)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.strip().decode() == "stopped"
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "submission.csv").read_text() == "precious"


def test_memory_is_bounded_by_what_comes_out(tmp_path, monkeypatch):
    """Small images made large are few at a time, here and in the network."""
    monkeypatch.setattr(data, "MOST_BYTES", 2**20)
    weights, sizes = tmp_path / "plain.pth", []
    plain(weights)
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8, 3), np.uint8))
    real = torch.nn.functional.interpolate

    def interpolate(images, *args, **kwargs):
        out = real(images, *args, **kwargs)
        sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    seen = []
    monkeypatch.setattr(
        models, "infer", lambda m, x, *_: seen.append(x.nbytes) or torch.zeros(len(x), 3)
    )
    flags = ["-w", str(weights), "-o", str(tmp_path / "x.csv"), "--color", "--image-size", "256"]
    assert predict.main([*flags, str(tmp_path / "images.npy")]) == 0
    assert len(seen) == 4 and max(seen) <= 2**20 and max(sizes) <= 2**20


def test_large_images_go_through_the_network_a_few_at_a_time():
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, images):
            seen.append(len(images))
            return images.mean((2, 3))

    for size, most in ((28, 250), (64, 250), (512, 3)):
        seen.clear()
        models.infer(
            Model(1, 1), torch.zeros(4, size, size, dtype=torch.uint8).repeat(63, 1, 1)[:251]
        )
        assert max(seen) == most and sum(seen) == 251


def test_a_start_imports_nothing_that_is_not_used():
    heavy = ["pandas", "matplotlib", "llvmlite", "torch._dynamo", "sympy", "torchmetrics"]
    code = f"import sys, predict; print([name for name in {heavy} if name in sys.modules])"
    started = subprocess.run(
        [sys.executable, "-c", code], cwd=tables.ROOT, capture_output=True, text=True
    )
    assert started.stdout == "[]\n", started.stderr
