"""Training speed of one and of two processes on this machine, alternating in one run.

    python bench/world_speed.py [--pairs 3] [--steps 6]

Three arms train the same steps of the recipe `licence-clerk`: one process with one thread, two with one thread each,
and one process with two threads. Two processes add up the adapter's gradient over the loopback, so the second arm over
the first is what a second machine would bring without a network in between, and less, because here both share memory
and caches. Tokens are real tokens of the rows; the first two steps of each process are warm-up. The losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS, ROWS_A_STEP, WARM_UP = 1000, 16, 2
ARMS = {"one process, one thread": (1, 1), "two processes, one thread each": (2, 1), "one process, two threads": (1, 2)}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--pairs", type=int, default=3)
    words.add_argument("--steps", type=int, default=6)
    words.add_argument("--dtype", default="auto")
    given = words.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built"
        subprocess.run([sys.executable, "-m", "metier", "build", *_words(built, given, 1)], check=True)
        for _ in range(given.pairs):
            rounds.append({arm: _run(built, *size, given) for arm, size in ARMS.items()})
            print(json.dumps(rounds[-1]), file=sys.stderr)
    one, two, threads = (statistics.median(r[arm]["tokens_per_second"] for r in rounds) for arm in ARMS)
    ratios = [
        {name: r[arm]["tokens_per_second"] / r[first]["tokens_per_second"] for name, (arm, first) in _PAIRS.items()}
        for r in rounds
    ]
    losses = [r[arm]["loss"] for r in rounds for arm in ARMS]
    print(
        json.dumps(
            {
                "what": f"LoRA SFT of SmolLM2-135M on licence notices, {ROWS_A_STEP} rows a step, {given.dtype}",
                "ours": two,
                "peers": {"one process, one thread": one, "one process, two threads": threads},
                "ratio": {name: round(statistics.median(r[name] for r in ratios), 3) for name in _PAIRS},
                "unit": "tokens/s",
                "pairs": given.pairs,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
                "rounds": rounds,
                "loss_spread": max(losses) - min(losses),
            },
            indent=2,
        )
    )


_FIRST, _SECOND, _THIRD = ARMS
_PAIRS = {"two processes / one": (_SECOND, _FIRST), "two processes / two threads": (_SECOND, _THIRD)}


def _words(runs: Path, given: argparse.Namespace, threads: int) -> list[str]:
    settings = {
        "data.sizes.train": ROWS,
        "train.epochs": (given.steps + WARM_UP) * ROWS_A_STEP / ROWS,
        "train.validations": 0,
        "train.checkpoint_every": 1000,
        "machine.threads": threads,
        "machine.dtype": given.dtype,
        "machine.tokens": 2048,
    }
    words = [str(ROOT / "recipes" / "licence-clerk"), "--runs", str(runs)]
    return words + [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]


def _run(built: Path, processes: int, threads: int, given: argparse.Namespace) -> dict[str, float]:
    """One training of the data set in `built`, in processes of its own."""
    runs = Path(tempfile.mkdtemp(dir=built.parent))
    shutil.copytree(built, runs, dirs_exist_ok=True)
    words = _words(runs, given, threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "metier", "train", *words],
            env=os.environ | {k: str(v) for k, v in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    assert [child.wait() for child in children] == [0] * processes
    lines = (runs / "licence-clerk" / "train" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][WARM_UP:]
    speed = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
    return {"tokens_per_second": round(speed, 1), "loss": steps[-1]["loss"]}


if __name__ == "__main__":
    main()
