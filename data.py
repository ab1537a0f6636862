"""Images: find, fetch or read them, as uint8 tensors.

Fashion-MNIST by default; by name, other data sets that torchvision has; or a folder of one's own,
`train/<class>/*.png|jpg`, with optional `val/` and `test/`.
"""

import contextlib
import gzip
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch import Generator, Tensor

import runtime

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# MD5 of the four archives: as published with the data set, and as Debian packs them anew.
ARCHIVES = {
    "train-images-idx3-ubyte.gz": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "cf8536b0aa1a6ac5fa3f23001093305c",
    ),
    "train-labels-idx1-ubyte.gz": (
        "25c81989df183df01b3e8a0aad5dffbe",
        "10bea18fdb374794d4bb42e356e600c9",
    ),
    "t10k-images-idx3-ubyte.gz": (
        "bef4ecab320f06d8554ea6380940ec79",
        "f78720b4224f21cce2f2ccf2d7a94c9a",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "bb300cfdad3c16e7a12a480ee83cd310",
        "0d30e22e447f3c33dab9ed536400ac01",
    ),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
CACHE_DIR = Path(__file__).resolve().parent / "data"
DEBIAN_CACHE = CACHE_DIR / "debian"
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
VALIDATION = 5000  # images held out for validation, at most a fifth, the same share of each class
# By the names of --dataset, apart from fashion-mnist, which has sources of its own.
TORCHVISION = {"mnist": "MNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DATASETS = ("fashion-mnist", *TORCHVISION)
FLIPPABLE = ("fashion-mnist", "cifar10", "folder")  # whose mirrored images still are of their class
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
CHUNK = 10_000  # images in memory at a time, for prediction; and how many bytes of them
MOST_BYTES = 2**28
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")  # PIL's modes
SIZES = (8, 512)  # of the images, smallest and largest


class DataError(Exception):
    """The images cannot be found or are damaged; the message is one line for the user."""


@dataclass(frozen=True)
class Source:
    """Where images are, and what a network must know of them."""

    name: str  # one of DATASETS, or "folder"
    path: Path
    classes: tuple[str, ...]
    image_size: int
    grey: bool  # else colour


# --- finding and fetching ---------------------------------------------------------------------


def find(
    folder: str | Path | None = None, dataset: str = "fashion-mnist", image_size: int | None = None
) -> Source:
    """Where the images of `dataset` are, or one's own if `folder` has a folder train/ or test/.

    Fashion-MNIST: `folder`, else Debian's, else what is or was downloaded. `image_size` is what
    images are resized to (default: as they are, one's own to 28). Raises DataError.
    """
    if image_size is not None and not SIZES[0] <= image_size <= SIZES[1]:
        raise DataError(f"--image-size {image_size}: possible are {SIZES[0]} to {SIZES[1]}")
    if folder is not None and any((Path(folder) / split).is_dir() for split in ("train", "test")):
        return _folder_source(Path(folder), image_size or 28)
    if dataset == "fashion-mnist":
        return Source(dataset, _find_fashion_mnist(folder), CLASSES, image_size or 28, grey=True)
    path = CACHE_DIR if folder is None else Path(folder)
    known = _torchvision(dataset, path, train=True)
    size, grey = known.data.shape[1], known.data.ndim == 3
    return Source(dataset, path, tuple(known.classes), image_size or size, grey)


def find_for_weights(weights: str | Path, meta: dict, folder: str | Path | None = None) -> Source:
    """Where the images are, in `folder` or else found, that weights are for of which `meta` is
    known. Raises DataError, also if the images are of other classes."""
    name = meta.get("dataset", "fashion-mnist")
    if name == "folder" and folder is None:
        raise DataError(f"{weights}: trained on own images; give IMAGES or --data")
    source = find(folder, name if name in DATASETS else "fashion-mnist", meta["image_size"])
    if meta["num_classes"] != len(source.classes):
        raise DataError(
            f"{weights}: has {meta['num_classes']} classes, the images {len(source.classes)}"
        )
    theirs = tuple(meta.get("classes", source.classes))
    if theirs != source.classes:
        raise DataError(
            f"{weights}: is for the classes {', '.join(theirs)}, but {source.path} has "
            f"{', '.join(source.classes)}"
        )
    if not has_split(source, "test"):
        raise DataError(f"{source.path}: has no test/; give IMAGES")
    return source


def _torchvision(dataset: str, path: Path, train: bool):
    """torchvision's data set, downloaded if it is not in `path`."""
    import torchvision

    kind = getattr(torchvision.datasets, TORCHVISION[dataset])
    with contextlib.suppress(Exception):
        return kind(path, train, download=False)
    try:
        with _fetching() if path == CACHE_DIR else contextlib.nullcontext():
            with contextlib.suppress(Exception):  # another process has fetched it meanwhile
                return kind(path, train, download=False)
            if path == CACHE_DIR:
                shutil.rmtree(path / TORCHVISION[dataset], ignore_errors=True)
            return kind(path, train, download=True)
    except Exception as error:  # torchvision lets out whatever stops it
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: {dataset} is not there, and not to be had ({reason})") from None


def _fetching() -> contextlib.AbstractContextManager:
    """Held by the one process that may change CACHE_DIR; others wait.

    Whoever holds it and finds an incomplete data set may delete it: nobody else is downloading.
    """
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    return runtime.lock(CACHE_DIR.with_name(f".{CACHE_DIR.name}.lock"), wait=True)


def _find_fashion_mnist(folder: str | Path | None) -> Path:
    """The folder with the four files."""
    if folder is not None:
        if found := _within(Path(folder)):
            return found
        raise DataError(
            f"{folder}: neither the four Fashion-MNIST files (*-ubyte.gz) nor a folder train/ are "
            "there"
        )
    if found := _find_whole():
        return found
    reasons = []
    try:
        with _fetching():
            for fetch in (lambda: None, _fetch_torchvision, _fetch_debian):
                try:
                    fetch()
                except Exception as error:  # whatever stops one source, the next is tried
                    reasons.append(" ".join(str(error).split())[:200])
                if found := _find_whole():
                    return found
                for half in (CACHE_DIR / "FashionMNIST", DEBIAN_CACHE):
                    shutil.rmtree(half, ignore_errors=True)
    except OSError as error:
        reasons.append(str(error))
    raise DataError(
        f"Fashion-MNIST was not found and could not be fetched ({'; '.join(reasons)}); give a "
        "folder with its four *-ubyte.gz files as --data DIR, or install the Debian package "
        f"{DEBIAN_PACKAGE}"
    )


def _within(folder: Path) -> Path | None:
    """`folder`, or torchvision's layout below it, if all four files (.gz or raw) are there."""
    for place in (folder, folder / "FashionMNIST" / "raw"):
        if all((place / name).is_file() or (place / name[:-3]).is_file() for name in ARCHIVES):
            return place
    return None


def _find_whole() -> Path | None:
    """A folder with all four files, none damaged: Debian's, or of what was fetched before."""
    for place in (DEBIAN_DIR, CACHE_DIR, CACHE_DIR / "FashionMNIST" / "raw", DEBIAN_CACHE):
        if found := _within(place):
            with contextlib.suppress(DataError):
                for name in ARCHIVES:
                    if (found / name).is_file():
                        _read_archive(found / name)
                    else:
                        _read_idx(found, name, dims=3 if "images" in name else 1)
                return found
    return None


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
        shutil.move(scratch / "tree" / DEBIAN_DIR.relative_to("/"), DEBIAN_CACHE)


# --- loading ------------------------------------------------------------------------------------


def load(source: Source, split: str) -> tuple[Tensor, Tensor]:
    """`split` "train", "val" (one's own images only) or "test", on the CPU.

    Returns uint8 images (N, H, H), or (N, 3, H, H) if in colour, and int64 labels (N,). Raises
    DataError for wrong checksums, truncated files, unreadable images, ...
    """
    images, labels = zip(*iter_batches(source, split), strict=True)
    return torch.cat(images), torch.cat(labels)


def iter_batches(source: Source, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """What `load` returns, as many at a time as `most` allows."""
    if source.name == "folder":
        images, labels = _list_classes(source, split)
    elif source.name == "fashion-mnist":
        images, labels = _load_idx(source.path, split)
    else:
        known = _torchvision(source.name, source.path, train=split == "train")
        images, labels = torch.as_tensor(known.data), torch.as_tensor(known.targets)
        images = images if images.dim() == 3 else images.permute(0, 3, 1, 2)
    prepare = read_images if source.name == "folder" else resize
    chunk = chunk_size(source.image_size, source.grey)
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        yield prepare(images[part], source.image_size, source.grey), labels[part]


def source_files(source: Source, split: str) -> list[Path]:
    """The files that `pieces` reads (not those of torchvision)."""
    if source.name == "folder":
        return _list_classes(source, split)[0]
    return [source.path / name for archive in ARCHIVES for name in (archive, archive[:-3])]


def chunk_size(size: int, grey: bool) -> int:
    """How many images of `size` pixels a side are kept in memory at a time, before prediction."""
    return max(1, min(CHUNK, MOST_BYTES // ((1 if grey else 3) * size**2)))


def has_split(source: Source, split: str) -> bool:
    """Whether there are images of `split`."""
    return (source.path / split).is_dir() if source.name == "folder" else split != "val"


def digest(source: Source) -> str | None:
    """SHA-256 over names and sizes of one's own training and validation images; else None.

    Whoever adds, removes or changes images has another training set, and another split of it.
    """
    if source.name != "folder":
        return None
    names = hashlib.sha256()
    for split in ("train", "val"):
        for name in source.classes if has_split(source, split) else ():
            for path in image_files(source.path / split / name):
                place = path.relative_to(source.path).as_posix()
                names.update(f"{place}\0{path.stat().st_size}\n".encode())
    return names.hexdigest()


def load_train(
    source: Source, full_train: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """(images, labels) to train on, in a fixed random order, and for validation.

    Held out for validation is what `source` says, else a share of the training images; nothing
    with `full_train`, or if the share is not one image of any class.
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
    if full_train or has_split(source, "val"):  # one's own images come class by class
        train = train[torch.randperm(len(train), generator=Generator().manual_seed(0))]
    kept = None if val is None or len(val) == 0 else (images[val], labels[val])
    return (images[train], labels[train]), kept


def resize(images_u8: Tensor, size: int, grey: bool) -> Tensor:
    """uint8 images (N, H, W) or (N, 3, H, W) as a network takes them: (N, size, size), by
    luminance, if it knows no colours, else (N, 3, size, size)."""
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
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte.gz", dims=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte.gz", dims=1).long()
    if len(images) != len(labels) or images.numel() == 0:
        raise DataError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{folder}: {split} label {labels.max()}, expected 0..{len(CLASSES) - 1}")
    return images, labels


def _read_idx(folder: Path, archive: str, dims: int) -> Tensor:
    """One IDX file of unsigned bytes: 0, 0, 8, dims, then big-endian int32 sizes, then the data."""
    path = folder / archive
    try:
        if path.is_file():
            content = gzip.decompress(_read_archive(path))
        else:
            path = folder / archive[:-3]
            content = path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    start = 4 + 4 * dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, dims)):
        raise DataError(f"{path}: not an IDX file of {dims}-dimensional unsigned bytes")
    shape = np.frombuffer(content, ">i4", dims, offset=4).tolist()
    if min(shape) < 0 or math.prod(shape) != len(content) - start:
        raise DataError(f"{path}: the header says {shape}, but {len(content) - start} bytes follow")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _read_archive(path: Path) -> bytes:
    """One of the archives, still packed."""
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if hashlib.md5(packed).hexdigest() not in ARCHIVES[path.name]:
        raise DataError(f"{path}: wrong MD5, the file is damaged or is not Fashion-MNIST")
    return packed


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


# --- image files --------------------------------------------------------------------------------


def _folder_source(folder: Path, image_size: int) -> Source:
    """One's own images: the classes are the folders in train/ (or test/), by name.

    They are grey if all image files of train/ are stored as grey.
    """
    splits = [split for split in ("train", "val", "test") if (folder / split).is_dir()]
    first = folder / splits[0]
    classes = sorted(place.name for place in _folders(first))
    if len(classes) < 2:
        raise DataError(f"{first}: needs a folder of images for each class, at least two")
    for split in splits[1:]:
        for place in sorted(_folders(folder / split)):
            if place.name not in classes:
                raise DataError(f"{place}: there is no such class in {first}")
    files = [path for name in classes for path in image_files(first / name)]
    grey = {"1", "L", "LA", *SIXTEEN_BITS}.issuperset(check_files(files))
    return Source("folder", folder, tuple(classes), image_size, grey)


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _list_classes(source: Source, split: str) -> tuple[list[Path], Tensor]:
    """Image files and labels of one's own `split`."""
    files, labels = [], []
    for label, name in enumerate(source.classes):
        members = image_files(source.path / split / name)
        if not members and split == "train":
            raise DataError(f"{source.path / split / name}: there are no images of this class")
        files += members
        labels += [label] * len(members)
    if not files:
        raise DataError(f"{source.path / split}: there are no images")
    return files, torch.tensor(labels)


def image_files(folder: Path) -> list[Path]:
    """All image files in and below `folder`, in the order of their names, but hidden ones.

    Links are followed, to each folder once; a folder that is not there has none. Raises DataError.
    """

    def stop(error: OSError):
        if isinstance(error, FileNotFoundError):
            return
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        known = os.stat(place)
        if (known.st_dev, known.st_ino) in seen:
            folders.clear()
            continue
        seen.add((known.st_dev, known.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(place, name)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(files)


def read_images(files: Sequence[Path], image_size: int, grey: bool) -> Tensor:
    """Image files of any size and kind as uint8 (N, H, H), or (N, 3, H, H) if not `grey`.

    Turned as their EXIF data says, on black where transparent, stretched to a square. Raises one
    DataError that names the files that cannot be read.
    """

    def read(path: Path) -> Tensor:
        with Image.open(path) as image:
            _check(image)
            if image.mode in SIXTEEN_BITS:
                image = _highest_8_bits(image)
            elif "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                image = Image.alpha_composite(black, image)
            image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
            pixels = torch.from_numpy(np.array(image))
        return resize((pixels if grey else pixels.permute(2, 0, 1))[None], image_size, grey)

    return torch.cat(_map_files(files, read))


def _check(image: Image.Image) -> None:
    """Raise ValueError for pixels that would be misread."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode in ("I", "F") or tags.get(SAMPLEFORMAT, (1,))[0] != 1:
        raise ValueError("its pixels are not unsigned numbers of 8 or 16 bits")
    if image.mode in SIXTEEN_BITS and tags.get(PHOTOMETRIC_INTERPRETATION) == 0:
        raise ValueError("its pixels are of 16 bits, and 0 is white")


def _highest_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits with 8. Raises ValueError if all of it would be black then."""
    pixels = np.array(image).astype(np.uint16)
    if "transparency" in image.info:
        pixels[pixels == image.info["transparency"]] = 0
    if 0 < pixels.max() < 4096:
        raise ValueError(f"of its 16 bits it uses 12 or less: no pixel is above {pixels.max()}")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def check_files(files: Sequence[Path]) -> list[str]:
    """PIL's modes of image files, of which only the headers are read. Raises DataError."""

    def mode(path: Path) -> str:
        with Image.open(path) as image:
            _check(image)
            return image.mode

    return _map_files(files, mode)


def _map_files(files: Sequence[Path], work) -> list:
    """work(file) for all `files`; one DataError for all that it fails on."""
    done, bad = [], []
    for path in files:
        try:
            done.append(work(path))
        except Exception as error:  # PIL raises nearly anything for damaged files
            empty = path.is_file() and path.stat().st_size == 0
            bad.append(f"{path} ({'empty' if empty else ' '.join(str(error).split())[:80]})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"cannot be read as images: {', '.join(bad[:5])}{more}")
    return done


def stream(path: Path, chunk: int) -> Iterator[Tensor]:
    """The images of an IDX or .npy file, `chunk` at a time, so that a large file needs no memory.

    Yields uint8 (n, H, W) or (n, 3, H, W). Raises DataError.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _npy_shape(file, path) if path.suffix == ".npy" else _idx_shape(file, path)
            n, *image = shape
            if n < 1 or not all(0 < side <= 4096 for side in image):
                raise DataError(f"{path}: its header says {n} images of {image}")
            if path.is_file() and path.suffix != ".gz":  # all of it can be told now
                size = path.stat().st_size - file.tell()
                if size != math.prod(shape):
                    raise DataError(f"{path}: its header says {shape}, but {size} bytes follow")
            chunk = max(1, min(chunk, MOST_BYTES // math.prod(image)))
            for start in range(0, n, chunk):
                shape = min(chunk, n - start), *image
                pixels = file.read(math.prod(shape))
                if len(pixels) != math.prod(shape):
                    raise DataError(f"{path}: truncated, its header says {n} images")
                images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
                yield images.permute(0, 3, 1, 2) if shape[-1] == 3 and len(shape) == 4 else images
            if file.read(1):
                raise DataError(f"{path}: longer than the {n} images its header says")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None


def _idx_shape(file: BinaryIO, path: Path) -> list[int]:
    header = file.read(16)
    if len(header) < 16 or header[:4] != bytes((0, 0, 8, 3)):
        raise DataError(f"{path}: neither an image nor an IDX file of images")
    return np.frombuffer(header, ">i4", 3, offset=4).tolist()


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
    colour = len(shape) == 4 and 3 in (shape[1], shape[3])
    if dtype != np.uint8 or columns_first or not (len(shape) == 3 or colour):
        raise DataError(
            f"{path}: {dtype} {shape}, expected uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
        )
    return list(shape)
