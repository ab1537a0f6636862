import json
import os
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

import checkpoint
from runlog import record

SETTINGS = {"seed": 0, "budget": 100_000, "teacher": {"t.pth": "1"}}
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
    inside = tmp_path / "unpacked"  # somewhere in another project's repository
    inside.mkdir()
    monkeypatch.setattr(record, "HERE", inside)
    assert record.commit() == ""


def test_the_commit_of_a_run_is_that_of_the_code_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: "begun")
    run = record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    monkeypatch.setattr(record, "commit", lambda: "ended")
    run.add({"stages": []})
    run.finish()
    assert json.loads((tmp_path / "run.json").read_text())["commit"] == "begun"


def test_states_that_a_killed_process_left_go_with_the_next(tmp_path):
    run = record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    run.add({"stages": []})
    run.finish()
    for name in (record.STATE, record.STATE_BEFORE):
        (tmp_path / name).write_bytes(b"large")
    assert record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE).finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_what_a_process_that_was_killed_had_half_written_goes(tmp_path):
    record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    other = tmp_path / ".mine.123"
    with checkpoint.writing(tmp_path / record.STATE):
        (half,) = tmp_path.glob(".*")
    for path in (half, other):
        path.write_bytes(b"large")
    record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    assert not half.exists() and other.exists()


def test_a_machine_that_computes_otherwise_is_said_so(tmp_path, capsys):
    for machine, bf16, said in (
        ({"threads": 2}, True, ""),
        ({"threads": 2}, True, ""),
        ({"threads": 2}, False, "begun in bf16, which is slow on this machine"),
        ({"threads": 1}, False, "another device or number of threads (threads: 2, now 1)"),
    ):
        record.Run(tmp_path, SETTINGS, {}, "train.py", machine, bf16)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == bool(said)


def test_weights_without_a_record_are_not_taken_for_results(tmp_path):
    (tmp_path / "pruned_resnet18.pth").write_bytes(b"of another run")
    with pytest.raises(record.UsageError, match=r"has weights files, but no run\.json"):
        record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned_resnet18.pth"]


def test_no_row_is_lost_if_the_disk_is_full_at_any_write(tmp_path, monkeypatch):
    stage = types.SimpleNamespace(number=0)
    rows = [{"epoch": 1}, {"epoch": 2}]
    write = checkpoint.write
    for failing in (record.STATE, "metrics.csv"):
        folder = tmp_path / failing
        run = record.Run(folder, SETTINGS, {}, "train.py", *MACHINE)
        run.save(stage, {"epoch": 1}, rows[0])

        def full(path, content, failing=failing):
            if path.name == failing:
                raise checkpoint.CheckpointError("full")
            write(path, content)

        monkeypatch.setattr(checkpoint, "write", full)
        with pytest.raises(checkpoint.CheckpointError):
            run.save(stage, {"epoch": 2}, rows[1])
        monkeypatch.setattr(checkpoint, "write", write)
        run = record.Run(folder, SETTINGS, {}, "train.py", *MACHINE)
        for row in rows[run.saved(stage)["epoch"] :]:  # as training goes on
            run.save(stage, row, row)
        assert (folder / "metrics.csv").read_text() == "epoch\n1\n2\n"


def test_names_of_files_that_are_no_utf8_are_written_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results.csv")
    command = os.fsdecode(b"train.py --teacher caf\xe9")
    record.add_results([{"name": "a", "command": command}])
    record.add_results([{"name": "b", "command": "train.py"}])
    text = record.RESULTS.read_text(encoding="utf-8")
    assert "caf\\udce9" in text and text.endswith("b,train.py\n")


def test_runs_that_end_together_lose_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results.csv")
    rows = [{"name": f"run{n}", "seed": n} for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda row: record.add_results([row]), rows))
    assert sorted(record.RESULTS.read_text().splitlines()) == sorted(
        ["name,seed", *(f"run{n},{n}" for n in range(40))]
    )


def test_a_run_goes_on_with_its_settings_only_and_says_what_changed(tmp_path):
    record.Run(tmp_path, {**SETTINGS, "classes": ["cat", "dog"]}, {}, "train.py", *MACHINE)
    record.Run(tmp_path, {**SETTINGS, "classes": ["cat", "dog"]}, {}, "train.py", *MACHINE)
    other = {**SETTINGS, "teacher": {"t.pth": "2"}, "classes": ["cat", "cow", "dog"]}
    with pytest.raises(record.UsageError) as error:
        record.Run(tmp_path, other, {}, "train.py", *MACHINE)
    assert "(teacher t.pth: 1, now 2; classes: [], now ['cow'])" in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{}", "17", '{"settings": 1}', "", "{"])
def test_a_record_that_is_none_is_one_clear_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(record.UsageError, match="damaged, or not the record of a run") as error:
        record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    assert "\n" not in str(error.value)


def test_going_on_with_other_threads_is_warned_of(tmp_path, capsys):
    record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    assert json.loads((tmp_path / "run.json").read_text())["machine"]["threads"] == 2
    record.Run(tmp_path, SETTINGS, {}, "train.py", *MACHINE)
    assert not capsys.readouterr().err
    record.Run(tmp_path, SETTINGS, {}, "train.py", {"threads": 1}, True)
    error = capsys.readouterr().err
    assert "warning" in error and "(threads: 2, now 1)" in error and error.count("\n") == 1


def test_a_users_results_do_not_touch_what_git_tracks():
    ignored = ["git", "check-ignore", "-q", str(record.RESULTS)]
    inside = subprocess.run(["git", "rev-parse"], cwd=record.HERE, capture_output=True)
    if inside.returncode:
        pytest.skip("not a git checkout")
    assert subprocess.run(ignored, cwd=record.HERE).returncode == 0
