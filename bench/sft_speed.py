"""Training speed and memory beside TRL + PEFT: same token ids, masks, order and adapter shape, alternating in one run.

    python bench/sft_speed.py [--pairs 3] [--steps 6] [--data rows.jsonl]

Three sides take turns, each in a process of its own, so that no allocator setting or patched class leaks: Metier, TRL
tuned (bf16 base, no checkpointing, the best of batch 1, 2, 4, 8, found first in the same run) and TRL as its quick
start leaves it. The first two steps of each process are warm-up. Without `--data` the rows are those of the recipe
licence-clerk; a data set file of any other project can be given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sides
from metier import machine

ROOT = Path(__file__).parents[1]
WARM_UP = 2
BATCHES = (1, 2, 4, 8)
TUNED, DEFAULT = "trl+peft tuned", "trl+peft defaults"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--pairs", type=int, default=3)
    words.add_argument("--steps", type=int, default=6)
    words.add_argument("--data", type=Path)
    words.add_argument("--worker", choices=("ours", "tuned", "defaults"), help=argparse.SUPPRESS)
    words.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        print(json.dumps(_measure(given.worker, given.data, given.steps + WARM_UP, given.batch)))
    elif given.data:
        _compare(given.data, given.pairs, given.steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            import metier

            metier.build(ROOT / "recipes" / "licence-clerk", runs=folder)
            _compare(Path(folder) / "licence-clerk" / "data" / "train.jsonl", given.pairs, given.steps)


def _compare(data: Path, pairs: int, steps: int) -> None:
    sweep = {batch: _run("tuned", data, 2, batch)["tokens_per_second"] for batch in BATCHES}
    best = max(sweep, key=lambda b: sweep[b])
    print(f"TRL tuned by batch size: {sweep}, best {best}", file=sys.stderr)
    found = []
    for _ in range(pairs):
        found.append(
            {
                "ours": _run("ours", data, steps),
                TUNED: _run("tuned", data, steps, best),
                DEFAULT: _run("defaults", data, max(2, steps // 2)),
            }
        )
        print(found[-1], file=sys.stderr)
    print(
        json.dumps(
            {
                "what": f"LoRA SFT, rank {sides.RANK} on all linear layers, SmolLM2-135M, bf16",
                "ours": _median(found, "ours", "tokens_per_second"),
                "peers": {peer: _median(found, peer, "tokens_per_second") for peer in (TUNED, DEFAULT)},
                "ratio": {peer: _ratio(found, peer, "tokens_per_second") for peer in (TUNED, DEFAULT)},
                "unit": "real tokens/s",
                "memory_ratio": {peer: _ratio(found, peer, "memory_gb") for peer in (TUNED, DEFAULT)},
                "flops_fraction": _median(found, "ours", "flops_fraction"),
                "pairs": found,
                "trl_by_batch": sweep,
                "machine": sides.machine_name(),
            }
        )
    )


def _median(found: list[dict[str, Any]], side: str, what: str) -> float:
    return round(float(statistics.median(f[side][what] for f in found)), 3)


def _ratio(found: list[dict[str, Any]], peer: str, what: str) -> float:
    return round(statistics.median(f["ours"][what] / f[peer][what] for f in found), 3)


def _run(worker: str, data: Path, steps: int, batch: int = 8) -> dict[str, float]:
    words = {"--worker": worker, "--data": data, "--steps": steps, "--batch": batch}
    argv = [sys.executable, __file__, *(str(w) for pair in words.items() for w in pair)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.strip().split("\n")[-1]))


def _measure(worker: str, data: Path, steps: int, batch: int) -> dict[str, float]:
    todo = sides.work(data)
    rows = [r for step in range(WARM_UP, steps) for r in todo.of_step(step)]
    tokens = sum(r.ids.size for r in rows)
    more: dict[str, float] = {}
    if worker == "ours":
        model, found = sides.our_steps(todo, steps, sides.Constant)
        results = list(found)
        seconds, loss = sum(r.seconds for r in results[WARM_UP:]), results[-1].loss
        flops = sum(sides.useful_flops(todo, model, todo.of_step(step)) for step in range(WARM_UP, steps))
        peak = sides.peak_gflops()
        more = {"flops_fraction": round(flops / seconds / 1e9 / peak, 3), "peak_gflops": round(peak, 1)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = sides.trl(todo, steps, folder, batch=batch, defaults=worker == "defaults")
        seconds, loss = sum(made.seconds[WARM_UP:]), made.losses[-1]
    measured = {"tokens_per_second": round(tokens / seconds, 1), "loss": round(loss, 4)}
    return measured | {"memory_gb": round(machine.peak_memory_gb(), 2)} | more


if __name__ == "__main__":
    main()
