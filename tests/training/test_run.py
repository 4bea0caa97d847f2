"""A training that is stopped, hurt or moved: it ends in the same bytes, or in one clear error before the first step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import metier
from conftest import write_specialist
from metier import machine, runs
from metier.errors import ConfigError, DataError, MetierError, NumericError, ResourceError, RunError, Terminated
from metier.models import lora, tensors
from metier.training import checkpoint, loop

STOPPED_AT, STEPS = 5, 12
ADAPTER = "train/adapter/adapter_model.safetensors"
real_steps = loop.steps


def steps_that(act: Callable[[int], object]) -> Callable[..., Iterator[loop.StepResult]]:
    """`loop.steps`, with `act(step)` called after every step."""

    def steps(*words: object, **more: object) -> Iterator[loop.StepResult]:
        for result in real_steps(*words, **more):  # type: ignore[arg-type]
            act(result.step)
            yield result

    return steps


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A specialist; its finished run; and its run whose training was stopped after step 5, with checkpoints 3 and 5."""
    root = tmp_path_factory.mktemp("stopped")
    stage = {"rank": 4, "alpha": 8, "learning_rate": 0.01, "epochs": 2, "batch_size": 4, "checkpoint_every": 3}
    spec = write_specialist(root / "own" / "colours", tiny, rows=48, train=[stage])
    metier.build(spec, runs=root / "built")
    shutil.copytree(root / "built", root / "stopped")
    shutil.copytree(root / "built", root / "whole")
    metier.train(spec, runs=root / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop = steps_that(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == STOPPED_AT else None)
        patch.setattr(loop, "steps", stop)
        with pytest.raises(Terminated):
            metier.train(spec, runs=root / "stopped")
    return spec, root / "whole", root / "stopped"


@pytest.fixture
def spec(folders: tuple[Path, Path, Path]) -> Path:
    return folders[0]


@pytest.fixture
def stopped(folders: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """The folder of runs with the stopped one, to be hurt."""
    return Path(shutil.copytree(folders[2], tmp_path / "runs"))


@pytest.fixture
def built(folders: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """The folder of runs with nothing trained."""
    return Path(shutil.copytree(folders[0].parents[1] / "built", tmp_path / "runs"))


@pytest.fixture
def ends_like_the_whole_one(folders: tuple[Path, Path, Path]) -> Callable[[Path], None]:
    """Trains to the end and compares with the run that was never hurt."""

    def ends(run: Path) -> None:
        metier.train(folders[0], runs=run)
        found, expected = (_result(folder / "colours" / "train") for folder in (run, folders[1]))
        assert found == expected

    return ends


def _result(train: Path) -> tuple[str, str, list[dict[str, object]]]:
    lines = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    newest = max((train / "checkpoints").glob("step-*"))
    return (
        runs.sha256(train / "adapter" / lora.WEIGHTS),
        newest.name + runs.sha256(newest / checkpoint.TENSORS),
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
    )


def work(run: Path) -> Path:
    return run / "colours" / ".work-train"


def newest(run: Path) -> Path:
    return max((work(run) / "checkpoints").glob("step-*"))


# What somebody or something did to an interrupted training


def another_run(run: Path) -> None:
    _, tensors, facts = _read(run)
    checkpoint.save(newest(run).parent, STOPPED_AT, tensors, facts, run="0" * 64)


def other_shapes(run: Path) -> None:
    mark, _, facts = _read(run)
    other = {n: torch.ones(3) for n in ("value", "mean", "square")}
    checkpoint.save(newest(run).parent, STOPPED_AT, other, facts, run=mark)


def _read(run: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, object]]:
    stated = json.loads((newest(run) / checkpoint.FACTS).read_text())
    return stated["run"], tensors.read(newest(run) / checkpoint.TENSORS), stated["facts"]


def a_file(run: Path) -> None:
    shutil.rmtree(work(run) / "checkpoints")
    (work(run) / "checkpoints").write_text("mine")


def cut_metrics(run: Path) -> None:
    data = (work(run) / "metrics.jsonl").read_bytes()
    (work(run) / "metrics.jsonl").write_bytes(data[: len(data) - 10])


def delete(path: Callable[[Path], Path]) -> Callable[[Path], object]:
    return lambda run: shutil.rmtree(path(run)) if path(run).is_dir() else path(run).unlink()


def plan(run: Path) -> Path:
    return work(run) / "plan.json"


# name: the damage, what the error says, where, and what its fix says to do
REFUSED = {
    "a checkpoint of another run": (another_run, "belongs to another training", newest, delete(newest)),
    "a checkpoint of other shapes": (other_shapes, "tensors of other shapes", newest, delete(newest)),
    "a file for checkpoints": (a_file, "a file stands", lambda r: work(r) / "checkpoints", None),
    "metrics cut": (cut_metrics, "metrics.jsonl is not what", lambda r: work(r) / "metrics.jsonl", delete(work)),
    "metrics gone": (
        lambda r: (work(r) / "metrics.jsonl").unlink(),
        "metrics.jsonl is not what",
        lambda r: work(r) / "metrics.jsonl",
        delete(work),
    ),
    "a plan that is no JSON": (lambda r: plan(r).write_text("{"), "plan.json is damaged", plan, delete(plan)),
    "a plan of another form": (lambda r: plan(r).write_text("[1]"), "not a plan", plan, delete(plan)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hurt_training_is_refused_before_the_first_step(
    name: str, spec: Path, stopped: Path, ends_like_the_whole_one: Callable[[Path], None], monkeypatch
) -> None:
    damage, what, where, mend = REFUSED[name]
    damage(stopped)
    place = str(where(stopped))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "steps", lambda *_, **__: pytest.fail("a step was begun"))
        with pytest.raises(RunError, match=what) as caught:
            metier.train(spec, runs=stopped)
    assert caught.value.where == place and caught.value.fix
    (mend or delete(lambda r: work(r) / "checkpoints"))(stopped)
    ends_like_the_whole_one(stopped)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def append_half_a_line(run: Path) -> None:
    with (work(run) / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')


PASSED_OVER = {
    "nothing": (lambda _: None, "going on from step 5"),
    "half a line behind the checkpoint": (append_half_a_line, "going on from step 5"),
    "the newest checkpoint flipped": (lambda r: flip(newest(r) / checkpoint.TENSORS), "going on from step 3"),
    "all checkpoints flipped": (
        lambda r: [flip(f) for f in (work(r) / "checkpoints").rglob("*.safetensors")],
        "checkpoint step-00000003 is damaged and not used",
    ),
    "all checkpoints gone": (lambda r: shutil.rmtree(work(r) / "checkpoints"), ""),
    "the mark gone": (lambda r: (work(r) / runs.MARK).unlink(), ""),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_a_hurt_training_ends_like_a_whole_one(
    name: str, stopped: Path, ends_like_the_whole_one: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    damage, says = PASSED_OVER[name]
    damage(stopped)
    ends_like_the_whole_one(stopped)
    assert says in capfd.readouterr().err


# What bit-equality depends on


def test_a_training_that_goes_on_elsewhere_says_that_it_is_not_exact(
    spec: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "processor", lambda: "Another CPU")
    done = metier.train(spec, runs=stopped)
    made = json.loads((stopped / "colours" / "train" / "plan.json").read_text())
    assert made["exact"] is False and done.figures["exact"] is False
    [reason] = made["inexact"]
    assert reason.startswith("processor changed after step 5: ") and "Another CPU" in reason
    assert done.figures["inexact"] == [reason] and made["fingerprint"]["processor"].startswith("Another CPU")
    assert capfd.readouterr().err.count("processor changed after step 5") == 1
    again = metier.train(spec, runs=stopped)
    assert again.status == "up to date" and again.figures["inexact"] == [reason]


def test_a_training_under_one_fingerprint_is_exact(spec: Path, stopped: Path) -> None:
    assert metier.train(spec, runs=stopped).figures["exact"] is True
    made = json.loads((stopped / "colours" / "train" / "plan.json").read_text())
    assert (
        made["inexact"] == []
        and made["fingerprint"] | {"threads": 1, "dtype": "fp32", "world_size": 1} == made["fingerprint"]
    )
    assert made["fingerprint"]["micro_batch_tokens"] == made["micro_batch_tokens"]
    assert made["fingerprint"]["torch"] == torch.__version__


# Numbers that are not finite


def test_a_loss_that_is_not_finite_ends_the_training_at_its_last_checkpoint(
    spec: Path,
    stopped: Path,
    ends_like_the_whole_one: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entropy, calls = loop.supervised.cross_entropy, []

    def poisoned(logprobs_K: torch.Tensor) -> tuple[torch.Tensor, int]:
        calls.append(1)
        total, weight = entropy(logprobs_K)
        return (total * torch.nan if len(calls) > 2 else total), weight

    with monkeypatch.context() as patch:
        patch.setattr(loop.supervised, "cross_entropy", poisoned)
        with pytest.raises(NumericError, match="the step was not applied") as caught:
            metier.train(spec, runs=stopped)
    assert caught.value.where.startswith("rows ") and caught.value.fix
    ends_like_the_whole_one(stopped)


# A disk that is full


@pytest.fixture
def small_disk(built: Path) -> Iterator[Path]:
    """The folder of runs on a disk of 4 MB."""
    disk = built.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield Path(shutil.copytree(built, disk / "runs"))
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    with (disk.parent / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_a_disk_that_is_full_for_a_while_costs_only_the_checkpoints_meanwhile(
    spec: Path,
    small_disk: Path,
    ends_like_the_whole_one: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def act(step: int) -> None:
        if step == 2:
            fill(small_disk)
        if step == 8:
            assert not list((work(small_disk) / "checkpoints").glob("step-*"))
            (small_disk.parent / "filler").unlink()

    monkeypatch.setattr(loop, "steps", steps_that(act))
    ends_like_the_whole_one(small_disk)
    said = capfd.readouterr().err
    assert said.count("no checkpoint after step 3: the disk is full") == said.count("no checkpoint after") == 1
    assert said.count("lines wait in memory") <= 1


def test_a_disk_that_stays_full_ends_in_one_error_and_the_next_run_goes_on(
    spec: Path,
    small_disk: Path,
    ends_like_the_whole_one: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "steps", steps_that(lambda step: fill(small_disk) if step == 7 else None))
        with pytest.raises(ResourceError, match="the disk is full"):
            metier.train(spec, runs=small_disk)
    assert newest(small_disk).name == "step-00000006"
    (small_disk.parent / "filler").unlink()
    ends_like_the_whole_one(small_disk)
    assert "going on from step 6" in capfd.readouterr().err


def test_a_stop_whose_checkpoint_fails_says_so(spec: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise ResourceError("the disk is full", fix="free some space")

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(loop, "steps", steps_that(lambda step: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(ResourceError, match="the disk is full"):
        metier.train(spec, runs=built)


# Data that cannot be trained on


def replace_split(run: Path, split: str, text: str) -> None:
    """Another content for a split, sealed as the build would have."""
    data = run / "colours" / "data"
    (data / f"{split}.jsonl").write_text(text)
    manifest = json.loads((data / runs.MANIFEST).read_text())
    manifest["outputs"][f"{split}.jsonl"] = runs.sha256(data / f"{split}.jsonl")
    (data / runs.MANIFEST).write_text(json.dumps(manifest))


def test_an_empty_validation_set_is_refused(spec: Path, built: Path) -> None:
    replace_split(built, "valid", "")
    with pytest.raises(DataError, match="no validation rows") as caught:
        metier.train(spec, runs=built)
    assert caught.value.where.endswith("valid.jsonl") and "metier build" in caught.value.fix


def test_a_row_without_an_answer_is_refused_by_name(spec: Path, built: Path) -> None:
    row = {"id": "mute", "messages": [{"role": "user", "content": "well?"}], "source": {"row": 1}, "group": "g"}
    replace_split(built, "train", json.dumps(row) + "\n")
    with pytest.raises(DataError, match="row mute has no answer to learn") as caught:
        metier.train(spec, runs=built)
    assert caught.value.where.endswith("train.jsonl")


def test_no_module_at_all_is_refused(spec: Path, built: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        metier.train(spec, runs=built, settings=["train.targets=[]"])
    assert "targets" in caught.value.where + caught.value.what and caught.value.fix


def test_a_base_that_changed_under_the_data_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    spec = write_specialist(tmp_path / "own" / "colours", base)
    metier.build(spec, runs=tmp_path / "runs")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(MetierError, match="build is out of date: changed: base"):
        metier.train(spec, runs=tmp_path / "runs")
