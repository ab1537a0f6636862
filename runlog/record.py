"""The folder of a run: settings, state, record, results, lock.

It knows files, neither devices nor images.
"""

import contextlib
import csv
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import checkpoint
import runtime
from distill import Stage

STATE, STATE_BEFORE = "state.pt", "state-before.pt"
HASHES = {  # settings that are hashes, and what to say if they differ
    "files": "the images have changed",
    "teacher_files": "another --teacher",
    "student_files": "another --student",
}
HERE = Path(__file__).resolve().parent.parent  # the project
RUNS = HERE / "runs"
RESULTS = RUNS / "results.csv"  # of this machine
RECORDED = HERE / "bench" / "results.csv"  # of the project


class UsageError(runtime.UserError):
    """Flags, or the run's folder, that cannot be used."""


class Run:
    """The folder of one training run.

    `settings` decide what is trained: a run is only resumed with the same. `given`: the weights
    files of --teacher and --student, wherever they are now; their hashes are in the settings.
    `machine` (threads, ...) affects floating-point results: a run that is resumed on another warns.
    `command` is for records only. `bf16` is recorded when the run is begun; from then on, what the
    record has counts. Raises UsageError if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        given: dict[str, list[Path]],
        command: str,
        machine: dict,
        bf16: bool,
    ):
        self.folder, self.given, self.command = folder, given, command
        self.commit = commit()  # of the code that runs: the checkout may change before the end
        self.settings = json.loads(json.dumps(settings))  # as they are read back: lists, no tuples
        self.record = self._open(machine, bf16)
        for left in folder.glob(f".{STATE}.*") if runtime.rank() == 0 else ():
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if self.finished:
            self._remove_states()  # if it was killed before
        self._state = self._read_state()
        self.rows: list[dict] = self._state.get("rows", [])
        self.minutes: float = self._state.get("minutes", 0.0)
        self._clock = time.perf_counter()

    def _open(self, machine: dict, bf16: bool) -> dict:
        """Create the folder, or resume the run that is in it if the settings are the same."""
        record = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = json.loads(record.read_text()) if record.exists() else None
            if known is None:
                if any(self.folder.glob("*.pth")):
                    raise UsageError(
                        f"{self.folder}: has weights files, but no run.json; choose another "
                        "--name, or remove the folder"
                    )
                known = {
                    "name": self.folder.name,
                    "command": self.command,
                    "settings": self.settings,
                    "machine": machine,
                    "bf16": bf16,
                }
                checkpoint.write(record, json.dumps(known, indent=2))
            parts = ("settings", "machine") if isinstance(known, dict) else ()
            if not parts or not all(isinstance(known.get(part), dict) for part in parts):
                raise ValueError
        except ValueError:
            raise UsageError(
                f"{record}: damaged, or not the record of a run; choose another --name, or remove "
                "the folder"
            ) from None
        except OSError as error:
            raise UsageError(_unusable(self.folder, error)) from None
        if known["settings"].keys() != self.settings.keys():
            raise UsageError(
                f"{self.folder} holds a run of another version of train.py, whose settings no "
                "longer mean anything; choose another --name, or remove the folder"
            )
        if changes := _changes(known["settings"], self.settings):
            raise UsageError(
                f"{self.folder} holds a run with other settings ({changes}); choose another "
                "--name, or resume it with the settings and images it was started with"
            )
        if "stages" not in known and (changes := _changes(known["machine"], machine)):
            warn(
                f"the run was begun with another device or number of threads ({changes}): its "
                "weights will differ from those of a run that was never stopped"
            )
        elif "stages" not in known and known.get("bf16") and not bf16:
            warn("the run was begun in bf16, which is slow on this machine; --name starts another")
        return known

    def _read_state(self) -> dict:
        """The newest state that can be read; {} if there is none."""
        state, damaged = {}, []
        for path in (self.folder / STATE, self.folder / STATE_BEFORE):
            try:
                if path.exists():
                    state = checkpoint.read(path)
                    break
            except checkpoint.CheckpointError:
                damaged.append(path)
        for path in damaged:
            anew = "the stage starts anew, and metrics.csv and the minutes with it"
            then = f"going on from {STATE_BEFORE}" if state else anew
            warn(f"{path}: damaged, cannot be loaded; {then}")
            if runtime.rank() == 0:
                path.unlink()  # it must not become the one before
        return state

    def load(self, file: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
        """As `checkpoint.load`: of a 3x3 stem in a given student, --stem says what follows it."""
        stem = self.settings["stem"] if file in self.given.get("student", ()) else None
        return checkpoint.load(file, device, stem)

    @property
    def finished(self) -> bool:
        return "stages" in self.record

    def path(self, stage: Stage) -> Path:
        """The weights file of a finished stage."""
        return self.folder / stage.file

    def epochs_done(self, stage: Stage) -> int:
        """How many epochs of `stage` are finished."""
        if self.path(stage).exists():
            return stage.training.epochs
        return state["epoch"] if (state := self.saved(stage)) else 0

    def saved(self, stage: Stage) -> dict | None:
        """The last state that `save` was given for `stage`, if the run stopped there."""
        return self._state if self._state.get("stage") == stage.number else None

    def save(self, stage: Stage, state: dict, row: dict | None) -> None:
        """Write the state of a stage, keeping the one before, and metrics.csv with its new row."""
        if row is not None:
            self.rows.append(row)
        if runtime.rank() > 0:
            return
        now = time.perf_counter()
        self.minutes += (now - self._clock) / 60
        self._clock = now
        state = {"stage": stage.number, **state, "rows": self.rows, "minutes": self.minutes}
        if self.rows:  # first: once the state is written, its last row is never added again
            checkpoint.write(self.folder / "metrics.csv", to_csv(self.rows))
        if (self.folder / STATE).exists():
            (self.folder / STATE).replace(self.folder / STATE_BEFORE)
        checkpoint.write(self.folder / STATE, state)

    def minutes_of(self, stage: Stage) -> float:
        """Minutes that the epochs of `stage` took."""
        ours = [r for r in self.rows if (r["stage"], r["round"]) == (stage.name, stage.round)]
        return round(sum(row["seconds"] for row in ours) / 60, 1)

    def add(self, record: dict) -> None:
        """Add the results to the record, which `finish` writes."""
        self.record |= {**record, "minutes": round(self.minutes, 1), "commit": self.commit}

    def finish(self) -> None:
        """Write the record, and remove the states: all that they hold is in the other files."""
        checkpoint.write(self.folder / "run.json", json.dumps(self.record, indent=2))
        self._remove_states()

    def _remove_states(self) -> None:
        for name in (STATE, STATE_BEFORE):
            (self.folder / name).unlink(missing_ok=True)


def warn(text: str) -> None:
    """Print a warning of train.py, once for all processes."""
    if runtime.rank() == 0:
        print(f"train.py: warning: {text}", file=sys.stderr)


def _unusable(folder: Path, error: OSError) -> str:
    return (
        f"{folder}: cannot be used for the run ({error.strerror}); make it writable, or choose "
        "another --name"
    )


def _changes(before: dict, now: dict, longest: int = 60) -> str:
    """What differs, as "key: before, now other": down to the key, nested ones too."""
    changes = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += [f"{key} {inner}"] if (inner := _changes(old, new, longest)) else []
        elif old != new and key in HASHES:
            changes.append(HASHES[key])
        elif old != new:
            if isinstance(old, list) and isinstance(new, list):  # only what differs, of classes
                old, new = [x for x in old if x not in new], [x for x in new if x not in old]
            texts = [str(value)[:longest] for value in (old, new)]
            changes.append(f"{key}: {texts[0]}, now {texts[1]}")
    return "; ".join(changes)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Raises UsageError if another process is training the run in `folder`."""
    path = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(runtime.lock(path))
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is training this run") from None
        except OSError as error:
            raise UsageError(_unusable(folder, error)) from None
        yield


def add_results(rows: list[dict]) -> None:
    """Add rows to the table of this machine's results, which git ignores; not those it has."""
    new = [{key: str(value) for key, value in row.items()} for row in rows]
    with runtime.lock(RESULTS.with_name(f".{RESULTS.name}.lock"), wait=True):  # runs end together
        old = list(csv.DictReader(RESULTS.open(encoding="utf-8"))) if RESULTS.exists() else []
        checkpoint.write(RESULTS, to_csv([*old, *(row for row in new if row not in old)]))


def recorded_accuracy(command: str) -> str:
    """The test accuracy that `command` had, by the project's results; "" if it was not run."""
    if not RECORDED.exists():
        return ""
    rows = [row for row in csv.DictReader(RECORDED.open()) if row["command"] == command]
    last = {row["seed"]: row for row in rows}  # of several budgets, the smallest
    test = [100 * float(row["pruned_test"] or row["student_test"]) for row in last.values()]
    if not test:
        return ""
    spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
    seeds = f"{len(test)} seed{'s' * (len(test) > 1)}"
    return f"; this command reached {statistics.mean(test):.2f}{spread}% on test ({seeds})"


def shown_path(path: str | Path) -> str:
    """A given file's path in records: from the project's folder; of one outside, .../ and its name.

    So that records name no places of a machine, and no file is taken for the project's own.
    """
    path = Path(path).resolve()
    return path.relative_to(HERE).as_posix() if HERE in path.parents else f".../{path.name}"


def to_csv(rows: list[dict]) -> str:
    """Rows as CSV, with every column that one of them has."""
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)  # older rows may have others
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def commit() -> str:
    """The commit of this checkout, "+" behind it if files differ from it; "" outside of git, or if
    the repository around this folder does not have it."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)

    try:
        if git("ls-files", "--error-unmatch", "train.py").returncode:
            return ""
        name = git("describe", "--always", "--exclude=*").stdout.strip()
        differs = git("diff", "--quiet", "HEAD").returncode
    except OSError:
        return ""
    return f"{name}+" if name and differs else name
