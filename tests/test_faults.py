"""A short version of tests/faults.py, and faults that need no process of their own."""

import errno
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import faults
import pytest
import tiny as shrunk
import torch

import checkpoint
import data
import distill
import runtime
import train
from runlog import record


def test_killed_and_stopped_runs_end_with_the_same_weights(tiny, tmp_path, monkeypatch, capsys):
    folder, step, steps = tmp_path, distill.TrainState.step, []
    flags = [*tiny[:-1], str(shrunk.write_images(folder / "data"))]
    with ThreadPoolExecutor(1) as thread:  # where no signal handler can be set
        assert thread.submit(train.main, flags).result() == 0
    expected = faults.weights(folder)
    shutil.rmtree(folder / "runs")
    assert faults.run(folder, DIE="write 6").returncode == -9
    assert faults.loadable(folder)

    def stopped(*args):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill.TrainState, "step", stopped)
        assert train.main(flags) == 130
    assert "the same command resumes" in capsys.readouterr().err and len(steps) == 2
    assert train.main(flags) == 0
    assert faults.same(faults.weights(folder), expected)


def test_a_stop_after_the_last_step_is_a_stop(tiny, tmp_path, monkeypatch, capsys):
    save_weights = train.save_weights

    def stopped(run, stage, *args):
        save_weights(run, stage, *args)
        if stage.budgets:  # the last network is written, and no step follows
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_weights", stopped)
        assert train.main(tiny) == 130
    assert "the same command resumes" in capsys.readouterr().err
    run_folder = tmp_path / "runs" / "quick-seed0"
    assert (run_folder / "pruned_resnet18.pth").exists()
    assert not (run_folder / "summary.txt").exists()
    assert train.main(tiny) == 0 and (run_folder / "summary.txt").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(number, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runtime.fcntl, "flock", refuse)
    monkeypatch.setattr(data, "CACHE_DIR", tmp_path / "data")
    for lock in (record.lock(tmp_path / "runs" / "name"), data._fetching()):
        with lock:
            error = capsys.readouterr().err
        assert f"({os.strerror(number)})" in error and error.count("\n") == 1


def test_a_lock_is_waited_for_or_refused(tmp_path):
    path, entered = tmp_path / "lock", []

    def enter():
        with runtime.lock(path, wait=True):
            entered.append(1)

    with ThreadPoolExecutor(1) as thread:
        with runtime.lock(path):
            with pytest.raises(BlockingIOError), runtime.lock(path):
                pass
            waiting = thread.submit(enter)
            time.sleep(0.05)
            assert not entered
        waiting.result(timeout=10)
    assert entered


def test_a_folder_that_takes_no_lock_file_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(record.UsageError, match="cannot be used"), record.lock(tmp_path / "runs/a"):
        pass


def test_a_damaged_state_falls_back_to_the_one_before(tiny, tmp_path, monkeypatch, capsys):
    path, before = tmp_path / record.STATE, tmp_path / record.STATE_BEFORE
    checkpoint.write(before, {"stage": "teacher", "rows": [], "minutes": 1.0})
    state = {"stage": "teacher", "rows": [], "minutes": 2.0, "network": torch.ones(9999)}
    checkpoint.write(path, state)
    assert record.Run(tmp_path, {"seed": 0}, {}, "", {"threads": 2}, True).minutes == 2.0
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert record.Run(tmp_path, {"seed": 0}, {}, "", {"threads": 2}, True).minutes == 1.0
    error = capsys.readouterr().err
    assert "state.pt: damaged, cannot be loaded; going on from state-before.pt" in error
    path.write_bytes(content)
    before.write_bytes(content)
    run = record.Run(tmp_path, {"seed": 0}, {}, "", {"threads": 2}, True)
    assert run.minutes == 0 and capsys.readouterr().err.count("the stage starts anew") == 2


def test_a_second_process_on_a_run_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with runtime.lock(tmp_path / "runs" / ".quick-seed0.lock"):
        assert train.main(tiny) == 2
    error = capsys.readouterr().err
    assert "another process is training this run" in error and error.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_ends_with_one_line_and_loses_nothing(
    number, tiny, tmp_path, monkeypatch, capsys
):
    fsync, calls = os.fsync, []

    def fail(file):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(number, os.strerror(number))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert train.main(tiny) == 2
    error = capsys.readouterr().err
    assert os.strerror(number) in error and "give the same command again" in error
    assert error.count("\n") == 1 and faults.loadable(tmp_path)
    assert train.main(tiny) == 0


def test_a_folder_that_vanishes_ends_with_one_line(tiny, tmp_path, monkeypatch, capsys):
    save = record.Run.save

    def vanish(self, *args):
        shutil.rmtree(self.folder)
        save(self, *args)

    monkeypatch.setattr(record.Run, "save", vanish)
    assert train.main(tiny) == 2
    error = capsys.readouterr().err
    assert "No such file or directory" in error and error.count("\n") == 1


def test_a_collapsed_network_is_called_out(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "validate", lambda *args: 0.1)
    assert train.main(tiny) == 0
    collapsed = "is near chance" in capsys.readouterr().err
    meta = checkpoint.load(tmp_path / "runs" / "quick-seed0" / "pruned_resnet18.pth")[1]
    assert collapsed == (meta["val_accuracy"] < 0.2)
