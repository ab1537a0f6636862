"""Fashion-MNIST: find or fetch the images, keep them as resident uint8 tensors, augment batches.

Augmentations are pure functions of a batch: they run where the batch lives, and all randomness
comes from the generator that is passed in.
"""

import gzip
import hashlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Generator, Tensor

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
VALIDATION = 5000  # images held out of the 60,000, the same number of each class


class DataError(Exception):
    """The images cannot be found or are damaged; the message is one line for the user."""


# --- finding and fetching ---------------------------------------------------------------------


def find(folder: str | Path | None = None) -> Path:
    """The folder with the four files: `folder`, else Debian's, else what is or was downloaded.

    Raises DataError if `folder` was given and lacks them, or if no source has them.
    """
    if folder is not None:
        if found := _within(Path(folder)):
            return found
        raise DataError(f"{folder}: the four Fashion-MNIST files (*-ubyte.gz) are not there")
    reasons = []
    for fetch in (None, _fetch_torchvision, _fetch_debian):
        try:
            if fetch is not None:
                fetch()
        except Exception as error:  # whatever stops one source, the next is tried
            reasons.append(" ".join(str(error).split())[:200])
        for place in (DEBIAN_DIR, CACHE_DIR, DEBIAN_CACHE):
            if found := _within(place):
                return found
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


def _fetch_torchvision() -> None:
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


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """`split` "train" or "test": uint8 images (N, H, W) and int64 labels (N,), on the CPU.

    Raises DataError for a wrong checksum, a truncated file or a header that does not fit.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte.gz", dims=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte.gz", dims=1).long()
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{folder}: {split} label {labels.max()}, expected 0..{len(CLASSES) - 1}")
    return images, labels


def _read_idx(folder: Path, archive: str, dims: int) -> Tensor:
    """One IDX file of unsigned bytes: 0, 0, 8, dims, then big-endian int32 sizes, then the data."""
    path = folder / archive
    try:
        if path.is_file():
            packed = path.read_bytes()
            if hashlib.md5(packed).hexdigest() not in ARCHIVES[archive]:
                raise DataError(f"{path}: wrong MD5, the file is damaged or is not Fashion-MNIST")
            content = gzip.decompress(packed)
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


def split_validation(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices (train, validation): a fixed, stratified permutation, the same in every run."""
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    per_class = size // (int(labels.max()) + 1)
    rank = torch.empty_like(labels)  # of each image within its class, in the order drawn
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    return order[rank[order] >= per_class], order[rank[order] < per_class]


# --- batches and augmentation -----------------------------------------------------------------


def batches(n: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Shuffled index batches of equal size; the remainder of n is left to other epochs."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return iter(order[: n - n % batch_size].split(batch_size))


def crop_boxes(
    n: int, size: int, generator: Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """`n` boxes (top, left, height, width), int64 (n, 4), drawn as torchvision's RandomResizedCrop.

    Area uniform in `scale`, aspect ratio log-uniform in `ratio`, ten tries for a box that fits,
    then the whole (square) image of `size` pixels a side.
    """
    device = generator.device
    u, v, top, left = torch.rand(4, 10, n, generator=generator, device=device)
    area = size * size * (scale[0] + (scale[1] - scale[0]) * u)
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * v)
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    width, height = width.where(fits, size), height.where(fits, size)
    first = fits.int().argmax(0, keepdim=True)  # the first that fits; row 0, made whole, if none
    top, left = (top * (size - height + 1)).floor(), (left * (size - width + 1)).floor()
    return (
        torch.stack((top, left, height, width)).gather(1, first.expand(4, 1, n)).squeeze(1).T.long()
    )


def resized_crop(images: Tensor, boxes: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and stretch it bilinearly to the full size, in one batch.

    `images` (N, H, W) or (N, C, H, W), `boxes` (N, 4) as from `crop_boxes`, `mirrored` bool (N,).
    Returns float32 of the shape of `images`: torchvision's `resized_crop` (bilinear) for boxes
    inside the image. Bilinear resampling is separable: one small matrix per axis and image.
    """
    top, left, height, width = boxes.T[:, :, None].float()

    def weights(start: Tensor, length: Tensor, size: int, reverse: Tensor | None) -> Tensor:
        pixel = torch.arange(size, device=images.device)
        source = ((pixel + 0.5) * length / size - 0.5).clamp(min=0).minimum(length - 1) + start
        if reverse is not None:
            source = torch.where(reverse[:, None], source.flip(1), source)
        return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0)  # (N, out, in)

    rows = weights(top, height, images.shape[-2], None)
    columns = weights(left, width, images.shape[-1], mirrored)
    if images.dim() == 4:
        rows, columns = rows[:, None], columns[:, None]
    return rows @ images.float() @ columns.mT


def random_resized_crop(
    images: Tensor,
    generator: Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Tensor:
    """RandomResizedCrop with a box of its own for each (square) image; `flip` mirrors every second.

    Shapes and dtypes as in `resized_crop`.
    """
    n, size = len(images), images.shape[-1]
    boxes = crop_boxes(n, size, generator, scale, ratio)
    coin = torch.rand(n, generator=generator, device=generator.device) < 0.5 if flip else None
    return resized_crop(images, boxes, coin)


def mixup(
    images: Tensor, targets: Tensor, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """mixup (arXiv 1710.09412): blend each image and target with its neighbour in the batch.

    `images` float (N, ...), `targets` float (N, classes), whose rows sum to 1. Each pair has its
    own weight, drawn from Beta(alpha, alpha); alpha 0 leaves the batch as it is. Batches are
    shuffled, so a neighbour is a random partner.
    """
    if alpha == 0:
        return images, targets
    # Joehnk (1964): for uniform u, v, given u^(1/a) + v^(1/a) <= 1, u^(1/a) / (u^(1/a) + v^(1/a))
    # is Beta(a, a). Sixteen tries; at a = 1 one pair in 65,536 is a rejected one, below fewer.
    u, v = torch.rand(2, 16, len(images), generator=generator, device=generator.device).pow(
        1 / alpha
    )
    first = (u + v <= 1).int().argmax(0, keepdim=True)
    u, v = u.gather(0, first).squeeze(0), v.gather(0, first).squeeze(0)
    weight = (u / (u + v)).nan_to_num(1.0)
    shape = (-1,) + (1,) * (images.dim() - 1)
    mixed = torch.lerp(images.roll(1, 0), images, weight.view(shape))
    return mixed, torch.lerp(targets.roll(1, 0), targets, weight[:, None])
