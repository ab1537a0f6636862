import errno
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import META
from torch.nn.utils import prune as torch_prune

import checkpoint
import models
import prune

DENSE = {"arch": "resnet18", "num_classes": 10}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def same(a, b):
    """Bit for bit, -0.0 apart from 0.0 included."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        if a[k].dim()
        else torch.equal(a[k], b[k])
        for k in a
    )


def test_a_pruned_network_comes_back_bit_for_bit_from_a_small_file(pruned, path):
    pruned.conv1.weight.data[0, 0, 0, 0] = 1e-30
    pruned.bn1.num_batches_tracked += 12345
    pruned.fc.weight.data[9, 511] = 0.5  # far behind the weight before it: gaps over 65,535
    pruned.layer4[1].conv1.weight.data.zero_()
    meta = {**META, "budget": 200_000}
    checkpoint.save(path, pruned, meta)
    assert path.stat().st_size < 450_000
    model, known = checkpoint.load(path)
    assert same(model.state_dict(), pruned.state_dict())
    assert known == {**meta, "stem": 4, "parameters": prune.count(pruned)}
    assert not model.training and {type(m) for m in model.modules()} == {
        type(m) for m in models.build("resnet18", 10).modules()
    }


def test_half_precision_rounds_the_weights_and_keeps_the_count(pruned, path):
    kept = pruned.conv1.weight.nonzero()[0]
    pruned.conv1.weight.data[tuple(kept)] = -1e-12  # too small for float16
    checkpoint.save(path, pruned, META, bits=16)
    assert path.stat().st_size < 300_000
    model, meta = checkpoint.load(path)
    assert meta["parameters"] == prune.count(model) == 100_000
    assert model.conv1.weight[tuple(kept)] == -(2.0**-24)
    for (name, a), b in zip(model.state_dict().items(), pruned.state_dict().values(), strict=True):
        if name in prune.weights(pruned):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2.0**-24)
        else:
            assert torch.equal(a, b), name
    pruned.conv1.weight.data[tuple(kept)] = 1e5
    with pytest.raises(checkpoint.CheckpointError, match="too large for half"):
        checkpoint.save(path, pruned, META, bits=16)
    assert prune.count(checkpoint.load(path)[0]) == 100_000  # the file before


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_denormal_numbers_are_0_whatever_the_processor_says(bits, flushed, narrow, path):
    """Scripts have them flushed to 0, a notebook has not."""
    model = models.build("resnet18", 10)
    weights = model.conv1.weight.data
    weights[0, 0, 0, :3] = torch.tensor([1e-40, -1e-42, 2e-38])
    before = not torch.tensor([1e-40]).any()
    try:
        torch.set_flush_denormal(flushed)
        checkpoint.save(path, model, DENSE, bits)
        for other in (False, True):
            torch.set_flush_denormal(other)
            loaded, meta = checkpoint.load(path)
            assert loaded.conv1.weight[0, 0, 0, :2].abs().tolist() == [0, 0]
            assert meta["parameters"] == prune.count(loaded)
    finally:
        torch.set_flush_denormal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_precisions_are_written_in_float32(dtype, narrow_resnet18, path):
    checkpoint.save(path, narrow_resnet18.to(dtype), DENSE)
    state = checkpoint.load(path)[0].state_dict()
    for name, tensor in narrow_resnet18.state_dict().items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_layers_without_weights_can_be_written(bits, pruned, path):
    for weight in prune.weights(pruned).values():
        weight.data.zero_()
        checkpoint.save(path, pruned, META, bits)
        assert checkpoint.load(path)[1]["parameters"] == prune.count(pruned)


@pytest.mark.parametrize("bits", [8, 5, 2])
def test_few_bits_have_a_scale_for_each_channel_and_keep_the_count(bits, pruned, path):
    conv, state = pruned.layer1[0].conv1, pruned.state_dict()
    kept = tuple(conv.weight.nonzero()[0])
    conv.weight.data[kept] = -1e-12  # less than half a step
    pruned.layer2[0].conv1.weight.data[5] = 0
    parameters = prune.count(pruned)
    checkpoint.save(path, pruned, {**META, "budget": parameters}, bits=bits)
    assert path.stat().st_size < 210_000
    model, meta = checkpoint.load(path)
    assert meta["parameters"] == prune.count(model) == parameters
    assert conv.weight[kept] != 0
    expected = checkpoint.fake_quantize(pruned, bits).state_dict()
    for name, tensor in model.state_dict().items():
        if name in prune.weights(pruned):
            assert torch.equal(tensor, expected[name]), name
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, state[name], rtol=2**-11, atol=0)
    for name, weight in list(prune.weights(model).items())[1:]:
        for row, largest in zip(weight.flatten(1), weight.flatten(1).abs().amax(1), strict=True):
            assert len(row.abs().unique()) <= 2 ** (bits - 1), name
            assert largest == 0 or (row[row != 0].abs() * 2 ** (bits - 1) > largest).all()
    if bits == 8:
        difference = model.layer1[0].conv2.weight - pruned.layer1[0].conv2.weight
        assert difference.norm() < 0.01 * pruned.layer1[0].conv2.weight.norm()


def test_few_bits_of_a_dense_network(narrow, path):
    model = models.build("resnet18", 10)
    checkpoint.save(path, model, {"arch": "resnet18", "num_classes": 10}, bits=8)
    assert path.stat().st_size < 1.1 * prune.count(model)
    expected = prune.weights(checkpoint.fake_quantize(model, 8))
    for name, weight in prune.weights(checkpoint.load(path)[0]).items():
        assert torch.equal(weight, expected[name]), name


def test_dense_networks_and_resnet50_come_back_as_well(narrow, path):
    for arch in models.ARCHITECTURES:
        model = models.build(arch, 7)
        checkpoint.save(path, model, {"arch": arch, "num_classes": 7})
        again, meta = checkpoint.load(path)
        assert same(again.state_dict(), model.state_dict())
        assert meta["parameters"] == prune.count(model)


@pytest.mark.parametrize("stem", models.STEMS)
def test_the_stem_is_kept_and_seen_in_plain_files(stem, narrow, path):
    model = models.build("resnet18", 10, stem=stem)
    for write in (
        lambda: checkpoint.save(path, model, {**META, "budget": 2 * 10**7, "stem": stem}),
        lambda: torch.save(model.state_dict(), path),
    ):
        write()
        again, meta = checkpoint.load(path, stem=stem)
        assert meta["stem"] == stem and same(again.state_dict(), model.state_dict())
        assert isinstance(again.maxpool, torch.nn.Identity) == (stem == 1)
        for other in set(models.STEMS) - {stem}:
            if {stem, other} != {1, 2} or write.__code__.co_names[0] == "checkpoint":
                with pytest.raises(
                    checkpoint.CheckpointError, match=f"--stem {other}, but its stem is "
                ):
                    checkpoint.load(path, stem=other)
    assert checkpoint.load(path)[1]["stem"] == {4: 4, 2: 1, 1: 1}[stem]  # the plain file


def test_plain_masked_and_course_files_load(pruned, path):
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    masked = prune.with_masks(pruned).state_dict()
    assert "conv1.weight_orig" in masked and "conv1.weight" not in masked
    teacher = models.build("resnet50", 10).state_dict()
    for content, arch, expected in (
        (state, "resnet18", state),
        (masked, "resnet18", state),
        ({"state_dict": {f"module.{k}": v for k, v in state.items()}}, "resnet18", state),
        (
            {"model_state_dict": {f"resnet50.{k}": v for k, v in teacher.items()}, "epoch": 3},
            "resnet50",
            teacher,
        ),
    ):
        torch.save(content, path)
        model, meta = checkpoint.load(path)
        assert meta["arch"] == arch and meta["num_classes"] == 10
        assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())


def test_masks_hide_what_lies_under_them(resnet18, path):
    torch_prune.random_unstructured(resnet18.conv1, "weight", 0.5)
    torch.save(resnet18.state_dict(), path)
    model, meta = checkpoint.load(path)
    assert torch.equal(model.conv1.weight, resnet18.conv1.weight)
    assert meta["parameters"] == 11_181_642 - 64 * 3 * 49 // 2


OTHERS = {  # of training programs: what they write, and what is ignored of it
    "model": (lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {0: s["fc.bias"]}}}, None),
    "net": (lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 93.2}, None),
    "ema alone": (lambda s: {"state_dict_ema": s, "args": None}, None),
    "ema too": (
        lambda s: {"state_dict": s, "state_dict_ema": {k: v / 2 for k, v in s.items()}},
        "state_dict_ema",
    ),
    "deep": (
        lambda s: {"checkpoint": {"net": {f"_orig_mod.{k}": v for k, v in s.items()}}},
        None,
    ),
    "AveragedModel": (
        lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
        "n_averaged",
    ),
    "criterion": (
        lambda s: {**{f"model.{k}": v for k, v in s.items()}, "criterion.weight": torch.ones(2)},
        "criterion.weight",
    ),
    "loss": (
        lambda s: {**s, **{f"kd_loss.{n}": torch.ones(2) for n in range(7)}},
        "kd_loss.0, kd_loss.1, kd_loss.2, kd_loss.3, kd_loss.4 and 2 more",
    ),
    "no counters": (lambda s: {k: v for k, v in s.items() if "tracked" not in k}, None),
    "half counters": (lambda s: {k: v.half() if "tracked" in k else v for k, v in s.items()}, None),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_state_dicts_of_other_training_programs(kind, narrow_resnet18, path):
    narrow_resnet18.bn1.num_batches_tracked += 100_000  # infinite in half precision
    state = narrow_resnet18.state_dict()
    make, ignored = OTHERS[kind]
    torch.save(make(state), path)
    model, meta = checkpoint.load(path)
    for name, tensor in model.state_dict().items():
        if "tracked" not in name or "counters" not in kind:
            assert torch.equal(tensor, state[name]), name
    assert meta.get("ignored") == ignored
    note = checkpoint.fill_missing_meta_(meta, path, 28, False, None)
    assumed = f"{path} does not say what images it is for: taken to be 28x28, grayscale, "
    assert note.startswith(assumed)
    also = f"; {path} also holds {ignored}, which is ignored" if ignored else "say otherwise"
    assert note.endswith(also)
    checkpoint.save(path, model, meta)
    assert "ignored" not in checkpoint.load(path)[1]


def test_one_of_several_networks_is_not_guessed(narrow_resnet18, path):
    state = narrow_resnet18.state_dict()
    for content in (
        {"student": state, "teacher": dict(state)},
        {f"{name}.{k}": v for name in ("student", "teacher") for k, v in state.items()},
    ):
        torch.save(content, path)
        with pytest.raises(checkpoint.CheckpointError, match=r"\(student., teacher.\); save the"):
            checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_whole_models_are_refused_with_what_to_do(narrow_resnet18, path):
    torch.save(narrow_resnet18, path)
    recipe = r"save the weights alone.*: torch.save\(model.state_dict\(\), 'weights.pth'\)"
    with pytest.raises(checkpoint.CheckpointError, match=recipe):
        checkpoint.load(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(checkpoint.CheckpointError, match=f"TorchScript.*{recipe}"):
        checkpoint.load(path)


def test_names_of_tensors_cannot_break_the_line(narrow_resnet18, path):
    torch.save({**narrow_resnet18.state_dict(), "head\n\x1b\udce9": torch.ones(1)}, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"also has head\\n\\x1b\\udce9; if"):
        checkpoint.load(path)


def test_what_a_file_without_weights_holds_is_said(narrow_resnet18, path):
    optimizer = torch.optim.SGD(narrow_resnet18.parameters(), 0.1).state_dict()
    for content, holds in ((optimizer, "only state, param_groups"), ([optimizer], "a list")):
        torch.save(content, path)
        with pytest.raises(checkpoint.CheckpointError, match=f"no state dict, {holds}; save one"):
            checkpoint.load(path)


def test_a_dict_that_holds_itself_ends(path):
    content = {}
    content["again"] = content["more"] = content
    torch.save(content, path)
    with pytest.raises(checkpoint.CheckpointError, match="no state dict"):
        checkpoint.load(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


def edit(path, **changes):
    """Change entries of the file's meta, its other entries, and its tensors (packed again)."""
    content = torch.load(path, weights_only=True)
    meta = {**content["meta"], **changes.pop("meta", {})}
    packed = {k: checkpoint._pack(v) for k, v in changes.items() if isinstance(v, torch.Tensor)}
    torch.save({**content, "meta": meta, **changes, **packed}, path)


def damage(path, kind):
    """Make the good weights file `path` bad; returns what the message must say."""
    content = torch.load(path, weights_only=True)
    values, gaps = (
        checkpoint._unpack(content[name], checkpoint.DTYPES[name], 10**6)
        for name in ("values", "gaps")
    )
    if kind in ("other shapes", "lacks a layer", "more layers", "deeper"):
        plain = checkpoint.load(path)[0].state_dict()
    if kind == "missing":
        path.unlink()
        return "No such file"
    if kind == "empty":
        path.write_bytes(b"")
        return "empty"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
        return "truncated"
    if kind == "text":
        path.write_text("id,pred\n0,9\n")
        return "not written by torch.save"
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return "directory"
    if kind == "code":
        torch.save({"model": Hostile()}, path)
        return "nothing was run"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(Hostile()))
        return "not written by torch.save"
    if kind == "no state dict":
        torch.save([1, 2, 3], path)
        return "no state dict"
    if kind == "other network":
        torch.save(torch.nn.Linear(3, 4).state_dict(), path)
        return "not the weights of a torchvision ResNet"
    if kind == "other shapes":
        plain["layer1.0.conv1.weight"] = torch.ones(64, 64, 5, 5)
        torch.save(plain, path)
        return r"layer1.0.conv1.weight is \(64, 64, 5, 5\)"
    if kind == "lacks a layer":
        del plain["layer2.0.bn1.bias"]
        torch.save(plain, path)
        return "layer2.0.bn1.bias is missing"
    if kind == "more layers":
        torch.save({**plain, "head.weight": torch.ones(1)}, path)
        return "also has head.weight"
    if kind == "deeper":
        torch.save({**plain, "layer1.2.bn1.bias": torch.ones(64)}, path)
        return "only ResNet18 and ResNet50"
    if kind == "architecture":
        edit(path, meta={"arch": "resnet34"})
        return "unknown architecture 'resnet34'"
    if kind == "stem":
        edit(path, meta={"stem": 3})
        return "unknown stem 3"
    if kind == "version":
        edit(path, version=99)
        return "version 99"
    if kind == "NaN":
        values[5] = torch.nan
        edit(path, values=values)
        return "not finite"
    if kind == "over budget":
        edit(path, meta={"budget": 99_999})
        return "more than its budget of 99,999"
    if kind == "miscounted":
        values[5] = 0
        edit(path, values=values)
        return "says 100000 parameters, but has 99999"
    if kind == "positions":
        gaps[7] = 0
        edit(path, gaps=gaps)
        return "do not fit together"
    if kind == "positions beyond":
        edit(path, gaps=torch.full_like(gaps, 60_000))
        return "do not fit together"
    if kind == "too few values":
        edit(path, values=values[1:])
        return "do not fit together"
    if kind == "too many others":
        edit(path, others=torch.ones(99))
        return "do not fit together"
    if kind == "dtype":
        torch.save({**content, "values": values}, path)
        return "do not fit together"
    if kind == "flipped bit":
        content["values"][100_000] ^= 1
        torch.save(content, path)
        return "do not fit together"
    if kind == "cut short":
        torch.save({**content, "values": content["values"][:-20]}, path)
        return "do not fit together"
    if kind == "bomb":  # a few kB that would fill the memory
        edit(path, others=torch.zeros(15_000_000))
        return "do not fit together"
    if kind == "classes":
        edit(path, meta={"num_classes": -1})
        return "do not fit together"
    if kind == "accuracy":
        edit(path, meta={"val_accuracy": torch.tensor(0.9)})
        return "do not fit together"
    if kind == "accuracy NaN":
        edit(path, meta={"val_accuracy": math.nan})
        return "do not fit together"
    raise AssertionError(kind)


def damage_bits(path, kind):
    """Make the good file of 8 bits bad; returns what the message must say."""
    content = torch.load(path, weights_only=True)
    kinds = {**checkpoint.DTYPES, "values": torch.int8}
    part = {
        name: checkpoint._unpack(content[name], kinds[name], 10**6)
        for name in ("values", "scales", "first")
    }
    misfit = "do not fit together"
    if kind == "bits":
        torch.save({**content, "bits": 9}, path)
    elif kind == "bits of another kind":
        torch.save({**content, "bits": True}, path)
    elif kind == "more than the bits hold":
        torch.save({**content, "bits": 7}, path)
    elif kind == "no scales":
        del content["scales"]
        torch.save(content, path)
    elif kind == "too few scales":
        edit(path, scales=part["scales"][1:])
    elif kind == "too few of the first":
        edit(path, first=part["first"][1:])
    elif kind == "floats":
        edit(path, values=part["values"].float())
    elif kind == "plain":
        torch.save({**content, "scales": part["scales"]}, path)
    elif kind == "scale 0":
        part["scales"][3] = 0
        edit(path, scales=part["scales"])
        misfit = "says 100000 parameters, but has"
    elif kind == "value 0":
        part["values"][3] = 0
        edit(path, values=part["values"])
        misfit = "says 100000 parameters, but has 99999"
    elif kind in ("NaN", "infinity"):
        part["scales"][3] = float(kind)
        edit(path, scales=part["scales"])
        misfit = "not finite"
    return misfit


KINDS = (
    "missing", "empty", "truncated", "text", "folder", "code", "bare pickle", "no state dict",
    "other network", "other shapes", "lacks a layer", "more layers", "deeper", "architecture",
    "stem", "version", "NaN", "over budget", "miscounted", "positions", "positions beyond",
    "too few values", "too many others", "dtype", "flipped bit", "cut short", "bomb", "classes",
    "accuracy", "accuracy NaN",
)  # fmt: skip


@pytest.fixture(scope="module")
def eight_bits(shipped_like, tmp_path_factory):
    path = tmp_path_factory.mktemp("bits") / "weights.pth"
    checkpoint.save(path, *checkpoint.load(shipped_like), bits=8)
    assert checkpoint.load(path)[1]["parameters"] == 100_000
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_weights_files_get_one_clear_line(kind, shipped_like, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.write_bytes(shipped_like.read_bytes())
    message = damage(path, kind)
    with pytest.raises(checkpoint.CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (path.parent / "hostile-code-ran").exists()


BIT_KINDS = (
    "bits", "bits of another kind", "more than the bits hold", "no scales", "too few scales",
    "too few of the first", "floats", "plain", "scale 0", "value 0", "NaN", "infinity",
)  # fmt: skip


@pytest.mark.parametrize("kind", BIT_KINDS)
def test_bad_files_of_8_bits_get_one_clear_line(kind, eight_bits, path):
    path.write_bytes(eight_bits)
    with pytest.raises(checkpoint.CheckpointError, match=damage_bits(path, kind)) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_scratch(tmp_path):
    path = tmp_path / "file.pth"
    checkpoint.write(path, "old")
    with pytest.raises(Exception, match=r"pickle|local object"):
        checkpoint.write(path, {"code": lambda: None})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_outputs_that_cannot_be_written_are_found_before_the_work(tmp_path):
    checkpoint.check_output(tmp_path / "new.csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "absent" / "x.csv", tmp_path / "file" / "x.csv"):
        with pytest.raises(checkpoint.CheckpointError, match="cannot be written"):
            checkpoint.check_output(bad)


def test_outputs_follow_links_and_leave_devices_and_pipes_what_they_are(tmp_path):
    (tmp_path / "far").mkdir()
    target, link, pipe = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    for text in ("new", "newer"):  # at first it leads nowhere
        checkpoint.check_output(link)
        checkpoint.write(link, text)
        assert link.is_symlink() and target.read_text() == text
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path, is_still in ((pipe, pipe.is_fifo), (link, link.is_char_device)):
        if path == link:
            link.unlink()
            link.symlink_to("/dev/null")
        checkpoint.check_output(path)
        checkpoint.write(path, "text")
        assert is_still()
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(checkpoint.CheckpointError, match="round in a circle"):
        checkpoint.check_output(link)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["far", "link", "pipe", "target"]


def test_mode_and_group_of_a_replaced_output_stay(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    group = next((group for group in os.getgroups() if group != os.getegid()), None)
    if os.geteuid() == 0 or group is not None:
        os.chown(path, -1, 4321 if os.geteuid() == 0 else group)
    before = path.stat()
    checkpoint.write(path, "new")
    after = path.stat()
    assert path.read_text() == "new" and after.st_ino != before.st_ino  # replaced, not overwritten
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_an_output_that_cannot_be_replaced_is_overwritten(number, tmp_path, monkeypatch):
    """As a mount point, or somebody else's file in a sticky folder."""

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_text("old and longer")
    monkeypatch.setattr(Path, "replace", refuse)
    checkpoint.check_output(path)
    checkpoint.write(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(checkpoint.CheckpointError, match=os.strerror(number)):
        checkpoint.write(tmp_path / "other", "new")
    assert list(tmp_path.iterdir()) == [path]


def as_nobody(work) -> str:
    """What `work` returns, or the error that it raises, where root's rights do not help."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            text = work()
        except Exception as error:
            text = str(error)
        finally:
            os.write(writing, str(text).encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as file:
        return file.read()


def test_an_output_in_a_folder_that_takes_no_new_files():
    with tempfile.TemporaryDirectory() as name:
        folder, file, locked = Path(name), Path(name, "file"), Path(name, "locked")
        for path, mode in ((file, 0o666), (locked, 0o444)):
            path.write_text("old and longer")
            path.chmod(mode)
        folder.chmod(0o555)
        assert "(Permission denied)" in as_nobody(lambda: checkpoint.check_output(folder / "new"))
        assert "(Permission denied)" in as_nobody(lambda: checkpoint.check_output(locked))
        assert as_nobody(lambda: checkpoint.check_output(file)) == "None"
        assert as_nobody(lambda: checkpoint.write(file, "new")) == "None"
        assert file.read_text() == "new" and locked.read_text() == "old and longer"
        folder.chmod(0o755)


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / f"{'x' * 250}.csv"
    checkpoint.check_output(path)
    checkpoint.write(path, "text")
    assert path.read_text() == "text"


def test_an_output_is_not_something_else_as_well(tmp_path):
    weights, link, new = tmp_path / "weights", tmp_path / "link", tmp_path / "new"
    weights.write_text("")
    link.symlink_to(weights)
    os.link(weights, tmp_path / "hard")
    for path, other in ((weights, link), (link, weights), (tmp_path / "hard", weights)):
        with pytest.raises(checkpoint.CheckpointError, match="the same file as"):
            checkpoint.check_output(path, tmp_path / "absent", other)
    with pytest.raises(checkpoint.CheckpointError, match="the same file as"):
        checkpoint.check_output(new, tmp_path / "." / "new")
    checkpoint.check_output(new, weights, link)


STRANGE = {
    "400 GB": lambda t: torch.zeros(1).expand(10**11),
    "4 GB": lambda t: torch.zeros(1).expand(10**9),
    "stride 0": lambda t: torch.zeros(1).expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "8 bits": lambda t: t.to(torch.float8_e5m2),
    "integers": lambda t: t.long(),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("masked", [False, True])
def test_strange_tensors_are_refused_by_name(kind, masked, narrow, path):
    model = models.build("resnet18", 10)
    state = (prune.with_masks(model) if masked else model).state_dict()
    names = ["conv1.weight_orig", "conv1.weight_mask"] if masked else ["conv1.weight", "fc.weight"]
    for name in names:
        if (kind, name) == ("integers", "conv1.weight_mask"):
            continue  # these are numbers as good as others
        torch.save({**state, name: STRANGE[kind](state[name])}, path)
        with pytest.raises(checkpoint.CheckpointError, match=name.removesuffix("_orig")):
            checkpoint.load(path)


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_parts_of_our_own_files_are_refused(kind, shipped_like, path):
    content = torch.load(shipped_like, weights_only=True)
    torch.save({**content, "values": STRANGE[kind](content["values"].float())}, path)
    with pytest.raises(checkpoint.CheckpointError, match="do not fit together"):
        checkpoint.load(path)


def test_our_own_files_cannot_say_what_is_ignored(shipped_like, path):
    path.write_bytes(shipped_like.read_bytes())
    edit(path, meta={"ignored": "a\nb"})
    assert "ignored" not in checkpoint.load(path)[1]


@pytest.mark.parametrize("key", ["image_size", "budget", "parameters", "num_classes"])
def test_true_is_no_number(key, shipped_like, path):
    path.write_bytes(shipped_like.read_bytes())
    edit(path, meta={key: True})
    with pytest.raises(checkpoint.CheckpointError, match="do not fit together"):
        checkpoint.load(path)


def test_loading_does_not_import_the_compiler(shipped_like):
    """Which takes longer than all the rest of a prediction."""
    script = (
        f"import sys, checkpoint; checkpoint.load({str(shipped_like)!r}); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(checkpoint.__file__).parent, check=True)


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema", "swa_model", "averaged"])
def test_averages_are_known_by_their_names_and_not_by_parts_of_words(name):
    assert checkpoint.AVERAGED.search(name)
    assert not any(map(checkpoint.AVERAGED.search, ("cinema", "emanet", "schema.model")))


def test_a_negative_variance_is_refused(narrow_resnet18, path):
    narrow_resnet18.layer2[0].bn1.running_var.neg_()
    torch.save(narrow_resnet18.state_dict(), path)
    with pytest.raises(checkpoint.CheckpointError, match="running_var"):
        checkpoint.load(path)
