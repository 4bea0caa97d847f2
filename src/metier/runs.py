"""A run is a folder, and it is the whole truth about that run.

Each act works in a hidden folder of its own, `.work-<act>`, which survives a kill so that the act can go on, and is
published by two renames when it is whole: readers see the old result or the new one, never a part. `act.json`, written
last, is the act's manifest: the fingerprint of everything that went in and the hash of every file that came out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier import progress, records
from metier.errors import INTERRUPTED, TERMINATED, MetierError, ResourceError, RunError, Terminated

MANIFEST, MARK, SPENT = "act.json", "fingerprint", "spent"
ACTS = ("build", "train", "prove", "ship")
FOLDERS = {"build": "data", "train": "train", "prove": "proof", "ship": "release"}
FORMAT = 1
MAX_JSON_BYTES = 1 << 28


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write(path: Path, data: bytes | str | Sequence[bytes | memoryview]) -> None:
    """Writes a file whole or not at all: a temporary file beside it, flushed to disk, then renamed.

    Large data may come in pieces, so that no second copy of it is held.
    """
    whole = data.encode("utf-8") if isinstance(data, str) else data
    pieces: Sequence[bytes | memoryview] = [whole] if isinstance(whole, bytes) else whole
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path, sum(len(piece) for piece in pieces)):
        try:
            with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as handle:
                for piece in pieces:
                    write_all(handle, piece)
                os.fsync(handle)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file's or folder's descriptor, closed afterwards."""
    handle = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Writes all of `data` where the descriptor stands; one call may take less than it was given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    with opened(path, os.O_RDONLY) as handle:
        os.fsync(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes one indented JSON object, numbers finite, keys in the order given."""
    write(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def read_json(path: Path, *, fix: str = "delete the run folder and run again") -> Any:
    """Strict JSON of a file that Metier wrote; a damaged file is a `RunError` with its name and this `fix`."""
    try:
        return records.loads(path.read_bytes(), str(path), MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise RunError(f"{path.name} is missing", where=str(path), fix="run the act that makes it again") from error
    except (OSError, MetierError) as error:
        raise RunError(
            f"{path.name} is damaged: {error}".split("\n")[0],
            where=str(path),
            fix=fix,
        ) from error


@contextlib.contextmanager
def disk(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns a failed read or write into one clear error; earlier results stay as they were."""
    try:
        yield
    except MetierError:
        raise
    except OSError as error:
        raise disk_error(error, path, needed) from error


def disk_error(error: OSError, path: Path, needed: int = 0) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(existing(path)).free
        wanted = f"{needed:,} bytes needed, " if needed else ""
        return ResourceError(
            f"the disk is full: {wanted}{free:,} bytes free",
            where=str(path),
            fix="free some space and run the same command again; earlier results are intact",
        )
    return ResourceError(
        f"cannot be read or written: {error.strerror or error}",
        where=str(path),
        fix="check the folder and its permissions",
    )


def need_space(path: Path, needed: int) -> None:
    """Refuses before the work starts where the disk cannot hold its result."""
    free = shutil.disk_usage(existing(path)).free
    if free < needed:
        raise disk_error(OSError(errno.ENOSPC, "no space"), path, needed)


@dataclass(frozen=True)
class Run:
    """An open run folder; this process holds its lock."""

    folder: Path

    def act(self, act: str) -> Path:
        """The published folder of an act."""
        return self.folder / FOLDERS[act]

    def manifest(self, act: str) -> dict[str, Any] | None:
        """The act's manifest, or None where the act was never finished."""
        path = self.act(act) / MANIFEST
        if not path.is_file():
            return None
        manifest = read_json(path)
        if manifest.get("format") != FORMAT:
            raise RunError(
                f"made by another version of Metier (format {manifest.get('format')}, this is {FORMAT})",
                where=str(path),
                fix="use a new --runs folder, or the Metier that made it",
            )
        return dict(manifest)

    def up_to_date(self, act: str, fingerprint: str) -> bool:
        """Whether the act was finished with these inputs and its files are as it left them."""
        manifest = self.manifest(act)
        return manifest is not None and manifest["fingerprint"] == fingerprint and not self.damaged(act)

    def damaged(self, act: str) -> str:
        """The first published file that is missing or altered, as a sentence; empty where all are whole."""
        manifest = self.manifest(act)
        if manifest is None:
            return f"{FOLDERS[act]}/ is missing"
        for name, expected in manifest["outputs"].items():
            path = self.act(act) / name
            with disk(path):
                actual = sha256(path) if path.is_file() else "no file"
            if actual != expected:
                return f"{FOLDERS[act]}/{name} was altered: expected sha256 {expected[:16]}…, found {actual[:16]}…"
        gone = next((n for n in manifest.get("mutable", ()) if not (self.act(act) / n).is_file()), "")
        return f"{FOLDERS[act]}/{gone} is missing" if gone else ""

    def require(self, act: str) -> Path:
        """The folder of an act that must have been finished and be whole."""
        if self.manifest(act) is None:
            raise RunError(f"{act} has not been done yet", where=str(self.folder), fix=f"run `metier {act}` first")
        if reason := self.damaged(act):
            raise RunError(reason, where=str(self.folder), fix=f"run `metier {act}` again")
        return self.act(act)

    def work(self, act: str, fingerprint: str) -> Path:
        """The act's working folder: the one an interrupted act left, if its inputs are the same, or a clean one."""
        folder = self.folder / f".work-{act}"
        mark = folder / MARK
        with disk(folder):
            if folder.exists() and not (mark.is_file() and mark.read_text() == fingerprint):
                # Without its mark, a folder that is only half deleted is never taken for one to go on with.
                mark.unlink(missing_ok=True)
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
        if not mark.exists():
            write(mark, fingerprint)
        return folder

    def publish(
        self,
        act: str,
        *,
        settings: dict[str, Any],
        inputs: dict[str, str],
        seconds: float,
        mutable: tuple[str, ...] = (),
    ) -> None:
        """Moves the working folder to its place. Paths that start as `mutable` says may change later."""
        work = self.folder / f".work-{act}"
        with disk(work):
            names = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
            outputs = {n: sha256(work / n) for n in names if not n.startswith((*mutable, MANIFEST, MARK, SPENT))}
            fingerprint = (work / MARK).read_text()
        write_json(
            work / MANIFEST,
            {
                "format": FORMAT,
                "act": act,
                "fingerprint": fingerprint,
                "settings": settings,
                "inputs": inputs,
                "outputs": outputs,
                "mutable": [n for n in names if n in mutable],
                "seconds": round(seconds, 3),
            },
        )
        self._swap(act)

    def _swap(self, act: str) -> None:
        """Puts the working folder in the place of the published one, which is kept until the new one stands there."""
        work, target, trash = self.folder / f".work-{act}", self.act(act), self.folder / f".trash-{act}"
        with disk(target):
            for mark in (MARK, SPENT):
                (work / mark).unlink(missing_ok=True)
            for path in (work, *work.rglob("*")):
                sync(path)
            if target.exists():
                shutil.rmtree(trash, ignore_errors=True)
                target.rename(trash)
            try:
                work.rename(target)
            except OSError:
                if trash.exists():
                    trash.rename(target)
                raise
            sync(self.folder)
            shutil.rmtree(trash, ignore_errors=True)

    def recover(self) -> None:
        """Finishes or undoes a publication that was cut between its two renames, and clears half-written files."""
        with disk(self.folder):
            for debris in self.folder.rglob(".*.tmp"):
                debris.unlink(missing_ok=True)
        for act in ACTS:
            work, target, trash = self.folder / f".work-{act}", self.act(act), self.folder / f".trash-{act}"
            if (work / MANIFEST).is_file():
                self._swap(act)
            elif trash.exists() and not target.exists():
                with disk(target):
                    trash.rename(target)
            shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def open_run(root: Path, name: str, *, create: bool = True) -> Iterator[Run]:
    """Opens `root/name` for this process alone; without `create`, a run that is not there is looked at as empty."""
    folder = root / name
    if not create and not folder.is_dir():
        yield Run(folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+", buffering=1)
    except OSError as error:
        raise disk_error(error, folder) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise RunError(
                f"the run is in use by {holder}", where=str(folder), fix="wait for it, or give another --runs folder"
            ) from error
        with disk(folder):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        run = Run(folder)
        run.recover()
        try:
            yield run
        finally:
            lock.truncate(0)


class Stop:
    """Whether a signal asked to stop; `check` raises at a moment where everything done so far is saved."""

    def __init__(self) -> None:
        self.signal = 0

    def check(self) -> None:
        if self.signal == signal.SIGTERM:
            raise Terminated
        if self.signal:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM waits for the next safe moment (`Stop.check`); the second stops at once."""
    stop = Stop()

    def heed(number: int, _: types.FrameType | None) -> None:
        if stop.signal:
            os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        stop.signal = number
        if not progress.quiet:  # written past Python's buffers, which the signal may have found half full
            os.write(2, b"\nstopping at the next safe moment; once more stops at once\n")

    try:
        before = {s: signal.signal(s, heed) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the host program owns the signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    while not path.exists():
        path = path.parent
    return path
