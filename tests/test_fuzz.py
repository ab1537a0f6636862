"""A short version of tests/fuzz.py."""

import fuzz


def test_broken_files_are_refused_or_predicted_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = fuzz.trial(tmp_path, n_weights=8, n_images=8, n_outputs=8, seed=1)
    for counts in table.values():
        assert counts["failed"] == 0 and counts["refused"] > 3
