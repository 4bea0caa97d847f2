"""A checkpoint is tensors and a few numbers, written whole; the newest one that is whole is used.

Everything else a step needs (order, learning rate, seeds) is a function of the step number, so a run that goes on from
a checkpoint is bit for bit the run that was never interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metier import runs
from metier.errors import MetierError
from metier.models import tensors as files
from metier.progress import note

KEEP = 2
TENSORS, FACTS = "state.safetensors", "checkpoint.json"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Publishes `folder/step-<step>` by one rename, then drops all but the newest checkpoints."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{step:08d}"
    payload = files.pieces(tensors)
    with runs.disk(target, sum(len(piece) for piece in payload)):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            runs.write(temporary / TENSORS, payload)
            runs.write_json(
                temporary / FACTS, {"step": step, "sha256": runs.sha256(temporary / TENSORS), "facts": dict(facts)}
            )
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def newest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, facts) of the newest whole checkpoint; damaged ones are named and passed over."""
    for temporary in folder.glob(".tmp-*"):
        shutil.rmtree(temporary, ignore_errors=True)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            facts = runs.read_json(path / FACTS)
            if runs.sha256(path / TENSORS) != facts["sha256"]:
                raise OSError(f"{TENSORS} has another sha256 than it was written with")
            return int(facts["step"]), files.read(path / TENSORS), facts["facts"]
        except (MetierError, OSError, KeyError) as error:
            note(f"checkpoint {path.name} is damaged and not used: {str(error).splitlines()[0]}")
    return None
