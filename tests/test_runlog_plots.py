"""Pictures of what users name and of networks of any size."""

import itertools
import logging
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch

from runlog import plots

PUBLISHED = Path(__file__).resolve().parent.parent / "bench" / "published.csv"


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
    assert plots.confusion(labels, probs, names)[:4] == b"\x89PNG"
    assert plots.mistakes(images, labels, probs, names)[:4] == b"\x89PNG"


def test_pictures_are_drawn_without_a_word(metrics, caplog, capfd, monkeypatch, recwarn):
    """On a machine without matplotlib's fonts for formulas."""
    for name in ("rm", "it", "bf", "sf", "tt", "cal"):
        monkeypatch.setitem(matplotlib.rcParams, f"mathtext.{name}", "no such font")
    monkeypatch.setitem(matplotlib.rcParams, "mathtext.fontset", "custom")
    with caplog.at_level(logging.WARNING):
        plots.curves(metrics)
        plots.layers({"conv1.weight": 20}, {"conv1.weight": 9408})
        plots.confusion(torch.arange(2), torch.eye(2), ["Pied-de-poule", "Größe"])
    assert not caplog.records and not recwarn.list and capfd.readouterr() == ("", "")


def test_characters_are_drawn_in_a_font_that_has_them_or_named_once(monkeypatch, capfd):
    """U+1D84 is in STIX, which matplotlib brings, and not in its default font."""
    monkeypatch.setattr(plots, "_said", set())
    fonts = [font for font in plots.fontManager.ttflist if font.name[:4] in ("Deja", "STIX")]
    monkeypatch.setattr(plots.fontManager, "ttflist", fonts)
    plots.confusion(torch.arange(2), torch.eye(2), ["\u1d84", "b"])
    assert capfd.readouterr() == ("", "")
    for _ in range(2):
        plots.confusion(torch.arange(2), torch.eye(2), ["短袖", "鞋"])
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
    figure = plots.confusion(torch.arange(100), torch.eye(100), names)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == names
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))  # none on the next


def test_sizes_has_a_line_for_several_budgets_and_a_star_for_the_best_command(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    results = tmp_path / "results.csv"
    rows = [
        *(f"train.py --budget,4,0,{n},0.9,0.92,0.9,0.9{n // 10_000}" for n in (20_000, 50_000)),
        *(f"train.py,4,{seed},100000,0.9,0.92,0.93,0.93{seed}" for seed in (0, 2, 4)),
        *(f"train.py --length 1,4,{seed},100000,0.9,0.92,0.92,0.95" for seed in (0, 1, 2)),
        "train.py --imagenet,4,0,100000,0.9,0.92,0.95,0.95",
        "train.py --stem 1,1,0,100000,0.9,0.92,0.95,0.96",
        "train.py --image-size 56,4,0,100000,0.9,0.92,0.94,0.935",
        *(f"train.py --no-prune,2,{seed},11173962,0.9,0.94,," for seed in (0, 1)),
    ]
    header = "command,stem,seed,parameters,student_val,student_test,pruned_val,pruned_test"
    results.write_text("\n".join([header, *rows]))
    axes = plots.sizes(results, PUBLISHED).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:5] == [
        "ours, stem of stride 4: 95.00% at 50,000, 1 seed, each pruned from the larger one",
        "ours, stem of stride 1: 96.00% at 100,000, 1 seed",
        "ours, unpruned, stem of stride 2: 94.00% at 11,173,962, 2 seeds",
        "ours, stem of stride 4, images enlarged to 56 pixels: 93.50% at 100,000, 1 seed",
        "ours, stem of stride 4: 93.20% at 100,000, 3 seeds",
    ]
    assert len(labels) == 5 + len(plots.KINDS)


def test_figures_of_the_first_release_are_hollow(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    results = tmp_path / "results.csv"
    header = "command,stem,seed,parameters,student_val,student_test,pruned_val,pruned_test\n"
    results.write_text(header)
    axes = plots.sizes(results, PUBLISHED).axes[0]
    drawn = {line.get_ydata()[0]: line.get_markerfacecolor() for line in axes.get_lines()}
    published = pd.read_csv(PUBLISHED)
    assert set(published.kind) == plots.KINDS.keys() and len(drawn) == len(published)
    for kind, accuracy in zip(published.kind, published.accuracy, strict=True):
        assert (drawn[accuracy] == "white") == (kind == "first")
