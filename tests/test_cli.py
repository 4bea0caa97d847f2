"""The command line: help at once, one clear error for every bad input, documented exit codes, results kept."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metier
from conftest import write_specialist
from metier import cli, runs
from metier.training import loop


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["metier", *map(str, words)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def specialist(tmp_path: Path, tiny: Path) -> Path:
    """Apart from the run folders that the tests make in `tmp_path`."""
    return write_specialist(tmp_path / "own" / "colours", tiny)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: call(capsys, monkeypatch, *words)


def change(spec: Path, **settings: object) -> Path:
    import yaml

    file = spec / "specialist.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | settings, sort_keys=False))
    return spec


def pairs(*rows: object) -> object:
    def write(spec: Path) -> None:
        (spec / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    return write


def edit(spec: Path, old: str, new: str) -> None:
    file = spec / "specialist.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


BAD = {
    "setting missing": (lambda s: edit(s, "name: colours\n", ""), "name is missing", "add `name:`"),
    "setting misspelt": (
        lambda s: edit(s, "learning_rate", "learning_rte"),
        "learning_rte is not a setting",
        "learning_rate?",
    ),
    "no settings": (lambda s: (s / "specialist.yaml").unlink(), "no settings at", "specialist.yaml"),
    "data missing": (lambda s: (s / "pairs.jsonl").unlink(), "pairs.jsonl", ""),
    "data empty": (lambda s: (s / "pairs.jsonl").write_text(""), "empty", ""),
    "data is a folder": (lambda s: ((s / "pairs.jsonl").unlink(), (s / "pairs.jsonl").mkdir()), "pairs.jsonl", ""),
    "data is a pipe": (lambda s: ((s / "pairs.jsonl").unlink(), os.mkfifo(s / "pairs.jsonl")), "pairs.jsonl", ""),
    "only rows without text": (pairs({"prompt": "", "completion": "x"}, {"prompt": "x", "completion": ""}), "", ""),
    "too few rows": (pairs({"prompt": "a", "completion": '{"colour": "red"}'}), "", ""),
    "no JSON Schema": (lambda s: (s / "schema.json").write_text('{"type": "objekt"}'), "", ""),
    "schema no JSON": (lambda s: (s / "schema.json").write_text("{"), "", ""),
    "schema missing": (lambda s: (s / "schema.json").unlink(), "schema.json", ""),
    "no such base": (lambda s: change(s, base="./nowhere"), "there is no base", "smollm2-135m"),
    "another base hash": (lambda s: change(s, base_sha256="0" * 64), "another hash", "base_sha256"),
    "no such grader": (
        lambda s: change(s, prove={"claims": [{"beats": "prompt", "grader": "field:color"}]}),
        "no grader",
        "field:colour",
    ),
    "no such module": (
        lambda s: change(s, train=[{"targets": ["q_prj"]}]),
        "no linear layer is called q_prj",
        "q_proj",
    ),
    "rank 0": (lambda s: change(s, train=[{"rank": 0}]), "rank: Input should be greater than", "settings.md"),
    "alpha 0": (lambda s: change(s, train=[{"alpha": 0}]), "alpha: Input should be greater than", "settings.md"),
    "learning rate 0": (lambda s: change(s, train=[{"learning_rate": 0}]), "learning_rate: Input", "settings.md"),
    "learning rate over 1": (lambda s: change(s, train=[{"learning_rate": 1e3}]), "learning_rate: Input", "settings"),
    "rank too large": (lambda s: change(s, train=[{"rank": 500}]), "rank 500", "at most"),
    "no such device": (lambda s: change(s, machine={"device": "cuda"}), "there is no cuda here", "cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str, specialist: Path, tmp_path: Path, run_cli) -> None:
    damage, what, fix = BAD[name]
    damage(specialist)
    folder = tmp_path / "runs"
    code, out, err = run_cli("run", specialist, "--runs", folder, "--json")
    error = json.loads(out)["error"]
    assert code == 2, error
    assert what in error["what"] + error["where"] and fix in error["fix"] and error["fix"] and error["where"]
    assert "Traceback" not in err
    made = folder / "colours"
    late = {"no such grader", "no such module", "rank too large", "no such device"}
    published = sorted(p.name for p in made.iterdir() if not p.name.startswith(".")) if made.exists() else []
    assert [n for n in published if n != "specialist.yaml"] == (["data"] if name in late else [])


def test_a_row_without_text_is_refused_and_the_rest_are_used(specialist: Path, tmp_path: Path, run_cli) -> None:
    with (specialist / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "", "completion": "{}"}\n{"prompt": "cut')
    code, out, _ = run_cli("build", specialist, "--runs", tmp_path, "--json")
    counts = json.loads(out)["counts"]
    assert (
        code == 0 and counts["in"] == 62 and counts["in"] == counts["used"] + counts["duplicate"] + counts["rejected"]
    )
    ledger = (tmp_path / "colours" / "data" / "ledger.jsonl").read_text()
    assert "pairs.jsonl:61" in ledger and "pairs.jsonl:62" in ledger


def test_errors_for_people_say_what_where_and_the_fix(specialist: Path, tmp_path: Path, run_cli) -> None:
    edit(specialist, "rank: 4", "rnk: 4")
    code, out, err = run_cli("train", specialist, "--runs", tmp_path)
    assert (code, out) == (2, "")
    assert err == (
        f"metier: train.0.rnk is not a setting\n  where: {specialist}/specialist.yaml\n  fix: did you mean rank?\n"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bild", "x"], "No such command"),
        (["build"], "Missing argument"),
        (["build", "x", "--jsn"], "No such option"),
        (["ask", "nowhere", "hello"], "no run at nowhere"),
        (["new", "licence-clark", "x"], "did you mean licence-clerk?"),
        (["train", "nowhere"], "no settings at nowhere"),
    ],
)
def test_wrong_words_exit_2(words: list[str], says: str, run_cli) -> None:
    code, _, err = run_cli(*words)
    assert code == 2 and says in err and "fix:" in err


def test_acts_out_of_order_say_which_comes_first(specialist: Path, tmp_path: Path, run_cli) -> None:
    for act, first in (("train", "build"), ("prove", "build"), ("ship", "train")):
        code, _, err = run_cli(act, specialist, "--runs", tmp_path)
        assert code == 2 and f"metier {first}" in err


def test_an_act_never_builds_on_an_earlier_one_with_other_settings(specialist: Path, tmp_path: Path, run_cli) -> None:
    run_cli("build", specialist, "--runs", tmp_path)
    code, _, err = run_cli("train", specialist, "--runs", tmp_path, "--set", "task.instruction=other")
    assert code == 2 and "build is out of date: changed: task" in err and "metier build" in err


@pytest.mark.parametrize("setting", ["name.x=1", "data.documents.0=foo", "train.7.rank=1", "x", "seed.0.y=2"])
def test_settings_that_have_no_place_are_refused(setting: str, specialist: Path, run_cli) -> None:
    code, _, err = run_cli("build", specialist, "--set", setting)
    assert code == 2 and "fix:" in err


def test_the_whole_line_in_json(specialist: Path, tmp_path: Path, run_cli) -> None:
    code, out, _ = run_cli("run", specialist, "--runs", tmp_path, "--json")
    whole = json.loads(out)
    assert code == {"ship": 0, "do-not-ship": 3, "cannot-tell": 4}[whole["verdict"]]
    assert [a["act"] for a in whole["acts"]][:3] == ["build", "train", "prove"]
    assert {"act", "run", "status", "seconds", "outputs"} <= whole.keys() and all(
        Path(p).exists() for p in whole["outputs"]
    )
    code, out, _ = run_cli("train", specialist, "--runs", tmp_path, "--json")
    assert code == 0 and json.loads(out)["status"] == "up to date"
    code, out, _ = run_cli("ask", tmp_path / "colours", "is it red", "--json")
    assert code == 0 and set(json.loads(out)) == {"base", "tuned"}


def test_a_run_never_lands_in_the_specialists_own_folder(specialist: Path, run_cli) -> None:
    before = (specialist / "specialist.yaml").read_bytes()
    code, _, err = run_cli("build", specialist, "--runs", specialist.parent)
    assert code == 2 and "own folder" in err and (specialist / "specialist.yaml").read_bytes() == before


def test_dry_run_writes_nothing(specialist: Path, tmp_path: Path, run_cli) -> None:
    code, out, _ = run_cli("run", specialist, "--runs", tmp_path / "runs", "--dry-run")
    assert code == 0 and "would be done" in out and not (tmp_path / "runs").exists()


def test_new_copies_a_recipe_and_never_over_something(tmp_path: Path, run_cli) -> None:
    code, out, _ = run_cli("new", "licence-clerk", tmp_path / "new")
    assert code == 0 and "metier run" in out and (tmp_path / "new" / "specialist.yaml").is_file()
    assert "\nname: new\n" in (tmp_path / "new" / "specialist.yaml").read_text()
    (tmp_path / "new" / "specialist.yaml").write_text("mine")
    code, _, err = run_cli("new", "licence-clerk", tmp_path / "new")
    assert code == 2 and "exists already" in err and (tmp_path / "new" / "specialist.yaml").read_text() == "mine"


def test_doctor_in_words_and_in_json(run_cli) -> None:
    code, out, _ = run_cli("doctor")
    assert code == 0 and "cores" in out and "GFLOP/s" in out
    code, out, _ = run_cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["cores"] >= 1 and found["torch"]["gflops"]["fp32"] > 0


def test_a_run_with_other_settings_is_done_again_and_never_mixed(specialist: Path, tmp_path: Path, run_cli) -> None:
    run_cli("build", specialist, "--runs", tmp_path)
    run_cli("train", specialist, "--runs", tmp_path)
    adapter = tmp_path / "colours" / "train" / "adapter" / "adapter_model.safetensors"
    first = runs.sha256(adapter)
    run_cli("train", specialist, "--runs", tmp_path, "--set", "train.rank=2")
    assert runs.sha256(adapter) != first
    assert json.loads((adapter.parent / "adapter_config.json").read_text())["r"] == 2
    run_cli("train", specialist, "--runs", tmp_path)
    assert runs.sha256(adapter) == first


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_the_step_and_the_next_run_goes_on(
    number: int, code: int, specialist: Path, tmp_path: Path, run_cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    metier.build(specialist, runs=tmp_path / "a")
    metier.train(specialist, runs=tmp_path / "a")
    steps = loop.steps

    def interrupted(*words: object, **more: object) -> Iterator[loop.StepResult]:
        for result in steps(*words, **more):  # type: ignore[arg-type]
            if result.step == 4:
                os.kill(os.getpid(), number)
            yield result

    metier.build(specialist, runs=tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "steps", interrupted)
        assert run_cli("train", specialist, "--runs", tmp_path / "b")[0] == code
    work = tmp_path / "b" / "colours" / ".work-train"
    assert (work / "checkpoints" / "step-00000004").is_dir() and not (tmp_path / "b" / "colours" / "train").exists()
    assert run_cli("train", specialist, "--runs", tmp_path / "b")[0] == 0
    name = "colours/train/adapter/adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("act", ["build", "train"])
def test_a_full_disk_costs_the_write_and_never_the_run(act: str, specialist: Path, tmp_path: Path) -> None:
    """A limit on file size fails writes as a full disk does; the command then works with room, as if never hurt."""
    metier.build(specialist, runs=tmp_path)
    if act == "train":
        edit(specialist, "epochs: 2", "epochs: 1")
    else:
        edit(specialist, "near_duplicate: 1\n", "near_duplicate: 0.99\n")
    before = {p: p.read_bytes() for p in (tmp_path / "colours" / "data").rglob("*") if p.is_file()}
    argv = [sys.executable, "-m", "metier", act, str(specialist), "--runs", str(tmp_path), "--json"]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and error["kind"] == "resource" and "disk is full" in error["what"], error
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in before} == before
    getattr(metier, act)(specialist, runs=tmp_path)
    assert not list((tmp_path / "colours").rglob("*.tmp"))


def test_help_is_instant_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom metier import cli\n"
        "try:\n    cli.commands.main(['--help'], standalone_mode=False)\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exit codes" in done.stdout and done.stdout.strip().endswith("[]")


def test_output_cannot_steer_a_terminal() -> None:
    assert cli._printable("a\x1b[31mb\n\u202ec") == "a\\x1b[31mb\n\\u202ec"


def test_a_bug_is_said_to_be_one(specialist: Path, run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metier, "build", lambda **_: 1 / 0)
    code, _, err = run_cli("build", specialist)
    assert code == 1 and "a bug in Metier: ZeroDivisionError" in err and "METIER_DEBUG=1" in err
