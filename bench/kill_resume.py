"""Does a training that was killed end where one that was not ends?

    python bench/kill_resume.py [--kills 20] [--rows 64]     the licence clerk on the real base model
    python bench/kill_resume.py --small [--kills 200]        a tiny model, each attempt forked from one warm process

Trains once without interruption; then again and again, each time killed (SIGKILL) at a moment drawn at random, and run
again until it is finished. Of four kills two come at any time from the start to the last write, one while a checkpoint
is written, one while the result is written and published. Compared are the adapter's bytes, the newest checkpoint
(weights, moments, the best weights so far, step) and the metrics but for `seconds`. The small trainings cross several
validations and checkpoints; every other one stops early, and in all of them the best validation is not the last.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metier import runs

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "licence-clerk"
TICK = 0.0005
PRELOADED = (
    "metier.acts",
    "metier.training.run",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_svg",
)

Start = Callable[[Path], int]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--small", action="store_true")
    words.add_argument("--kills", type=int)
    words.add_argument("--rows", type=int, default=64)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make = small if given.small else _real
        start, built = make(Path(folder), given.rows)
        found = _killed(start, built, given.kills or (200 if given.small else 20))
    equal = sum(f["equal"] for f in found)
    print(
        json.dumps(
            {
                "what": "killed with SIGKILL at a random moment of training, run again: adapter, optimizer and metrics "
                "equal the uninterrupted run's",
                "ours": equal,
                "peers": {},
                "ratio": {},
                "unit": f"of {len(found)}",
                "pairs": found,
                "machine": f"{os.cpu_count()} cores",
            }
        )
    )
    sys.exit(equal != len(found))


def _killed(start: Start, built: list[Path], kills: int) -> list[dict[str, Any]]:
    """Each kill with when it came and whether its run ended like the uninterrupted one."""
    random_ = random.Random(0)
    references = [_reference(start, place) for place in built]
    found: list[dict[str, Any]] = []
    tries = 0
    while len(found) < kills:
        kind = ("any time", "checkpoint", "any time", "publishing")[len(found) % 4]
        place, (expected, length, publishing) = random_.choice(list(zip(built, references, strict=True)))
        tries += 1
        attempt = copy(place, f"{place.name}-{tries}")
        moment = _moment(kind, attempt, random_, length, publishing)
        if not _ended(start(attempt), moment):
            shutil.rmtree(attempt)
            continue
        assert _ended(start(attempt), None) is False
        found.append({"killed": kind, "run": place.name, "equal": facts(attempt) == expected})
        print(len(found), found[-1], file=sys.stderr)
        shutil.rmtree(attempt)
    return found


def _reference(start: Start, built: Path) -> tuple[dict[str, Any], float, float]:
    """What the uninterrupted run ends in, its seconds, and how many of them are writing and publishing the result."""
    place = copy(built, f"{built.name}-reference")
    begun = time.monotonic()
    pid, seen = start(place), 0.0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if not seen and (_work(place) / "adapter").exists():
            seen = time.monotonic()
        time.sleep(TICK)
    found = facts(place)
    print(f"{built.name}: {found['shape']}", file=sys.stderr)
    return found, time.monotonic() - begun, time.monotonic() - seen


def _moment(kind: str, place: Path, random_: random.Random, length: float, publishing: float) -> Callable[[], bool]:
    """A function that says when it is time to kill."""
    if kind == "any time":
        due = time.monotonic() + random_.uniform(0, length)
        return lambda: time.monotonic() > due
    count, wait = random_.randint(1, 6), random_.uniform(0, publishing if kind == "publishing" else 0.02)
    seen: set[Path] = set()
    begun: list[float] = []

    def now() -> bool:
        seen.update(_work(place).glob("adapter" if kind == "publishing" else "checkpoints/.tmp-*"))
        if not begun and len(seen) >= (1 if kind == "publishing" else count):
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + wait

    return now


def _ended(pid: int, due: Callable[[], bool] | None) -> bool:
    """Waits for the end of a training; whether it was killed, which happens when it is due. One that had finished by
    then shows nothing."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL), f"the training ended with {code}"
            return code != 0
        if due and due():
            os.kill(pid, signal.SIGKILL)
            due = None
        time.sleep(TICK)


def facts(place: Path) -> dict[str, Any]:
    train = _run(place) / "train"
    newest = max((train / "checkpoints").glob("step-*"))
    metrics = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    valid = [m["valid_loss"] for m in metrics if "valid_loss" in m]
    return {
        "adapter": runs.sha256(train / "adapter" / "adapter_model.safetensors"),
        "optimizer": (newest.name, runs.sha256(newest / "state.safetensors")),
        "metrics": [{k: v for k, v in m.items() if k != "seconds"} for m in metrics],
        "exact": json.loads((train / "plan.json").read_text())["exact"],
        "shape": f"{newest.name}, best of {len(valid)} validations: number {valid.index(min(valid)) + 1}",
    }


def _run(place: Path) -> Path:
    return next(p.parent for p in place.glob("*/specialist.yaml"))


def _work(place: Path) -> Path:
    return _run(place) / ".work-train"


def copy(built: Path, name: str) -> Path:
    """A run folder with the same data and nothing trained."""
    return Path(shutil.copytree(built, built.parent / name))


def _real(folder: Path, rows: int) -> tuple[Start, list[Path]]:
    sizes = (f"data.sizes.train={rows}", "data.sizes.valid=16", "data.sizes.test=16")
    settings = [w for s in ("train.checkpoint_every=2", "train.validations=3", *sizes) for w in ("--set", s)]
    nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]

    def start(place: Path, act: str = "train") -> int:
        argv = [sys.executable, "-m", "metier", act, str(RECIPE), "--runs", str(place), *settings]
        return os.posix_spawn(sys.executable, argv, dict(os.environ), file_actions=nothing)

    assert not _ended(start(folder / "clerk", "build"), None)
    return start, [folder / "clerk"]


def small(folder: Path, _: int) -> tuple[Start, list[Path]]:
    """Two specialists on a tiny model: one walks to its last step, at a rate that rises too high; one stops early."""
    os.environ |= {"METIER_CACHE": str(folder / "cache"), "METIER_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT / "tests"))
    for module in PRELOADED:
        importlib.import_module(module)
    import metier
    from conftest import write_model, write_specialist
    from metier import progress

    progress.quiet = True
    tiny = write_model(folder / "tiny")
    stage = {"rank": 4, "alpha": 8, "epochs": 3, "batch_size": 4, "checkpoint_every": 2, "validations": 9}
    stages = {
        "whole": {**stage, "learning_rate": 0.3, "warmup": 0.9, "patience": 0},
        "early": {**stage, "learning_rate": 0.1, "patience": 2},
    }
    for name, settings in stages.items():
        spec = write_specialist(folder / "specs" / name, tiny, rows=40, train=[settings])
        metier.build(spec, runs=folder / name)
    # What a child need not look at is what it need not collect.
    gc.freeze()

    def start(place: Path) -> int:
        if child := os.fork():
            return child
        try:
            metier.train(folder / "specs" / place.name.split("-")[0], runs=place)
            os._exit(0)
        finally:
            os._exit(1)

    return start, [folder / name for name in stages]


if __name__ == "__main__":
    main()
