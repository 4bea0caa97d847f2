"""A run folder: whole or not at all, one process at a time, and only what changed is done again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metier import runs
from metier.errors import ResourceError, RunError, Terminated
from metier.runs import Run, open_run


def publish(run: Run, fingerprint: str, text: str) -> None:
    work = run.work("build", fingerprint)
    runs.write(work / "a.txt", text)
    run.publish("build", settings={"s": 1}, inputs={"i": "x"}, seconds=0.1)


def test_published_once_and_up_to_date(tmp_path: Path) -> None:
    with open_run(tmp_path, "r") as run:
        assert not run.up_to_date("build", "f")
        publish(run, "f", "one")
        assert run.up_to_date("build", "f") and not run.up_to_date("build", "g")
        publish(run, "g", "two")
        assert (run.act("build") / "a.txt").read_text() == "two" and run.up_to_date("build", "g")
    assert not list(tmp_path.glob("r/.work*")) and not list(tmp_path.glob("r/.trash*"))


def test_an_altered_file_is_named_and_the_act_is_out_of_date(tmp_path: Path) -> None:
    with open_run(tmp_path, "r") as run:
        publish(run, "f", "one")
        (run.act("build") / "a.txt").write_text("other")
        assert "data/a.txt was altered" in run.damaged("build") and not run.up_to_date("build", "f")
        with pytest.raises(RunError, match=r"a\.txt"):
            run.require("build")
        (run.act("build") / "a.txt").unlink()
        assert "no file" in run.damaged("build")


def test_work_goes_on_with_the_same_inputs_and_starts_clean_with_others(tmp_path: Path) -> None:
    with open_run(tmp_path, "r") as run:
        (run.work("train", "f") / "half").write_text("kept")
        assert (run.work("train", "f") / "half").exists()
        assert not (run.work("train", "g") / "half").exists()


@pytest.mark.parametrize("cut", ["before", "between", "after"])
def test_a_kill_around_the_two_renames_loses_nothing(tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path, "r") as run:
        publish(run, "f", "old")

        class Killed(BaseException):
            pass

        renames = []
        rename = Path.rename

        def counted(self: Path, target: Path) -> Path:
            if len(renames) == ["before", "between", "after"].index(cut):
                raise Killed
            renames.append(self.name)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", counted)
        if cut == "after":
            monkeypatch.setattr(runs, "sync", lambda _: (_ for _ in ()).throw(Killed()))
            monkeypatch.setattr(runs, "write_json", lambda p, v: p.write_text(json.dumps(v)))
            monkeypatch.setattr(runs, "write", lambda p, d: p.write_bytes(d.encode() if isinstance(d, str) else d))
        with pytest.raises(Killed):
            publish(run, "g", "new")
        monkeypatch.undo()
    with open_run(tmp_path, "r") as run:
        assert (run.act("build") / "a.txt").read_text() == "new", "the work was whole, so it is what is published"
        assert run.up_to_date("build", "g")
        assert sorted(p.name for p in run.folder.iterdir()) == [".lock", "data"]


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    with open_run(tmp_path, "r"):
        code = (
            "from metier.runs import open_run\nfrom pathlib import Path\n"
            f"with open_run(Path({str(tmp_path)!r}), 'r'):\n    pass"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"process {os.getpid()}" in out.stderr and "RunError" in out.stderr
    with open_run(tmp_path, "r"):
        pass


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "f"
    runs.write(target, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"disk is full: 3 bytes needed, [\d,]+ bytes free"):
        runs.write(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    runs.need_space(tmp_path, 1)
    with pytest.raises(ResourceError, match="disk is full"):
        runs.need_space(tmp_path / "not" / "yet", 1 << 60)


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        runs.write_json(tmp_path / "f.json", {"x": float("nan")})
    assert not (tmp_path / "f.json").exists()


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path, "r") as run:
        publish(run, "f", "one")
        manifest = run.act("build") / runs.MANIFEST
        runs.write_json(manifest, json.loads(manifest.read_text()) | {"format": 99})
        with pytest.raises(RunError, match="another version"):
            run.up_to_date("build", "f")
        manifest.write_text('{"format": 1, "format": 1}')
        with pytest.raises(RunError, match="damaged"):
            run.manifest("build")


@pytest.mark.parametrize(("number", "raises"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_waits_for_the_safe_moment(number: int, raises: type) -> None:
    before = signal.getsignal(number)
    with runs.stoppable() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == number
        with pytest.raises(raises):
            stop.check()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(number: int, code: int) -> None:
    lines = (
        "import os, time",
        "from metier import runs",
        "with runs.stoppable():",
        f"    os.kill(os.getpid(), {int(number)})",
        f"    os.kill(os.getpid(), {int(number)})",
        "    print('still here')",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == "" and done.stderr.count("once more stops at once") == 1


def test_a_folder_that_is_half_deleted_is_never_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work for f is being deleted for work of g when the process dies; then f is wanted again."""
    with open_run(tmp_path, "r") as run:
        (run.work("train", "f") / "a").write_text("kept")
        monkeypatch.setattr(runs.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.work("train", "g")
        monkeypatch.undo()
        assert not (run.work("train", "f") / "a").exists()


def test_a_half_written_file_of_a_dead_process_is_cleared(tmp_path: Path) -> None:
    with open_run(tmp_path, "r") as run:
        (run.work("train", "f") / ".plan.json.7.tmp").write_text("{")
    with open_run(tmp_path, "r") as run:
        assert not list(run.folder.rglob("*.tmp")) and (run.folder / ".work-train").is_dir()


def test_a_publication_that_fails_keeps_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path, "r") as run:
        (run.work("train", "f") / "checkpoint").write_text("hours of work")

        def full(*_: object) -> None:
            raise ResourceError("the disk is full", fix="free some space")

        with monkeypatch.context() as patch:
            patch.setattr(runs, "write_json", full)
            with pytest.raises(ResourceError):
                run.publish("train", settings={}, inputs={}, seconds=0.0)
        assert (run.work("train", "f") / "checkpoint").read_text() == "hours of work"


def test_a_missing_mutable_file_makes_the_act_due(tmp_path: Path) -> None:
    with open_run(tmp_path, "r") as run:
        runs.write(run.work("build", "f") / "dataset.json", "{}")
        run.publish("build", settings={}, inputs={}, seconds=0.0, mutable=("dataset.json",))
        runs.write(run.act("build") / "dataset.json", '{"opened": 1}')
        assert run.up_to_date("build", "f")
        (run.act("build") / "dataset.json").unlink()
        assert "dataset.json is missing" in run.damaged("build")
