"""The learning-rate range test: trial steps that say which peak rate a stage may be given (Smith 2017, section 3.3).

The rate grows by the same factor in every step, from far too small to far too large, on training rows and from the
weights that a training begins with. Nothing that was trained is kept, and test rows are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from metier import machine, plots, progress, runs
from metier.config import Loaded
from metier.errors import ConfigError, NumericError
from metier.models import load
from metier.records import Document
from metier.runs import Run
from metier.text import chat
from metier.training import loop
from metier.training.feeds import feeds
from metier.training.run import set_free

FOLDER, FOUND, PLOT = "lr", "lr.json", "lr.svg"
STEPS, LOWEST, HIGHEST = 60, 1e-6, 1.0
MEMORY = 0.8
"""How much of the smoothed loss comes from the steps before."""
BLOWN_UP = 2.0
"""Where the smoothed loss is so many times its least, the sweep has seen enough."""
BELOW = 10.0
"""How far under the rate of the least loss the suggestion stays: a whole stage at that rate would not hold."""
TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Sweep(loop.Schedule):
    """A schedule whose rate grows by the same factor in every step, from `LOWEST` to `HIGHEST`."""

    def rate(self, step: int) -> float:
        return float(LOWEST * (HIGHEST / LOWEST) ** (step / (self.steps - 1)))


def find(loaded: Loaded, run: Run) -> dict[str, Any]:
    """The sweep and its suggestion for the first stage, which it also writes into the folder `lr` of the run."""
    spec, stage = loaded.spec, loaded.spec.train[0].model_copy(update={"replay": 0})
    if stage.method not in ("sft", "cpt"):
        raise ConfigError(
            f"a learning rate is looked for in the methods sft and cpt, not in {stage.method}",
            where="train.method",
            fix="look for it with method: sft on the same rows",
        )
    machine.prepare(spec.machine.threads)
    device = machine.device(spec.machine.device)
    base = load.resolve(spec.base, loaded.folder, spec.base_sha256)
    data = run.require("build")
    dtype = machine.dtype(spec.machine.dtype, device)
    model = load.model(base, dtype=dtype, device=device, quantize=stage.quantize)
    only = spec.model_copy(update={"train": (stage,)})
    feed = feeds(only, data, chat.of_run(base.folder, data), load.context(model), _no_replay)[0]
    flat = loop.Flat(set_free(model, stage, spec.seed))
    schedule = Sweep(
        steps=STEPS,
        batch_size=stage.batch_size,
        learning_rate=HIGHEST,
        warmup=0,
        weight_decay=stage.weight_decay,
        clip=stage.clip,
        seed=spec.seed,
        tokens=spec.machine.tokens or max(TOKENS, *(row.ids.size for row in feed.rows)),
        sources=feed.sources,
    )
    with runs.stoppable() as stop, progress.bar("lr", STEPS, "steps") as advance:

        def steps() -> Iterable[loop.StepResult]:
            for result in loop.steps(model, flat, feed.rows, feed.prefix, schedule, stage=stage):
                stop.check()
                advance(1, f"lr {result.lr:.1e}  loss {result.loss:.3f}")
                yield result

        points = swept(steps())
    found = {"suggestion": suggestion(points), "points": points}
    _write(run, found)
    return found


def _no_replay(tokens: int) -> list[Document]:
    """The trial steps take no replay."""
    raise AssertionError(f"{tokens} tokens of replay were asked for")


def swept(results: Iterable[loop.StepResult]) -> list[dict[str, float]]:
    """{`lr`, `loss`, `smoothed`} of each step, up to where the loss blows up or is no number any more.

    `smoothed` is the exponential mean, divided by the weight of the steps there were, so that it does not start at 0.
    """
    points: list[dict[str, float]] = []
    mean, least = 0.0, math.inf
    try:
        for count, result in enumerate(results, 1):
            mean = MEMORY * mean + (1 - MEMORY) * result.loss
            smoothed = mean / (1 - MEMORY**count)
            points.append({"lr": result.lr, "loss": result.loss, "smoothed": smoothed})
            least = min(least, smoothed)
            if smoothed > BLOWN_UP * least:
                break
    except NumericError:
        pass  # the rate that did this is past the end of what can be used
    return points


def suggestion(points: list[dict[str, float]]) -> float:
    """A tenth of the rate with the least smoothed loss, to two digits."""
    best = min(points, key=lambda point: point["smoothed"])["lr"]
    return float(f"{best / BELOW:.1e}")


def _write(run: Run, found: dict[str, Any]) -> None:
    folder = run.folder / FOLDER
    with runs.disk(folder):
        folder.mkdir(exist_ok=True)
    runs.write_json(folder / FOUND, found)
    runs.write(folder / PLOT, plots.rate_plot(found["points"], found["suggestion"]))
