"""Raw text and then answers: two stages in one run, resumed in either, twice the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metier
from conftest import write_specialist
from metier import config, records, runs
from metier.errors import DataError
from metier.models import load, lora, tensors
from metier.text.chat import Renderer
from metier.training import loop
from metier.training.feeds import feeds
from metier.training.run import _schedule

ADAPTER = "train/adapter/adapter_model.safetensors"
STAGES = [
    {
        "method": "cpt",
        "rank": 4,
        "alpha": 8,
        "learning_rate": 0.01,
        "batch_size": 2,
        "max_length": 64,
        "epochs": 3,
        "checkpoint_every": 3,
        "validations": 2,
        "replay": 0.2,
    },
    {"learning_rate": 0.01, "batch_size": 4, "epochs": 1, "checkpoint_every": 3},
]


def write_text(folder: Path, count: int = 24) -> None:
    """Documents of a few lines that a tiny model can learn to expect."""
    (folder / "notes").mkdir(parents=True, exist_ok=True)
    for n in range(count // 2):
        body = "\n".join(
            f"lot {n} line {i}: the {('red', 'green')[i % 2]} thing {n * i % 31}" for i in range(1 + n % 9)
        )
        (folder / "notes" / f"{n:02}.md").write_text(body)
    with (folder / "more.jsonl").open("w") as file:
        for n in range(count // 2):
            file.write(json.dumps({"text": f"case {n * 7919 % 1009}: the apple of lot {n} is green and ripe"}) + "\n")
    with (folder / "general.jsonl").open("w") as file:
        for n in range(6):
            file.write(json.dumps({"text": f"some other words number {n}, quite {n * 37} unlike the rest"}) + "\n")


def write_two_stages(folder: Path, tiny: Path, **data: object) -> Path:
    write_text(folder)
    sizes = {"train": 30, "valid": 6, "test": 12}
    both = {"examples": ["pairs.jsonl"], "sizes": sizes, "near_duplicate": 1, "text": ["notes/*.md", "more.jsonl"]}
    return write_specialist(folder, tiny, data=both | {"replay": ["general.jsonl"]} | data, train=STAGES)


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stages")
    spec = write_two_stages(folder / "colours", tiny)
    metier.run(spec, runs=folder / "runs")
    return spec, folder / "runs" / "colours"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_the_contract_says(finished: tuple[Path, Path], shared: Path) -> None:
    checker = [sys.executable, shared / "checks" / "run_folder.py", finished[1], "--acts", "build,train,prove"]
    done = subprocess.run(checker, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_steps_go_on_over_the_stages_and_each_has_its_own_rate(finished: tuple[Path, Path]) -> None:
    steps = [m for m in metrics(finished[1]) if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, len(steps) + 1))
    first = [m for m in steps if m["stage"] == "cpt"]
    second = steps[len(first) :]
    assert {m["stage"] for m in second} == {"sft"}
    assert first[-1]["lr"] < 1e-3 and second[0]["lr"] == 0.01, "the schedule begins anew"


def test_the_plan_has_each_stage_and_their_totals(finished: tuple[Path, Path]) -> None:
    plan = json.loads((finished[1] / "train" / "plan.json").read_text())
    assert [s["stage"] for s in plan["stages"]] == ["cpt", "sft"]
    steps = [m for m in metrics(finished[1]) if "loss" in m]
    assert sum(s["steps"] for s in plan["stages"]) == len(steps)
    assert plan["seconds"]["measured"] == pytest.approx(sum(m["seconds"] for m in steps), abs=0.02)
    bits = plan["bits_per_byte"]["cpt"]
    assert bits == plan["stages"][0]["bits_per_byte"] and bits["after"] < bits["before"]


def test_a_dry_run_says_what_each_stage_goes_through(finished: tuple[Path, Path]) -> None:
    spec, run = finished
    planned = metier.train(spec, runs=run.parent, settings=["train.1.epochs=3"], dry=True).figures
    splits = json.loads((run / "data" / "dataset.json").read_text())["splits"]
    tokens = [round(splits["text-train"]["tokens"] * 3 / 0.8), splits["train"]["tokens"] * 3]
    assert [s["tokens"] for s in planned["stages"]] == tokens and planned["tokens"] == sum(tokens)


def test_two_runs_are_equal_byte_for_byte(finished: tuple[Path, Path], tmp_path: Path) -> None:
    spec, run = finished
    metier.build(spec, runs=tmp_path)
    metier.train(spec, runs=tmp_path)
    names = ("data/text-train.jsonl", "data/text-test.jsonl", "data/replay.jsonl", "data/ledger.jsonl", ADAPTER)
    for name in names:
        assert (tmp_path / "colours" / name).read_bytes() == (run / name).read_bytes(), name


def without_seconds(run: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics(run)]


def test_interrupted_anywhere_and_resumed_equals_uninterrupted(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off before the first checkpoint, in the middle and at the end of a stage, and in the next one."""
    spec, run = finished
    metier.build(spec, runs=tmp_path)
    names = [m["stage"] for m in metrics(run) if "loss" in m]
    first, steps, broken = names.count("cpt"), loop.steps, {}
    stops = [("cpt", 2), ("cpt", 5), ("cpt", first), ("sft", 1), ("sft", len(names) - first)]

    def breaking(
        model: object, flat: object, rows: list, prefix: int, schedule: loop.Schedule, start: int = 0, **more: object
    ):
        for result in steps(model, flat, rows, prefix, schedule, start, **more):  # type: ignore[arg-type]
            yield result
            here = ("cpt" if schedule.steps == first else "sft", result.step)
            if here in stops and here not in broken:
                broken[here] = True
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "steps", breaking)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            metier.train(spec, runs=tmp_path)
    metier.train(spec, runs=tmp_path)
    assert runs.sha256(tmp_path / "colours" / ADAPTER) == runs.sha256(run / ADAPTER)
    assert without_seconds(tmp_path / "colours") == without_seconds(run)


def test_the_second_stage_is_a_training_that_begins_with_the_first_ones_weights(
    finished: tuple[Path, Path], tiny: Path, tmp_path: Path
) -> None:
    """Fresh moments, a fresh schedule and the order of rows from its beginning: by the loop alone, bit for bit."""
    spec, _ = finished
    settings = ["train.0.validations=0", "train.1.validations=0"]
    alone = [f"train=[{json.dumps(STAGES[0] | {'validations': 0})}]"]
    for name, chosen in (("both", settings), ("first", alone)):
        metier.build(spec, runs=tmp_path / name, settings=chosen)
        metier.train(spec, runs=tmp_path / name, settings=chosen)
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=torch.device("cpu"))
    lora.load(model, tmp_path / "first" / "colours" / "train" / "adapter")
    loaded = config.load(spec, settings).spec
    data = tmp_path / "both" / "colours" / "data"
    _, feed = feeds(loaded, data, Renderer(tiny), 512, lambda _: records.documents(data / "replay.jsonl"))
    plan = json.loads((tmp_path / "both" / "colours" / "train" / "plan.json").read_text())["stages"][1]
    flat = loop.Flat(lora.parameters(model))
    for _ in loop.steps(model, flat, feed.rows, feed.prefix, _schedule(feed, loaded.seed, plan)):
        pass
    expected = tensors.read(tmp_path / "both" / "colours" / ADAPTER)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lora.state(model).items())


def test_the_base_writes_its_own_replay_where_none_is_given(tiny: Path, tmp_path: Path) -> None:
    spec = write_two_stages(tmp_path / "colours", tiny, replay=[])
    for folder in ("one", "two"):
        metier.build(spec, runs=tmp_path / folder)
        metier.train(spec, runs=tmp_path / folder)
    one, two = (tmp_path / f / "colours" / "train" / "replay.jsonl" for f in ("one", "two"))
    assert one.read_bytes() == two.read_bytes() and one.stat().st_size > 1000


def test_raw_text_alone_is_trained_on_and_not_proved(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "colours"
    spec = write_specialist(folder, tiny, data={"text": ["more.jsonl"]}, train=[STAGES[0] | {"replay": 0}])
    write_text(folder)
    built = metier.build(spec, runs=tmp_path / "runs")
    assert built.figures["counts"] == {"in": 12, "used": 12, "duplicate": 0, "rejected": 0}
    trained = metier.train(spec, runs=tmp_path / "runs")
    assert trained.figures["bits_per_byte"]["cpt"]["after"] < trained.figures["bits_per_byte"]["cpt"]["before"]
    with pytest.raises(DataError, match="nothing to prove on"):
        metier.prove(spec, runs=tmp_path / "runs")


def test_a_base_without_a_template_learns_in_the_given_one(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    task = {"instruction": "Name the colour as JSON.", "schema": "schema.json", "template": "chatml"}
    spec = write_specialist(tmp_path / "colours", bare, task=task, ship={"unproved": True})
    metier.run(spec, runs=tmp_path / "runs")
    own = write_specialist(tmp_path / "own", tiny, task=task | {"template": None})
    metier.build(own, runs=tmp_path / "own" / "runs")
    metier.train(own, runs=tmp_path / "own" / "runs")
    assert runs.sha256(tmp_path / "runs" / "colours" / ADAPTER) == runs.sha256(
        tmp_path / "own" / "runs" / "colours" / ADAPTER
    )
    shipped = tmp_path / "runs" / "colours" / "release" / "adapter" / "chat_template.jinja"
    assert "<|im_end|>" in shipped.read_text()
