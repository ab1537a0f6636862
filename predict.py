"""Classify the Fashion-MNIST test images with given weights and write the predictions as CSV.

    python predict.py -w pruned_resnet18.pth     # or: uv run predict.py -w pruned_resnet18.pth

Writes submission.csv (header id,pred; 10,000 rows, ids from 0) and prints the number of parameters
and the accuracy. `-w` takes what train.py writes, and any state dict of a torchvision ResNet18 or
ResNet50, plain or with the masks of torch.nn.utils.prune.
"""

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import checkpoint
import data
import models
import prune
import sparse


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify the Fashion-MNIST test images and write the predictions as CSV."
    )
    parser.add_argument(
        "-w", "--weights", type=Path, required=True, metavar="FILE", help="weights of a ResNet"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default="submission.csv", metavar="FILE",
        help="CSV with the columns id,pred (default: submission.csv)",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the images (default: found or fetched)",
    )
    parser.add_argument(
        "--tta", action="store_true", help="average each image's logits with its mirror image's"
    )
    parser.add_argument("--device", choices=models.DEVICES, default="auto", help="default: auto")
    parser.add_argument(
        "--engine",
        choices=("auto", "dense", "sparse"),
        default="auto",
        help="sparse skips the zeros, on the CPU only; auto: where it is faster (default)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=250, metavar="N", help="images at a time (default: 250)"
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: at least 1")
    return args


def predict(args: argparse.Namespace) -> None:
    """Check everything that was asked for, predict, write."""
    device = models.choose_device(args.device)
    if args.engine == "sparse" and device.type != "cpu":
        raise models.DeviceError(f"--engine sparse: runs on the CPU, not on {device.type}")
    checkpoint.check_output(args.output)
    model, meta = checkpoint.load(args.weights, device)
    if meta["num_classes"] != len(data.CLASSES):
        raise checkpoint.CheckpointError(
            f"{args.weights}: has {meta['num_classes']} classes, the images {len(data.CLASSES)}"
        )
    images_u8, labels = data.load(data.find(args.data), "test")
    engine = args.engine
    if engine == "auto":
        mostly_zeros = (
            meta["parameters"] < sum(w.numel() for w in prune.weights(model).values()) / 2
        )
        engine = "sparse" if mostly_zeros and device.type == "cpu" else "dense"
    began = time.perf_counter()
    if engine == "sparse":
        model = sparse.SparseResNet(model, images_u8.shape[-1])
    logits = models.infer(model, images_u8, args.batch_size, args.tta)
    predictions = logits.argmax(1).cpu()
    seconds = time.perf_counter() - began
    table = pd.DataFrame({"id": range(len(predictions)), "pred": predictions.numpy()})
    checkpoint.write(args.output, table.to_csv(index=False))
    accuracy = models.accuracy(logits, labels)
    print(
        f"{meta['arch']}, {meta['parameters']:,} parameters: test accuracy {accuracy:.2%}"
        f"{' with mirror images' if args.tta else ''}, {len(labels):,} images in {seconds:.1f} s "
        f"on {device.type} ({engine}), predictions in {args.output}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_flush_denormal(True)  # denormal weights are ten times slower on a CPU
    try:
        predict(args)
    except (models.DeviceError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
