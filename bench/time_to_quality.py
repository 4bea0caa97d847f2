"""How soon is Metier where TRL's defaults end? Held-out loss against wall-clock, on the same rows.

    python bench/time_to_quality.py [--rows 128] [--epochs 3] [--data FOLDER]

TRL trains as its quick start leaves it (learning rate 2e-5, linear, batch 8, gradient checkpointing, float32 base
under bf16 autocast) with the same adapter shape; its final adapter is scored on the validation rows. Metier trains with
its own defaults and is scored after every step; the clock counts training only. Loss is nats per answer token.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sides
from metier.models import load, lora
from metier.text import batches
from metier.training import loop
from sft_speed import ROOT

CPU = torch.device("cpu")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rows", type=int, default=128)
    words.add_argument("--epochs", type=int, default=3)
    words.add_argument("--data", type=Path, help="a data folder with train.jsonl and valid.jsonl")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = given.data
        if data is None:
            import metier

            metier.build(ROOT / "recipes" / "licence-clerk", runs=folder)
            data = Path(folder) / "licence-clerk" / "data"
        todo, held_out = sides.work(data / "train.jsonl"), sides.work(data / "valid.jsonl")
        todo = sides.Work(todo.base, todo.rows[: given.rows])
        print(json.dumps(_compare(todo, held_out, given.epochs, Path(folder))))


def _compare(todo: sides.Work, held_out: sides.Work, epochs: int, folder: Path) -> dict[str, Any]:
    theirs, target = _trl(todo, held_out, epochs, folder)
    print(f"TRL defaults: {target:.4f} nats after {theirs:.0f} s", file=sys.stderr)
    curve = _ours(todo, held_out, epochs, target)
    reached = next((seconds for seconds, loss in curve if loss <= target), None)
    return {
        "what": f"training until the held-out loss of TRL's defaults, {len(todo.rows)} rows, {epochs} epochs",
        "ours": reached,
        "peers": {"trl+peft defaults": round(theirs, 1)},
        "ratio": {"trl+peft defaults": None if reached is None else round(reached / theirs, 4)},
        "unit": "s",
        "pairs": [{"trl_loss": target, "ours": curve}],
        "machine": sides.machine_name(),
    }


def _trl(todo: sides.Work, held_out: sides.Work, epochs: int, folder: Path) -> tuple[float, float]:
    """Seconds of TRL's training, and the held-out loss of its adapter in our model."""
    steps = math.ceil(len(todo.rows) * epochs / 8)
    made = sides.trl(todo, steps, str(folder / "trl"), batch=8, rows_a_step=8, defaults=True, learning_rate=None)
    made.model.save_pretrained(folder / "adapter")
    model = load.model(todo.base, dtype=torch.bfloat16, device=CPU)
    lora.load(model, folder / "adapter")
    return sum(made.seconds), _held_out(model, held_out)


def _ours(todo: sides.Work, held_out: sides.Work, epochs: int, target: float) -> list[tuple[float, float]]:
    """(seconds of training, held-out loss) after each step, until the target is passed."""
    steps = math.ceil(len(todo.rows) * epochs / sides.ROWS_A_STEP)
    model, results = sides.our_steps(todo, steps, loop.Schedule)
    curve, seconds = [], 0.0
    for result in results:
        seconds += result.seconds
        curve.append((round(seconds, 2), round(_held_out(model, held_out), 4)))
        if curve[-1][1] <= target:
            break
    return curve


def _held_out(model: Any, work: sides.Work) -> float:
    start = time.perf_counter()
    loss = loop.mean_loss(model, work.rows, batches.shared_prefix(work.rows), 4096)
    print(f"held out: {loss:.4f} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    return loss


if __name__ == "__main__":
    main()
