import pytest

from runlog import record, report


def shown(tmp_path, student, pruned, classes=10, **settings):
    run = record.Run(tmp_path, settings, {}, "train.py", {"threads": 2}, True)
    common = {"file": "a.pth", "kilobytes": 1, "parameters": 9, "minutes": 1.0}
    stages = [
        {"stage": stage, **common, **{f"{k}_{kind}": v for (k, kind), v in shares.items()}}
        for stage, shares in (("teacher", student), ("student", student), ("pruned", pruned))
    ]
    run.add({"stages": stages, "classes": classes})
    report.print_summary(run)


def shares(val, test):
    return {("val", "accuracy"): val, ("test", "accuracy"): test}


@pytest.mark.parametrize(
    ("student", "pruned", "quick", "warning"),
    [
        (shares(0.98, 0.9), shares(0.87, 0.9), True,
         "pruning has cost 11.0 points on validation: the unpruned student has 98.0%, 9 parameters "
         "have 87.0%; a larger --budget or the full chain may help"),
        (shares(None, 0.98), shares(None, 0.95), False,
         "pruning has cost 3.0 points on test: the unpruned student has 98.0%, 9 parameters have "
         "95.0%; a larger --budget or a larger --length may help"),
        (shares(0.98, 0.98), shares(0.1, 0.1), False,
         "the pruned network has collapsed, its accuracy is near chance (10%); a larger --budget "
         "or a larger --length may help"),
        (shares(0.12, 0.12), shares(0.1, 0.1), True,
         "the unpruned student's accuracy is near chance (10%); the full chain may help"),
        (shares(0.98, 0.98), shares(0.97, 0.5), False, None),
        (shares(None, None), shares(None, None), False, None),
        (shares(None, None), shares(0.9, 0.9), False, None),
    ],
)  # fmt: skip
def test_the_report_says_what_pruning_has_cost(student, pruned, quick, warning, tmp_path, capsys):
    shown(tmp_path, student, pruned, quick=quick)
    out, err = capsys.readouterr()
    assert err == ("" if warning is None else f"train.py: warning: {warning}\n")
    if None not in (pruned["val", "accuracy"], student["val", "accuracy"]):
        cost = 100 * (pruned["val", "accuracy"] - student["val", "accuracy"])
        teacher, student_row, pruned_row = out.splitlines()[2:5]
        assert f"{cost:+.2f}" in pruned_row
        assert "+" not in teacher + student_row and "-" not in teacher + student_row
    assert "bal." not in out


@pytest.mark.parametrize(
    ("classes", "accuracy", "near"),
    [(2, 0.57, True), (2, 0.65, False), (3, 0.45, True), (3, 0.5, False), (100, 0.05, False)],
)
def test_what_is_near_chance_depends_on_the_number_of_classes(
    classes, accuracy, near, tmp_path, capsys
):
    shown(tmp_path, shares(accuracy, None), shares(accuracy, None), classes, quick=True)
    chance = f"the unpruned student's accuracy is near chance ({1 / classes:.0%}); the full chain"
    assert (chance in capsys.readouterr().err) == near


def test_the_report_shows_balanced_accuracy_where_there_is_one(tmp_path, capsys):
    row = {**shares(0.98, 0.97), ("val", "balanced"): 0.6, ("test", "balanced"): 0.55}
    shown(tmp_path, row, row, quick=False)
    out = capsys.readouterr().out
    assert "val bal." in out and "test bal." in out and "60.00%" in out and "55.00%" in out


def test_a_row_of_results_tells_a_given_student_from_its_trained_teacher(tmp_path):
    settings = {"stem": 4, "seed": 0}
    run = record.Run(tmp_path, settings, {}, "train.py", {"threads": 2}, True)
    stages = [
        {"stage": stage, "parameters": 9, "val_accuracy": share, "test_accuracy": share}
        for stage, share in (("student", 0.5), ("teacher", 0.75), ("pruned", 0.25))
    ]
    run.add({"stages": stages, "minutes": 1.0, "device": "cpu"})
    (row,) = report.result_rows(run)
    found = {name: row[f"{name}_test"] for name in ("teacher", "student", "pruned")}
    assert found == {"teacher": "0.7500", "student": "0.5000", "pruned": "0.2500"}
