"""The documents against the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_both_environments_list_the_same_dependencies():
    """Read with regular expressions: Python 3.10 has no TOML reader, and YAML is no dependency."""
    project = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)
    pip = set(re.findall(r'"([^"]+)"', block))
    listed = (ROOT / "environment.yml").read_text().split("dependencies:")[1]
    conda = set(re.findall(r"^  - (.+)$", listed, re.M))
    names = {"pytorch": "torch"}  # conda-forge's name: PyPI's
    conda = {re.sub(r"^[a-z]+", lambda m: names.get(m[0], m[0]), entry) for entry in conda}
    python = {entry for entry in conda if re.match("python[^a-z]", entry)}
    tools = {"pytest", "ruff"}
    assert len(python) == 1 and tools <= conda
    assert conda - python - tools == pip
    (pip_python,) = re.findall(r'requires-python = "([^"]+)"', project)
    assert python == {f"python{pip_python}"}


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_the_readme_names_every_flag_and_no_other(script):
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    readme = (ROOT / "README.md").read_text()
    table = re.search(rf"### `{re.escape(script)}`(.*?)(?=\n##)", readme, re.S)[1]
    assert set(re.findall(r"^\| .*?`(?:-\w, )?(--[a-z-]+)", table, re.M)) == known


def test_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in sorted(ROOT.glob("*.py")):
        assert re.search(rf"^\| `{path.name}` \|", readme, re.M), path.name
