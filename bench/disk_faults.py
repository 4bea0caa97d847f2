"""Does every call by which a training reaches the disk have an end that keeps what was there?

    python bench/disk_faults.py [--every 1]

Records the calls that a small training makes on its run folder (open, write, fsync, ftruncate, rename, replace, unlink,
rmdir, mkdir), then repeats it, and each time one call fails with ENOSPC, EIO or EACCES, or the process ends right
before or right after it. Afterwards the checkpoint with the highest number must be whole, and another run must end
in the adapter and metrics of a training that was never hurt. `--every N` takes every Nth call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import kill_resume
from metier import runs


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--every", type=int, default=1)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tried, broken, made = _tried(Path(folder), given.every)
    print(
        json.dumps(
            {
                "what": "one call on the disk fails or is the last: a broken checkpoint, a bug, or another result",
                "ours": len(broken),
                "peers": {},
                "ratio": {},
                "unit": f"of {tried}",
                "pairs": broken,
                "calls": made,
                "machine": f"{os.cpu_count()} cores",
            }
        )
    )
    sys.exit(bool(broken))


def _tried(root: Path, every: int) -> tuple[int, list[str], dict[str, int]]:
    """How many faults were tried, those that did harm, and the calls by name."""
    _, [built, _] = kill_resume.small(root, 0)
    import faults
    import metier

    calls, place = root / "calls", root / "place"

    def train(at: int | None = None, fault: str = "") -> int:
        return faults.attempt(
            lambda: metier.train(root / "specs" / built.name, runs=place), place, calls, at=at, fault=fault, forked=True
        )

    shutil.copytree(built, place)
    assert train() == faults.DONE
    expected, made = kill_resume.facts(place), calls.read_text().splitlines()
    found = []
    for fault in (*faults.ERRORS, *faults.DEATHS):
        for at in range(0, len(made), every):
            shutil.rmtree(place)
            shutil.copytree(built, place)
            ended = train(at, fault)
            harm = "" if _unharmed(fault, ended, place) and train() == faults.DONE else "HARM"
            if not harm:
                ends = kill_resume.facts(place)
                harm = ", ".join(k for k in ("adapter", "metrics", "exact") if ends[k] != expected[k])
            found += [f"{fault} at {made[at]}: {harm}"] if harm else []
            print(fault, at, made[at], harm, file=sys.stderr)
    return len(range(0, len(made), every)) * 5, found, dict(Counter(c.split()[0] for c in made))


def _unharmed(fault: str, ended: int, place: Path) -> bool:
    """Whether the training ended as it should, and its newest checkpoint is whole."""
    import faults

    if ended not in ((faults.DEAD,) if fault in faults.DEATHS else (faults.DONE, faults.REFUSED)):
        return False
    newest = max(place.glob("*/*/checkpoints/step-*"), default=None)
    if newest is None:
        return True
    stated = json.loads((newest / "checkpoint.json").read_text())
    return bool(stated["sha256"] == runs.sha256(newest / "state.safetensors"))


if __name__ == "__main__":
    main()
