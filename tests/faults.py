"""What a run survives, on tiny images: `uv run tests/faults.py` (10 minutes on two cores).

Kills a run with SIGKILL at random moments (in a step, while a file is written, before it gets its
name), starts it again with the same command, and compares its weights with those of a run that was
never stopped; fills the disk; writes to a mount point. Prints a table; ends with 1 if anything was
lost. `tests/test_faults.py` runs a short version of it.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny

import checkpoint

FILES = ("teacher.pth", "student.pth", "pruned_resnet18.pth")
MOMENTS = "step", "write", "rename"


def run(folder: Path, *flags: str, timeout: float = 300, **environment: str):
    """tests/tiny.py in a process of its own."""
    command = [sys.executable, str(Path(tiny.__file__)), str(folder), *flags]
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def count(folder: Path, kind: str) -> int:
    """How often a moment comes in a run that is not stopped."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    ended = run(folder, DIE=f"{kind} 1000000")
    assert ended.returncode == 0, ended.stderr
    shutil.rmtree(folder / "runs")
    return int(ended.stderr.split()[-1])


def weights(folder: Path) -> list[torch.Tensor]:
    """All weights that a finished run left."""
    run_folder = folder / "runs" / "quick-seed0"
    with tiny.narrow():
        networks = [checkpoint.load(run_folder / name)[0] for name in FILES]
    return [tensor for network in networks for tensor in network.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loadable(folder: Path) -> bool:
    """Whether every file that bears a final name is whole."""
    for path in folder.glob("runs/quick-seed0/*"):
        if path.suffix in (".pth", ".pt") and not path.name.startswith("."):
            checkpoint.read(path)
    return True


def killed(
    folder: Path, kills: int, seed: int, moments: dict[str, int], expected: list[torch.Tensor]
) -> tuple[int, int]:
    """Kill runs until `kills` have been killed; returns kills and runs that ended differently."""
    rng, done, lost = random.Random(seed), 0, 0
    while done < kills:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        while done < kills:
            kind = rng.choice(list(moments))
            ended = run(folder, DIE=f"{kind} {rng.randint(1, moments[kind])}")
            if ended.returncode != -9:
                break
            done += 1
            lost += not loadable(folder)
        ended = run(folder)
        lost += ended.returncode != 0 or not same(weights(folder), expected)
    return done, lost


def stopped(folder: Path, moments: list[str], expected: list[torch.Tensor]) -> tuple[int, int]:
    """SIGTERM at each of `moments`, one after the other, in one run."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    lost = 0
    for moment in moments:
        ended = run(folder, STOP=moment)
        lost += ended.returncode != 130 or "the same command resumes" not in ended.stderr
    lost += run(folder).returncode != 0 or not same(weights(folder), expected)
    return len(moments), lost


def damaged(folder: Path, last: int, expected: list[torch.Tensor]) -> tuple[int, int]:
    """The newest state cut short, and with one bit changed, in the run's `last` step."""
    lost = 0
    for kind in ("cut", "bit"):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        assert run(folder, DIE=f"step {last}").returncode == -9
        state = folder / "runs" / "quick-seed0" / "state.pt"
        content = bytearray(state.read_bytes())
        if kind == "bit":
            content[len(content) // 2] ^= 1
        state.write_bytes(content[: None if kind == "bit" else 100_000])
        ended = run(folder)
        lost += ended.returncode != 0 or "going on from state-before.pt" not in ended.stderr
        lost += not same(weights(folder), expected)
    return 2, lost


def full_disk(folder: Path, last: int, expected: list[torch.Tensor]) -> tuple[int, int]:
    """A tmpfs too small for the second state, then one that is large enough."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    run(folder, DIE=f"step {last}")
    state = (runs / "quick-seed0" / "state.pt").stat().st_size
    shutil.rmtree(runs)
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    size = f"size={state * 3 // 2}"
    if subprocess.run([*mount, size, "tmpfs", str(runs)], capture_output=True).returncode:
        return 0, 0  # not allowed here
    try:
        ended = run(folder)
        lost = ended.returncode != 2 or "cannot be written (No space left" not in ended.stderr
        lost += "Traceback" in ended.stderr or not loadable(folder)
        subprocess.run([*mount, "remount,size=4g", "tmpfs", str(runs)], check=True)
        lost += run(folder).returncode != 0 or not same(weights(folder), expected)
    finally:
        subprocess.run(["umount", str(runs)], check=True)
    return 1, lost


def mounted(folder: Path) -> tuple[int, int]:
    """An output that is a mount point, as in a container: writable, then read-only."""
    inside, outside = folder / "inside.pth", folder / "outside.pth"
    for path in (inside, outside):
        path.write_text("old and longer")
    if subprocess.run(["mount", "--bind", outside, inside], capture_output=True).returncode:
        return 0, 0  # not allowed here
    try:
        checkpoint.check_output(inside)
        checkpoint.write(inside, "new")
        lost = outside.read_text() != "new"
        subprocess.run(["mount", "-o", "remount,bind,ro", inside], check=True)
        try:
            checkpoint.check_output(inside)
            lost += 1
        except checkpoint.CheckpointError:
            pass
    finally:
        subprocess.run(["umount", inside], check=True)
    return 2, lost + (len([*folder.glob(".*.pth*")]) > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, stop and starve a tiny run.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_images(folder / "data")
        assert run(folder).returncode == 0
        expected = weights(folder)
        moments = {kind: count(folder, kind) for kind in MOMENTS}
        table = {
            "killed (SIGKILL) at a random moment": killed(
                folder, args.kills, args.seed, moments, expected
            ),
            "stopped (SIGTERM) in a step": stopped(
                folder, ["step 2", "step 5", "step 1", "step 6"], expected
            ),
            "newest state damaged": damaged(folder, moments["step"], expected),
            "disk full": full_disk(folder, moments["step"], expected),
            "output is a mount point": mounted(folder),
        }
    print("| fault | tried | lost |\n|---|---|---|")
    for fault, (tried, lost) in table.items():
        print(f"| {fault} | {tried} | {lost} |")
    return int(any(lost for _, lost in table.values()))


if __name__ == "__main__":
    sys.exit(main())
