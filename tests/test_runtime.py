import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).resolve().parent.parent
SAID = "import runtime, sys\nsys.exit(runtime.run(lambda: {}))"
SCRIPTS = ["train.py", "predict.py", "export.py"]


@pytest.mark.parametrize("script", [*SCRIPTS, "bench/speed.py", "bench/tables.py"])
def test_all_scripts_end_alike(script):
    end = 'if __name__ == "__main__":\n    sys.exit(runtime.run(main))\n'
    assert (ROOT / script).read_text().endswith(end)


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_scripts_begin_alike(script, tmp_path):
    """With PYTHONSAFEPATH they find their modules; Ctrl-C during the imports is no traceback."""
    torch = tmp_path / "torch.py"  # in the place of the real one, which takes seconds
    for content, code, error in (
        ("raise SystemExit('torch')", 1, "torch\n"),
        ("import os, time; os.kill(os.getpid(), 2); time.sleep(9)", -2, ""),
    ):
        torch.write_text(content)
        done = subprocess.run(
            [sys.executable, ROOT / script],
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path)},
            # a shell may have started the tests in the background, where SIGINT is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (code, error)


def test_a_second_ctrl_c_is_no_traceback_of_the_exit():
    again = "import atexit, os; atexit.register(lambda: (os.kill(os.getpid(), 2), 0)); "
    done = subprocess.run(
        [sys.executable, "-c", again + SAID.format("7")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (-2, "")


def test_a_closed_pipe_ends_a_script_without_a_word():
    """As `| head` does; help is printed on the way that everything is."""
    help_of = SAID.format("__import__('argparse').ArgumentParser().parse_args(['--help'])")
    command = f'{sys.executable} -c "{help_of}" | true; exit ${{PIPESTATUS[0]}}'
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("work", "code"),
    [("7", 7), ("__import__('os').kill(__import__('os').getpid(), 15)", 130), ("sys.exit(2)", 2)],
)
def test_exit_codes(work, code):
    done = subprocess.run(
        [sys.executable, "-c", SAID.format(work)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr == ("\nstopped\n" if code == 130 else "")


def ended(main, **places: str | None) -> int:
    """The exit code of `main` in a child with its `stdout` and `stderr` there, or None: closed."""
    if (child := os.fork()) == 0:
        code = 99
        try:
            for number, place in enumerate(places.values(), start=1):
                os.dup2(os.open(place or "/dev/null", os.O_WRONLY | os.O_CREAT), number)
            os.closerange(3, 100)
            for number, (name, place) in enumerate(places.items(), start=1):
                stream = None
                if place is None:
                    os.close(number)
                else:  # as Python opens them, with LC_ALL=C and PYTHONUTF8=0
                    stream = open(number, "w", (-1, 1)[number - 1], "ascii")  # noqa: SIM115
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            code = runtime.run(main)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("stdout", ["out", "/dev/full", None])
@pytest.mark.parametrize("stderr", ["err", "/dev/full", None])
def test_messages_do_not_decide_the_exit_code(stdout, stderr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def main():
        for stream in (sys.stdout, sys.stderr):
            print("é\udce9", file=stream, flush=True)
            print("again", file=stream)
        with open("file", "w") as file:  # which must not become a standard stream
            assert file.fileno() > 2
        return 7

    assert ended(main, stdout=stdout, stderr=stderr) == 7
    if stdout == "out":
        assert Path("out").read_text() == "\\xe9\\udce9\nagain\n"
    if stderr == "err":
        lost = "warning: standard output cannot be written (No space left on device); messages are "
        expected = "\\xe9\\udce9\nagain\n"
        written = Path("err").read_text()
        assert written.replace(f"{lost}lost\n", "") == expected
        assert written.count(lost) == (stdout == "/dev/full")


@pytest.mark.parametrize("stdout", ["out", "/dev/full"])
def test_a_result_must_not_get_lost(stdout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def main():
        runtime.print_result("result")
        print("message")
        return 0

    full = stdout == "/dev/full"
    assert ended(main, stdout=stdout, stderr="err") == (2 if full else 0)
    line = f"{Path(sys.argv[0]).name}: standard output: No space left on device\n"
    assert Path("err").read_text() == (line if full else "")
    assert full or Path("out").read_text() == "result\nmessage\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("can't start new thread"), "set a smaller OMP_NUM_THREADS"),
        (PermissionError(13, "Permission denied", "/x"), ": /x: Permission denied\n"),
        (FileNotFoundError(2, "No usable temporary directory found"), "set TMPDIR to a writable"),
        (RuntimeError("CUDA out of memory. Tried to"), ": out of memory; smaller"),
        (MemoryError(), ": out of memory; smaller images"),
        (OSError("odd"), ": odd\n"),
    ],
)
def test_refusals_of_the_system_are_one_line(error, line, tmp_path):
    def main():
        raise error

    assert ended(main, stdout=str(tmp_path / "out"), stderr=str(tmp_path / "err")) == 2
    written = (tmp_path / "err").read_text()
    assert line in written and written.count("\n") == 1


def test_denormal_numbers_are_off_without_a_word():
    """NumPy, which pandas and matplotlib use, warns when it finds none of them."""
    said = SAID.format("print(numpy.finfo(float).bits, 1e-310 * torch.ones(1, dtype=float).item())")
    done = subprocess.run(
        [sys.executable, "-c", f"import numpy, torch\n{said}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "64 0.0\n", "")


def test_in_a_notebook_scripts_print_and_draw():
    """Its streams have no bytes below, and its shell names a backend that our environment lacks."""
    said = SAID.format("(import_module('matplotlib.pyplot'), print('drawn'), 5)[2]")
    stream = "class Cell(io.StringIO):\n buffer = property()\nsys.stdout = Cell()\n"
    end = "\nfinally: print(sys.stdout.getvalue(), file=sys.__stdout__)"
    code = f"import io, sys\nfrom importlib import import_module\n{stream}try:\n "
    code += said.replace("\n", "\n ") + end
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, "drawn\n\n", "")
