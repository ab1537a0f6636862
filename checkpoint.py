"""Weights files: the only writer and the only reader. No output is ever left half written.

A weights file is a dict that `torch.load(weights_only=True)` reads:

    format    "pruned-resnet"
    version   2, or 3 with `bits`
    meta      the network's description: arch, stem, num_classes, classes, image_size, grey,
              dataset, budget, parameters, and its origin (stage, command, seed, commit,
              val_accuracy)
    values    float32: the non-zero conv and linear weights, in the order of the state dict
    bits      if quantized, 2 to 8: `values` are int8 levels of up to 2**(bits - 1) - 1, to be
              multiplied by the scale of their output channel; the first layer is not among them
    scales    float32, with `bits`: one for each output channel of all layers but the first
    first     float32, with `bits`: the first layer's values
    half      True if `values` is float16 instead
    gaps      uint16: delta-encoded indices, the distance of each value from the one before it, over
              all these weights laid end to end; 65535 means "65535 further, no value here".
              None if `values` holds every weight
    others    float32: all other floating-point tensors, end to end (BatchNorm, biases)
    integers  int64: BatchNorm's batch counters

Shapes are not stored: they follow from arch, stem (4 if absent) and num_classes. In a pruned file,
one with gaps, the tensors are compressed without loss, see `_pack`.
"""

import argparse
import contextlib
import copy
import errno
import io
import lzma
import os
import pickle
import re
import shutil
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

import data
import models
import prune
import runtime

FORMAT, VERSIONS = "pruned-resnet", (2, 3)
MAX_CLASSES = 10_000  # more count as damage: a file must not fill the memory
MAX_GAP = 65535  # the longest gap, after which there is no value
BITS = (2, 3, 4, 5, 6, 7, 8, 16)  # possible widths of a weight, beside 32
SMALLEST_HALF = 2.0**-24
DTYPES = {
    "values": torch.float32,
    "gaps": torch.uint16,
    "others": torch.float32,
    "integers": torch.int64,
    "scales": torch.float32,
    "first": torch.float32,
}
FOREIGN_DTYPES = (  # of third-party weights, masks and counters
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int32, torch.int64,
)  # fmt: skip
# Bytes are modelled one by one (lc=0, pb=0): neighboring weights are independent.
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "pb": 0, "dict_size": 2**20}]
# Entries of third-party state dicts that are not the network's: AveragedModel's, a criterion's.
NOT_WEIGHTS = re.compile(r"n_averaged$|(\w*_)?(criterion|loss|metric)", re.I)
AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|averag", re.I)  # names of averaged weights
# Why a file can only be overwritten: rights of its folder or of a sticky one, a mount point.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
ALONE = "torch.save(model.state_dict(), 'weights.pth')"


class CheckpointError(runtime.UserError):
    """A file that cannot be used."""


# --- outputs --------------------------------------------------------------------------------------


def output_path(text: str) -> Path:
    """The path of an output on the command line, for argparse; "-" is standard output."""
    return Path("/dev/stdout" if text == "-" else text)


def is_stdout(path: Path) -> bool:
    """Whether `path` is this process's standard output, by whatever name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def _target(path: Path) -> Path | None:
    """The file that `path` leads to; None for a device or a pipe, which cannot be replaced."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(0, "its links go round in a circle")
    if target.is_dir():
        raise OSError(0, "is a folder")
    if is_stdout(path) and sys.__stdout__ is None:
        raise OSError(0, "standard output is closed")
    return None if is_stdout(path) or (target.exists() and not target.is_file()) else target


def _scratch(target: Path) -> Path:
    """Where `writing` writes what becomes `target`."""
    return target.with_name(f".{target.name[:40]}.{os.getpid()}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it becomes `path` at the end, or, on an error, leaves no trace.

    A link stays, and its target is replaced; mode, group and, where allowed, owner stay. Devices
    and pipes are written to directly. A file that cannot be replaced, because it is a mount point
    or in a read-only folder, is overwritten at the end. Raises CheckpointError if the disk is full,
    or the folder gone or read-only; BrokenPipeError.
    """
    scratch = None
    try:
        target = _target(path)
        if is_stdout(path):  # opened again by its name, a file would be truncated
            sys.stdout.flush()
            file = open(1, "wb", closefd=False)  # noqa: SIM115
        elif target is None:
            file = path.open("wb")
        else:
            scratch = _scratch(target)
            try:
                file = scratch.open("wb")
                _copy_rights(target, scratch)
            except OSError as error:
                if error.errno not in REFUSALS or not target.exists():
                    raise
                file, scratch = io.BytesIO(), None
        with file:
            yield file
            file.flush()
            if scratch:
                os.fsync(file.fileno())
            elif isinstance(file, io.BytesIO):
                file.seek(0)
                _overwrite(target, file)
        if scratch:
            _replace(target, scratch)
    except BaseException as error:
        if scratch:
            with contextlib.suppress(OSError):
                scratch.unlink()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise CheckpointError(
                f"{path}: cannot be written ({error.strerror}); once that is put right, give the "
                "same command again"
            ) from None
        raise


def _copy_rights(target: Path, scratch: Path) -> None:
    """Give `scratch` the owner, group and mode of `target`, as far as that is allowed."""
    with contextlib.suppress(OSError, AttributeError):  # there is no target; Windows has no chown
        known = target.stat()
        try:
            os.chown(scratch, known.st_uid, known.st_gid)
        except PermissionError:  # only root may give a file away
            os.chown(scratch, -1, known.st_gid)
    with contextlib.suppress(OSError):
        scratch.chmod(stat.S_IMODE(target.stat().st_mode))


def _replace(target: Path, scratch: Path) -> None:
    """Rename `scratch` to `target`, or copy it where only that is possible."""
    try:
        scratch.replace(target)
    except OSError as error:
        if error.errno not in REFUSALS or not target.exists():
            raise
        with scratch.open("rb") as source:
            _overwrite(target, source)
        scratch.unlink()


def _overwrite(target: Path, source: BinaryIO) -> None:
    """Give the existing file `target` the content of `source`."""
    with target.open("r+b") as file:
        shutil.copyfileobj(source, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, content: object) -> None:
    """Write `content` to `path`, as `writing` does: str and bytes as they are, else torch.save."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # a file's name may be other bytes
    elif not isinstance(content, bytes):
        file = io.BytesIO()
        torch.save(content, file)
        content = file.getvalue()
    with writing(path) as file:
        file.write(content)


def check_output(path: Path, *others: Path) -> None:
    """Raise CheckpointError unless `writing` can write to `path`, for use before the work.

    Nor may it be one of `others`, which are read or written as well.
    """
    try:
        target = _target(path)
        if target is None:
            if not os.access(path, os.W_OK):
                raise OSError(0, "not allowed")
        elif target.exists():
            with target.open("r+b"):  # also tells a file on a read-only mount, or immutable
                pass
        else:
            if not target.parent.is_dir():
                raise OSError(0, f"there is no folder {target.parent}")
            _scratch(target).open("wb").close()  # tempfile tries for ever where Windows refuses
            _scratch(target).unlink()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
    there = path.exists()
    for other in others:
        if there == other.exists() and (
            path.samefile(other) if there else target == _target(other)
        ):
            raise CheckpointError(f"{path}: cannot be written, it is the same file as {other}")


# --- weights ------------------------------------------------------------------------------------


def read(path: str | Path) -> object:
    """The object that torch.save wrote to `path`; no code in it is run. Raises CheckpointError."""
    try:
        if Path(path).is_fifo():
            raise OSError(errno.ESPIPE, "a pipe can be read only once; give a file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ValueError("TorchScript")
                # torch.save does not compress, so nothing can be larger than the file; and
                # torch.load does not look at the checksums.
                stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
                if not stored or archive.testzip():
                    raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols: unreadable files raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        text = str(error).lower()
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, pickle.UnpicklingError) and "global" in text:
            reason = (
                "it holds Python objects that are not tensors or plain data (nothing was run); in "
                f"the program that wrote it, save the weights alone: {ALONE}"
            )
        elif text == "torchscript":
            reason = f"it is a TorchScript archive; save the weights alone instead: {ALONE}"
        elif data.is_lfs_pointer(path):
            reason = f"it is {data.LFS_POINTER}"
        elif str(path).endswith(".safetensors"):
            reason = (
                "it is in another format; convert it: "
                'torch.save(safetensors.torch.load_file("weights.safetensors"), "weights.pth")'
            )
        else:
            reason = (
                "it is empty, damaged, truncated, or was not written by torch.save; fetch or save "
                "it again"
            )
        raise CheckpointError(f"{path}: cannot be loaded: {reason}") from None


def save(path: Path, model: nn.Module, meta: dict, bits: int = 32) -> None:
    """Write the weights of `model` in the format above; `meta` needs arch and num_classes.

    Floats are stored as float32, -0.0 and denormal numbers as 0.0. Zero weights are left out where
    that makes the file smaller.
    `bits`: 32; 16, conv and linear weights in float16; or 2 to 8, these quantized as in
    `fake_quantize` and all other floats rounded to 11 significant bits. The parameter count does
    not change. Raises CheckpointError, also if a weight is too large for float16.
    """
    prunable = list(prune.weights(model))
    state = {name: _storable(tensor) for name, tensor in model.state_dict().items()}
    others = [t.flatten() for n, t in state.items() if n not in prunable and t.is_floating_point()]
    integers = [t.flatten() for t in state.values() if not t.is_floating_point()]
    parts = {"others": torch.cat(others), "integers": torch.cat(integers)}
    flat = torch.cat([state[name].flatten() for name in prunable])
    positions = flat.nonzero().squeeze(1)
    first = state[prunable[0]].flatten()
    if bits == 16:
        flat = flat.where(flat == 0, flat.sign() * flat.abs().clamp(min=SMALLEST_HALF)).half()
        if not flat.isfinite().all():
            raise CheckpointError("--bits 16: a weight is too large for half precision; try 8")
    elif bits < 16:
        whole, scales = zip(*(quantize(state[name], bits) for name in prunable[1:]), strict=True)
        flat = torch.cat([torch.zeros(len(first), dtype=torch.int8), *(w.flatten() for w in whole)])
        parts = {"scales": torch.cat(scales), "first": _round_mantissa(first), **parts}
        parts["others"] = _round_mantissa(parts["others"])
    if len(positions) < len(flat) / 4:
        flat = flat[positions]
        if bits < 16:
            in_first = int(first.count_nonzero())
            flat, parts["first"] = flat[in_first:], parts["first"][positions[:in_first]]
        steps = positions.diff(prepend=torch.tensor([-1]))
        gaps = torch.full((int((steps // MAX_GAP + 1).sum()),), MAX_GAP)
        gaps[(steps // MAX_GAP + 1).cumsum(0) - 1] = steps % MAX_GAP
        parts = {**parts, "values": flat, "gaps": gaps.to(torch.uint16)}
        parts = {name: _pack(tensor) for name, tensor in parts.items()}
    else:
        parts = {**parts, "values": flat[len(first) :].clone() if bits < 16 else flat}
        parts["gaps"] = None
    content = {
        "format": FORMAT,
        "version": VERSIONS[bits < 16],
        "meta": {**meta, "parameters": prune.count(model)},
        **({"bits": bits} if bits < 16 else {"half": bits == 16}),
        **parts,
    }
    write(path, content)


def _storable(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; floats as float32, exactly 0 where they count as such."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    return tensor.float().where(prune.nonzero(tensor), 0.0)


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of `weight`, float32 (O, ...), with a scale per output channel.

    Returns (q, scales): q int8 (int16 above 8 bits) of the same shape, |q| <= 2**(bits - 1) - 1,
    and scales float32 (O,), so that weight is about q * scale. For each channel 51 clipping
    thresholds are tried, from its largest magnitude down to half of that, and the one of the
    smallest squared error is used. Non-zero weights never become 0, so the count does not change.
    """
    most = 2 ** (bits - 1) - 1
    everything = weight.float().flatten(1)
    filled = everything != 0  # the search is over these, moved to the front of their rows
    columns = filled.byte().argsort(dim=1, descending=True, stable=True)[:, : filled.sum(1).max()]
    flat = everything.gather(1, columns)
    largest = everything.abs().amax(1, keepdim=True)
    least = torch.finfo(torch.float32).tiny
    best, errors = torch.zeros_like(flat), torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    for share in torch.linspace(1, 0.5, 51):
        scale = _round_mantissa(largest * (share / most)).clamp(min=least)
        whole = (flat / scale).round().clamp(-most, most)
        whole = whole.where((whole != 0) | (flat == 0), flat.sign())
        error = (whole * scale - flat).square().sum(1, keepdim=True)
        better = error < errors
        best, errors = whole.where(better, best), error.where(better, errors)
        scales = scale.where(better, scales)
    dtype = torch.int8 if bits <= 8 else torch.int16
    whole = torch.zeros_like(everything).scatter_(1, columns, best)
    return whole.to(dtype).view_as(weight), scales[:, 0]


def fake_quantize(model: nn.Module, bits: int) -> nn.Module:
    """A copy of `model` whose conv and linear weights have the values that `quantize` leaves.

    The first layer's have 11 significant bits instead: it is small, and quantized it would cost as
    much accuracy as all other layers together (docs/experiments.md).
    """
    model = copy.deepcopy(model)
    first, *others = (weight.detach() for weight in prune.weights(model).values())
    first.copy_(_round_mantissa(first))
    for weight in others:
        whole, scales = quantize(weight, bits)
        weight.copy_((whole.flatten(1) * scales[:, None]).view_as(weight))
    return model


def _round_mantissa(numbers: Tensor) -> Tensor:
    """float32 rounded to the 11 significant bits of float16, of any magnitude: packs to half."""
    return ((numbers.contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


def _pack(tensor: Tensor) -> Tensor:
    """`tensor` (N,), compressed, as uint8: the lowest bytes of all numbers, then the second, ...

    Of the four bytes of a trained weight, the highest (sign and exponent) shrinks to a quarter, the
    others hardly at all. The xz container adds a checksum.
    """
    planes = tensor.view(torch.uint8).view(-1, tensor.itemsize).t().contiguous()
    packed = lzma.compress(planes.numpy().tobytes(), check=lzma.CHECK_CRC32, filters=LZMA)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _unpack(packed: Tensor, dtype: torch.dtype, most: int) -> Tensor:
    """The inverse of `_pack`, (N,) of `dtype`; at most `most` numbers. Raises ValueError."""
    size = dtype.itemsize
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**24)
        raw = decompressor.decompress(packed.numpy().tobytes(), most * size + 1)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from None
    if len(raw) > most * size or len(raw) % size or not decompressor.eof:
        raise ValueError("not the size that was announced")
    if not raw:
        return torch.empty(0, dtype=dtype)
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(size, -1)
    return planes.t().contiguous().view(-1).view(dtype)


def load(
    path: str | Path, device: str | torch.device = "cpu", stem: int | None = None
) -> tuple[nn.Module, dict]:
    """`(model, meta)`: a ResNet of `models.build` in eval mode, and the file's description of it.

    Reads files of `save`, and third-party state dicts of torchvision's ResNets: plain, with
    `torch.nn.utils.prune` masks (`weight_orig`, `weight_mask`), inside other dicts ("state_dict",
    "model", "net", ...), and with a prefix on all keys ("module.", "resnet50.", ...). BatchNorm's
    counters may be missing, as in PyTorch before 0.4.1. For these, `meta` has arch, num_classes,
    stem and parameters, and as "ignored" the names of tensors that are not part of the network. A
    3x3 stem does not show whether a max-pool follows: it counts as stem 1 unless `stem` says 2.
    Raises CheckpointError.
    """
    content = read(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        model, meta = _from_file(path, content)
    else:
        model, meta = _from_state_dict(path, content, stem)
    if stem not in (None, meta["stem"]):
        raise CheckpointError(
            f"{path}: --stem {stem}, but its stem is {meta['stem']}; leave --stem out"
        )
    if not all(bool(t.isfinite().all()) for t in model.state_dict().values()):
        raise CheckpointError(f"{path}: has weights that are not finite")
    variances = (t for name, t in model.state_dict().items() if name.endswith("running_var"))
    if any(bool((t < 0).any()) for t in variances):
        raise CheckpointError(f"{path}: a BatchNorm variance (running_var) is negative")
    parameters = prune.count(model)
    if parameters != meta.setdefault("parameters", parameters):
        raise CheckpointError(f"{path}: says {meta['parameters']} parameters, but has {parameters}")
    if parameters > meta.get("budget", parameters):
        raise CheckpointError(
            f"{path}: has {parameters:,} parameters, more than its budget of {meta['budget']:,}"
        )
    if "image_size" in meta:
        model.image_size = meta["image_size"]  # which `models.infer` checks
    return model.to(device).eval(), meta


def add_image_flags(parser: argparse._ActionsContainer) -> None:
    """The flags that say what `fill_missing_meta_` adds."""
    parser.add_argument(
        "--image-size", type=int, metavar="N",
        help="side of the network's images in pixels, if the weights file does not say (28)",
    )  # fmt: skip
    parser.add_argument(
        "--color",
        action="store_true",
        help="the network's images are in color, if the file does not say (default: grayscale)",
    )
    parser.add_argument(
        "--stem", type=int, choices=models.STEMS,
        help="total stride of the network's stem, if the file does not say (4 if 7x7, 1 if 3x3)",
    )  # fmt: skip


def fill_missing_meta_(
    meta: dict, path: str | Path, image_size: int | None, color: bool, stem: int | None
) -> str | None:
    """Complete the `meta` of the file at `path` in place: image size (28) and grey or color.

    Returns a line for the user on everything that was assumed or ignored, else None. Raises
    CheckpointError if file and user disagree, and DataError for an `image_size` out of range.
    """
    data.check_image_size(image_size)
    silent = "image_size" not in meta
    for key, said, default in (
        ("image_size", image_size, 28),
        ("grey", False if color else None, True),
    ):
        known = meta.setdefault(key, default if said is None else said)
        if said not in (None, known):
            flag, value = ("--color", "") if key == "grey" else ("--image-size", f" {said}")
            raise CheckpointError(
                f"{path}: {flag}{value}, but it is for {_images(meta)} images; leave {flag} out"
            )
    notes = []
    if silent:
        guess = ", stem 1" if meta["stem"] == 1 and not stem else ""
        said = image_size and color and (stem or meta["stem"] != 1)
        notes.append(
            f"{path} does not say what images it is for: taken to be {_images(meta)}{guess}, "
            "scaled to [-1, 1]"
            + ("" if said else "; --image-size, --color and --stem say otherwise")
        )
    if note := pop_ignored_(meta, path):
        notes.append(note)
    return "; ".join(notes) or None


def pop_ignored_(meta: dict, path: str | Path) -> str | None:
    """A line for the user on what `load` ignored in the file at `path`; None if nothing."""
    ignored = meta.pop("ignored", None)
    return ignored and f"{path} also holds {ignored}, which is ignored"


def _images(meta: dict) -> str:
    return "{0}x{0}, {1}".format(
        meta["image_size"], "grayscale" if meta.get("grey", True) else "color"
    )


class _Broken(Exception):
    """The parts of a file do not fit together."""


def _require(condition: bool) -> None:
    if not condition:
        raise _Broken


def _from_file(path: str | Path, content: dict) -> tuple[nn.Module, dict]:
    """The network in a file of `save`."""
    try:
        meta = _checked_meta(path, content)
        model = models.build(meta["arch"], meta["num_classes"], stem=meta["stem"])
        state, prunable = model.state_dict(), prune.weights(model).keys()
        layers = [state[name] for name in prunable]
        parts = _unpacked(content, sum(layer.numel() for layer in layers))
        floats = [t for n, t in state.items() if n not in prunable and t.is_floating_point()]
        integers = [t for t in state.values() if not t.is_floating_point()]
        for tensors, source in (
            (layers, _values(content.get("bits", 32), layers, parts)),
            (floats, parts["others"]),
            (integers, parts["integers"]),
        ):
            sizes = [tensor.numel() for tensor in tensors]
            _require(sum(sizes) == len(source))
            for tensor, part in zip(tensors, source.split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))
    except _Broken:
        raise CheckpointError(
            f"{path}: damaged, its parts do not fit together; fetch or save it again"
        ) from None
    return model, meta


def _checked_meta(path: str | Path, content: dict) -> dict:
    """The file's description of its network, "stem" as one of models.STEMS."""
    version = content.get("version")
    _require(isinstance(version, int))
    if version not in VERSIONS:
        known = " and ".join(str(known) for known in VERSIONS)
        raise CheckpointError(
            f"{path}: format version {version}, but this version of the project reads {known}; use "
            "the version that wrote it, or a later one"
        )
    meta = content.get("meta")
    _require(isinstance(meta, dict) and type(meta.get("num_classes")) is int)
    _require(0 < meta["num_classes"] <= MAX_CLASSES)
    meta.pop("ignored", None)  # nothing is, in these files
    kinds = {
        "budget": int,
        "parameters": int,
        "image_size": int,
        "grey": bool,
        "dataset": str,
        "classes": list,
    }
    _require(all(type(meta[key]) is kind for key, kind in kinds.items() if key in meta))
    classes = meta.get("classes", ["?"] * meta["num_classes"])
    _require(len(classes) == meta["num_classes"] and all(isinstance(c, str) for c in classes))
    _require(0 < meta.get("image_size", 28) <= data.SIZES[1])
    accuracy = meta.get("val_accuracy")  # None if nothing was held out
    _require(accuracy is None or (type(accuracy) is float and 0 <= accuracy <= 1))
    if meta.get("arch") not in models.ARCHITECTURES:
        raise CheckpointError(f"{path}: unknown architecture {meta.get('arch')!r}")
    stem = meta.setdefault("stem", 4)
    if type(stem) is not int or stem not in models.STEMS:
        raise CheckpointError(f"{path}: unknown stem {stem!r}")
    return meta


def _unpacked(content: dict, most: int) -> dict[str, Tensor]:
    """The tensors of a file, by their names in it; none has more than `most` numbers."""
    bits, packed = content.get("bits", 32), content.get("gaps") is not None
    _require(type(bits) is int and (bits == 32 or 2 <= bits <= 8))
    dtypes, parts = dict(DTYPES), {}
    if bits < 32:
        dtypes["values"] = torch.int8
    else:
        del dtypes["scales"], dtypes["first"]
        dtypes["values"] = torch.float16 if content.get("half") is True else torch.float32
    if not packed:
        del dtypes["gaps"]
    for name, dtype in dtypes.items():
        part = content.get(name)
        wanted = torch.uint8 if packed else dtype
        _require(_is_plain(part) and part.dtype == wanted and part.dim() == 1)
        try:
            parts[name] = _unpack(part, dtype, most) if packed else part
        except ValueError:
            raise _Broken from None
    return parts


def _values(bits: int, layers: list[Tensor], parts: dict[str, Tensor]) -> Tensor:
    """All weights of `layers`, float32, one after the other."""
    flat = torch.zeros(sum(layer.numel() for layer in layers), dtype=torch.float32)
    values = parts["values"].float()
    if bits < 32:
        values = torch.cat([parts["first"], values])
    if "gaps" in parts:
        gaps = parts["gaps"].long()
        positions = gaps.cumsum(0)[gaps != MAX_GAP] - 1
        _require(not len(positions) or (positions[0] >= 0 and positions[-1] < len(flat)))
        _require(not (positions.diff() <= 0).any())
    else:
        positions = torch.arange(len(flat))
    _require(len(positions) == len(values))
    flat[positions] = values
    if bits < 32:
        sizes = torch.tensor([layer[0].numel() for layer in layers[1:] for _ in layer])
        whole = flat[-sizes.sum() :]
        _require(len(parts["scales"]) == len(sizes) and whole.abs().max() <= 2 ** (bits - 1) - 1)
        whole *= parts["scales"].repeat_interleave(sizes)
    return flat


def _from_state_dict(path: str | Path, content: object, stem: int | None) -> tuple[nn.Module, dict]:
    """A model from anybody's state dict."""
    flat = _flatten(content) if isinstance(content, dict) else {}
    if not any(isinstance(tensor, Tensor) for tensor in flat.values()):
        inside = ", ".join(list(map(str, content))[:5])[:100] if isinstance(content, dict) else ""
        holds = f"only {inside}" if inside else f"a {type(content).__name__}"
        raise CheckpointError(f"{path}: holds no state dict, {holds}; save one: {ALONE}")
    prefix, others = _find_network(path, flat)
    apart = tuple(others)
    tensors = {n: t for n, t in flat.items() if isinstance(t, Tensor) and not n.startswith(apart)}
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    ignored = [other.rstrip(".") for other in others]
    ignored += [name for name in tensors if not name.startswith(prefix)]
    for name, tensor in state.items():
        if not _is_plain(tensor) or tensor.dtype not in FOREIGN_DTYPES:
            raise CheckpointError(f"{path}: {name} is not a plain tensor of numbers")
    masks = {}
    for name in [name[:-5] for name in state if name.endswith("_orig")]:
        masks[name] = state.pop(f"{name}_mask", None)
        state[name] = state.pop(f"{name}_orig")
        if masks[name] is None or masks[name].shape != state[name].shape:
            raise CheckpointError(f"{path}: {name}_orig has no mask that fits")
    arch = "resnet50" if "layer1.0.conv3.weight" in state else "resnet18"
    fc = state.get("fc.weight")
    if fc is None or fc.dim() != 2 or not 0 < len(fc) <= MAX_CLASSES:
        raise CheckpointError(
            f"{path}: not the weights of a torchvision ResNet, {prefix}fc.weight is missing"
        )
    first = state.get("conv1.weight")
    if first is None or first.shape[2:] != (3, 3):
        stem = 4
    elif stem != 2:  # the max-pool leaves no trace
        stem = 1
    model = models.build(arch, len(fc), stem=stem)
    own = model.state_dict()
    for name in own:
        if name.endswith("num_batches_tracked"):
            counter = state.get(name, own[name])
            if counter.numel() == 1:  # in half precision, large ones are infinite
                state[name] = counter.double().nan_to_num(0, 0, 0).long().view(())
        if name not in state:
            raise CheckpointError(f"{path}: not a {arch}, {name} is missing")
        if state[name].shape != own[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            raise CheckpointError(f"{path}: not a torchvision {arch}, {name} is {shapes}")
        if state[name].is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(
                f"{path}: not a torchvision {arch}, {name} is {state[name].dtype}"
            )
    for name in sorted(state.keys() - own.keys()):
        if not NOT_WEIGHTS.match(name):
            advice = f"if that is no part of the network, save it without: {ALONE}"
            if name.startswith("layer"):
                advice = "only ResNet18 and ResNet50 are supported"
            raise CheckpointError(f"{path}: not a torchvision {arch}, it also has {name}; {advice}")
        ignored.append(prefix + name)
    model.load_state_dict(
        {name: state[name] * masks[name] if name in masks else state[name] for name in own}
    )
    meta = {"arch": arch, "num_classes": len(fc), "stem": stem}
    if ignored:
        more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
        meta["ignored"] = runtime.printable(", ".join(ignored[:5]) + more)
    return model, meta


def _flatten(content: dict) -> dict[str, object]:
    """The entries of a dict and of the dicts within it, with their names joined by dots."""
    flat, seen, inner = {}, set(), [("", content)]
    while inner:
        prefix, entries = inner.pop(0)
        if id(entries) in seen:  # a damaged file can hold a dict that holds itself
            continue
        seen.add(id(entries))
        for name, value in entries.items():
            if isinstance(name, str) and isinstance(value, dict) and len(prefix) < 100:
                inner.append((f"{prefix}{name}.", value))
            elif isinstance(name, str):
                flat[prefix + name] = value
    return flat


def _find_network(path: str | Path, flat: dict[str, object]) -> tuple[str, list[str]]:
    """The prefix of the network's names in `flat`, and those of averages of it, which are ignored.

    An average (EMA, SWA) is the network only if there is nothing else.
    """
    names = sorted(name for name in flat if re.search(r"(^|\.)conv1\.weight(_orig)?$", name))
    found = {name.rpartition("conv1.")[0] for name in names}
    found = sorted(  # not those of blocks
        prefix for prefix in found if any(name.startswith(f"{prefix}layer1.") for name in flat)
    )
    plain = [prefix for prefix in found if not AVERAGED.search(prefix)] or found
    if len(plain) > 1:
        raise CheckpointError(
            f"{path}: holds several networks ({', '.join(plain)}); save the weights of one alone: "
            f"{ALONE}"
        )
    if not plain:
        raise CheckpointError(
            f"{path}: not the weights of a torchvision ResNet, it has no conv1.weight and layer1"
        )
    return plain[0], [prefix for prefix in found if prefix != plain[0]]


def _is_plain(tensor: object) -> bool:
    """A tensor whose numbers are all there: a stride of 0 makes one number in a file a billion."""
    return (
        isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not (tensor.is_quantized or tensor.is_nested)
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )
