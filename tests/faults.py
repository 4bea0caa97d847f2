"""Fails one chosen call of those that change or open files, or ends the process right before or after it.

`before` and `after` end a forked child by `os._exit`. `gone` comes to the same on disk without a fork: after the call,
whatever else the dying code tries on the folder is refused.

Calls are found by making them: a first run records what is called, so a call that is new is covered by itself.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metier.errors import MetierError

CALLS = ("open", "write", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir")
ERRORS = ("ENOSPC", "EIO", "EACCES")
DEATHS = ("before", "after")
GONE = "gone"
DONE, REFUSED, DEAD, BUG = 0, 1, 86, 99
_open, _write = os.open, os.write


class Gone(BaseException):
    """The process is dead, as far as the disk is concerned."""


def attempt(
    program: Callable[[], object],
    folder: Path,
    calls: Path,
    *,
    at: int | None = None,
    fault: str = "",
    forked: bool = False,
) -> int:
    """Runs `program`, its call number `at` on `folder` faulty, and returns `DONE`, `REFUSED` (by a `MetierError`),
    `DEAD` or `BUG`; the names of the calls are written to `calls`, one a line. What is to die is always `forked`."""
    if not forked and fault not in DEATHS:
        return _ended(program, folder, calls, at, fault)
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(_ended(program, folder, calls, at, fault))


def _ended(program: Callable[[], object], folder: Path, calls: Path, at: int | None, fault: str) -> int:
    try:
        with _faulty(str(folder), calls, at, fault):
            program()
    except MetierError:
        return REFUSED
    except Gone:
        return DEAD
    except BaseException:  # noqa: BLE001 (whatever it is, a fork must end here)
        traceback.print_exc()
        return BUG
    return DONE


@contextlib.contextmanager
def _faulty(folder: str, calls: Path, at: int | None, fault: str) -> Iterator[None]:
    handle = _open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    made, shortened = 0, False

    def done(name: str, real: Callable[..., Any], words: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Makes the call; every other write takes only the first half."""
        nonlocal shortened
        if name == "write" and len(words[1]) > 1:
            shortened = not shortened
            return real(words[0], words[1][: len(words[1]) // 2] if shortened else words[1])
        return real(*words, **more)

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            nonlocal made
            path = _path(words[0], more.get("dir_fd"))
            if not path.startswith(folder):
                return real(*words, **more)
            _write(handle, f"{name} {path.removeprefix(folder)}\n".encode())
            made += 1
            if fault == GONE and at is not None and made - 1 > at:
                raise Gone
            if made - 1 != at or fault == GONE:
                return done(name, real, words, more)
            if fault in ERRORS:
                raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)), path)
            with contextlib.suppress(OSError):
                if fault == "after":
                    done(name, real, words, more)
            os._exit(DEAD)

        return call

    real, opens = {n: getattr(os, n) for n in CALLS}, io.open
    for name in CALLS:
        setattr(os, name, wrapped(name, real[name]))
    io.open = builtins.open = wrapped("open", io.open)
    try:
        yield
    finally:
        io.open = builtins.open = opens
        for name in CALLS:
            setattr(os, name, real[name])
        os.close(handle)


def _path(what: Any, folder: int | None) -> str:
    if isinstance(what, int):
        return os.readlink(f"/proc/self/fd/{what}")
    if folder is not None:
        return f"{os.readlink(f'/proc/self/fd/{folder}')}/{os.fsdecode(what)}"
    return os.path.abspath(os.fsdecode(what))
