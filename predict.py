"""Classify the Fashion-MNIST test images with given weights and write the predictions as CSV.

    python predict.py -w pruned_resnet18.pth     # or: uv run predict.py -w pruned_resnet18.pth

writes submission.csv (columns id,pred; 10,000 rows) and prints parameters and accuracy.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import checkpoint
import data
import models


def choose_device(wanted: str) -> torch.device:
    return torch.device(wanted)


def main(argv: list[str] | None = None) -> int:
    pass


if __name__ == "__main__":
    sys.exit(main())
