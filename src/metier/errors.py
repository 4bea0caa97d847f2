"""What went wrong, where, and what to do about it.

Every failure a person can cause or mend is a `MetierError`; its kind decides the exit code.

    MetierError
    ├── ConfigError    settings: unknown key, impossible value                 exit 2
    ├── DataError      documents and rows: unreadable, empty, leaking           exit 2
    ├── ModelError     weights, tokenizers, adapters: missing, malformed        exit 2
    ├── RunError       run folders: locked, damaged, made with other settings   exit 2
    ├── ResourceError  disk, memory, ports, permissions, absent extras          exit 1
    ├── NumericError   a loss or weight that is not finite                      exit 1
    └── PolicyError    an action Metier will not take                           exit 1

Broken invariants of Metier itself are plain assertions, never a `MetierError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

DONE, FAILED, WRONG, DO_NOT_SHIP, CANNOT_TELL = 0, 1, 2, 3, 4
INTERRUPTED, TERMINATED = 130, 143


class MetierError(Exception):
    """`what` happened, `where` (file:line, row, setting) and the `fix`, in a person's words."""

    kind = "failed"
    exit_code = FAILED

    def __init__(self, what: str, *, fix: str, where: str = "") -> None:
        super().__init__(what)
        self.what, self.fix, self.where = what, fix, where

    def __str__(self) -> str:
        place = f"\n  where: {self.where}" if self.where else ""
        return f"{self.what}{place}\n  fix: {self.fix}"

    def record(self) -> dict[str, str]:
        """The error as `--json` prints it."""
        return {"kind": self.kind, "what": self.what, "where": self.where, "fix": self.fix}


class ConfigError(MetierError, ValueError):
    kind, exit_code = "config", WRONG


class DataError(MetierError, ValueError):
    kind, exit_code = "data", WRONG


class ModelError(MetierError, ValueError):
    kind, exit_code = "model", WRONG


class RunError(MetierError, ValueError):
    kind, exit_code = "run", WRONG


class ResourceError(MetierError, OSError):
    kind = "resource"


class NumericError(MetierError, ArithmeticError):
    kind = "numeric"


class PolicyError(MetierError):
    kind = "policy"


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, it is no error, and only the command line catches it."""


def recorded(record: dict[str, str]) -> MetierError:
    """The error of another process, from what `MetierError.record` gave there."""
    kind = next((c for c in MetierError.__subclasses__() if c.kind == record["kind"]), MetierError)
    return kind(record["what"], where=record["where"], fix=record["fix"])


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean X?` for a misspelt name, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "use one of: " + ", ".join(known)


def needs_extra(module: str, extra: str) -> ResourceError:
    """The error for an optional part that is not installed, with its install line."""
    return ResourceError(f"{module} is not installed", fix=f'run: pip install "metier[{extra}]"')
