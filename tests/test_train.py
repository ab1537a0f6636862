import csv
import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny as shrunk
import torch
from torch import nn

import checkpoint
import data
import distill
import export
import models
import predict
import prune
import train
from engine import rewrite
from runlog import estimate, plots, record


def read_rows(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "quick-seed0"


# --- stages -------------------------------------------------------------------------------------


def settings_of(*flags, data_flags=()):
    args = train.parse([*flags, *data_flags])
    source = data.Source("fashion-mnist", None, data.CLASSES, 28, True)
    return train.chain_settings(args, source, torch.device("cpu"), stem=args.stem or 4)


@pytest.mark.parametrize(
    ("flags", "budgets", "epochs"),
    [
        ([], [100_000], [32, 12, 60]),
        (["--quick"], [100_000], [2, 5, 16]),
        (["--length", "0.5"], [100_000], [16, 6, 30]),
        (["--length", "0.01"], [100_000], [1, 1, 1]),
        (["--teacher", "none"], [100_000], [60, 40]),
        (["--teacher", "none", "--length", "0.5"], [100_000], [30, 20]),
        (["--no-prune"], [], [32, 12]),
        (["--budget", "50000", "1000000", "200000"], [1_000_000, 200_000, 50_000], 3 * [60]),
    ],
)
def test_the_chain_prunes_to_each_budget_before_the_unaugmented_epochs(flags, budgets, epochs):
    stages = train.stages_of(settings_of(*flags), 4_228_570)
    pruned = [stage for stage in stages if stage.name == "pruned"]
    assert [stage.training.epochs for stage in stages][-len(epochs) :] == epochs
    assert len({stage.file for stage in stages}) == len({s.number for s in stages}) == len(stages)
    assert [stage.budgets[-1] for stage in pruned] == budgets
    assert stages[-1].file == ("pruned_resnet18.pth" if budgets else "student.pth")
    steps = [budget for stage in pruned for budget in stage.budgets]
    assert steps == sorted(steps, reverse=True) and max(steps, default=0) < 4_228_570
    for stage in pruned:
        assert len(stage.budgets) == max(1, round(stage.training.epochs / 3))
        assert len(stage.budgets) <= distill.augmented_epochs(stage.training)


def test_a_schedule_does_not_depend_on_random_weights(wide, monkeypatch):
    args = train.parse(wide)
    source = data.find(args.data)
    images, _ = data.load(source, "train")
    build, known = models.build, []

    def build_with_a_zero(*args):
        model = build(*args)
        with torch.no_grad():
            model.layer1[0].conv1.weight[0, 0, 1, 1] = 0.0
        return model

    for of in (build, build_with_a_zero):
        monkeypatch.setattr(models, "build", of)
        known.append(train.check(args, source, torch.device("cpu"), images))
    assert known[0] == known[1]


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["narrow", pytest.param("full", marks=pytest.mark.slow)])
def test_the_whole_chain(width, wide, folder, tmp_path, tiny_data, request, capsys):
    if width == "narrow":
        request.getfixturevalue("narrow")
    wide_flags = [*wide, "--budget", "100000", "150000", "--name", folder.name]
    assert train.main(wide_flags) == 0
    printed = capsys.readouterr().out
    between = folder / "pruned_resnet18-150000.pth"
    assert checkpoint.load(between)[1]["parameters"] == 150_000
    assert {path.name for path in folder.iterdir()} == {
        "teacher.pth", "student.pth", between.name, "pruned_resnet18.pth",
        "metrics.csv", "summary.txt", "run.json",
        "curves.png", "confusion.png", "mistakes.png", "layers.png",
    }  # fmt: skip
    assert "in all at most" in printed

    model, meta = checkpoint.load(folder / "pruned_resnet18.pth")
    assert meta["parameters"] == meta["budget"] == prune.count(model) == 100_000
    assert meta["classes"] == list(data.CLASSES) and meta["image_size"] == 28
    assert (folder / "pruned_resnet18.pth").stat().st_size < 700_000
    assert "Total params: 100,000" in (folder / "summary.txt").read_text()
    assert checkpoint.load(folder / "teacher.pth")[1]["arch"] == "resnet50"

    rows = read_rows(folder / "metrics.csv")
    assert [row["stage"] for row in rows] == ["teacher", "student"] + 4 * ["pruned"]
    assert [row["round"] for row in rows[2:]] == ["1", "1", "2", "2"]
    assert rows[-1]["parameters"] == "100000" == rows[-2]["parameters"] != rows[-3]["parameters"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[3] == rates[5] == pytest.approx(0) and rates[4] > 0.01

    record = json.loads((folder / "run.json").read_text())
    assert record["torchinfo_total_params"] == 100_000
    images, labels = data.load(data.find(tiny_data), "test")
    accuracy = models.accuracy(models.infer(model, images), labels)
    assert record["stages"][-1]["test_accuracy"] == accuracy
    assert record["stages"][-1]["val_accuracy"] == meta["val_accuracy"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "results.csv").exists()  # quick runs are not results

    output = tmp_path / "out.csv"
    weights = str(folder / "pruned_resnet18.pth")
    flags = ["-w", weights, "-o", str(output), "--data", str(tiny_data)]
    assert predict.main(flags) == 0
    printed = capsys.readouterr().out
    assert "100,000 parameters" in printed and f"test accuracy {accuracy:.2%}" in printed
    predictions = read_rows(output)
    assert list(predictions[0]) == ["id", "pred"] and len(predictions) == len(labels)
    assert [int(row["id"]) for row in predictions] == list(range(len(labels)))
    right = sum(int(r["pred"]) == y for r, y in zip(predictions, labels.tolist(), strict=True))
    assert right / len(labels) == pytest.approx(accuracy)

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train.main(wide_flags) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def weights_of(folder):
    files = ("teacher.pth", "student.pth", "pruned_resnet18.pth")
    return [
        tensor
        for name in files
        for tensor in checkpoint.load(folder / name)[0].state_dict().values()
    ]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_same_seed_same_weights_stopped_or_not(tiny, folder, monkeypatch, capsys):
    """Interrupted in every epoch but the first, and where each stage's file is to be written; in
    networks of half the channels."""
    monkeypatch.setattr(train, "QUICK", replace(shrunk.CHAIN, width=0.5))
    monkeypatch.setattr(train, "TEACHERS", ((32, 4, 0.5),))
    tiny = [*tiny, "--budget", "40000", "30000", "--name", folder.name]
    assert train.main(tiny) == 0
    expected, rows = weights_of(folder), read_rows(folder / "metrics.csv")
    folder.rename(folder.with_name("reference"))
    step, save = distill.TrainState.step, train.save_weights
    steps, kept = [], []

    def step_or_stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4 + 3:  # one epoch of four steps is done, and half of the next
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def save_or_stop(run, stage, *args):
        if stage not in kept:
            kept.append(stage)
            raise KeyboardInterrupt
        return save(run, stage, *args)

    def begin(*args):
        steps.clear()  # in the place of the time measurement, whose steps are left out

    monkeypatch.setattr(estimate, "print_plan", begin)
    monkeypatch.setattr(distill.TrainState, "step", step_or_stop)
    monkeypatch.setattr(train, "save_weights", save_or_stop)
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(train.main(tiny))
    assert codes[-1] == 0 and codes.count(130) >= 6
    assert "the same command resumes" in capsys.readouterr().err
    assert equal(weights_of(folder), expected)
    again = read_rows(folder / "metrics.csv")
    for row in (*rows, *again):
        row.pop("seconds")
    assert again == rows
    for name in ("teacher.pth", "student.pth", "pruned_resnet18.pth"):
        model, meta = checkpoint.load(folder / name)
        for weight in (model.layer4[0].conv1.weight, model.layer4[0].conv2.weight):
            half = len(weight) // 2
            assert weight[:half].any() and not weight[half:].any()
        assert meta["parameters"] == prune.count(model)
    assert meta["parameters"] == 30_000 == int(rows[-1]["parameters"])


def test_a_given_teacher_is_used_and_none_is_trained(tiny, folder, tmp_path, monkeypatch):
    """The course's file: the state dict in "model_state_dict", all keys prefixed."""
    torch.manual_seed(5)
    teacher = models.build("resnet50", 10)
    state = {f"resnet50.{name}": tensor for name, tensor in teacher.state_dict().items()}
    path = tmp_path / "resnet-50.pth"
    torch.save({"model_state_dict": state}, path)
    seen = []
    frozen = rewrite.inference_copy

    def spy(model, *machine):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return frozen(model, *machine)

    monkeypatch.setattr(rewrite, "inference_copy", spy)
    flags = ["--teacher", str(path), "--full-train", "--name", folder.name]
    assert train.main([*tiny, *flags]) == 0
    assert not (folder / "teacher.pth").exists()
    given = teacher.state_dict()
    assert any(s.keys() == given.keys() and equal(s.values(), given.values()) for s in seen)
    rows = read_rows(folder / "metrics.csv")
    assert {row["stage"] for row in rows} == {"student", "pruned"}
    assert {row["val_accuracy"] for row in rows} == {""}  # --full-train leaves no validation
    assert checkpoint.load(folder / "pruned_resnet18.pth")[1]["parameters"] == 100_000


@pytest.fixture
def full(tiny, monkeypatch):
    """train.main's flags for a tiny run that counts as a full one: it writes results."""
    monkeypatch.setattr(train, "CHAIN", shrunk.CHAIN)
    return tiny[1:]


def test_full_runs_write_a_results_row_and_seeds_differ(full, tmp_path, capsys, monkeypatch):
    for seed in ("0", "1"):
        assert train.main([*full, "--seed", seed, "--budget", "90000"]) == 0
    rows = read_rows(tmp_path / "results.csv")
    assert [(r["seed"], r["parameters"]) for r in rows] == [("0", "90000"), ("1", "90000")]
    assert {row["command"] for row in rows} == {"train.py --budget 90000"}
    monkeypatch.setattr(record, "RECORDED", tmp_path / "results.csv")
    test = [100 * float(row["pruned_test"]) for row in rows]
    said = record.recorded_accuracy("train.py --budget 90000")
    assert f"reached {sum(test) / 2:.2f} ± " in said and "(2 seeds)" in said
    assert record.recorded_accuracy("train.py") == ""
    for row in rows:
        known = json.loads((tmp_path / "runs" / row["name"] / "run.json").read_text())
        accuracy = known["stages"][-1]["test_accuracy"]
        assert row["pruned_test"] == f"{accuracy:.4f}"
    assert not equal(*(weights_of(tmp_path / "runs" / row["name"]) for row in rows))


def test_without_a_teacher_the_student_is_the_pruned_networks_teacher(
    full, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(estimate, "step_times", shrunk.STEP_TIMES)
    taught = []
    fit = distill.fit

    def watched(stage, model, teacher, *args, **options):
        taught.append((stage.name, teacher))
        return fit(stage, model, teacher, *args, **options)

    monkeypatch.setattr(distill, "fit", watched)
    assert train.main([*full, "--teacher", "none"]) == 0
    folder = tmp_path / "runs" / "resnet18-teacher-none-seed0"
    assert not (folder / "teacher.pth").exists()
    assert [name for name, _ in taught] == ["student", "pruned"]
    assert not taught[0][1]
    dense = rewrite.inference_copy(
        checkpoint.load(folder / "student.pth")[0], torch.device("cpu"), False, 28
    )
    (teacher,) = taught[1][1]
    assert equal(teacher.state_dict().values(), dense.state_dict().values())
    (row,) = read_rows(tmp_path / "results.csv")
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert row["teacher_test"] == "" and row["pruned_test"] == f"{stages[-1]['test_accuracy']:.4f}"
    assert row["student_test"] == f"{stages[0]['test_accuracy']:.4f}"
    capsys.readouterr()


def test_unpruned_networks_are_an_ensemble_teacher(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "step_times", shrunk.STEP_TIMES)
    files = []
    for seed in ("0", "1"):
        flags = ["--teacher", "none", "--no-prune", "--stem", "2", "--seed", seed]
        assert train.main([*full, *flags]) == 0
        folder = tmp_path / "runs" / f"resnet18-no-prune-stem-2-teacher-none-seed{seed}"
        assert not list(folder.glob("pruned*"))
        files.append(str(folder / "student.pth"))
    taught = []
    fit = distill.fit

    def watched(stage, model, teachers, *args, **options):
        taught.append([id(teacher) for teacher in teachers])
        return fit(stage, model, teachers, *args, **options)

    monkeypatch.setattr(distill, "fit", watched)
    monkeypatch.setattr(record, "HERE", tmp_path)
    assert train.main([*full, "--teacher", *files]) == 0
    assert len(taught) == 2 and len(taught[0]) == 2 and taught[0] == taught[1]
    *rows, last = read_rows(tmp_path / "results.csv")
    for row in rows:
        assert row["pruned_test"] == row["teacher_test"] == "" != row["student_test"]
        assert int(row["parameters"]) > 100_000
    assert last["command"] == " ".join(
        ["train.py --teacher"]
        + [f"runs/resnet18-no-prune-stem-2-teacher-none-seed{n}/student.pth" for n in (0, 1)]
    )
    mean = sum(float(row["student_test"]) for row in rows) / 2
    assert float(last["teacher_test"]) == pytest.approx(mean, abs=1e-4)
    assert capsys.readouterr().out.count("\nteacher ") == 2


@pytest.mark.parametrize(
    ("accuracies", "given", "expected"),
    [
        ((0.9, 0.8, 0.8), {}, ["", "teacher", "teacher", "teacher"]),
        ((0.8, 0.9, 0.8), {}, ["", "teacher", "student", "student"]),
        ((0.8, 0.8, 0.9), {}, ["", "teacher", "teacher", "pruned"]),
        ((0.8, 0.805, 0.815), {}, ["", "teacher", "teacher", "student"]),
        ((0.8, 0.805, 0.809), {}, ["", "teacher", "teacher", "teacher"]),
        ((None, None, None), {}, ["", "teacher", "teacher", "teacher"]),
        ((0.8, 0.8, 0.9), {"teacher": 0.1}, ["given", "given", "given"]),
        ((0.8, 0.9, None), {"student": 0.85}, ["", "given", "pruned"]),
    ],
)
def test_the_first_network_as_accurate_as_the_best_is_the_teacher(
    accuracies, given, expected, tmp_path, monkeypatch
):
    files = {name: [tmp_path / f"given_{name}.pth"] * (name in given) for name in train.STAGES}
    run = record.Run(tmp_path / "run", {"stem": 4}, files, "", {}, False)
    flags = ["--budget", "200000", "100000", *(["--teacher", "x"] if "teacher" in given else [])]
    settings = settings_of("--quick", *flags)
    settings["student_from"] = "given" if "student" in given else "trained"
    stages = train.stages_of(settings, 4_228_570)
    known = {tmp_path / f"given_{name}.pth": accuracy for name, accuracy in given.items()}
    known |= {run.path(s): accuracy for s, accuracy in zip(stages, accuracies, strict=False)}
    monkeypatch.setattr(checkpoint, "load", lambda path, *_: (None, {"val_accuracy": known[path]}))
    teachers = [train.teacher_files(run, stage, stages) for stage in stages]
    names = ["".join(path.stem.split("_")[0] for path in paths) for paths in teachers]
    if "student" in given:  # the ResNet50 is trained all the same
        names = [name.replace("teacher", "") for name in names]
        assert len(names) == 3
    else:
        assert names == expected


@pytest.mark.parametrize("stem", [4, 2])
def test_a_given_state_dict_is_pruned_and_its_teacher_is_not(stem, full, tmp_path, monkeypatch):
    chain = replace(shrunk.CHAIN, pruned=replace(shrunk.CHAIN.pruned, epochs=1))
    monkeypatch.setattr(train, "CHAIN", chain)
    monkeypatch.setattr(estimate, "step_times", shrunk.STEP_TIMES)
    plain, seen, fit = models.build("resnet18", 10, stem=stem), [], distill.fit

    def watch(stage, model, *args, **kwargs):
        seen.append((type(model.layer1[0]).__name__, isinstance(model.maxpool, nn.MaxPool2d)))
        return fit(stage, model, *args, **kwargs)

    monkeypatch.setattr(distill, "fit", watch)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    flags = [*full, "--student", str(tmp_path / "plain.pth"), "--stem", str(stem), "--name", "own"]
    assert train.main(flags) == 0
    assert seen == [("Bottleneck", False), ("BasicBlock", True)]  # of stride 1; of `stem`
    _, meta = checkpoint.load(tmp_path / "runs" / "own" / "pruned_resnet18.pth")
    assert meta["parameters"] == 100_000 and meta["stem"] == stem
    assert train.main(flags) == 0  # shows the report again


def test_a_given_network_is_pruned_or_fine_tuned(full, folder, tmp_path, monkeypatch, capsys):
    assert train.main(["--quick", *full]) == 0
    student, pruned = (folder / f"{name}.pth" for name in ("student", "pruned_resnet18"))
    chain = replace(shrunk.CHAIN, pruned=replace(shrunk.CHAIN.pruned, epochs=1))
    monkeypatch.setattr(train, "CHAIN", chain)
    monkeypatch.setattr(estimate, "step_times", shrunk.STEP_TIMES)
    full = [*full, "--teacher", "none"]
    masks = [w != 0 for w in prune.weights(checkpoint.load(pruned)[0]).values()]
    for given, budget in ((pruned, 100_000), (pruned, 90_000), (student, 100_000)):
        flags = [*full, "--student", str(given), "--budget"]
        assert train.main([*flags, str(budget), "--name", f"{given.stem}-{budget}"]) == 0
        again = tmp_path / "runs" / f"{given.stem}-{budget}"
        assert not (again / "student.pth").exists()
        rows = read_rows(again / "metrics.csv")
        assert {row["stage"] for row in rows} == {"pruned"}
        model, meta = checkpoint.load(again / "pruned_resnet18.pth")
        assert prune.count(model) == meta["budget"] == budget
        kept = [w != 0 for w in prune.weights(model).values()]
        assert all(bool(mask[k].all()) for k, mask in zip(kept, masks, strict=True))
        assert equal(kept, masks) == (budget == 100_000)  # of the student, by the same single step
        titles = [s["stage"] for s in json.loads((again / "run.json").read_text())["stages"]]
        assert titles == ["student", "pruned"]
    assert {row["command"] for row in read_rows(tmp_path / "results.csv")} == {
        "train.py --teacher none --student .../pruned_resnet18.pth",
        "train.py --budget 90000 --teacher none --student .../pruned_resnet18.pth",
        "train.py --teacher none --student .../student.pth",
    }
    capsys.readouterr()
    for flags, message in (
        (
            ["--student", str(pruned), "--stem", "2"],
            "--stem 2, but its stem is 4; leave --stem out",
        ),
        (["--student", str(folder / "teacher.pth")], "a resnet50, not a resnet18"),
        (["--student", str(pruned), "--budget", "100001"], "100,000 parameters can be kept"),
    ):
        assert train.main([*full, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_of_a_narrow_student_no_more_is_asked_than_can_be_kept(wide, tmp_path, monkeypatch, capsys):
    """Two thirds of its first convolution are merged into the rest, as gray images have three equal
    channels."""
    shrunk.measure_nothing(monkeypatch)
    shrunk.draw_nothing(monkeypatch)
    student = models.build("resnet18", 10, stem=1)
    prune.apply_width_(student, 0.09375)
    meta = {"arch": "resnet18", "num_classes": 10, "stem": 1, "image_size": 28, "grey": True}
    checkpoint.save(tmp_path / "narrow.pth", student, meta)
    most = prune.count(student) - 2 * 6 * 3 * 3
    flags = [*wide, "--teacher", "none", "--student", str(tmp_path / "narrow.pth"), "--name", "a"]
    assert train.main([*flags, "--budget", str(most + 1)]) == 2
    assert f"{most:,} parameters can be kept" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert train.main([*flags, "--budget", str(most)]) == 0
    pruned, _ = checkpoint.load(tmp_path / "runs" / "a" / "pruned_resnet18.pth")
    assert prune.count(pruned) == most


@pytest.mark.parametrize("stem", [2, 1])
def test_a_stem_of_smaller_stride_goes_through_the_whole_chain(
    stem, tiny, tmp_path, tiny_data, monkeypatch, capsys
):
    batches = replace(shrunk.CHAIN.batches, images=16)  # 16 times the work for each
    monkeypatch.setattr(train, "QUICK", replace(shrunk.CHAIN, batches=batches, width=1.0))
    size = ["--image-size", "20", "--width", "1"] if stem == 1 else []
    assert train.main([*tiny, "--stem", str(stem), *size]) == 0
    (folder,) = (tmp_path / "runs").glob(f"quick-stem-{stem}*-seed0")
    for name in ("teacher", "student", "pruned_resnet18"):
        model, meta = checkpoint.load(folder / f"{name}.pth")
        assert meta["stem"] == (1 if name == "teacher" else stem)
        assert model.conv1.kernel_size == (3, 3)
    assert prune.count(model) == 100_000
    assert "Total params: 100,000" in (folder / "summary.txt").read_text()
    out = tmp_path / "submission.csv"
    flags = ["-w", str(folder / "pruned_resnet18.pth"), "--data", str(tiny_data), "-o", str(out)]
    predictions = []
    for engine in ("dense", "sparse"):
        assert predict.main([*flags, "--engine", engine]) == 0
        predictions.append(out.read_text())
    assert predictions[0] == predictions[1]
    capsys.readouterr()


def test_of_several_budgets_each_network_is_kept_and_measured(full, tmp_path):
    assert train.main([*full, "--budget", "100000", "150000"]) == 0
    rows = read_rows(tmp_path / "results.csv")
    assert [row["parameters"] for row in rows] == ["150000", "100000"]
    folder = tmp_path / "runs" / "resnet18-budget-150000-100000-seed0"
    for row, name in zip(rows, ("pruned_resnet18-150000.pth", "pruned_resnet18.pth"), strict=True):
        model, meta = checkpoint.load(folder / name)
        assert prune.count(model) == meta["budget"] == int(row["parameters"])
        assert row["pruned_val"] == f"{meta['val_accuracy']:.4f}"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "--device cuda"),
        (["--budget", "10969"], "must be from 10970 "),
        (["--budget", "5000000"], "to 4228554"),
        (["--data", "absent"], "absent: there is no such folder"),
        (["--teacher", "absent.pth"], "absent.pth: cannot be loaded: No such file"),
        (["--name", "a/b"], "--name a/b"),
        (["--seed", "-1"], "--seed -1"),
        (["--length", "2"], "--quick and --length: choose one"),
        (["--width", "1.5"], "--width 1.5: must be from 0.05 to 1"),
        (["--no-prune", "--budget", "9"], "--no-prune and --budget: choose one"),
        (["--no-prune", "--student", "a.pth"], "--no-prune and --student: nothing is left"),
        (["--student", "a.pth", "--imagenet"], "--student and --imagenet: choose one"),
        (["--student", "a.pth", "--width", "1"], "--student and --width: choose one"),
        (["--imagenet", "--width", "0.5"], "--imagenet needs --width 1"),
        (["--teacher", "none", "a.pth"], "--teacher: give none or files, not both"),
        (["--budget", "200000", "200000"], "--budget: the same number twice"),
    ],
)
def test_bad_flags_end_with_one_line_before_any_work(
    wide, flags, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(estimate, "step_times", None)
    assert train.main([*wide, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"num_classes": 7}, "has 7 classes, but "),
        ({"classes": list(reversed(data.CLASSES))}, "was trained for the classes Ankle boot, Bag,"),
        ({"classes": list("oksnthmyrw")}, "was trained for the classes o, k, s, n, t, h, m, y"),
        (
            {"image_size": 64},
            "was trained for images of 64 pixels a side, but .*--image-size resizes",
        ),
        ({"grey": False}, "was trained for color images, but"),
    ],
)
@pytest.mark.parametrize("flag", ["--teacher", "--student"])
def test_a_network_for_other_images_is_refused(flag, meta, message, tiny, tmp_path, capsys):
    path, meta = tmp_path / "t.pth", {"arch": "resnet18", "num_classes": 10, **meta}
    checkpoint.save(path, models.build("resnet18", meta["num_classes"]), meta)
    assert train.main([*tiny, flag, str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"{flag} {path}: {message}", error) and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--teacher", "--student"])
def test_a_network_whose_logits_overflow_is_named(flag, tiny, tmp_path, capsys):
    path, model = tmp_path / "t.pth", models.build("resnet18", 10)
    torch.nn.init.constant_(model.fc.weight, 3e38)
    checkpoint.save(path, model, {"arch": "resnet18", "num_classes": 10})
    assert train.main([*tiny, flag, str(path)]) == 2
    message = f"{flag} {path}: gives logits that are not finite"
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_teacher_that_does_not_say_its_stem_may_have_a_max_pool(tiny, tmp_path, capsys):
    path = tmp_path / "t.pth"
    torch.save(models.build("resnet18", 10, stem=2).state_dict(), path)
    assert train.main([*tiny, "--teacher", str(path)]) == 0
    assert (
        "; stem 1 (if it has a max-pool, first write it with export.py" in capsys.readouterr().err
    )
    assert export.main(["-w", str(path), "--stem", "2", "--bits", "16"]) == 0
    assert checkpoint.load(tmp_path / "t-16bit.pth")[1]["stem"] == 2


def test_files_that_were_moved_are_still_the_same_run(tiny, tmp_path, tiny_data, monkeypatch):
    path, meta = tmp_path / "t.pth", {"arch": "resnet18", "num_classes": 10}
    checkpoint.save(path, models.build("resnet18", 10), meta)
    step, steps = distill.TrainState.step, []

    def stop_in_the_second_epoch(*args):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill.TrainState, "step", stop_in_the_second_epoch)
        assert train.main([*tiny, "--teacher", str(path)]) == 130
    images = tmp_path / "elsewhere"
    shutil.copytree(tiny_data, images)
    moved = path.rename(images / path.name)
    flags = [*tiny[:-1], str(images), "--teacher", str(moved)]
    assert train.main(flags) == 0
    (folder,) = (tmp_path / "runs").glob("[!.]*")
    assert len(read_rows(folder / "metrics.csv")) == 3


def test_runs_that_differ_have_names_that_differ(tmp_path):
    def name(*flags):
        args = train.parse(flags)
        path = args.data or tmp_path
        source = data.Source("folder" if args.data else "fashion-mnist", path, ("a", "b"), 28, True)
        return train.default_name(args, source)

    flags = [
        (), ("--quick",), ("--budget", "50000"), ("--budget", "50000", "20000"), ("--seed", "1"),
        ("--stem", "2"), ("--length", "2"), ("--width", "0.5"), ("--data", "cats"),
        ("--data", "a/dogs"), ("--no-prune",), ("--teacher", "none"), ("--teacher", "a.pth"),
        ("--teacher", "b.pth"), ("--teacher", "a.pth", "b.pth"), ("--image-size", "56"),
        ("--full-train",), ("--no-flip",), ("--imagenet",), ("--student", "a.pth"),
        ("--dataset", "mnist"), ("--teacher", *(f"{n}.pth" for n in range(200)), "--seed", "1"),
    ]  # fmt: skip
    names = [name(*words) for words in flags]
    assert len({*names}) == len(names) and names[0] == "resnet18-seed0"
    assert name("--budget", "2", "3") == name("--budget", "3", "2")  # is the same run
    assert name("--quick", "--stem", "2") == "quick-stem-2-seed0"
    assert name("--stem", "1", "--teacher", "none") == "resnet18-stem-1-teacher-none-seed0"
    assert name("--teacher", str(tmp_path.with_name("t.pth"))).endswith("-t-seed0")
    assert name("--seed", "0", "--device", "cpu") == names[0] == name("--length", "1")
    assert all("/" not in name and len(name) < 200 for name in names)


def test_a_run_of_another_version_is_refused_in_one_line(tiny, folder, capsys):
    folder.mkdir(parents=True)
    old = {"settings": {"recipe": "cpu"}, "machine": {}, "bf16": False}
    (folder / "run.json").write_text(json.dumps(old))
    assert train.main(tiny) == 2
    error = capsys.readouterr().err
    assert "another version of train.py" in error and error.count("\n") == 1


def test_a_teacher_that_was_replaced_is_noticed(tiny, tmp_path, monkeypatch, capsys):
    path, meta = tmp_path / "t.pth", {"arch": "resnet18", "num_classes": 10}
    monkeypatch.setattr(train, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    for code, error in ((130, "resumes this run"), (2, "other settings (another --teacher)")):
        checkpoint.save(path, models.build("resnet18", 10), meta)
        assert train.main([*tiny, "--teacher", str(path)]) == code
        assert error in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_keeps_no_run_from_its_end(
    tiny, folder, monkeypatch, capsys
):
    def fail(*args):
        raise ValueError("Expected end of text")

    monkeypatch.setattr(plots, "confusion", fail)
    assert train.main(tiny) == 0
    printed = capsys.readouterr()
    assert "no picture confusion.png (Expected end of text)" in printed.err
    assert "everything is in" in printed.out and (folder / "mistakes.png").exists()


@pytest.mark.parametrize("missing", ["RANK", "MASTER_PORT"])
def test_processes_without_their_surroundings_are_one_clear_line(
    tiny, missing, monkeypatch, capsys
):
    known = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**known, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert train.main(tiny) == 2
    error = capsys.readouterr().err
    assert f"not {missing}:" in error and error.count("\n") == 1


def test_imagenet_weights_that_cannot_be_had_are_said_so(wide, monkeypatch, capsys):
    for error in (OSError("no route to host"), RuntimeError("invalid hash value")):

        def refuse(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
        assert train.main([*wide, "--imagenet"]) == 2
        assert f"or their file is damaged ({error}); try again" in capsys.readouterr().err


def test_other_settings_do_not_go_on_with_a_run(tiny, folder, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", stop)
        assert train.main(tiny) == 130
    capsys.readouterr()
    name = ["--name", folder.name]
    assert train.main([*tiny, *name, "--budget", "90000", "--full-train"]) == 2
    error = capsys.readouterr().err
    assert (
        "budgets: [100000], now [90000]" in error
        and "full_train: False, now True" in error
        and error.count("\n") == 1
    )


def test_a_run_folder_that_cannot_be_written_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert train.main(tiny) == 2
    assert "cannot be used for the run" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(
    tiny, folder, monkeypatch, capsys
):
    step = distill.TrainState.step

    def explode(self, images, targets, teacher, rate):
        loss, logits = step(self, images, targets, teacher, rate)
        return (loss * torch.nan if teacher is not None and rate else loss), logits

    monkeypatch.setattr(distill.TrainState, "step", explode)
    assert train.main(tiny) == 1
    assert "stage student, epoch 1, step 1: the loss is nan" in capsys.readouterr().err
    assert (folder / "teacher.pth").exists() and not (folder / "student.pth").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_whole_chain_on_a_gpu(tiny, folder):
    flags = ["cuda" if flag == "cpu" else flag for flag in tiny]
    assert train.main(flags) == 0
    assert checkpoint.load(folder / "pruned_resnet18.pth")[1]["parameters"] == 100_000
