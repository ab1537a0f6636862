"""Export a network as ONNX, as one C file, or as a weights file with fewer bits per weight.

    uv run --group export export.py -w pruned_resnet18.pth     # writes pruned_resnet18.onnx
    uv run export.py -w pruned_resnet18.pth --c                # writes pruned_resnet18.c
    uv run export.py -w pruned_resnet18.pth --bits 8           # writes pruned_resnet18-8bit.pth
    uv run export.py -w pruned_resnet18.pth --c --bits 8       # writes pruned_resnet18-8bit.c

ONNX has no sparse convolution, so zero weights are stored and multiplied. BatchNorm is folded into
the convolutions; dead channels, and kernel positions that see only padding, are removed. The C file
holds only the non-zero weights. Both take uint8 images and return logits, which are compared with
PyTorch's before the file gets its name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runtime  # isort: skip  # before torch, which reads what it sets

import argparse
import copy
import ctypes
import io
import os
import shlex
import shutil
import subprocess
import tempfile
import time

import torch
from torch import Tensor, nn

import checkpoint
import data
import models
import prune
from engine import c_source, rewrite

TOLERANCE = 1e-4  # largest difference from PyTorch's logits, relative to the largest of them
NOISE = 1000  # random images to check with, where there are no test images


class ExportError(runtime.UserError):
    """The network cannot be exported."""


class ExportModel(nn.Module):
    """A torchvision ResNet from uint8 images to logits, without its unreachable weights."""

    def __init__(self, model: nn.Module, image_size: int, grey: bool):
        super().__init__()
        self.grey = grey
        self.model = rewrite.fold_batchnorm(model).cpu().float().requires_grad_(False)
        if grey:
            rewrite.merge_input_channels_(self.model.conv1)
        rewrite.remove_channels_(self.model)
        rewrite.trim_(self.model, image_size)

    def forward(self, images_u8: Tensor) -> Tensor:
        images = images_u8.float() / 127.5 - 1
        return self.model(images.unsqueeze(1) if self.grey else images)


def to_onnx(module: nn.Module, example: Tensor) -> bytes:
    """`module` as an ONNX file, for any batch size; `example`: at least two images."""
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


def run_onnx(onnx: bytes, images_u8: Tensor, batch: int = 250) -> tuple[Tensor, float]:
    """Logits, float32 (N, classes), of an ONNX file in onnxruntime, and images per second."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx)
    session.run(None, {"images": images_u8[:batch].numpy()})  # warm up
    began = time.perf_counter()
    parts = [session.run(None, {"images": part.numpy()})[0] for part in images_u8.split(batch)]
    seconds = time.perf_counter() - began
    return torch.cat([torch.from_numpy(part) for part in parts]), len(images_u8) / seconds


class ReferenceModel(nn.Module):
    """The unchanged network from uint8 images to logits: exports are compared with it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images_u8: Tensor) -> Tensor:
        return self.model(models.normalize(images_u8))


def export_bits(args: argparse.Namespace) -> None:
    """Write the weights with fewer bits, and print how size and predictions change."""
    model, meta, images_u8, labels, what = load(args)
    output = args.output or args.weights.with_name(f"{args.weights.stem}-{args.bits}bit.pth")
    checkpoint.check_output(output, args.weights)
    expected = logits_of(model, images_u8, args.weights)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "fewer.pth"
        checkpoint.save(written, model, meta, args.bits)
        logits = logits_of(checkpoint.load(written)[0], images_u8, args.weights)
        content = written.read_bytes()
    checkpoint.write(output, content)
    before, after = args.weights.stat().st_size / 1000, len(content) / 1000
    say(
        output,
        f"{output}: {after:,.0f} instead of {before:,.0f} kB, {same(logits, expected)} {what} as "
        f"before{accuracies(labels, expected, logits)}",
    )


def say(output: Path, text: str) -> None:
    """Print a message, on standard error if the file goes to standard output."""
    print(text, file=sys.stderr if checkpoint.is_stdout(output) else sys.stdout)


def same(logits: Tensor, expected: Tensor) -> str:
    """How many predictions are equal, as text."""
    return f"{int((logits.argmax(1) == expected.argmax(1)).sum()):,} of {len(logits):,}"


def accuracies(labels: Tensor | None, *logits: Tensor) -> str:
    """Test accuracies before and after, as text; "" without labels."""
    if labels is None:
        return ""
    before, *after = (f"{models.accuracy(part, labels):.2%}" for part in logits)
    return f", test accuracy {before}" + "".join(f" -> {part}" for part in after)


def load(args: argparse.Namespace) -> tuple[nn.Module, dict, Tensor, Tensor | None, str]:
    """(model, meta, images, labels, their name): the network, and images to check the export with.

    These are the test images. Of a custom data set without --data, they are random, without labels.
    """
    model, meta = checkpoint.load(args.weights, stem=args.stem)
    assumed = checkpoint.fill_missing_meta_(
        meta, args.weights, args.image_size, args.color, args.stem
    )
    if assumed:
        print(f"export.py: {assumed}", file=sys.stderr)
    size, grey = meta["image_size"], meta["grey"]
    if args.data is not None or meta.get("dataset") in data.DATASETS:
        source = data.find_for_weights(args.weights, meta, args.data)
        for note in source.notes:
            print(f"export.py: {runtime.printable(note)}", file=sys.stderr)
        return model, meta, *data.load(source, "test"), "test images"
    shape = (NOISE, size, size) if grey else (NOISE, 3, size, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return model, meta, noise, None, "random images"


def logits_of(model: nn.Module, images_u8: Tensor, weights: Path) -> Tensor:
    """Logits, float32 (N, classes), before or after an export. Raises models.LogitsError if they
    are not finite.

    Channels that a narrow network lacks are not computed: of a ResNet50 they would take minutes.
    """
    present = rewrite.trim_channels_(copy.deepcopy(model))
    return models.check_finite(models.infer(present, images_u8), weights)


def export_onnx(args: argparse.Namespace) -> None:
    """Check all flags, export, compare with PyTorch, write."""
    tempfile.gettempdir()  # PyTorch's exporter needs one; raises OSError
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"{error.name} is not installed: uv run --group export ..., or pip install onnx "
            "onnxscript onnxruntime"
        ) from None
    model, meta, images_u8, _, what = load(args)
    output = args.output or args.weights.with_suffix(".onnx")
    checkpoint.check_output(output, args.weights)
    expected = logits_of(model, images_u8, args.weights)
    # Two images: of one, the exporter takes the batch size for a constant.
    example = images_u8[:1].repeat(2, *[1] * (images_u8.dim() - 1))
    slim = to_onnx(ExportModel(model, meta["image_size"], meta["grey"]).eval(), example)
    logits, speed = run_onnx(slim, images_u8)
    difference = check(logits, expected)
    checkpoint.write(output, slim)
    whole = to_onnx(ReferenceModel(model).eval(), example)
    _, whole_speed = run_onnx(whole, images_u8)
    say(
        output,
        f"{output}: {same(logits, expected)} {what} as in PyTorch, logits within {difference:.0e}\n"
        f"{'':15}{'kB':>9}{'images/s (onnxruntime)':>25}",
    )
    for title, file, rate in (("exported", slim, speed), ("nothing removed", whole, whole_speed)):
        say(output, f"{title:15}{len(file) / 1000:>9,.0f}{rate:>25,.0f}")


def check(logits: Tensor, expected: Tensor) -> float:
    """The largest difference; raises ExportError if it exceeds TOLERANCE or is NaN."""
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE * max(float(expected.abs().max()), 1):
        raise ExportError(f"the export differs by {difference:.1e} in a logit; nothing was written")
    return difference


# --- C ------------------------------------------------------------------------------------------


def compiler() -> list[str] | None:
    """The command of a C compiler: the variable CC, else cc, gcc or clang; None if absent."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise ExportError(
            f"CC={os.environ['CC']}: not a command ({error}); mend or unset it"
        ) from None
    for words in (named, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return None


class CLibrary:
    """A C file of `c_source.CSource`, compiled for this machine and loaded.

    Raises ExportError if it cannot be compiled, OSError if it cannot be loaded, or the temporary
    folder not be used.
    """

    def __init__(self, text: str, name: str, classes: int):
        self.classes = classes
        # Windows keeps a library that is loaded.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            source, library = Path(folder) / f"{name}.c", Path(folder) / f"{name}.so"
            source.write_text(text)
            command = [*compiler(), "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
            for more in (["-march=native"], []):  # which not every compiler knows
                try:
                    done = subprocess.run([*command, *more], capture_output=True, text=True)
                except OSError as error:
                    raise ExportError(
                        f"{command[0]}: cannot be run ({error.strerror}); CC names another compiler"
                    ) from None
                if done.returncode == 0:
                    break
            else:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ExportError(f"{command[0]} cannot compile the C file: {reason}")
            self._logits = getattr(ctypes.CDLL(str(library)), f"{name}_logits")
        self._logits.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def __call__(self, images_u8: Tensor) -> Tensor:
        """Logits, float32 (N, classes), of uint8 images (N, H, W) or (N, 3, H, W), one by one."""
        images_u8 = images_u8.contiguous()
        logits = torch.empty(len(images_u8), self.classes)
        begin, step = images_u8.data_ptr(), images_u8[:1].numel()
        for i in range(len(images_u8)):
            self._logits(begin + i * step, logits.data_ptr() + 4 * i * self.classes)
        return logits


def c_file(
    model: nn.Module, meta: dict, name: str, bits: int, file: str = ""
) -> tuple[nn.Module, c_source.CSource]:
    """(the network as the C file computes it, the C file's source)."""
    size, grey = meta["image_size"], meta["grey"]
    if bits < 32:  # only weights in use are quantized: others could determine scales
        model = rewrite.untrimmed(rewrite.trim_(copy.deepcopy(model), size))
        if grey:
            prune.merge_grey_input_(model)
        model = checkpoint.fake_quantize(model, bits)
    classes = meta.get("classes", ())
    return model, c_source.CSource(model, size, grey, name, bits, classes, file)


def export_c(args: argparse.Namespace) -> None:
    """Write the C file, compile and compare it if that can be done."""
    model, meta, images_u8, labels, what = load(args)
    ending = "" if args.bits == 32 else f"-{args.bits}bit"
    output = args.output or args.weights.with_name(f"{args.weights.stem}{ending}.c")
    checkpoint.check_output(output, args.weights)
    compiles = compiler() is not None
    original = logits_of(model, images_u8, args.weights)
    name = c_source.identifier(output.stem)
    network, source = c_file(model, meta, name, args.bits, output.name)
    expected = original if args.bits == 32 else logits_of(network, images_u8, args.weights)
    notes = [f"A {meta['arch']} of {meta['parameters']:,} parameters, written by export.py."]
    if labels is not None:
        accuracy = models.accuracy(expected, labels)
        notes.append(f"Accuracy on the {len(labels):,} test images: {accuracy:.2%}.")
    text = source.text(notes)
    checked, library = "not compared with PyTorch, there is no C compiler", None
    if compiles:
        try:
            library = CLibrary(text, name, meta["num_classes"])
        except OSError as error:  # as on a read-only or noexec file system, or of a cross compiler
            checked = (
                f"not compared with PyTorch, the compiled file cannot be loaded ({error}); TMPDIR "
                "names another temporary folder, CC a compiler for this machine"
            )
    if library:
        logits = library(images_u8)
        difference = check(logits, expected)
        checked = f"{same(logits, original)} {what} as in PyTorch, logits within {difference:.0e}"
        checked += " of the rounded network's" if args.bits < 32 else ""
        checked += accuracies(labels, logits)
    checkpoint.write(output, text)
    sizes = (
        f"{source.table_bytes / 1000:,.0f} kB of tables, {source.memory_bytes / 1000:,.0f} kB RAM"
    )
    say(output, f"{output}: {checked}\n{sizes}")


# --- command line -------------------------------------------------------------------------------


def check_ending(args: argparse.Namespace) -> None:
    """Refuse an output named as one format while the flags ask for another."""
    flags = {
        ".c": "with --c",
        ".pth": "with --bits, without --c",
        ".onnx": "without --c and --bits",
    }
    ending = ".c" if args.c else ".pth" if args.bits < 32 else ".onnx"
    named = args.output.suffix.lower() if args.output else ending
    if named in flags and named != ending:
        raise ExportError(
            f"{args.output}: a {named} file is written {flags[named]}; these flags write {ending}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Export a network as ONNX without its dead channels, as one C file without its "
        "zero weights, or as a weights file with fewer bits per weight."
    )
    parser.add_argument(
        "-w", "--weights", type=Path, required=True, metavar="FILE", help="weights of a ResNet"
    )
    parser.add_argument(
        "-o", "--output", type=checkpoint.output_path, metavar="FILE",
        help="default: beside the weights, named after them and --bits, as NAME.onnx, NAME.c, "
        "NAME-8bit.c or NAME-8bit.pth; - for standard output",
    )  # fmt: skip
    parser.add_argument("--c", action="store_true", help="write C99; without --c and --bits, ONNX")
    parser.add_argument(
        "--bits", type=int, default=32, choices=checkpoint.BITS, metavar="N",
        help="bits per weight, 2 to 8 or 16: writes a weights file, or with --c a C file",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the data set whose test images check the export (default: found or "
        "downloaded; random images for weights of own images)",
    )
    checkpoint.add_image_flags(parser)
    args = parser.parse_args(argv)
    try:
        check_ending(args)
        with torch.inference_mode():
            export_c(args) if args.c else export_bits(args) if args.bits < 32 else export_onnx(args)
    except runtime.UserError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(main))
