"""Pictures of what users name and of networks of any size."""

import itertools
import logging

import matplotlib
import pytest
import torch

from runlog import plots


@pytest.fixture
def metrics(tmp_path):
    """metrics.csv of a run of three stages."""
    path = tmp_path / "metrics.csv"
    rows = [
        f"{stage},1,{parameters},0.8,0.9,0.9{epoch}"
        for stage, parameters in (("teacher", 25_000_000), ("student", 11_000_000), ("pruned", 999))
        for epoch in range(4)
    ]
    header = "stage,round,parameters,train_accuracy,val_accuracy,val_accuracy_average"
    path.write_text("\n".join([header, *rows]))
    return path


def test_classes_may_have_any_name():
    names = ["costs $5 to $6", "$\\frac{$", "短袖", "_^{}"]
    labels, probs = torch.arange(4), torch.eye(4).roll(1, 0)
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    assert plots.confusion(images, labels, probs, names)[:4] == b"\x89PNG"
    assert plots.mistakes(images, labels, probs, names)[:4] == b"\x89PNG"


def test_pictures_are_drawn_without_a_word(metrics, caplog, capfd, monkeypatch, recwarn):
    """On a machine without matplotlib's fonts for formulas."""
    for name in ("rm", "it", "bf", "sf", "tt", "cal"):
        monkeypatch.setitem(matplotlib.rcParams, f"mathtext.{name}", "no such font")
    monkeypatch.setitem(matplotlib.rcParams, "mathtext.fontset", "custom")
    with caplog.at_level(logging.WARNING):
        plots.curves(metrics)
        plots.layers({"conv1.weight": 20}, {"conv1.weight": 9408})
        plots.confusion(None, torch.arange(2), torch.eye(2), ["Pied-de-poule", "Größe"])
    assert not caplog.records and not recwarn.list and capfd.readouterr() == ("", "")


def test_characters_are_drawn_in_a_font_that_has_them_or_named_once(monkeypatch, capfd):
    """U+1D84 is in STIX, which matplotlib brings, and not in its default font."""
    monkeypatch.setattr(plots, "_said", set())
    fonts = [font for font in plots.fontManager.ttflist if font.name[:4] in ("Deja", "STIX")]
    monkeypatch.setattr(plots.fontManager, "ttflist", fonts)
    plots.confusion(None, torch.arange(2), torch.eye(2), ["\u1d84", "b"])
    assert capfd.readouterr() == ("", "")
    for _ in range(2):
        plots.confusion(None, torch.arange(2), torch.eye(2), ["短袖", "鞋"])
    error = capfd.readouterr().err
    assert error.startswith("warning: no installed font has the characters 短袖鞋, they")
    assert error.count("\n") == 1


def test_the_stages_are_named_above_the_curves(metrics, monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    figure = plots.curves(metrics)
    figure.draw_without_rendering()
    top = figure.axes[0]
    names = [text for text in top.texts if text.get_text() in ("teacher", "student", "pruned")]
    assert len(names) == 3
    for text in names:
        assert text.get_window_extent().y0 >= top.get_window_extent().y1


def test_a_hundred_classes_can_be_read(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    names = [f"class {i}" for i in range(100)]
    figure = plots.confusion(None, torch.arange(100), torch.eye(100), names)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == names
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))  # none on the next
