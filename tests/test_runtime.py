import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAID = "import runtime, sys\nsys.exit(runtime.run(lambda: {}))"


@pytest.mark.parametrize(
    "script", ["train.py", "predict.py", "export.py", "bench/speed.py", "bench/tables.py"]
)
def test_all_scripts_end_alike(script):
    end = 'if __name__ == "__main__":\n    sys.exit(runtime.run(main))\n'
    assert (ROOT / script).read_text().endswith(end)


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
