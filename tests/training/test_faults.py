"""Every call by which a training reaches the disk fails once, and the process dies right before and after each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import faults
from metier import runs
from metier.errors import ResourceError
from metier.training import checkpoint
from metier.training.metrics import Metrics

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are named through /proc")
STEPS = 3


def train(root: Path, mark: str, steps: int = STEPS) -> None:
    """What a training does to the disk, with a sum in place of a model."""
    with runs.open_run(root, "r") as run:
        if run.up_to_date("train", mark):
            return
        work = run.work("train", mark)
        metrics, value_N, done = Metrics(work / "metrics.jsonl"), torch.zeros(3), 0
        checkpoint.prepare(work / "checkpoints")
        found = checkpoint.newest(work / "checkpoints", run=mark, like={"value": value_N})
        if found:
            done, value_N = found[0], found[1]["value"]
            metrics.restore(found[2])
        else:
            metrics.clear()
        for step in range(done + 1, steps + 1):
            value_N = value_N * 1.5 + step
            metrics.add({"step": step, "value": float(value_N[0])})
            with contextlib.suppress(ResourceError):
                checkpoint.save(work / "checkpoints", step, {"value": value_N}, metrics.state(), run=mark)
        runs.write(work / "adapter.json", json.dumps(value_N.tolist()))
        metrics.state()
        run.publish("train", settings={}, inputs={}, seconds=0.0, mutable=("checkpoints/",))


def published(root: Path) -> dict[str, bytes]:
    """The published files; a checkpoint that could not be written is missing, and may be."""
    folder = root / "r" / "train"
    names = {p: p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: p.read_bytes() for p, n in names.items() if not n.startswith("checkpoints/")}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an earlier result, which the training replaces."""
    root = tmp_path_factory.mktemp("before")
    train(root, "old", steps=1)
    return root


SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in (*faults.ERRORS[1:], *faults.DEATHS)]


@pytest.mark.parametrize("fault", [faults.ERRORS[0], faults.GONE, *SLOW])
def test_every_call_of_a_training_may_fail_once(
    before: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, root, log = published(before), tmp_path / "runs", tmp_path / "calls"
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here, and disks take their time

    def run(at: int | None = None) -> int:
        return faults.attempt(lambda: train(root, "new"), root, log, at=at, fault=fault)

    shutil.copytree(before, root)
    assert run() == faults.DONE
    new, calls = published(root), log.read_text().splitlines()
    for name in faults.CALLS:
        assert any(c.startswith(f"{name} ") for c in calls), f"{name} is not called any more, or no longer seen"
    assert new["adapter.json"] != old["adapter.json"]
    for at, call in enumerate(calls):
        shutil.rmtree(root)
        shutil.copytree(before, root)
        ended = run(at)
        where = f"{fault} at call {at}: {call}"
        if fault in faults.ERRORS:
            assert ended in (faults.DONE, faults.REFUSED), where
        else:
            assert ended == faults.DEAD or at == len(calls) - 1, where
        now = published(root)
        if fault in faults.ERRORS:
            assert now in (old, new), f"{where}: what is published is neither the old result nor the new one"
        _hold_newest(root / "r" / ".work-train" / "checkpoints", where)
        train(root, "new")
        assert published(root) == new, where
        assert sorted(p.name for p in (root / "r").iterdir()) == [".lock", "train"], where


def _hold_newest(folder: Path, where: str) -> None:
    """The checkpoint with the highest number is whole: it is the one that is found."""
    steps = sorted(folder.glob("step-*"))
    found = checkpoint.newest(folder, run="new", like={"value": torch.zeros(3)})
    assert (found[0] if found else None) == (int(steps[-1].name[5:]) if steps else None), where
