"""Hostile and broken files against predict.py: `uv run tests/fuzz.py` (1,000 weights files, 300
files of images and 300 pairs of outputs, 20 minutes on two cores).

Each must end in a valid prediction or in one line on stderr and exit code 2: no traceback, no code
run, nothing harmed that was not asked to be written, no memory beyond 2 GB. Prints a table; ends
with 1 otherwise. `tests/test_fuzz.py` runs a short version.
"""

import argparse
import contextlib
import gzip
import io
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny

import checkpoint
import models
import predict
import prune

MEMORY_MB = 2000
CODE_RAN = "code-ran"


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {CODE_RAN}",)


# --- weights ------------------------------------------------------------------------------------


def seeds(folder: Path) -> dict[str, bytes]:
    """Good weights files of all kinds."""
    torch.manual_seed(0)
    model = models.build("resnet18", 10)
    masks = prune.all_reachable(model, 28, grey=True)
    prune.apply_(model, prune.choose_masks(model, masks, 100_000, 28, grey=True))
    meta = {
        "arch": "resnet18",
        "num_classes": 10,
        "budget": 100_000,
        "image_size": 28,
        "grey": True,
    }
    path, files = folder / "seed.pth", {}
    checkpoint.save(path, model, meta)
    files["pruned"] = path.read_bytes()
    for bits in (8, 16):
        checkpoint.save(path, model, meta, bits)
        files[f"{bits} bits"] = path.read_bytes()
    for name, state in (
        ("plain", model.state_dict()),
        ("masked", prune.with_masks(model).state_dict()),
    ):
        torch.save(state, path)
        files[name] = path.read_bytes()
    torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    files["legacy"] = path.read_bytes()
    path.unlink()
    return files


def flip(content: bytes, rng: random.Random) -> bytes:
    """Some bits changed, near the start or the end (headers, directory), or anywhere."""
    content = bytearray(content)
    near = rng.choice([200, 4000, len(content)])
    for _ in range(rng.choice([1, 1, 8, 100])):
        at = rng.randrange(min(near, len(content)))
        at = len(content) - 1 - at if rng.random() < 0.5 else at
        content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def splice(content: bytes, rng: random.Random) -> bytes:
    """A part taken out, doubled, or overwritten with zeros."""
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    b = min(b, a + 100_000)
    return content[:a] + rng.choice([b"", content[a:b] * 2, bytes(b - a)]) + content[b:]


def odd_tensor(rng: random.Random) -> torch.Tensor:
    """A tensor of a wrong kind: dtype, shape, a stride of 0 that declares a huge size, NaN."""
    return rng.choice(
        [
            torch.zeros(3),
            torch.zeros(0),
            torch.tensor(1.0),
            torch.zeros(1).expand(10**10),
            torch.zeros(1, dtype=torch.uint8).expand(10**11),
            torch.full((64, 3, 7, 7), torch.nan),
            torch.full((64,), torch.inf),
            torch.zeros(64, dtype=torch.complex64),
            torch.zeros(64, dtype=torch.bool),
            torch.zeros(64, dtype=torch.int64),
            torch.eye(4).to_sparse(),
            torch.zeros(2, 3, 4, 5, 6),
            torch.empty(10**8, device="meta"),
        ]
    )


def altered(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Nearly what it was: another dtype, shape, layout or range."""
    change = rng.choice(
        [
            torch.Tensor.double,
            torch.Tensor.half,
            torch.Tensor.bool,
            torch.Tensor.flatten,
            torch.Tensor.to_sparse,
            lambda t: t.float() * 1e38 * 1e38,
            lambda t: t[..., :1],
            lambda t: t[..., :1].expand(t.shape),
            lambda t: t.unsqueeze(0),
            lambda t: t.transpose(0, -1),
            lambda t: torch.cat([t, t]),
            lambda t: t.to("meta"),
        ]
    )
    try:
        return change(tensor)
    except (RuntimeError, IndexError, NotImplementedError):  # of no dimension, or odd already
        return tensor


def odd_value(rng: random.Random) -> object:
    return rng.choice([None, -1, 0, 10**30, 1.5, "", "resnet18", [], {}, True, [1] * 10, "x" * 999])


def restructure(content: bytes, rng: random.Random) -> bytes:
    """The dict itself changed: entries swapped, lost, of wrong kinds, that lie."""
    data = torch.load(io.BytesIO(content), weights_only=True)
    place = data.get("state_dict", data)
    for _ in range(rng.choice([1, 1, 3])):
        key, other = (rng.choice(list(place)) for _ in range(2))
        change = rng.randrange(8)
        if change == 0:
            place[key], place[other] = place[other], place[key]
        elif change == 1:
            place.pop(key, None)
        elif change == 2:
            place[key] = odd_tensor(rng)
        elif change == 3:
            place[key] = odd_value(rng)
        elif change == 4 and isinstance(data.get("meta"), dict):
            data["meta"][rng.choice(list(data["meta"]))] = odd_value(rng)
        elif change == 5 and isinstance(data.get("gaps"), torch.Tensor):
            with contextlib.suppress(ValueError, RuntimeError):  # changed before
                gaps = checkpoint._unpack(data["gaps"], torch.uint16, 10**6).int()
                gaps[rng.randrange(len(gaps))] = rng.choice([0, 65535, 65534])
                data["gaps"] = checkpoint._pack(gaps.to(torch.uint16))
        elif change == 6 and isinstance(place.get(key), torch.Tensor):
            place[key] = altered(place[key], rng)
        elif change == 7:  # as wrapped modules, other versions or strangers name them
            place[rng.choice(["module.", "model.", "", "x"]) + other] = place.pop(key, None)
        if not place:
            break
    file = io.BytesIO()
    torch.save(data, file)
    return file.getvalue()


def hostile(content: bytes, rng: random.Random) -> bytes:
    """A pickle that wants to run code, as torch.save writes it or bare."""
    file = io.BytesIO()
    kind = rng.randrange(3)
    if kind == 0:
        torch.save({"state_dict": Hostile()}, file)
    elif kind == 1:
        torch.save([Hostile()], file, _use_new_zipfile_serialization=False)
    else:
        pickle.dump(Hostile(), file, protocol=rng.randrange(2, 5))
    return file.getvalue()


def nonsense(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\n", b"PK\x03\x04", content[:4] * 1000, rng.randbytes(5000)])


MUTATIONS: dict[Callable, int] = {
    flip: 35,
    truncate: 15,
    splice: 15,
    restructure: 25,
    hostile: 5,
    nonsense: 5,
}  # and how often, in percent

# --- images -------------------------------------------------------------------------------------


def image_seeds() -> dict[str, bytes]:
    from PIL import Image

    images = tiny.images()["test_images"]
    files = {"a-idx3-ubyte": tiny.idx_bytes(images)}
    files["b.gz"] = gzip.compress(files["a-idx3-ubyte"])
    for name, array in (("c.npy", images), ("d.npy", images.astype(np.float32))):
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    turned = Image.Exif()
    turned[0x112] = 6
    alpha = Image.merge("LA", [Image.fromarray(images[0])] * 2)
    frames = {"save_all": True, "append_images": [alpha]}
    for suffix, kind, image, options in (
        ("png", "png", alpha, {"exif": turned}),
        ("jfif", "jpeg", alpha.convert("L"), {"exif": turned}),
        ("gif", "gif", alpha, frames),
        ("tiff", "tiff", alpha.convert("L"), {"exif": turned}),
        ("tif", "tiff", alpha, frames),
        ("webp", "webp", alpha, frames),
        ("bmp", "bmp", alpha.convert("L"), {}),
        ("tga", "tga", alpha, {}),
        ("ppm", "ppm", alpha.convert("L"), {}),
        ("pcx", "pcx", alpha.convert("L"), {}),
        ("ico", "ico", alpha, {}),
        ("", "png", alpha, {}),  # no suffix
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[os.fsdecode(b"caf\xe9.") + suffix] = file.getvalue()  # not UTF-8 either
    return files


def lie(content: bytes, rng: random.Random) -> bytes:
    """Sizes in the header that are not those of the data."""
    at = rng.randrange(3, 16)
    return content[:at] + rng.randbytes(min(4, 16 - at)) + content[at + min(4, 16 - at) :]


IMAGE_MUTATIONS: dict[Callable, int] = {flip: 40, truncate: 20, splice: 20, lie: 15, nonsense: 5}

# --- outputs ------------------------------------------------------------------------------------


def make_places(home: Path, weights: Path, images: Path) -> list[str]:
    """Files, links and folders in the new folder `home`; returns what -o and --show may be told."""
    (home / "folder").mkdir(parents=True)
    (home / "file").write_text("precious")
    (home / "link").symlink_to("file")
    (home / "link-to-link").symlink_to(home / "link")
    (home / "dangling").symlink_to("absent")
    (home / "circle").symlink_to("circle")
    (home / "to-weights").symlink_to(weights)
    (home / "to-folder").symlink_to("folder")
    os.link(weights, home / "hard")
    places = [str(path) for path in home.iterdir()]
    places += [str(weights), str(images), f"{home}/folder/../../{weights.name}"]
    places += [f"{home}/new", f"{home}/no/folder", f"{home}/file/within", f"{home}/{'x' * 300}"]
    return [*places, f"{home}/to-folder/new", "/dev/null", "/dev/full", ""]


def contents(*roots: Path) -> dict[str, object]:
    """All that lies under `roots`: the bytes of files, the targets of links."""
    found: dict[str, object] = {}
    for root in roots:
        for path in [root, *root.rglob("*")]:
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            else:
                found[str(path)] = "folder" if path.is_dir() else path.read_bytes()
    return found


def write_to(flags: list[str], places: list[str], roots: tuple[Path, ...]) -> str:
    """What came of predictions, and perhaps a picture, written to `places`; as `attempt`."""
    before, targets = contents(*roots), [os.path.realpath(place) for place in places]
    for flag, place in zip(("-o", "--show"), places, strict=False):
        flags = [*flags, flag, place]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = predict.main(flags)
    except BaseException:
        return f"{places}: traceback: {traceback.format_exc()}"
    after = contents(*roots)
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    if not Path("/dev/null").is_char_device():
        return f"{places}: /dev/null is a device no more"
    if code == 0:
        if changed - set(targets):
            return f"{places}: also written {sorted(changed - set(targets))}"
        csv = after.get(targets[0], b"id,pred\n")  # a device keeps nothing
        return "predicted" if csv.startswith(b"id,pred\n") else f"{places}: no prediction"
    if code != 2 or err.getvalue().count("\n") != 1:
        return f"{places}: exit code {code}, stderr {err.getvalue()!r}"
    if "/dev/full" in places[1:]:  # nobody can know before; the predictions are there
        changed -= {targets[0]}
    return f"{places}: refused, yet written {sorted(changed)}" if changed else "refused"


# --- trial --------------------------------------------------------------------------------------


def attempt(flags: list[str], output: Path) -> str:
    """ "predicted", "refused", or what went wrong."""
    output.write_text("precious")
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = predict.main([*flags, "-o", str(output)])
    except BaseException:
        return "traceback: " + traceback.format_exc()
    if Path(CODE_RAN).exists():
        return "code was run"
    if code == 0:
        return "predicted" if output.read_text().startswith("id,pred\n") else "no prediction"
    if code != 2 or err.getvalue().count("\n") != 1:
        return f"exit code {code}, stderr {err.getvalue()!r}"
    return "refused" if output.read_text() == "precious" else "output harmed"


def trial(
    folder: Path, n_weights: int, n_images: int, n_outputs: int, seed: int
) -> dict[str, dict[str, int]]:
    """Counts of outcomes; what went wrong is printed. Must run in an empty current folder."""
    rng, table = random.Random(seed), {}
    good, output = folder / "good.pth", folder / "out.csv"
    images = folder / "images-idx3-ubyte"
    images.write_bytes(tiny.idx_bytes(tiny.images()["test_images"][:5]))
    files = seeds(folder)
    good.write_bytes(files["pruned"])
    for title, n, contents, mutations in (
        ("weights", n_weights, files, MUTATIONS),
        ("images", n_images, image_seeds(), IMAGE_MUTATIONS),
    ):
        counts = table[title] = {"predicted": 0, "refused": 0, "failed": 0}
        for i in range(n):
            name = rng.choice(list(contents))
            (mutate,) = rng.choices(list(mutations), mutations.values())
            path = folder / f"mutated-{name}"
            path.write_bytes(mutate(contents[name], rng))
            weights, classified = (path, images) if title == "weights" else (good, path)
            outcome = attempt(["-w", str(weights), str(classified)], output)
            path.unlink()
            if outcome not in counts:
                print(f"{title} {i} ({name!a}, {mutate.__name__}): {outcome}", file=sys.stderr)
                outcome = "failed"
            counts[outcome] += 1
    counts = table["outputs"] = {"predicted": 0, "refused": 0, "failed": 0}
    for i in range(n_outputs):
        home = folder / f"outputs{i}"
        places = rng.choices(make_places(home, good, images), k=rng.choice([1, 1, 2]))
        outcome = write_to(["-w", str(good), str(images)], places, (home, good, images))
        if outcome not in counts:
            print(f"outputs {i}: {outcome}", file=sys.stderr)
            outcome = "failed"
        counts[outcome] += 1
        shutil.rmtree(home)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Throw broken files at predict.py.")
    parser.add_argument("--weights", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="default 300")
    parser.add_argument("--outputs", type=int, default=300, metavar="N", help="default 300")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        table = trial(Path(name), args.weights, args.images, args.outputs, args.seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        "| files | tried | predicted | refused in one line | anything else |\n|---|---|---|---|---|"
    )
    for title, counts in table.items():
        print(f"| {title} | {sum(counts.values())} | {' | '.join(map(str, counts.values()))} |")
    print(f"most memory used: {peak:,.0f} MB")
    return int(any(counts["failed"] for counts in table.values()) or peak > MEMORY_MB)


if __name__ == "__main__":
    sys.exit(main())
