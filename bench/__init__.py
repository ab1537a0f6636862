"""Benchmarks, and the tables that are generated from their results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = tuple(ROOT / f"pruned_resnet18{kind}.pth" for kind in ("", "-stem2", "-stem1"))
