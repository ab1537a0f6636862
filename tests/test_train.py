import csv
import json
from dataclasses import replace

import pytest
import tiny as shrunk
import torch

import checkpoint
import data
import distill
import models
import predict
import prune
import train
from engine import rewrite
from runlog import plots, record


def read_rows(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "quick-seed0"


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, of in train.RECIPES.items() if of.pruned])
def test_recipes_cut_to_the_budget_before_their_last_epoch(name):
    recipe = train.RECIPES[name]
    parts = train.plan(recipe, 4_228_570, 100_000)
    pruned = [part for part in parts if part.name == "pruned"]
    dense = {"teacher": recipe.teacher, "student": recipe.student}
    assert [p.name for p in parts if p.number < 2] == [name for name in dense if dense[name]]
    assert [part.number for part in pruned] == list(range(2, len(recipe.pruned) + 2))
    assert len({part.file for part in parts}) == len(parts)
    assert parts[-1].file == "pruned_resnet18.pth"
    cuts = [budget for part in parts for budget in part.cuts]
    assert len(cuts) == sum(stage.cuts for stage in recipe.pruned)
    assert cuts == sorted(cuts, reverse=True) and cuts[0] < 4_228_570
    assert all(len(part.cuts) == part.stage.cuts <= part.stage.epochs for part in parts)
    assert parts[-1].stage.cuts < parts[-1].stage.epochs
    assert all(part.stage.cuts <= (1 - distill.UNAUGMENTED) * part.stage.epochs for part in parts)
    ends = [part.cuts[-1] for part in pruned]
    assert ends == list(recipe.budgets) if recipe.budgets else ends[-1] == 100_000


def test_a_plan_does_not_depend_on_random_weights(wide, monkeypatch):
    args = train.parse(wide)
    source = data.find(args.data)
    build, known = models.build, []

    def build_with_a_zero(*args):
        model = build(*args)
        with torch.no_grad():
            model.layer1[0].conv1.weight[0, 0, 1, 1] = 0.0
        return model

    for of in (build, build_with_a_zero):
        monkeypatch.setattr(models, "build", of)
        known.append(train.check(args, source))
    assert known[0] == known[1]


def test_a_round_goes_its_share_of_the_way_in_as_many_cuts_as_it_likes():
    quick = train.RECIPES["quick"]
    rounds = (
        distill.Stage(4, cuts=3),
        distill.Stage(6, cuts=4),
        distill.Stage(32, cuts=12, share=6),
    )
    cuts = [part.cuts for part in train.plan(replace(quick, pruned=rounds), 10**7, 10**5)[2:]]
    assert [len(steps) for steps in cuts] == [3, 4, 12]
    for steps, way in zip(cuts, (3, 7, 13), strict=True):
        assert steps[-1] == pytest.approx(10 ** (7 - 2 * way / 13), abs=1)
    assert cuts[2][0] / cuts[1][-1] == pytest.approx(10 ** (-1 / 13), rel=1e-5)


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["narrow", pytest.param("full", marks=pytest.mark.slow)])
def test_the_whole_chain(width, wide, folder, tmp_path, tiny_data, request, capsys):
    if width == "narrow":
        request.getfixturevalue("narrow")
    assert train.main(wide) == 0
    printed = capsys.readouterr().out
    (between,) = folder.glob("pruned_resnet18-*.pth")  # the network that the first round left
    assert checkpoint.load(between)[1]["parameters"] == int(between.stem.split("-")[1]) > 100_000
    assert {path.name for path in folder.iterdir()} == {
        "teacher.pth", "student.pth", between.name, "pruned_resnet18.pth",
        "metrics.csv", "summary.txt", "run.json",
        "curves.png", "confusion.png", "mistakes.png", "layers.png",
    }  # fmt: skip
    assert "in all about" in printed

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
    assert rates[3] == rates[5] == pytest.approx(0) and rates[4] > 0.001

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
    assert train.main(wide) == 0
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
    monkeypatch.setitem(train.RECIPES, "quick", replace(shrunk.RECIPE, width=0.5))
    tiny = [*tiny, "--budget", "30000"]
    assert train.main(tiny) == 0
    expected, rows = weights_of(folder), read_rows(folder / "metrics.csv")
    folder.rename(folder.with_name("reference"))
    step, keep = distill.TrainState.step, train.keep
    steps, kept = [], []

    def step_or_stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4 + 3:  # one epoch of four steps is done, and half of the next
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def keep_or_stop(run, part, *args):
        if part not in kept:
            kept.append(part)
            raise KeyboardInterrupt
        return keep(run, part, *args)

    def begin(*args):
        steps.clear()  # in the place of the time measurement, whose steps are left out

    monkeypatch.setattr(train, "announce", begin)
    monkeypatch.setattr(distill.TrainState, "step", step_or_stop)
    monkeypatch.setattr(train, "keep", keep_or_stop)
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(train.main(tiny))
    assert codes[-1] == 0 and codes.count(130) >= 6
    assert "the same command goes on" in capsys.readouterr().err
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
    assert train.main([*tiny, "--teacher", str(path), "--full-train"]) == 0
    assert not (folder / "teacher.pth").exists()
    given = teacher.state_dict()
    assert any(s.keys() == given.keys() and equal(s.values(), given.values()) for s in seen)
    rows = read_rows(folder / "metrics.csv")
    assert {row["stage"] for row in rows} == {"student", "pruned"}
    assert {row["val_accuracy"] for row in rows} == {""}  # --full-train leaves no validation
    assert checkpoint.load(folder / "pruned_resnet18.pth")[1]["parameters"] == 100_000


def test_longer_recipes_write_a_results_row_and_seeds_differ(tiny, tmp_path, monkeypatch):
    recipe = replace(train.RECIPES["quick"], pruned=shrunk.RECIPE.pruned[:1])
    monkeypatch.setitem(train.RECIPES, "cpu", recipe)
    for seed in ("0", "1"):
        assert train.main([*tiny[1:], "--recipe", "cpu", "--seed", seed, "--budget", "90000"]) == 0
    rows = read_rows(tmp_path / "results.csv")
    assert [(r["seed"], r["parameters"]) for r in rows] == [("0", "90000"), ("1", "90000")]
    for row in rows:
        record = json.loads((tmp_path / "runs" / row["name"] / "run.json").read_text())
        accuracy = record["stages"][-1]["test_accuracy"]
        assert row["pruned_test"] == f"{accuracy:.4f}"
    assert not equal(*(weights_of(tmp_path / "runs" / row["name"]) for row in rows))


def test_without_a_teacher_the_student_teaches_what_is_left_of_it(
    tiny, tmp_path, monkeypatch, capsys
):
    recipe = replace(train.RECIPES["quick"], teacher=None)
    monkeypatch.setitem(train.RECIPES, "self", recipe)
    monkeypatch.setattr(train, "measure", shrunk.MEASURE)
    taught = []
    fit = distill.fit

    def watched(part, model, teacher, *args, **options):
        taught.append((part.name, teacher))
        return fit(part, model, teacher, *args, **options)

    monkeypatch.setattr(distill, "fit", watched)
    assert train.main([*tiny[1:], "--recipe", "self"]) == 0
    folder = tmp_path / "runs" / "self-seed0"
    assert not (folder / "teacher.pth").exists()
    assert [name for name, _ in taught] == ["student", "pruned", "pruned"]
    assert not taught[0][1] and taught[2][1]
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


def test_networks_that_are_only_dense_teach_together(tiny, tmp_path, monkeypatch, capsys):
    dense = replace(shrunk.RECIPE, teacher=None, pruned=())
    monkeypatch.setitem(train.RECIPES, "dense", dense)
    monkeypatch.setattr(train, "measure", shrunk.MEASURE)
    for seed in ("0", "1"):
        assert train.main([*tiny[1:], "--recipe", "dense", "--stem", "2", "--seed", seed]) == 0
        folder = tmp_path / "runs" / f"dense-stem2-seed{seed}"
        assert not list(folder.glob("pruned*"))
    files = [str(tmp_path / "runs" / f"dense-stem2-seed{seed}" / "student.pth") for seed in (0, 1)]
    monkeypatch.setitem(train.RECIPES, "long", shrunk.RECIPE)
    taught = []
    fit = distill.fit

    def watched(part, model, teachers, *args, **options):
        taught.append([id(teacher) for teacher in teachers])
        return fit(part, model, teachers, *args, **options)

    monkeypatch.setattr(distill, "fit", watched)
    monkeypatch.setattr(record, "HERE", tmp_path)
    assert train.main([*tiny[1:], "--recipe", "long", "--teacher", *files]) == 0
    assert len(taught) == 3 and len(taught[0]) == 2 and taught[0] == taught[1] == taught[2]
    *rows, last = read_rows(tmp_path / "results.csv")
    for row in rows:
        assert row["pruned_test"] == row["teacher_test"] == "" != row["student_test"]
        assert int(row["parameters"]) > 100_000
    assert last["teacher"] == " ".join(f"runs/dense-stem2-seed{n}/student.pth" for n in (0, 1))
    mean = sum(float(row["student_test"]) for row in rows) / 2
    assert float(last["teacher_test"]) == pytest.approx(mean, abs=1e-4)
    assert capsys.readouterr().out.count("\nteacher ") == 2


@pytest.mark.parametrize(
    ("taught_by", "accuracies", "given", "expected"),
    [
        ("first", (0.9, 0.8, 0.8), {}, ["", "teacher", "teacher", "teacher"]),
        ("first", (0.8, 0.9, 0.8), {}, ["", "teacher", "student", "student"]),
        ("first", (0.8, 0.8, 0.9), {}, ["", "teacher", "teacher", "pruned"]),
        ("first", (0.8, 0.805, 0.815), {}, ["", "teacher", "teacher", "student"]),
        ("first", (0.8, 0.805, 0.809), {}, ["", "teacher", "teacher", "teacher"]),
        ("first", (None, None, None), {}, ["", "teacher", "teacher", "teacher"]),
        ("first", (0.8, 0.8, 0.9), {"teacher": 0.1}, ["given", "given", "given"]),
        ("first", (0.8, 0.9, None), {"student": 0.85}, ["", "given", "pruned"]),
        ("last", (0.8, 0.8, 0.8), {}, ["", "teacher", "student", "pruned"]),
        ("last", (0.8, 0.78, 0.795), {}, ["", "teacher", "teacher", "pruned"]),
        ("last", (0.8, 0.81, 0.79), {}, ["", "teacher", "student", "student"]),
        ("last", (0.8, 0.85, None), {"student": 0.855}, ["", "given", "pruned"]),
    ],
)
def test_a_network_as_good_as_the_best_teaches_what_is_left(
    taught_by, accuracies, given, expected, tmp_path, monkeypatch
):
    files = {name: {str(tmp_path / f"given_{name}.pth"): "sha256"} for name in given}
    settings = {"recipe": {"taught_by": taught_by}, "teacher": {}, "student": {}, **files}
    run = record.Run(tmp_path / "run", settings, {}, False)
    parts = [
        part
        for part in train.plan(train.RECIPES["quick"], 4_228_570, 100_000)
        if not settings.get(part.name)
    ]
    known = {tmp_path / f"given_{name}.pth": share for name, share in given.items()}
    known |= {run.path(part): share for part, share in zip(parts, accuracies, strict=False)}
    monkeypatch.setattr(checkpoint, "load", lambda path: (None, {"val_accuracy": known[path]}))
    taught = [train.teachers_of(run, part, parts) for part in parts]
    names = ["".join(path.stem.split("_")[0] for path in paths) for paths in taught]
    assert names == expected


def test_a_given_network_is_cut_and_trained_on(tiny, folder, tmp_path, monkeypatch, capsys):
    assert train.main(tiny) == 0
    student, pruned = (folder / f"{name}.pth" for name in ("student", "pruned_resnet18"))
    rounds = (replace(shrunk.RECIPE.pruned[0], epochs=1),)
    recipe = replace(shrunk.RECIPE, teacher=None, student=None, pruned=rounds, erased=0.5)
    monkeypatch.setitem(train.RECIPES, "finetune", recipe)
    monkeypatch.setattr(train, "measure", shrunk.MEASURE)
    masks = [w != 0 for w in prune.weights(checkpoint.load(pruned)[0]).values()]
    for given, budget in ((pruned, 100_000), (pruned, 90_000), (student, 100_000)):
        flags = [*tiny[1:], "--recipe", "finetune", "--student", str(given), "--budget"]
        assert train.main([*flags, str(budget), "--name", f"{given.stem}-{budget}"]) == 0
        again = tmp_path / "runs" / f"{given.stem}-{budget}"
        assert not (again / "student.pth").exists()
        rows = read_rows(again / "metrics.csv")
        assert {row["stage"] for row in rows} == {"pruned"}
        model, meta = checkpoint.load(again / "pruned_resnet18.pth")
        assert prune.count(model) == meta["budget"] == budget
        kept = [w != 0 for w in prune.weights(model).values()]
        within = all(bool(mask[k].all()) for k, mask in zip(kept, masks, strict=True))
        assert within == (given == pruned)
        assert equal(kept, masks) == (given == pruned and budget == 100_000)
        titles = [s["stage"] for s in json.loads((again / "run.json").read_text())["stages"]]
        assert titles == ["student", "pruned"]
    assert {row["student"] for row in read_rows(tmp_path / "results.csv")} == {
        student.name, pruned.name,
    }  # fmt: skip
    capsys.readouterr()
    for flags, message in (
        ([], "--recipe finetune: needs a network to go on from, --student FILE"),
        (["--student", str(pruned), "--stem", "2"], "a resnet18 of --stem 4, not a resnet18 of"),
        (["--student", str(folder / "teacher.pth")], "a resnet50 of --stem 4, not a resnet18 of"),
        (["--student", str(pruned), "--budget", "100001"], "has 100,000 parameters, fewer than"),
    ):
        assert train.main([*tiny[1:], "--recipe", "finetune", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("stem", [2, 1])
def test_a_stem_of_smaller_stride_goes_through_the_whole_chain(
    stem, tiny, tmp_path, tiny_data, monkeypatch, capsys
):
    recipe = replace(train.RECIPES["quick"], images=16)  # 16 times the work for each
    monkeypatch.setitem(train.RECIPES, "quick", recipe)
    size = ["--image-size", "20"] if stem == 1 else []
    assert train.main([*tiny, "--stem", str(stem), *size]) == 0
    folder = tmp_path / "runs" / f"quick-stem{stem}-seed0"
    for name in ("teacher", "student", "pruned_resnet18"):
        model, meta = checkpoint.load(folder / f"{name}.pth")
        assert meta["stem"] == stem and model.conv1.kernel_size == (3, 3)
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


def test_a_recipe_with_budgets_keeps_and_measures_a_network_for_each(
    tiny, tmp_path, monkeypatch, capsys
):
    recipe = replace(train.RECIPES["quick"], budgets=(150_000, 100_000))
    monkeypatch.setitem(train.RECIPES, "curve", recipe)
    flags = [*tiny[1:], "--recipe", "curve"]
    assert train.main(flags) == 0
    rows = read_rows(tmp_path / "results.csv")
    assert [row["parameters"] for row in rows] == ["150000", "100000"]
    folder = tmp_path / "runs" / "curve-seed0"
    for row, name in zip(rows, ("pruned_resnet18-150000.pth", "pruned_resnet18.pth"), strict=True):
        model, meta = checkpoint.load(folder / name)
        assert prune.count(model) == meta["budget"] == int(row["parameters"])
        assert row["pruned_val"] == f"{meta['val_accuracy']:.4f}"
    png = plots.sizes(tmp_path / "results.csv", "curve")
    assert png[:4] == b"\x89PNG"
    capsys.readouterr()
    assert train.main([*flags, "--budget", "90000"]) == 2
    assert "--budget 90000: the recipe curve has its own" in capsys.readouterr().err


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "--device cuda"),
        (["--budget", "10969"], "possible are 10,970"),
        (["--budget", "5000000"], "to 4,228,554"),
        (["--data", "absent"], "absent: there is no such folder"),
        (["--teacher", "absent.pth"], "absent.pth: cannot be loaded: No such file"),
        (["--name", "a/b"], "--name a/b"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_flags_end_with_one_line_before_any_work(
    wide, flags, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(train, "measure", None)
    assert train.main([*wide, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_other_classes_is_refused(tiny, tmp_path, capsys):
    path = tmp_path / "t.pth"
    checkpoint.save(path, models.build("resnet50", 7), {"arch": "resnet50", "num_classes": 7})
    assert train.main([*tiny, "--teacher", str(path)]) == 2
    assert "has 7 classes, the images have 10" in capsys.readouterr().err


def test_a_teacher_that_was_replaced_is_noticed(tiny, tmp_path, monkeypatch, capsys):
    path, meta = tmp_path / "t.pth", {"arch": "resnet18", "num_classes": 10}
    monkeypatch.setattr(train, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    for code, error in ((130, "goes on from here"), (2, f"teacher {path}: ")):
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
    assert "confusion.png could not be drawn (Expected end of text)" in printed.err
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
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert train.main([*wide, "--imagenet"]) == 2
    assert "--imagenet: the weights cannot be downloaded" in capsys.readouterr().err


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
        "budget: 100000, now 90000" in error
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
