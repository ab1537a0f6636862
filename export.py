"""Write a pruned network as ONNX, with everything removed that cannot matter, or in half precision.

    uv run --group export export.py -w pruned_resnet18.pth     # writes pruned_resnet18.onnx
    uv run export.py -w pruned_resnet18.pth --half             # writes pruned_resnet18-half.pth

ONNX has no sparse convolution, so what zeros are left are stored and multiplied. But BatchNorm is
folded into the convolutions, channels that nobody reads go, and so do kernel taps that only ever
meet padding. The file takes uint8 images (N, H, W) (colour: (N, 3, H, W)) as they are, and gives
logits. It is checked against PyTorch, with onnxruntime, before it gets its name.
"""

import openmp  # isort: skip  # noqa: F401  (before torch, which reads what it sets)

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import data
import models
import rewrite
import shell

TOLERANCE = 1e-4  # between PyTorch's logits and the export's, as a share of the largest


class ExportError(Exception):
    """The network cannot be exported; the message is one line for the user."""


class Slim(nn.Module):
    """A torchvision ResNet's function of uint8 images, without what cannot matter to it."""

    def __init__(self, model: nn.Module, image_size: int, grey: bool):
        super().__init__()
        self.grey = grey
        self.model = rewrite.fold_batchnorm(model).cpu().float().requires_grad_(False)
        if grey:  # three equal channels are one
            conv = self.model.conv1
            rewrite.replace_(conv, conv.weight.sum(1, keepdim=True), conv.bias)
        rewrite.remove_channels_(self.model)
        rewrite.trim_(self.model, image_size)

    def forward(self, images_u8: Tensor) -> Tensor:
        images = images_u8.float() / 127.5 - 1
        return self.model(images.unsqueeze(1) if self.grey else images)


def to_onnx(module: nn.Module, example: Tensor) -> bytes:
    """`module` as an ONNX file, for any number of images."""
    file = io.BytesIO()
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.save(file)
    return file.getvalue()


def run(onnx: bytes, images_u8: Tensor, batch: int = 250) -> tuple[Tensor, float]:
    """Logits of an exported file by onnxruntime, and images per second."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx)
    session.run(None, {"images": images_u8[:batch].numpy()})  # warm up
    began = time.perf_counter()
    parts = [session.run(None, {"images": part.numpy()})[0] for part in images_u8.split(batch)]
    seconds = time.perf_counter() - began
    return torch.cat([torch.from_numpy(part) for part in parts]), len(images_u8) / seconds


class Stock(nn.Module):
    """The network as it is, of uint8 images: what the export is compared with."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images_u8: Tensor) -> Tensor:
        return self.model(models.normalize(images_u8))


def export_half(args: argparse.Namespace) -> None:
    """The same weights file with values in half precision, and what that changes."""
    output = args.output or args.weights.with_name(f"{args.weights.stem}-half.pth")
    checkpoint.check_output(output, args.weights)
    model, meta, images_u8, what = load(args)
    expected = models.infer(model, images_u8)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "half.pth"
        checkpoint.save(written, model, meta, half=True)
        logits = models.infer(checkpoint.load(written)[0], images_u8)
        content = written.read_bytes()
    checkpoint.write(output, content)
    same = int((logits.argmax(1) == expected.argmax(1)).sum())
    before, after = args.weights.stat().st_size / 1000, len(content) / 1000
    print(
        f"{output}: {after:,.0f} instead of {before:,.0f} kB, {same:,} of {len(images_u8):,} "
        f"{what} as before, logits within {float((logits - expected).abs().max()):.0e}",
        file=sys.stderr if checkpoint.is_stdout(output) else sys.stdout,
    )


def load(args: argparse.Namespace) -> tuple[nn.Module, dict, Tensor, str]:
    """A network, what is known of it, images to check it with, and what those are: the test images,
    or noise if they were somebody's own and are not given."""
    model, meta = checkpoint.load(args.weights, stem=args.stem)
    assumed = checkpoint.complete_(meta, args.weights, args.image_size, args.colour, args.stem)
    if assumed:
        print(f"export.py: {assumed}", file=sys.stderr)
    size, grey = meta["image_size"], meta["grey"]
    if args.data is not None or meta.get("dataset") in data.DATASETS:
        source = data.find_for(args.weights, meta, args.data)
        return model, meta, data.load(source, "test")[0], "test images"
    shape = (1000, size, size) if grey else (1000, 3, size, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return model, meta, noise, "random images"


def export_onnx(args: argparse.Namespace) -> None:
    """Check everything that was asked for, export, compare, write."""
    output = args.output or args.weights.with_suffix(".onnx")
    checkpoint.check_output(output, args.weights)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed: uv run --group export ...") from None
    model, meta, images_u8, what = load(args)
    slim = to_onnx(Slim(model, meta["image_size"], meta["grey"]).eval(), images_u8[:2])
    logits, speed = run(slim, images_u8)
    expected = models.infer(model, images_u8)
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise ExportError(f"the export differs by {difference:.1e} in a logit; nothing was written")
    checkpoint.write(output, slim)
    stock = to_onnx(Stock(model).eval(), images_u8[:2])
    _, stock_speed = run(stock, images_u8)
    same = int((logits.argmax(1) == expected.argmax(1)).sum())
    to = sys.stderr if checkpoint.is_stdout(output) else sys.stdout
    print(f"{output}: {same:,} of {len(images_u8):,} {what} as in PyTorch, ", end="", file=to)
    print(f"logits within {difference:.0e}", file=to)
    print(f"{'':8}{'kB':>9}{'images/s (onnxruntime)':>25}", file=to)
    for title, file, rate in (("export", slim, speed), ("stock", stock, stock_speed)):
        print(f"{title:8}{len(file) / 1000:>9,.0f}{rate:>25,.0f}", file=to)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a network as ONNX, without channels and kernel taps that cannot matter, "
        "or its weights in half precision."
    )
    parser.add_argument(
        "-w", "--weights", type=Path, required=True, metavar="FILE", help="weights of a ResNet"
    )
    parser.add_argument(
        "-o", "--output", type=checkpoint.output, metavar="FILE",
        help="default: FILE.onnx, or FILE-half.pth, beside the weights; - for standard output",
    )  # fmt: skip
    parser.add_argument(
        "--half", action="store_true", help="a weights file in half precision instead of ONNX"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the images that it is checked with"
    )
    checkpoint.add_image_flags(parser)
    args = parser.parse_args(argv)
    try:
        with torch.inference_mode():
            export_half(args) if args.half else export_onnx(args)
    except (ExportError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(shell.run(main))
