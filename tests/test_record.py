import subprocess

import record


def test_the_commit_has_a_plus_if_files_differ_other_than_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == ""
    for name in ("train.py", "results.csv"):
        (tmp_path / name).write_text("before")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    clean = record.commit()
    assert clean and not clean.endswith("+")
    (tmp_path / "results.csv").write_text("a row more")
    assert record.commit() == clean
    (tmp_path / "train.py").write_text("changed")
    assert record.commit() == f"{clean}+"
