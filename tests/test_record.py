import json
import subprocess

import pytest

import record

SETTINGS = {"seed": 0, "budget": 100_000, "teacher": {"file": "t.pth", "sha256": "1"}}
MACHINE = {"threads": 2}, True  # and whether in bf16


def test_the_commit_has_a_plus_if_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == ""
    (tmp_path / "train.py").write_text("before")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    clean = record.commit()
    assert clean and not clean.endswith("+")
    (tmp_path / "train.py").write_text("changed")
    assert record.commit() == f"{clean}+"


def test_a_run_goes_on_with_its_settings_only_and_says_what_changed(tmp_path):
    record.Run(tmp_path, {**SETTINGS, "classes": ["cat", "dog"]}, *MACHINE)
    record.Run(tmp_path, {**SETTINGS, "classes": ["cat", "dog"]}, *MACHINE)
    teacher, classes = {"file": "t.pth", "sha256": "2"}, ["cat", "cow", "dog"]
    with pytest.raises(record.UsageError) as error:
        record.Run(tmp_path, {**SETTINGS, "teacher": teacher, "classes": classes}, *MACHINE)
    assert "(teacher sha256: 1, now 2; classes: [], now ['cow'])" in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{}", "17", '{"settings": 1}', "", "{"])
def test_a_record_that_is_none_is_one_clear_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(record.UsageError, match="cannot be used for the run") as error:
        record.Run(tmp_path, SETTINGS, *MACHINE)
    assert "\n" not in str(error.value)


def test_going_on_with_other_threads_is_warned_of(tmp_path, capsys):
    record.Run(tmp_path, SETTINGS, *MACHINE)
    assert json.loads((tmp_path / "run.json").read_text())["machine"]["threads"] == 2
    record.Run(tmp_path, SETTINGS, *MACHINE)
    assert not capsys.readouterr().err
    record.Run(tmp_path, SETTINGS, {"threads": 1}, True)
    error = capsys.readouterr().err
    assert "warning" in error and "(threads: 2, now 1)" in error and error.count("\n") == 1


def test_a_users_results_do_not_touch_what_git_tracks():
    ignored = ["git", "check-ignore", "-q", str(record.RESULTS)]
    inside = subprocess.run(["git", "rev-parse"], cwd=record.HERE, capture_output=True)
    if inside.returncode:
        pytest.skip("not a git checkout")
    assert subprocess.run(ignored, cwd=record.HERE).returncode == 0


def report(tmp_path, student, pruned, **settings):
    run = record.Run(tmp_path, {"recipe_name": "cpu", **settings}, *MACHINE)
    common = {"file": "a.pth", "kilobytes": 1, "parameters": 9, "minutes": 1.0}
    stages = [
        {"stage": stage, **common, **{f"{k}_{kind}": v for (k, kind), v in shares.items()}}
        for stage, shares in (("teacher", student), ("student", student), ("pruned", pruned))
    ]
    run.finish({"stages": stages, "classes": 10})
    run.report()


def shares(val, test):
    return {("val", "accuracy"): val, ("test", "accuracy"): test}


@pytest.mark.parametrize(
    ("student", "pruned", "recipe", "warning"),
    [
        (shares(0.98, 0.9), shares(0.87, 0.9), "quick",
         "pruning has cost 11.0 points on validation: the dense student has 98.0%, 9 parameters "
         "have 87.0%; a larger --budget or the recipe cpu may help"),
        (shares(None, 0.98), shares(None, 0.95), "cpu",
         "pruning has cost 3.0 points on test: the dense student has 98.0%, 9 parameters have "
         "95.0%; a larger --budget or a longer recipe may help"),
        (shares(0.98, 0.98), shares(0.1, 0.1), "cpu",
         "the pruned network has collapsed, its accuracy is near chance (10%); a larger --budget "
         "or a longer recipe may help"),
        (shares(0.98, 0.98), shares(0.97, 0.5), "cpu", None),
        (shares(None, None), shares(None, None), "cpu", None),
    ],
)  # fmt: skip
def test_the_report_says_what_pruning_has_cost(student, pruned, recipe, warning, tmp_path, capsys):
    report(tmp_path, student, pruned, recipe_name=recipe)
    out, err = capsys.readouterr()
    assert err == ("" if warning is None else f"train.py: warning: {warning}\n")
    if pruned["val", "accuracy"] is not None:
        cost = 100 * (pruned["val", "accuracy"] - student["val", "accuracy"])
        teacher, student_row, pruned_row = out.splitlines()[2:5]
        assert f"{cost:+.2f}" in pruned_row
        assert "+" not in teacher + student_row and "-" not in teacher + student_row
    assert "bal." not in out


def test_the_report_shows_balanced_accuracy_where_there_is_one(tmp_path, capsys):
    row = {**shares(0.98, 0.97), ("val", "balanced"): 0.6, ("test", "balanced"): 0.55}
    report(tmp_path, row, row)
    out = capsys.readouterr().out
    assert "val bal." in out and "test bal." in out and "60.00%" in out and "55.00%" in out
