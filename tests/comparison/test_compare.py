"""Runs side by side: what differs, what may be compared, what must be said, and that nothing is written."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from metier import cli, records, runs, stats
from metier.comparison import figures
from metier.comparison.page import comparison_page
from metier.comparison.run import compare
from metier.errors import ConfigError, RunError
from release import test_report as reports

TASK = {"instruction": "Read it.", "schema": {"type": "object"}, "prompt": None, "shots": 3}


def make(folder: Path, **changes: Any) -> Path:
    """A finished run with the manifests that acts leave."""
    run: Path = reports.make_run(folder, **changes)
    runs.write_json(run / "data" / "task.json", TASK)
    for act, place in (("build", "data"), ("train", "train"), ("prove", "proof")):
        manifest(run, act, place)
    return run


def manifest(run: Path, act: str, place: str) -> None:
    files = [p for p in (run / place).iterdir() if p.is_file() and p.name not in (runs.MANIFEST, "dataset.json")]
    outputs = {p.name: runs.sha256(p) for p in files}
    made = {"format": 1, "act": act, "fingerprint": "0", "settings": {}, "inputs": {}, "outputs": outputs}
    runs.write_json(run / place / runs.MANIFEST, made | {"seconds": 812.4})


def change(run: Path, **settings: Any) -> None:
    file = run / "specialist.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings, sort_keys=False))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("first") / "clerk", cases=40)


@pytest.fixture
def second(first: Path, tmp_path: Path) -> Path:
    """The first run under another name, to be changed."""
    return Path(shutil.copytree(first, tmp_path / "second"))


def worsen(run: Path, cases: int) -> set[str]:
    """Makes the specialist's first right answers wrong under `all`, and returns their cases."""
    path = run / "proof" / "scores.jsonl"
    rows = [row for _, row in records.objects(path)]
    right = [r for r in rows if (r["arm"], r["grader"], r["value"]) == ("tuned", "all", 1)][:cases]
    for row in right:
        row["value"] = 0.0
    runs.write(path, records.lines(rows))
    manifest(run, "prove", "proof")
    return {row["case"] for row in right}


def test_the_same_run_copied_differs_in_nothing(first: Path, second: Path) -> None:
    found = compare([first, second])
    assert found["settings"] == [] and found["notes"] == []
    assert found["same"] == {"train.jsonl": None, "valid.jsonl": None, "test.jsonl": True}
    assert {(row["estimate"], row["b"], row["c"]) for row in found["differences"]} == {(0, 0, 0)}
    assert found["runs"][0]["training"] == found["runs"][1]["training"]


def test_settings_that_differ_have_their_dotted_keys(first: Path, second: Path) -> None:
    stage = copy.deepcopy(yaml.safe_load((second / "specialist.yaml").read_text())["train"][0])
    change(second, seed=7, train=[stage | {"rank": 8, "targets": ["q_proj", "v_proj"]}])
    assert compare([first, second])["settings"] == [
        {"key": "seed", "values": [0, 7]},
        {"key": "train.0.rank", "values": [16, 8]},
        {"key": "train.0.targets", "values": ["all-linear", ["q_proj", "v_proj"]]},
    ]


def test_specialists_are_paired_case_by_case_as_the_gate_does_it(first: Path, second: Path) -> None:
    lost = worsen(second, 5)
    assert len(lost) == 5
    found = compare([first, second])
    [row] = [row for row in found["differences"] if row["grader"] == "all"]
    assert (row["run"], row["against"], row["arm"]) == ("second", "clerk", "tuned")
    # Five cases of forty lost and none won: (0 - 5) / 40, mid-p = (1/2)^5.
    expected = stats.tango(0, 5, 40)
    assert (row["estimate"], row["b"], row["c"], row["n"]) == (-0.125, 0, 5, 40)
    assert (row["low"], row["high"]) == (expected.low, expected.high)
    assert row["p"] == pytest.approx(0.5**5)
    assert found["differences"][0] is row


def test_a_case_that_one_could_not_judge_is_left_out_and_counted(first: Path, second: Path) -> None:
    path = second / "proof" / "scores.jsonl"
    rows = [row for _, row in records.objects(path)]
    next(r for r in rows if (r["arm"], r["grader"]) == ("tuned", "all"))["value"] = None
    runs.write(path, records.lines(rows))
    [row] = [row for row in compare([first, second])["differences"] if row["grader"] == "all"]
    assert (row["n"], row["missing"]) == (39, 1)


def test_scores_on_different_test_sets_are_not_compared_and_it_is_said(first: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", cases=30)
    found = compare([first, other])
    assert found["differences"] == [] and found["same"]["test.jsonl"] is False
    assert "other and clerk were proved on different test sets: their scores are not compared" in found["notes"]
    assert "none is called better" in comparison_page(found)


def test_other_schemas_and_bases_are_said(first: Path, second: Path) -> None:
    runs.write_json(second / "data" / "task.json", TASK | {"schema": {"type": "array"}})
    manifest(second, "build", "data")
    change(second, base="other-base")
    found = compare([first, second])
    assert [row["grader"] for row in found["differences"] if row["grader"] == "schema"] == []
    assert any("different schemas" in note for note in found["notes"])
    assert any("different bases" in note for note in found["notes"])


def test_training_figures_are_those_of_the_metrics(first: Path, second: Path) -> None:
    rows = [
        {"step": s, "stage": "sft", "loss": float(s), "tokens": 100, "supervised_tokens": 9, "seconds": 0.5}
        for s in range(1, 13)
    ]
    rows.insert(6, {"step": 6, "stage": "sft", "valid_loss": 0.25})
    rows.insert(0, {"step": 0, "stage": "cpt", "valid_loss": 0.125})  # of a stage before
    rows.append({"step": 12, "stage": "sft", "valid_loss": 0.75})
    runs.write(second / "train" / "metrics.jsonl", records.lines(rows))
    manifest(second, "train", "train")
    shown = compare([first, second])["runs"][1]
    assert shown["training"] == {
        "finished": True,
        "steps": 12,
        "tokens": 1200,
        "loss": 7.5,  # the mean of 3 .. 12
        "valid_loss": 0.25,
        "seconds": 6.0,
        "act_seconds": 812.4,
        "tokens_per_second": 200.0,
        "memory_gb": 2.187,
    }
    assert shown["curves"]["valid_loss"] == [[0, 0.0, 0.125], [6, 3.0, 0.25], [12, 6.0, 0.75]]


def test_runs_are_shown_with_what_they_have(first: Path, second: Path, tmp_path: Path) -> None:
    shutil.rmtree(second / "proof")
    (second / "train").rename(second / ".work-train")
    (second / ".work-train" / runs.MANIFEST).unlink()
    with (second / ".work-train" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 89, "lo')  # as a training at work may leave it for a moment
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(first / "specialist.yaml", bare)
    found = compare([first, second, bare])
    one, two, three = found["runs"]
    assert [r["acts"] for r in found["runs"]] == [["build", "train", "prove"], ["build"], []]
    assert two["proof"] is None and two["training"]["finished"] is False and two["training"]["steps"] == 88
    assert three["data"] is three["training"] is three["proof"] is None
    assert found["notes"] == ["second: the training is not finished; its figures are those so far"]
    page = comparison_page(found)
    assert "—" in page and one["proof"]["verdict"] in page


def test_what_was_altered_or_is_out_of_date_is_said(first: Path, second: Path) -> None:
    path = second / "proof" / "scores.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"value": 0.0', b'"value": 1.0', 1))
    train = second / "train" / runs.MANIFEST
    made = json.loads(train.read_text())
    made["settings"] = {"seed": 3, "train": [{"rank": 16}]}
    made["inputs"] = {"data/test.jsonl": "0" * 64}
    runs.write_json(train, made)
    assert compare([first, second])["notes"] == [
        "second: train is out of date; since then changed: seed, data/test.jsonl",
        "second: proof/scores.jsonl was altered after prove",
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(first: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(first, tmp_path / "clerk"))
    names = [run["run"] for run in compare([first, other])["runs"]]
    assert names == [f"{first.parent.name}/clerk", f"{tmp_path.name}/clerk"]


def test_wrong_runs_are_refused(first: Path, tmp_path: Path) -> None:
    for folders in ([first], [first, first], [first, first.parent / "." / "clerk"]):
        with pytest.raises(ConfigError, match="different runs"):
            compare(folders)
    with pytest.raises(RunError, match="no run at"):
        compare([first, tmp_path / "nowhere"])


def test_nothing_is_written(first: Path, second: Path) -> None:
    before = {p: p.stat().st_mtime_ns for run in (first, second) for p in run.rglob("*")}
    comparison_page(compare([first, second]))
    assert {p: p.stat().st_mtime_ns for run in (first, second) for p in run.rglob("*")} == before


# The page and the terminal


def test_the_page_is_self_contained_and_the_same_each_time(first: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", cases=40, hostile=reports.EVIL)
    shutil.copytree(first, tmp_path / "third")
    found = compare([first, tmp_path / "third", other])
    found["notes"].append(reports.EVIL)
    found["runs"][1]["run"] = reports.EVIL
    page = comparison_page(found)
    text = reports.hold_self_contained(page).text
    assert page == comparison_page(found)
    assert "Training loss, smoothed" in text and "Validation loss" in text and "all right" in text


def test_the_command_prints_a_table_a_document_and_a_page(
    first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worsen(second, 5)
    change(second, seed=7)

    def call(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["metier", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = call(first, second, "--html", tmp_path / "page.html")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and ["seed", "0", "7"] in rows
    assert any("−12.5 points" in line and "worse" in line for line in out.splitlines())
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    code, out = call(first, second, "--json")
    assert code == 0 and json.loads(out)["runs"][1]["run"] == "second"
    assert call(first)[0] == 2


def test_a_share_without_an_interval_stands_alone() -> None:
    assert figures._share({"f1": 0.5, "intervals": {"f1": {"low": None}}}, "f1") == "50.0\u00a0%"
    assert figures._share(None, "all") == figures.NOTHING
