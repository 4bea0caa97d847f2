"""Does a training that was killed end in the adapter of one that was not? On the real base model.

    python bench/kill_resume.py [--kills 20] [--rows 64]

Trains a small licence clerk once without interruption; then again and again, each time killed (SIGKILL) at a random
moment, from the first import to the last write, and run again until it is finished. Counts equal adapter hashes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metier import runs

RECIPE = Path(__file__).parents[1] / "recipes" / "licence-clerk"
ADAPTER = Path("licence-clerk/train/adapter/adapter_model.safetensors")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kills", type=int, default=20)
    words.add_argument("--rows", type=int, default=64)
    given = words.parse_args()
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        built = _build(Path(folder) / "built", given.rows)
        start = time.monotonic()
        reference = _finish(_copy(built, "reference"))
        length = time.monotonic() - start
        found = []
        tries = 0
        while len(found) < given.kills:
            place = _copy(built, f"try-{tries}")
            tries += 1
            moment = moments.uniform(0, length)
            if not _kill(place, moment):
                length = min(length, moment)  # it finishes sooner than the reference did
                continue
            found.append({"killed_after": round(moment, 1), "equal": _finish(place) == reference})
            print(found[-1], file=sys.stderr)
    equal = sum(f["equal"] for f in found)
    print(
        json.dumps(
            {
                "what": "killed with SIGKILL at a random moment of training, run again: final adapter equals the "
                "uninterrupted one",
                "ours": equal,
                "peers": {},
                "ratio": {},
                "unit": f"of {given.kills}",
                "pairs": found,
                "machine": f"{os.cpu_count()} cores",
            }
        )
    )


def _argv(act: str, place: Path) -> list[str]:
    settings = ("train.checkpoint_every=2", "train.validations=3", "data.sizes.valid=16", "data.sizes.test=16")
    words = [w for s in (*settings, (place / "rows").read_text()) for w in ("--set", s)]
    return [sys.executable, "-m", "metier", act, str(RECIPE), "--runs", str(place), "--json", *words]


def _build(place: Path, rows: int) -> Path:
    place.mkdir()
    (place / "rows").write_text(f"data.sizes.train={rows}")
    subprocess.run(_argv("build", place), check=True, capture_output=True)
    return place


def _copy(built: Path, name: str) -> Path:
    """A run folder with the same data and nothing trained."""
    place = built.parent / name
    shutil.copytree(built, place)
    return place


def _finish(place: Path) -> str:
    subprocess.run(_argv("train", place), check=True, capture_output=True)
    return runs.sha256(place / ADAPTER)


def _kill(place: Path, moment: float) -> bool:
    """Whether the training was still running when it was killed; one that had finished shows nothing."""
    process = subprocess.Popen(_argv("train", place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


if __name__ == "__main__":
    main()
