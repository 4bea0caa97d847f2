"""The metrics file of a training: whole lines, in order; a disk that fails delays lines and loses none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from metier import records, runs
from metier.errors import ResourceError, RunError
from metier.progress import note


class Metrics:
    """A JSON Lines file that grows by `add` and can be cut back to where a checkpoint left it.

    Lines that could not be written wait in memory and go out with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._waiting = b""
        self._failing = False

    def add(self, line: dict[str, Any]) -> None:
        """Appends one line; where the disk fails it says so once, and the line waits."""
        self._waiting += records.lines([line])
        try:
            self._write()
            self._failing = False
        except ResourceError as error:
            if not self._failing:
                note(f"{error.what} ({error.where}); training goes on, and the lines wait in memory")
            self._failing = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the file: its length and hash, once every line so far is on disk."""
        self._write()
        with runs.disk(self.path):
            runs.sync(self.path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def restore(self, state: dict[str, Any]) -> None:
        """Cuts the file back to a checkpoint's `state`; a file that no longer begins with it is a `RunError`."""
        with runs.disk(self.path):
            data = self.path.read_bytes()[: state["bytes"]] if self.path.is_file() else b""
        digest = hashlib.sha256(data)
        if digest.hexdigest() != state["sha256"]:
            raise RunError(
                f"{self.path.name} is not what the checkpoint left: its first {state['bytes']:,} bytes are cut or "
                "altered",
                where=str(self.path),
                fix=f"put the file back, or delete {self.path.parent} to train again from the first step",
            )
        self._bytes, self._digest = len(data), digest
        self._write()

    def clear(self) -> None:
        """Begins with an empty file."""
        with runs.disk(self.path):
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        """Puts what waits behind the lines that are on disk, over what an earlier failure may have left there."""
        with runs.disk(self.path, len(self._waiting)), runs.opened(self.path, os.O_WRONLY | os.O_CREAT) as handle:
            os.ftruncate(handle, self._bytes)
            os.lseek(handle, 0, os.SEEK_END)
            runs.write_all(handle, self._waiting)
        self._bytes += len(self._waiting)
        self._digest.update(self._waiting)
        self._waiting = b""
