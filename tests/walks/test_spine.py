"""The whole line on a tiny model: build, train, prove, ship; killed and resumed; twice the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import metier
from conftest import write_model, write_specialist
from metier import acts
from metier.errors import DataError

ADAPTER = "train/adapter/adapter_model.safetensors"
SAME = ("data/train.jsonl", ADAPTER, "proof/scores.jsonl", "proof/verdict.json")


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A specialist and its finished run, released although a random model proves nothing."""
    folder = tmp_path_factory.mktemp("walk")
    spec = write_specialist(folder / "colours", tiny, ship={"unproved": True})
    metier.run(spec, runs=folder / "runs")
    return spec, folder / "runs" / "colours"


def test_the_folder_holds_what_the_contract_says(finished: tuple[Path, Path], shared: Path) -> None:
    done = subprocess.run(
        [sys.executable, shared / "checks" / "run_folder.py", finished[1]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_second_run_does_nothing(finished: tuple[Path, Path]) -> None:
    spec, run = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    outcomes = metier.run(spec, runs=run.parent)
    assert [o.status for o in outcomes] == [acts.FRESH] * 4
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_two_runs_are_equal_byte_for_byte(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """The second in a process of its own, with other hashes of texts, another time zone and locale."""
    spec, run = finished
    code = "import sys, metier\nmetier.run(sys.argv[1], runs=sys.argv[2])"
    other = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Kathmandu", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, spec, tmp_path], env=other, check=True)
    for name in SAME:
        assert (tmp_path / "colours" / name).read_bytes() == (run / name).read_bytes(), name


def test_only_what_a_setting_touches_is_done_again(finished: tuple[Path, Path]) -> None:
    spec, run = finished

    def stale(*settings: str) -> list[str]:
        return [
            o.act for o in metier.run(spec, runs=run.parent, settings=settings, dry=True) if o.status == acts.PLANNED
        ]

    assert stale() == []
    assert stale("seed=1") == ["build", "train", "prove", "ship"]
    assert stale("train.rank=2") == ["train", "prove", "ship"]
    assert stale("prove.confidence=0.9") == ["prove", "ship"]
    assert stale("ship.license=mit") == ["ship"]


def test_a_base_with_windows_and_without_a_system_role_goes_through_every_act(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "gemma2")
    template = base / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    metier.run(write_specialist(tmp_path / "colours", base, ship={"unproved": True}), runs=tmp_path / "runs")
    certificate = json.loads((tmp_path / "runs" / "colours" / "release" / "certificate.json").read_text())
    assert certificate["pass"]


def test_rows_over_the_context_are_refused_by_the_build(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", max_position_embeddings=40)
    spec = write_specialist(tmp_path / "colours", base)
    with pytest.raises(DataError, match=r"too_long \(first pairs.jsonl:1: too_long: 67 tokens, over the limit of 40"):
        metier.build(spec, runs=tmp_path / "runs")


def test_claims_changed_after_training_cannot_ship(finished: tuple[Path, Path], tmp_path: Path) -> None:
    spec, run = finished
    verdict = json.loads((run / "proof" / "verdict.json").read_text())
    assert verdict["sealed"]["registered_before_training"] is True
    metier.build(spec, runs=tmp_path)
    metier.train(spec, runs=tmp_path)
    changed = metier.prove(spec, runs=tmp_path, settings=["prove.max_new_tokens=6"])
    late = json.loads((tmp_path / "colours" / "proof" / "verdict.json").read_text())
    assert late["sealed"]["registered_before_training"] is False and changed.figures["verdict"] != "ship"


def test_an_altered_test_set_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    spec, _ = finished
    metier.build(spec, runs=tmp_path)
    metier.train(spec, runs=tmp_path)
    test = tmp_path / "colours" / "data" / "test.jsonl"
    test.write_bytes(test.read_bytes().replace(b"red", b"rad"))
    from metier.errors import RunError

    with pytest.raises(RunError, match=r"test\.jsonl was altered"):
        metier.prove(spec, runs=tmp_path)


def test_base_and_tuned_answer_side_by_side(finished: tuple[Path, Path]) -> None:
    said = metier.ask(finished[1], "thing 5 of lot 9 is red")
    assert set(said) == {"base", "tuned"} and said["base"]["text"] != said["tuned"]["text"]


def test_nothing_is_released_on_another_verdict(tiny: Path, tmp_path: Path) -> None:
    from metier.errors import PolicyError

    spec = write_specialist(tmp_path / "own", tiny)
    outcomes = metier.run(spec, runs=tmp_path)
    assert [o.act for o in outcomes] == ["build", "train", "prove"]
    assert outcomes[-1].figures["verdict"] in ("do-not-ship", "cannot-tell")
    with pytest.raises(PolicyError, match="verdict"):
        metier.ship(spec, runs=tmp_path)
    assert not (tmp_path / "colours" / "release").exists()


def _killed_and_resumed(kills: int) -> None:
    bench = Path(__file__).parents[2] / "bench" / "kill_resume.py"
    done = subprocess.run(
        [sys.executable, bench, "--small", "--kills", str(kills)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ours"] == kills


def test_killed_and_resumed_equals_uninterrupted() -> None:
    _killed_and_resumed(4)


@pytest.mark.slow
def test_killed_two_hundred_times_equals_uninterrupted() -> None:
    _killed_and_resumed(200)


def test_a_killed_proof_goes_on_to_the_same_scores(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Cut the outputs as a kill would, in the middle of a line and of an arm."""
    spec, run = finished
    metier.build(spec, runs=tmp_path)
    metier.train(spec, runs=tmp_path)
    from metier.evaluate import run as evaluation

    seen = []
    append = evaluation._append

    def cut(path: Path, found: list) -> None:
        append(path, found)
        seen.append(path)
        if len(seen) == 2:
            with path.open("ab") as file:
                file.write(b'{"case": "half a li')
            raise KeyboardInterrupt

    evaluation._append = cut  # type: ignore[assignment]
    try:
        with pytest.raises(KeyboardInterrupt):
            metier.prove(spec, runs=tmp_path)
    finally:
        evaluation._append = append
    metier.prove(spec, runs=tmp_path)
    for name in ("proof/scores.jsonl", "proof/verdict.json"):
        assert (tmp_path / "colours" / name).read_bytes() == (run / name).read_bytes()
