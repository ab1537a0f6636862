"""Benchmarks, and the tables that are generated from their results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (ROOT / "pruned_resnet18.pth", ROOT / "pruned_resnet18-stem2.pth")
