"""Trackers show what metrics.jsonl says, each point once over kills and resumes, and never cost the run."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import metier
from metier import acts, config, curves, records, runs
from metier.curves import Point
from metier.errors import ConfigError, ResourceError
from metier.training import loop, track

ADAPTER = "train/adapter/adapter_model.safetensors"
Steps = dict[str, list[tuple[int, float]]]


def line(step: int, **figures: float) -> dict[str, Any]:
    return {"step": step, "stage": "sft", **figures}


class Fake:
    """A tracker that keeps what it is sent, or fails on it."""

    def __init__(self, broken: bool = False) -> None:
        self.points: list[Point] = []
        self.calls, self.broken, self.finished = 0, broken, None

    def __call__(self, about: track.About) -> track.Tracker:
        self.about = about
        return track.Tracker(self._send, self._close)

    def _send(self, points: Sequence[Point]) -> None:
        self.calls += 1
        if self.broken:
            raise ConnectionError("no answer from http://me:secret@server/api\nmore")
        self.points += points

    def _close(self, finished: bool) -> None:
        self.finished = finished


@pytest.fixture
def spec(specialist: Path) -> config.Spec:
    return config.load(specialist, ["track=[mlflow,wandb]"]).spec


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Stand-ins for two trackers, the second of them broken; every line is passed on at once."""
    made = {"mlflow": Fake(), "wandb": Fake(broken=True)}
    for name, fake in made.items():
        monkeypatch.setitem(track.TRACKERS, name, fake)
    monkeypatch.setattr(track, "EVERY_SECONDS", 0.0)
    return made


def test_what_is_new_in_the_file_is_passed_on_and_the_main_figures_last(
    spec: config.Spec, fakes: dict[str, Fake], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    with track.following(spec, tmp_path, path.name) as trackers:
        trackers.follow()
        path.write_bytes(records.lines([line(1, loss=2.0, tokens=10, seconds=0.5), line(1, valid_loss=1.0)]))
        trackers.follow()
        trackers.follow()
        with path.open("ab") as file:
            file.write(records.lines([line(2, loss=1.0)]))
        trackers.end({"loss": 1.5, "memory_gb": {"measured": 2}, "device": "cpu"})
    fake = fakes["mlflow"]
    first = {"loss": 2.0, "tokens": 10, "seconds": 0.5, "tokens_per_second": 20}
    assert [(p.step, p.figures) for p in fake.points] == [
        (1, first),
        (1, {"valid_loss": 1.0}),
        (2, {"loss": 1.0}),
        (2, {"final/loss": 1.5, "final/memory_gb.measured": 2}),
    ]
    assert fake.finished is True
    assert fake.about.name == "colours" and fake.about.settings["train.0.rank"] == 4


def test_a_tracker_that_fails_is_named_once_and_left_out(
    spec: config.Spec, fakes: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with track.following(spec, tmp_path, path.name) as trackers:
        for step in (1, 2, 3):
            path.open("ab").write(records.lines([line(step, loss=1.0)]))
            trackers.follow()
    assert [p.step for p in fakes["mlflow"].points] == [1, 2, 3]
    assert (fakes["wandb"].calls, fakes["wandb"].finished) == (1, None)
    said = capsys.readouterr().err
    assert said.count("wandb failed and is left out") == 1 and "secret" not in said
    assert trackers.failed == {"wandb": "ConnectionError: no answer from http://server/api"}


def test_a_tracker_that_cannot_open_or_close_costs_nothing(
    spec: config.Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closing_badly(about: track.About) -> track.Tracker:
        return track.Tracker(lambda points: None, lambda finished: 1 / 0)

    monkeypatch.setitem(track.TRACKERS, "mlflow", lambda about: {}["nowhere"])
    monkeypatch.setitem(track.TRACKERS, "wandb", closing_badly)
    with track.following(spec, tmp_path, "metrics.jsonl") as trackers:
        trackers.end({})
    assert sorted(trackers.failed) == ["mlflow", "wandb"]


def test_a_stopped_training_closes_its_trackers_as_stopped(
    spec: config.Spec, fakes: dict[str, Fake], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), track.following(spec, tmp_path, "metrics.jsonl"):
        raise KeyboardInterrupt
    assert fakes["mlflow"].finished is False


def test_a_training_that_goes_on_has_the_same_id_and_another_training_another(
    spec: config.Spec, fakes: dict[str, Fake], tmp_path: Path
) -> None:
    ids = []
    for name in ("one", "one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
        with track.following(spec, tmp_path / name, "metrics.jsonl"):
            ids.append(fakes["mlflow"].about.id)
    assert ids[0] == ids[1] != ids[2]


def test_lines_are_not_sent_more_often_than_every_few_seconds(
    spec: config.Spec, fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "EVERY_SECONDS", 3600.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(records.lines([line(1, loss=1.0)]))
    with track.following(spec, tmp_path, path.name) as trackers:
        for step in range(2, 50):
            path.open("ab").write(records.lines([line(step, loss=1.0)]))
            trackers.follow()
        assert fakes["mlflow"].calls == 1
        trackers.end({"loss": 1.0})
    assert [p.step for p in fakes["mlflow"].points] == [*range(1, 50), 49]


# Settings


def test_an_absent_tracker_is_refused_before_the_work_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError) as refused:
        acts.hold_extras("train", ["trackio"])
    assert 'pip install "metier[' in refused.value.fix


def test_a_folder_that_a_tracker_left_is_not_taken_for_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ResourceError, match="no_such_tracker is not installed"):
        acts.hold_extras("train", ["no_such_tracker"])


def test_a_tracker_named_twice_or_unknown_is_refused(specialist: Path) -> None:
    for value in ("[wandb,wandb]", "[wandbb]"):
        with pytest.raises(ConfigError, match="track"):
            config.load(specialist, [f"track={value}"])


def test_turning_a_tracker_on_does_not_do_the_training_again(specialist: Path, tmp_path: Path) -> None:
    metier.build(specialist, runs=tmp_path / "runs")
    metier.train(specialist, runs=tmp_path / "runs")
    again = metier.train(specialist, runs=tmp_path / "runs", settings=["track=[wandb]"])
    assert again.status == acts.FRESH


# The trackers themselves, where they are installed


@pytest.mark.parametrize("name", track.TRACKERS)
def test_every_point_stands_once_in_a_tracker_after_a_kill(
    name: str, specialist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    for variable in [v for v in os.environ if v.startswith(("MLFLOW_", "WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "EVERY_SECONDS", 0.0)
    steps = loop.steps

    def killed(*words: Any, **more: Any) -> Iterator[loop.StepResult]:
        for result in steps(*words, **more):
            if result.step == 6:
                raise KeyboardInterrupt
            yield result

    metier.build(specialist, runs="runs")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "steps", killed)
        with pytest.raises(KeyboardInterrupt):
            metier.train(specialist, runs="runs", settings=[f"track=[{name}]"])
    capsys.readouterr()
    done = metier.train(specialist, runs="runs", settings=[f"track=[{name}]"])
    assert done.figures["trackers_failed"] == {} and capsys.readouterr().out == ""

    folder = tmp_path / "runs" / "colours" / "train"
    points = curves.read(folder / "metrics.jsonl")
    shown = READ[name](folder, runs.read_json(folder / track.TRACKED)["id"])
    for key in ("loss", "lr", "grad_norm", "valid_loss", "tokens_per_second"):
        assert [s for s, _ in shown[key]] == [p.step for p in points if key in p.figures], key
        # Steps 4 and 5 were done twice; their values are the same, their seconds are not.
        expected = [p.figures[key] for p in points if key in p.figures]
        if key != "tokens_per_second":
            assert [v for _, v in shown[key]] == pytest.approx(expected, rel=1e-6), key
    assert shown["final/loss"] == [(points[-1].step, pytest.approx(done.figures["loss"], rel=1e-6))]

    metier.build(specialist, runs="plain")
    metier.train(specialist, runs="plain")
    assert (tmp_path / "plain" / "colours" / ADAPTER).read_bytes() == (folder.parent / ADAPTER).read_bytes()


def _read_tensorboard(folder: Path, _: str) -> Steps:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / track.TENSORBOARD), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _read_mlflow(_: Path, name: str) -> Steps:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("metier")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags["metier.id"] == name and run.data.params["train.0.rank"] == "4"
    assert run.info.status == "FINISHED"
    return {k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)] for k in run.data.metrics}


def _read_wandb(folder: Path, name: str) -> Steps:
    from wandb.proto import wandb_internal_pb2

    path = max(folder.parents[2].glob(f"wandb/offline-run-*/run-{name}.wandb"), key=lambda p: p.stat().st_mtime_ns)
    shown: Steps = {}
    for data in _leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for key, value in row.items():
            shown.setdefault(key, []).append((row["_step"], value))
    return shown


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, behind wandb's own seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def _read_trackio(_: Path, name: str) -> Steps:
    from trackio.sqlite_storage import SQLiteStorage

    shown: Steps = {}
    for row in SQLiteStorage.get_logs("metier", f"colours-{name}"):
        for key, value in row.items():
            shown.setdefault(key, []).append((row["step"], value))
    return shown


READ: dict[str, Callable[[Path, str], Steps]] = {
    "tensorboard": _read_tensorboard,
    "mlflow": _read_mlflow,
    "wandb": _read_wandb,
    "trackio": _read_trackio,
}
