"""Find, fetch, read and split images, as uint8 tensors.

Fashion-MNIST by default; by name, other data sets of torchvision; or an image folder,
`train/<class>/*.png|jpg|...`, with optional `val/` and `test/`.
"""

import contextlib
import functools
import gzip
import hashlib
import itertools
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile
from torch import Generator, Tensor

import runtime

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# Fashion-MNIST's four files, by the MD5 of their unpacked content: archives differ by who packed.
CONTENT_MD5 = {
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": "train-images-idx3-ubyte",
    "9018921c3c673c538a1fc5bad174d6f9": "train-labels-idx1-ubyte",
    "8181f5470baa50b63fa0f6fddb340f0a": "t10k-images-idx3-ubyte",
    "15d484375f8d13e6eb1aabb0c3f46965": "t10k-labels-idx1-ubyte",
}
FILES = tuple(CONTENT_MD5.values())
MOST_CONTENT = 2**26  # bytes that are unpacked of one of them; the largest has 47 million
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
CACHE_DIR = Path(__file__).resolve().parent / "data"
DEBIAN_CACHE = CACHE_DIR / "debian"
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
VALIDATION = 5000  # images held out for validation, at most a fifth, the same share of each class
# By the names of --dataset, apart from fashion-mnist, which has sources of its own.
TORCHVISION = {"mnist": "MNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
# Images of each class, in training and test set. torchvision does not look into unpacked IDX files.
LABEL_COUNTS = {
    "mnist": (
        (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
        (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    ),
    "kmnist": ((6000,) * 10, (1000,) * 10),
}
DATASETS = ("fashion-mnist", *TORCHVISION)
FLIPPABLE = ("fashion-mnist", "cifar10", "folder")  # whose mirrored images still are of their class
SPLITS = {  # names of the folders in an image folder, in small or capital letters
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Formats of which PIL reads headers alone, and one whose signed numbers it takes for unsigned.
NOT_DECODED = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")
STILL = ("MPO", "PSD")  # formats whose further frames are previews or layers of the first
CHUNK = 10_000  # images in memory at a time, for prediction; and how many bytes of them
MOST_BYTES = 2**28
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")  # PIL's modes
GREY = ("1", "L", "LA", "I", *SIXTEEN_BITS)
SIZES = (8, 512)  # of the images, smallest and largest
CHANNELS = 4  # so few pixels a side count as the channels of one image (H, W, C)


class DataError(runtime.UserError):
    """The images cannot be found or are damaged."""


@dataclass(frozen=True)
class Source:
    """Where a data set is, its classes, and the images that are made of it."""

    name: str  # one of DATASETS, or "folder"
    path: Path
    classes: tuple[str, ...]
    image_size: int  # pixels a side
    grey: bool  # else color
    splits: dict[str, Path] = field(default_factory=dict)  # folders of an image folder, by SPLITS
    notes: tuple[str, ...] = ()  # lines for the user: what was left out or assumed


# --- finding and fetching ---------------------------------------------------------------------


def check_image_size(size: int | None) -> None:
    """Raises DataError if --image-size is out of range."""
    if size is not None and not SIZES[0] <= size <= SIZES[1]:
        raise DataError(f"--image-size {size}: must be from {SIZES[0]} to {SIZES[1]}")


def find(
    folder: str | Path | None = None, dataset: str = "fashion-mnist", image_size: int | None = None
) -> Source:
    """The data set `dataset`, or the image folder `folder` if it has a folder of SPLITS.

    Fashion-MNIST: in `folder`, if it is given, else Debian's or downloaded. Images are resized to
    `image_size` pixels a side (default: their own size; 28 for an image folder). Raises DataError.
    """
    check_image_size(image_size)
    if folder is not None and (splits := _splits(Path(folder))):
        if dataset != "fashion-mnist":
            raise DataError(
                f"--dataset {dataset}: {folder} is an image folder ({_names(splits.values())}); "
                "give --dataset or --data, not both"
            )
        return _folder_source(Path(folder), splits, image_size or 28)
    if dataset == "fashion-mnist":
        return Source(dataset, _find_fashion_mnist(folder), CLASSES, image_size or 28, grey=True)
    path = CACHE_DIR if folder is None else Path(folder)
    known = _torchvision(dataset, path, train=True)
    size, grey = known.data.shape[1], known.data.ndim == 3
    return Source(dataset, path, tuple(known.classes), image_size or size, grey)


def find_for_weights(weights: str | Path, meta: dict, folder: str | Path | None = None) -> Source:
    """The data set whose test images match a checkpoint: in `folder`, else in the default places.

    `meta` is the checkpoint's metadata. It decides the image size, grayscale or color, and the
    order of the classes, of which an image folder may lack some. Raises DataError, also for images
    of other classes.
    """
    name = meta.get("dataset", "fashion-mnist")
    if name == "folder" and folder is None:
        raise DataError(f"{weights}: trained on an image folder; give IMAGES or --data")
    if name not in DATASETS or (folder is not None and _splits(Path(folder))):
        name = "fashion-mnist"
    source = find(folder, name, meta["image_size"])
    if not has_split(source, "test"):
        raise DataError(f"{source.path}: has no folder test/; add one, or leave out --data")
    theirs = tuple(unicodedata.normalize("NFC", c) for c in meta.get("classes", source.classes))
    if "classes" not in meta and meta["num_classes"] != len(source.classes):
        hint = "; a class without images needs an empty folder" if source.splits else ""
        raise DataError(
            f"{weights}: has {meta['num_classes']} classes, but {source.path} has "
            f"{len(source.classes)}; give images of these classes with --data{hint}"
        )
    known, here = set(theirs), set(source.classes)
    # An image folder may have an order of its own, and lack some of the classes.
    fits = here <= known and len(known) == len(theirs)
    if theirs != source.classes and not (source.splits and fits):
        raise DataError(
            f"{weights}: was trained for the classes {_some(theirs, 10)}, but {source.path} has "
            f"the classes {_some(source.classes, 10)}; give images of these classes with --data"
        )
    source = replace(source, classes=theirs, grey=meta.get("grey", source.grey))
    if not source.splits:
        return source
    there = set(_list_classes(source, "test")[1].tolist())
    missing = [name for label, name in enumerate(theirs) if label not in there]
    note = f"{source.splits['test']}: has no images of the classes {_some(missing)}"
    return replace(source, notes=(*source.notes, *([note] if missing else [])))


def _torchvision(dataset: str, path: Path, train: bool):
    """torchvision's data set in `path`; CACHE_DIR is where it is downloaded. Raises DataError."""
    found = _find_torchvision(dataset, path, train)
    if dataset in LABEL_COUNTS:
        labels = np.asarray(found.targets, np.uint8)
        header = struct.pack(">BBBBI", 0, 0, 8, 1, len(labels))
        digest = hashlib.md5(header + labels.tobytes(), usedforsecurity=False).hexdigest()
        counts = tuple(np.bincount(labels, minlength=10))
        if digest in CONTENT_MD5 or counts != LABEL_COUNTS[dataset][not train]:
            place = path / TORCHVISION[dataset] / "raw"
            again = "rename or delete it" if path == CACHE_DIR else "leave out --data"
            raise DataError(
                f"{place}: the labels in this folder are not those of {dataset}; {again}, and the "
                "files are downloaded"
            )
    return found


def _find_torchvision(dataset: str, path: Path, train: bool):
    """As `_torchvision`, whatever its files contain."""
    import torchvision

    kind = getattr(torchvision.datasets, TORCHVISION[dataset])
    with contextlib.suppress(Exception):
        return kind(path, train, download=False)
    if path != CACHE_DIR:  # a folder of the user's, in which nothing is written
        why = _why_not(path, f"torchvision's complete files of {dataset}")
        raise DataError(f"{path}: {why}; without --data {dataset} is downloaded")
    try:
        with _fetching():
            with contextlib.suppress(Exception):  # another process has fetched it meanwhile
                return kind(path, train, download=False)
            _remove_damaged(path / TORCHVISION[dataset] / "raw")
            return kind(path, train, download=True)
    except Exception as error:  # torchvision lets out whatever stops it
        for empty in (path / TORCHVISION[dataset] / "raw", path / TORCHVISION[dataset]):
            with contextlib.suppress(OSError):
                empty.rmdir()  # only if nothing is in it
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: {dataset} was not found and could not be downloaded ({reason}); try again, "
            "or give a folder with torchvision's files as --data DIR"
        ) from None


def _fetching() -> contextlib.AbstractContextManager:
    """Held by the one process that may change CACHE_DIR; others wait.

    Whoever holds it and finds a damaged file may delete it: nobody else is downloading.
    """
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    return runtime.lock(CACHE_DIR.with_name(f".{CACHE_DIR.name}.lock"), wait=True)


def _remove_damaged(folder: Path) -> None:
    """Delete the IDX files in `folder` that are cut off: torchvision keeps them if it has all."""
    for name in FILES:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file() and not _is_complete(path):
                path.unlink()


def _find_fashion_mnist(folder: str | Path | None) -> Path:
    """The folder with the four files."""
    if folder is not None:
        if found := _within(Path(folder)):
            return found
        raise DataError(f"{folder}: {_why_not(Path(folder))}")
    if found := _find_complete():
        return found
    reasons = []
    try:
        with _fetching():
            for fetch in (lambda: None, _fetch_torchvision, _fetch_debian):
                try:
                    fetch()
                except Exception as error:  # whatever stops one source, the next is tried
                    reasons.append(" ".join(str(error).split())[:200])
                if found := _find_complete():
                    return found
                _remove_damaged(CACHE_DIR / "FashionMNIST" / "raw")
    except OSError as error:
        reasons.append(str(error))
    raise DataError(
        f"Fashion-MNIST was not found and could not be downloaded ({'; '.join(reasons)}); give a "
        "folder with its four *-ubyte.gz files as --data DIR, or install the Debian package "
        f"{DEBIAN_PACKAGE}"
    )


def _why_not(folder: Path, files: str = "the four Fashion-MNIST files (*-ubyte.gz)") -> str:
    """Why no images are found in `folder`, and what to do."""
    if not folder.is_dir():
        return "is not a folder" if folder.exists() else "there is no such folder"
    places = _folders(folder)
    needed = f"neither {files} nor a folder train/ or test/ is there"
    with contextlib.suppress(DataError):  # of folders that are not asked for
        for place in itertools.islice(_folders_below(folder), 1000):
            if _splits(place):
                return f"{needed}; did you mean {place}?"
    classes = [place for place in places if image_files(place)]
    if outer := [p for p in classes if any(image_files(inner) for inner in _folders(p))]:
        known = "/, ".join(names[0] for names in SPLITS.values())
        return f"{needed}; rename those with folders of classes ({_names(outer)}) to {known}/"
    if classes:
        return (
            f"{needed}; move its folders of images ({_names(classes)}) to {folder}/train/ for "
            f"training, or to {folder}/test/ for predictions"
        )
    return needed


def _within(folder: Path) -> Path | None:
    """`folder`, or torchvision's layout below it, if all four files (.gz or raw) are there."""
    for place in (folder, folder / "FashionMNIST" / "raw"):
        if all(_idx_path(place, name).is_file() for name in FILES):
            return place
    return None


def _find_complete() -> Path | None:
    """A folder with all four files, none cut off: Debian's, or of an earlier download."""
    for place in (DEBIAN_DIR, CACHE_DIR, CACHE_DIR / "FashionMNIST" / "raw", DEBIAN_CACHE):
        if (found := _within(place)) and all(_is_complete(_idx_path(found, n)) for n in FILES):
            return found
    return None


def _is_complete(path: Path) -> bool:
    """Whether an IDX file is as long as its header says; an archive says its length at its end."""
    try:
        with _unpacked(path) as file:
            start, shape = _idx_header(file.read(16))
        with path.open("rb") as file:
            length = file.seek(-4 if path.suffix == ".gz" else 0, os.SEEK_END)
            length = int.from_bytes(file.read(), "little") if path.suffix == ".gz" else length
        return length == start + math.prod(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        return False


def _fetch_torchvision() -> None:
    import torchvision

    torchvision.datasets.FashionMNIST(CACHE_DIR, download=True)


def _fetch_debian() -> None:
    """Fetch and unpack Debian's package without root, with apt's state in a scratch folder."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE_DIR) as name:
        scratch = Path(name)
        for sub in ("state/lists/partial", "cache/archives/partial"):
            (scratch / sub).mkdir(parents=True)
        settings = {
            "Dir::State": scratch / "state",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": scratch / "cache",
            "APT::Sandbox::User": "",  # apt's own user cannot write to the scratch folder
        }
        apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
        for command in (["update"], ["download", DEBIAN_PACKAGE]):
            done = subprocess.run(apt + command, cwd=scratch, capture_output=True, text=True)
            if done.returncode != 0:
                raise OSError(f"apt-get {command[0]} failed: {done.stderr}")
        (package,) = scratch.glob(f"{DEBIAN_PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, scratch / "tree"], check=True)
        shutil.rmtree(DEBIAN_CACHE, ignore_errors=True)  # incomplete, or it would be in use
        shutil.move(scratch / "tree" / DEBIAN_DIR.relative_to("/"), DEBIAN_CACHE)


# --- loading ------------------------------------------------------------------------------------


def load(source: Source, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of `split` "train", "val" (image folders only) or "test", on the CPU.

    Returns uint8 images (N, H, H), or (N, 3, H, H) if in color, and int64 labels (N,). Raises
    DataError for other or damaged files.
    """
    images, labels = zip(*iter_batches(source, split), strict=True)
    return torch.cat(images), torch.cat(labels)


def iter_batches(
    source: Source, split: str, background: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `load`, in batches of `chunk_size` images; `background` as in `read_image`."""
    if source.name == "folder":
        images, labels = _list_classes(source, split)
    elif source.name == "fashion-mnist":
        images, labels = _load_idx(source.path, split)
    else:
        known = _torchvision(source.name, source.path, train=split == "train")
        images, labels = torch.as_tensor(known.data), torch.as_tensor(known.targets)
        images = images if images.dim() == 3 else images.permute(0, 3, 1, 2)
    read = functools.partial(read_images, background=background)
    prepare = read if source.name == "folder" else resize
    chunk = chunk_size(source.image_size, source.grey)
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        yield prepare(images[part], source.image_size, source.grey), labels[part]


def source_files(source: Source, split: str) -> list[Path]:
    """The files that `iter_batches` reads, in its order (not those of torchvision)."""
    if source.name == "folder":
        return _list_classes(source, split)[0]
    return [_idx_path(source.path, name) for name in FILES]


def chunk_size(size: int, grey: bool) -> int:
    """How many images of `size` pixels a side are kept in memory at a time, before prediction."""
    return max(1, min(CHUNK, MOST_BYTES // ((1 if grey else 3) * size**2)))


def has_split(source: Source, split: str) -> bool:
    """Whether there are images of `split`."""
    return split in source.splits if source.name == "folder" else split != "val"


def digest(source: Source) -> str | None:
    """SHA-256 over names and sizes of an image folder's training and validation files; else None.

    Images that are added, removed, or changed in size are another training set, and another split.
    """
    if source.name != "folder":
        return None
    names = hashlib.sha256()
    for split in ("train", "val"):
        for path in source_files(source, split) if has_split(source, split) else ():
            place = os.fsencode(path.relative_to(source.path).as_posix())
            names.update(place + f"\0{path.stat().st_size}\n".encode())
    return names.hexdigest()


def load_train(
    source: Source, full_train: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """(images, labels) to train on, in a fixed random order, and for validation, as in `load`.

    Validation images are those of `val/`, else a share of the training images that is held out;
    None with `full_train`. Raises DataError, also if no class has an image to hold out.
    """
    images, labels = load(source, "train")
    if has_split(source, "val"):
        more, their = load(source, "val")
        train, val = torch.arange(len(labels)), torch.arange(len(labels), len(labels) + len(their))
        images, labels = torch.cat([images, more]), torch.cat([labels, their])
    else:
        train, val = split_validation(labels, min(VALIDATION, len(labels) // 5))
        if not full_train and len(val) == 0:
            raise DataError(
                f"{source.path}: no class has two images, so none can be held out for validation; "
                "give more, or a folder val/, or --full-train"
            )
    if full_train:
        train, val = torch.arange(len(labels)), None
    if full_train or has_split(source, "val"):  # image folders are sorted by class
        train = train[torch.randperm(len(train), generator=Generator().manual_seed(0))]
    kept = None if val is None or len(val) == 0 else (images[val], labels[val])
    return (images[train], labels[train]), kept


def resize(images_u8: Tensor, size: int, grey: bool) -> Tensor:
    """Resize and convert uint8 images (N, H, W) or (N, 3, H, W): to uint8 (N, size, size), colors
    by their luminance, if `grey`, else to (N, 3, size, size)."""
    if not grey and images_u8.dim() == 3:
        images_u8 = images_u8[:, None].expand(-1, 3, -1, -1)
    if images_u8.dim() == 4 - grey and images_u8.shape[-2:] == (size, size):
        return images_u8
    shape = (size, size) if grey else (3, size, size)
    fitted = torch.empty((len(images_u8), *shape), dtype=torch.uint8)
    pixels = max(math.prod(images_u8.shape[1:]), math.prod(shape))
    piece = max(1, MOST_BYTES // 16 // pixels)  # in float32, and more than once
    for part, out in zip(images_u8.split(piece), fitted.split(piece), strict=True):
        images = part.float() if part.dim() == 4 else part[:, None].float()
        if grey and images.shape[1] == 3:
            images = (images * LUMINANCE).sum(1, keepdim=True).round()
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        out.copy_(images.round().clamp(0, 255).view_as(out))
    return fitted


def _load_idx(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte")
    return images, _read_idx(folder, f"{prefix}-labels-idx1-ubyte").long()


def _read_idx(folder: Path, name: str) -> Tensor:
    """One of Fashion-MNIST's files; its MD5 says that its format and labels are right, too."""
    path = _idx_path(folder, name)
    again = "; delete it to have it fetched again" if CACHE_DIR in path.parents else ""
    try:
        with _unpacked(path) as file:
            content = file.read(MOST_CONTENT)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged, or cannot be read ({_reason(error)}){again}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if CONTENT_MD5.get(found) != name:
        raise DataError(
            f"{path}: damaged, or not Fashion-MNIST's: the MD5 of its unpacked content is {found}"
            + (
                again
                or "; other data sets: train.py --dataset NAME, or images in DIR/train/<class>/"
            )
        )
    start, shape = _idx_header(content)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _idx_path(folder: Path, name: str) -> Path:
    """The archive of an IDX file, or the file where there is none."""
    archive = folder / f"{name}.gz"
    return archive if archive.is_file() else folder / name


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """A file or a pipe, unpacked if its content is that of gzip."""
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        yield gzip.GzipFile(fileobj=file) if packed else file


def _idx_header(content: bytes) -> tuple[int, list[int]]:
    """(where the data begin, their shape) of an IDX file of unsigned bytes: 0, 0, 8, the number of
    dimensions, big-endian int32 sizes, data."""
    start = 4 + 4 * content[3]
    return start, np.frombuffer(content, ">i4", content[3], offset=4).tolist()


def split_validation(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices (train, validation): a fixed, stratified permutation, the same in every run.

    About `size` are held out, of each class that has two images at least one.
    """
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    count = labels.bincount()
    share = (count * size // len(labels)).maximum((count > 1).long())  # of each class
    rank = torch.empty_like(labels)  # of each image within its class, in the order drawn
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    held = rank[order] < share[labels[order]]
    return order[~held], order[held]


# --- image folders ------------------------------------------------------------------------------


def _splits(folder: Path) -> dict[str, Path]:
    """The folders of an image folder, by the names of SPLITS; {} if it is none."""
    found, folders = {}, _folders(folder) if folder.is_dir() else []
    for split, names in SPLITS.items():
        places = [place for place in folders if place.name.lower() in names]
        if len(places) > 1:
            raise DataError(
                f"{folder}: {_names(places)} are all for the split {split}; rename or remove one"
            )
        if places:
            found[split] = places[0]
    return found


def _folder_source(folder: Path, splits: dict[str, Path], image_size: int) -> Source:
    """An image folder: the classes are the folders in train/ (or else val/ or test/), by name.

    It is grayscale if all image files of that folder are stored as grayscale.
    """
    found = {split: _class_folders(place) for split, place in splits.items()}
    split, first = next(iter(splits.items()))
    classes = tuple(found[split])
    if len(classes) < (2 if split == "train" else 1):
        least = ", at least two" if split == "train" else ""
        raise DataError(f"{first}: needs a folder of images for each class{least}")
    files, others, notes = [], [], []
    if unused := [p for p in _folders(folder) if p not in splits.values()]:
        known = "; ".join(" or ".join(names) for names in SPLITS.values())
        notes.append(
            f"{folder}: not used: {_names(unused)}; folders that are used are called {known}"
        )
    loose = [path for path in _files(folder) if is_image(path)]
    for split, members in found.items():
        loose += _files(splits[split])
        for name, places in members.items():
            if name not in classes:
                raise DataError(
                    f"{places[0]}: there is no such class in {first}; rename or remove this folder"
                )
            if len(places) > 1:
                notes.append(
                    f"{splits[split]}: {len(places)} folders are called {name}, in several Unicode "
                    "normalization forms: taken for one class"
                )
            for place in places:
                images, more = walk(place)
                files += images
                others += more
        if split == next(iter(splits)):
            in_first = len(files)
    if loose:
        notes.append(f"left out, in no folder of a class ({len(loose)}): {_some(loose)}")
    modes, said = inspect(files, others)
    grey = set(GREY).issuperset(modes[:in_first])
    return Source("folder", folder, classes, image_size, grey, splits, (*notes, *said))


def _class_folders(place: Path) -> dict[str, list[Path]]:
    """The folders of each class in a split's folder, by class name.

    The name is in Unicode's normal form NFC: file systems and archives differ in theirs, so that a
    class can have several folders. The order is that of torchvision's ImageFolder: sorted as text.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(_folders(place)):
        found.setdefault(unicodedata.normalize("NFC", as_utf8(path.name)), []).append(path)
    return dict(sorted(found.items()))


def order_note(classes: Sequence[str]) -> list[str]:
    """A line for the user if the order of class names is not that of the numbers in them."""
    by_number = sorted(classes, key=lambda c: re.sub("[0-9]+", lambda n: n[0].zfill(20), c))
    if list(classes) != sorted(classes) or list(classes) == by_number:
        return []
    shown = ", ".join(f"{i} is {name}" for i, name in enumerate(classes[:4]))
    return [
        f"classes are numbered in the order of their names as text: {shown}"
        f"{', ...' * (len(classes) > 4)}; predict.py --names writes names instead"
    ]


def as_utf8(name: str) -> str:
    """A file name as valid Unicode; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folders(place: Path) -> list[Path]:
    """The folders in `place`, sorted, but for hidden ones."""
    try:
        inside = sorted(p for p in place.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror})") from None
    for path in inside:  # of an image, it is told by who reads it
        if path.is_symlink() and not path.exists() and not has_suffix(path.name):
            raise DataError(f"{path}: a link that leads nowhere; mend or remove it")
    return [path for path in inside if path.is_dir()]


def _folders_below(folder: Path) -> Iterator[Path]:
    """All folders below `folder`, those of a level before those of the next."""
    level = [folder]
    while level := [inner for place in level for inner in _folders(place)]:
        yield from level


def _files(place: Path) -> list[Path]:
    """The files in `place`, sorted, but for hidden ones."""
    return sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith("."))


def _names(folders: Sequence[Path]) -> str:
    return _some([f"{place.name}/" for place in folders])


def _some(items: Sequence, most: int = 5) -> str:
    """The first of `items`, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(runtime.printable(str(item)) for item in items[:most]) + more


def _list_classes(source: Source, split: str) -> tuple[list[Path], Tensor]:
    """Image files and labels of a split of an image folder."""
    if split not in source.splits:
        raise DataError(f"{source.path}: has no folder {split}/; add one")
    folders, files, labels = _class_folders(source.splits[split]), [], []
    for label, name in enumerate(source.classes):
        members = [file for place in folders.get(name, ()) for file in image_files(place)]
        if not members and split == "train":
            raise DataError(
                f"{source.splits[split] / name}: there are no images of this class that Pillow "
                "decodes; add some, or remove the folder"
            )
        files += members
        labels += [label] * len(members)
    if not files:
        raise DataError(
            f"{source.splits[split]}: there are no images in folders of classes "
            f"({split}/<class>/*.png); sort its images into such folders, or move it elsewhere"
        )
    return files, torch.tensor(labels)


# --- image files --------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """All image files in and below `folder`, in the order of their names, but hidden ones.

    Links are followed, to each folder once; a folder that is not there has none. Raises DataError.
    """
    return walk(folder)[0]


def walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """As `image_files`, and all other files but hidden ones."""

    def stop(error: OSError):
        if isinstance(error, FileNotFoundError):
            return
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    images, others, seen = [], [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        known = os.stat(place)
        if (known.st_dev, known.st_ino) in seen:
            folders.clear()
            continue
        seen.add((known.st_dev, known.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            (images if is_image(path) and not _is_special(path) else others).append(path)
    return sorted(images), sorted(others)


def _is_special(path: Path) -> bool:
    """Whether a file is a pipe, a socket or a device: to read one may never end."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a broken link is told by who reads it
        return False


def has_suffix(name: str) -> bool:
    """Whether a file name ends as those of a format that Pillow decodes."""
    suffix = os.path.splitext(name)[1].lower()
    Image.preinit()  # the usual formats; the others take a fifth of a second
    if suffix not in Image.EXTENSION:
        Image.init()
    kind = Image.EXTENSION.get(suffix)
    return kind in {*Image.OPEN, "MPO"} and kind not in NOT_DECODED


def is_image(path: Path) -> bool:
    """Whether `path` is called like an image, or its content is one that Pillow decodes."""
    if has_suffix(path.name) or not path.is_file():  # a pipe can be read only once
        return has_suffix(path.name)
    try:
        with _opened(path) as image:
            return image.format not in NOT_DECODED
    except Exception:  # PIL raises nearly anything for other files
        return False


def inspect(files: Sequence[Path], others: Sequence[Path] = ()) -> tuple[list[str], list[str]]:
    """Read the headers of image files: their PIL modes, and lines for the user.

    The lines name files with several frames or pages, and `others`, which are left out. Raises
    DataError.
    """

    def header(path: Path) -> tuple[str, bool]:
        with _opened(path) as image:
            _check(image)
            return image.mode, getattr(image, "is_animated", False) and image.format not in STILL

    headers, notes = _map_files(files, header), []
    if several := [path for path, (_, more) in zip(files, headers, strict=True) if more]:
        notes.append(
            f"of several frames or pages, the first is used ({len(several)}): {_some(several)}"
        )
    if others:
        notes.append(f"left out, not images that Pillow decodes ({len(others)}): {_some(others)}")
    return [mode for mode, _ in headers], notes


def read_images(files: Sequence[Path], image_size: int, grey: bool, background: int = 0) -> Tensor:
    """`read_image` of all `files`: uint8 (N, H, H), or (N, 3, H, H) if not `grey`.

    Raises one DataError that names the files that cannot be read.
    """
    return torch.cat(_map_files(files, lambda path: read_image(path, image_size, grey, background)))


def read_image(
    image: Image.Image | str | Path, image_size: int, grey: bool, background: int = 0
) -> Tensor:
    """An image as uint8 (1, H, H), or (1, 3, H, H) if not `grey`; the only reader of images.

    It is turned as its EXIF data says, on `background` (0 is black) where transparent, reduced
    from 16 bits to the highest 8, stretched to a square. Raises ValueError for other pixels, or
    what PIL raises.
    """
    if not isinstance(image, Image.Image):
        with _opened(image) as opened:
            return read_image(opened, image_size, grey, background)
    _check(image)
    stored = str(getattr(image, "tile", ""))
    deep, few = re.search(";16[BLN]", stored), re.search("'L;([24])'", stored)
    if isinstance(image, TiffImageFile):  # Pillow 12 and 13 misread mapped files that EXIF turns
        name, image.filename = image.filename, ""
        image.load()
        image.filename = name
    image = ImageOps.exif_transpose(image)  # first: conversions drop the EXIF data
    if image.mode == "I":  # of PGM
        image = Image.fromarray(np.array(image).astype(np.uint16))
    if image.mode in SIXTEEN_BITS:
        image = _highest_8_bits(image, background)
    elif deep and 0 < max(most for _, most in image.convert("RGB").getextrema()) < 16:
        raise ValueError(TOO_DARK)
    if few and isinstance(image.info.get("transparency"), int):  # PIL leaves it in its own bits
        image.info["transparency"] *= 255 // (2 ** int(few[1]) - 1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*[background] * 3, 255))
        image = Image.alpha_composite(below, image)
    pixels = torch.from_numpy(np.array(image.convert("L" if grey else "RGB")))
    return resize((pixels if grey else pixels.permute(2, 0, 1))[None], image_size, grey)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file, without PIL's warnings: of what cannot be read, it raises an error as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            yield image


def _check(image: Image.Image) -> None:
    """Raise ValueError for pixels that would be misread."""
    if image.format in NOT_DECODED:
        raise ValueError(f"{image.format} is not supported")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    pgm = image.format == "PPM" and image.mode == "I"  # 16 bits, in 32
    if (image.mode in ("I", "F") and not pgm) or tags.get(SAMPLEFORMAT, (1,))[0] != 1:
        raise ValueError("its pixels are not unsigned numbers of 8 or 16 bits")
    if image.mode in SIXTEEN_BITS and tags.get(PHOTOMETRIC_INTERPRETATION) == 0:
        raise ValueError("its pixels are of 16 bits, and 0 is white")
    if "RGB;16" in str(getattr(image, "tile", "")) and "transparency" in image.info:
        raise ValueError("its colors are of 16 bits, and one of them is transparent")


def _highest_8_bits(image: Image.Image, background: int) -> Image.Image:
    """An image of 16 bits with 8, `background` where transparent. Raises ValueError if all of it
    would be black then."""
    pixels = np.array(image).astype(np.uint16)
    clear = pixels == image.info.get("transparency", -1)
    if 0 < pixels[~clear].max(initial=0) < 4096:
        raise ValueError(TOO_DARK)
    pixels[clear] = background << 8
    return Image.fromarray((pixels >> 8).astype(np.uint8))


NPY = b"\x93NUMPY"
TOO_DARK = "it uses at most 12 of its 16 bits, and would be black; scale its pixels to 16 bits"
LFS_POINTER = "a pointer of Git LFS, not the file itself; `git lfs pull` fetches it"


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is what Git leaves in the place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(23) == b"version https://git-lfs"
    except OSError:
        return False


def _map_files(files: Sequence[Path], work) -> list:
    """work(file) for all `files`; one DataError for all that it fails on."""
    done, bad = [], []
    for path in files:
        try:
            done.append(work(path))
        except Exception as error:  # PIL raises nearly anything for damaged files
            reason = _reason(error)[:120]
            if isinstance(error, UnidentifiedImageError):
                reason = "not an image that Pillow decodes, or damaged"
            if path.is_file() and path.stat().st_size == 0:
                reason = "empty"
            elif is_lfs_pointer(path):
                reason = LFS_POINTER
            bad.append(f"{path} ({reason})")
    if bad:
        raise DataError(f"cannot be read as images: {_some(bad)}; replace or remove them")
    return done


def _reason(error: Exception) -> str:
    """What went wrong, as one line without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def stream(path: Path, chunk: int) -> Iterator[Tensor]:
    """The images of an IDX or .npy file, `chunk` at a time, so that a large file needs no memory.

    Yields uint8 (n, H, W) or (n, 3, H, W). Raises DataError.
    """
    try:
        with _unpacked(path) as file:
            npy = file.peek(len(NPY))[: len(NPY)] == NPY
            shape = _npy_shape(file, path) if npy else _idx_shape(file, path)
            n, *image = shape
            if n < 1 or not all(0 < side <= 4096 for side in image):
                raise DataError(
                    f"{path}: {n:,} images of {'x'.join(map(str, image))}; at least one image is "
                    "needed, and at most 4,096 pixels a side"
                )
            if len(shape) == 3 and shape[-1] <= CHANNELS:
                raise DataError(
                    f"{path}: {tuple(shape)} looks like one image with its channels last; give "
                    "(N, H, W), (N, H, W, 3) or (N, 3, H, W)"
                )
            if path.is_file() and not isinstance(file, gzip.GzipFile):  # all can be told now
                size = path.stat().st_size - file.tell()
                if size != math.prod(shape):
                    raise DataError(
                        f"{path}: its header says {math.prod(shape):,} bytes of images, but "
                        f"{size:,} follow; fetch or save it again"
                    )
            chunk = max(1, min(chunk, MOST_BYTES // math.prod(image)))
            for start in range(0, n, chunk):
                shape = min(chunk, n - start), *image
                pixels = file.read(math.prod(shape))
                if len(pixels) != math.prod(shape):
                    raise DataError(
                        f"{path}: truncated, its header says {n:,} images; fetch or save it again"
                    )
                images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
                yield images.permute(0, 3, 1, 2) if shape[-1] == 3 and len(shape) == 4 else images
            if file.read(1):
                raise DataError(
                    f"{path}: longer than the {n:,} images its header says; fetch or save it again"
                )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)[:120]})") from None


def _idx_shape(file: BinaryIO, path: Path) -> list[int]:
    header = file.read(16)
    if len(header) < 16 or header[:4] != bytes((0, 0, 8, 3)):
        raise DataError(
            f"{path}: neither an image that Pillow decodes, nor an IDX or .npy file of images"
        )
    return _idx_header(header)[1]


def _npy_shape(file: BinaryIO, path: Path) -> list[int]:
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in read_header:
        raise DataError(f"{path}: .npy version {version}, known are 1.0 and 2.0")
    try:
        shape, columns_first, dtype = read_header[version](file)
    except Exception:  # it is parsed as Python, and damage can raise nearly anything
        raise DataError(f"{path}: its header is damaged") from None
    color = len(shape) == 4 and 3 in (shape[1], shape[3])
    if dtype != np.uint8 or not (len(shape) == 3 or color):
        floats = "; floats in 0..1: save (array * 255).round().astype(numpy.uint8)"
        raise DataError(
            f"{path}: {dtype} {shape}, expected uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
            f"{floats if dtype.kind == 'f' else ''}"
        )
    if columns_first:
        raise DataError(
            f"{path}: the array is in Fortran order; save numpy.ascontiguousarray(array)"
        )
    return list(shape)
