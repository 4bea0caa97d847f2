"""Trackers: TensorBoard, MLflow, Weights & Biases and trackio show what `metrics.jsonl` says.

The file is the truth and a tracker reads along. So a training that goes on after a kill, with its file cut back to the
checkpoint, sends a tracker only what it does not hold yet, and no point stands twice. A tracker that fails is named
once and left out; the training never waits for it or ends with it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metier import config, curves, runs
from metier.config import Spec
from metier.curves import Point
from metier.progress import note

TRACKED, TENSORBOARD = "tracked.json", "tensorboard"
PROJECT = "metier"
EVERY_SECONDS = 5.0
_MLFLOW_BATCH, _MLFLOW_TEXT = 1000, 6000


@dataclass(frozen=True)
class About:
    """What a tracker is told of a training: its name, an id that lasts over interruptions, and its settings by key."""

    name: str
    id: str
    settings: dict[str, Any]
    folder: Path
    began: float


@dataclass(frozen=True)
class Tracker:
    """An open tracker: `send` takes points in order, `close` says whether the training came to its end."""

    send: Callable[[Sequence[Point]], None]
    close: Callable[[bool], None]


class Following:
    """Reads along in a metrics file and passes on what is new; `failed` says which trackers were left out, and why."""

    def __init__(self, metrics: Path, names: Sequence[str], about: About) -> None:
        self.failed: dict[str, str] = {}
        self._metrics, self._read, self._walk = metrics, 0, curves.Walk()
        self._last, self._next = Point(0, "", 0.0, {}), 0.0
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._spared(name):
                self._open[name] = TRACKERS[name](about)

    def follow(self) -> None:
        """Passes on the new lines, at most every few seconds: sending may cost a request."""
        if self._open and time.monotonic() >= self._next:
            self._pass_on()
            self._next = time.monotonic() + EVERY_SECONDS

    def end(self, figures: Mapping[str, Any]) -> None:
        """Passes on the rest, and the training's main figures as one last point under `final/`."""
        self._pass_on()
        numbers = {f"final/{k}": float(v) for k, v in config.dotted(dict(figures)).items() if curves.finite(v)}
        self._send([replace(self._last, figures=numbers)])

    def close(self, *, finished: bool) -> None:
        for name, tracker in dict(self._open).items():
            with self._spared(name):
                tracker.close(finished)

    def _pass_on(self) -> None:
        lines, self._read = curves.lines(self._metrics, self._read)
        new = [self._walk.point(line) for line in lines]
        if new:
            self._last = new[-1]
            self._send(new)

    def _send(self, points: Sequence[Point]) -> None:
        for name, tracker in dict(self._open).items():
            with self._spared(name):
                tracker.send(points)

    @contextlib.contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """A tracker's own failure, of whatever kind, costs the tracker."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (it comes from another program's code or server)
            self._open.pop(name, None)
            self.failed[name] = _without_secrets(f"{type(error).__name__}: {error}".split("\n")[0][:300])
            note(f"{name} failed and is left out from here on ({self.failed[name]}); metrics.jsonl holds everything")


@contextlib.contextmanager
def following(spec: Spec, work: Path, metrics: str) -> Iterator[Following]:
    """The trackers that the settings name, open over the training in `work`."""
    about = About(
        name=spec.name,
        id=_id(work) if spec.track else "",
        settings=config.dotted(config.tree(spec)),
        folder=work,
        began=time.time() - sum(line.get("seconds", 0.0) for line in curves.lines(work / metrics)[0]),
    )
    found = Following(work / metrics, spec.track, about)
    finished = False
    try:
        yield found
        finished = True
    finally:
        found.close(finished=finished)


def _id(work: Path) -> str:
    """The id under which trackers know this training: made when it begins, and kept until it is published."""
    path = work / TRACKED
    if not path.is_file():
        runs.write_json(path, {"id": secrets.token_hex(8)})
    return str(runs.read_json(path)["id"])


def _tensorboard(about: About) -> Tracker:
    """Event files in the run folder, written anew when a training goes on: they then hold each point once."""
    from torch.utils.tensorboard import SummaryWriter

    folder = about.folder / TENSORBOARD
    shutil.rmtree(folder, ignore_errors=True)
    # A TensorBoard that is looking on drops what it read of the files that were there before.
    writer = SummaryWriter(str(folder), purge_step=0)
    writer.add_text("settings", "".join(f"    {key}: {value}\n" for key, value in about.settings.items()))

    def send(points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.figures.items():
                writer.add_scalar(name, value, point.step, walltime=about.began + point.seconds)
        writer.flush()

    return Tracker(send, lambda _: writer.close())


def _mlflow(about: About) -> Tracker:
    """A run on the server of MLFLOW_TRACKING_URI, else in MLflow's local store; asked first which steps it holds."""
    # A server that is gone would be tried for minutes.
    _unless_set(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10")
    _unless_set(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="WARNING")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    found = client.search_runs([experiment], filter_string=f"tags.`metier.id` = '{about.id}'")
    run = found[0] if found else client.create_run(experiment, run_name=about.name, tags={"metier.id": about.id})
    run_id = run.info.run_id
    if found:
        client.update_run(run_id, status="RUNNING")
    else:
        settings = [Param(key, str(value)[:_MLFLOW_TEXT]) for key, value in about.settings.items()]
        client.log_batch(run_id, params=settings, tags=[RunTag("mlflow.source.name", "metier")])
    held = {key: client.get_metric_history(run_id, key)[-1].step for key in run.data.metrics}

    def send(points: Sequence[Point]) -> None:
        metrics = [
            Metric(name, value, round(1000 * (about.began + point.seconds)), point.step)
            for point in points
            for name, value in point.figures.items()
            if point.step > held.get(name, -1)
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _MLFLOW_BATCH])

    return Tracker(send, lambda finished: client.set_terminated(run_id, "FINISHED" if finished else "KILLED"))


def _wandb(about: About) -> Tracker:
    """A run as WANDB_MODE says, offline unless it is set; online the server says from which step it goes on.

    Offline every attempt writes a folder of its own with all points from the first, under the same id.
    """
    _unless_set(WANDB_MODE="offline", WANDB_PROJECT=PROJECT, WANDB_ERROR_REPORTING="false")
    import wandb

    run = wandb.init(
        name=about.name,
        id=about.id,
        resume=None if os.environ["WANDB_MODE"] == "offline" else "allow",
        config=about.settings,
        settings=wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True, init_timeout=20
        ),
    )

    def send(points: Sequence[Point]) -> None:
        for point in points:
            if point.step >= run.starting_step:
                run.log(point.figures, step=point.step)

    return Tracker(send, lambda finished: run.finish(exit_code=0 if finished else 1))


def _trackio(about: About) -> Tracker:
    """A run in trackio's local store, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say; it knows its last step."""
    _unless_set(TRACKIO_PROJECT=PROJECT)
    import trackio

    # It greets on stdout, which belongs to the command's own result.
    with contextlib.redirect_stdout(io.StringIO()):
        run = trackio.init(
            os.environ["TRACKIO_PROJECT"],
            name=f"{about.name}-{about.id}",
            resume="allow",
            config=about.settings,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    first = run._next_step

    def send(points: Sequence[Point]) -> None:
        for point in points:
            if point.step >= first:
                run.log(point.figures, step=point.step)

    def close(_: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()

    return Tracker(send, close)


TRACKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _unless_set(**variables: str) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _without_secrets(text: str) -> str:
    """A message without the user and password that an address in it may hold."""
    return re.sub(r"//[^/@\s]+@", "//", text)
