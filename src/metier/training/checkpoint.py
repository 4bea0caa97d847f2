"""A checkpoint is tensors and a few numbers, written whole; the newest one that is whole is used.

Everything else a step needs (order, learning rate, seeds) is a function of the step number, so a run that goes on from
a checkpoint is bit for bit the run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metier import runs
from metier.errors import MetierError, RunError
from metier.models import tensors as files
from metier.progress import note

KEEP = 2
TENSORS, FACTS = "state.safetensors", "checkpoint.json"


def prepare(folder: Path) -> None:
    """Makes the folder of checkpoints, without what a kill left half written; raises where it cannot hold any."""
    if folder.exists() and not folder.is_dir():
        raise RunError("a file stands where checkpoints belong", where=str(folder), fix="delete or move it")
    with runs.disk(folder):
        folder.mkdir(exist_ok=True)
        runs.sync(folder.parent)
        for debris in folder.glob(".tmp-*"):
            shutil.rmtree(debris, ignore_errors=True)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, run: str) -> None:
    """Publishes `folder/step-<step>` by one rename, then drops all but the newest checkpoints.

    `run` is the fingerprint of the training it belongs to. Where the disk fails, a `ResourceError` says so, and the
    earlier checkpoints are as they were.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{step:08d}"
    payload = files.pieces(tensors)
    stated = {"step": step, "run": run, "sha256": _sha256(payload), "facts": dict(facts)}
    with runs.disk(target, sum(len(piece) for piece in payload)):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            runs.write(temporary / TENSORS, payload)
            runs.write_json(temporary / FACTS, stated | {"seal": runs.digest(stated)})
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        runs.sync(folder)
    _drop_old(folder, target)


def newest(
    folder: Path, *, run: str, like: Mapping[str, Tensor]
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, facts) of the newest whole checkpoint, or None; damaged ones are named and passed over.

    One that is whole but belongs to another training than `run`, or whose tensors have not the shapes of `like`, is a
    `RunError`: somebody put it there.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            stated = _stated(path)
            tensors = files.read(path / TENSORS)
        except (MetierError, OSError) as error:
            note(f"checkpoint {path.name} is damaged and not used: {str(error).splitlines()[0]}")
            continue
        if stated["run"] != run or not _fits(tensors, like):
            what = "belongs to another training" if stated["run"] != run else "holds tensors of other shapes"
            raise RunError(f"checkpoint {path.name} {what}", where=str(path), fix="delete it, and run again")
        return stated["step"], tensors, stated["facts"]
    return None


def _sha256(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _stated(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, once that and its tensors are found to be as they were written."""
    found = runs.read_json(path / FACTS)
    stated = {k: v for k, v in found.items() if k != "seal"} if isinstance(found, dict) else {}
    if not stated or runs.digest(stated) != found.get("seal"):
        raise OSError(f"{FACTS} is not as it was written")
    if runs.sha256(path / TENSORS) != stated["sha256"]:
        raise OSError(f"{TENSORS} is not as it was written")
    return stated


def _fits(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> bool:
    """Whether all of `like` is there; what is kept besides, such as the best values so far, has one of its shapes."""
    shapes = {t.shape for t in like.values()}
    return like.keys() <= tensors.keys() and all(
        t.shape == like[n].shape if n in like else t.shape in shapes for n, t in tensors.items()
    )


def _drop_old(folder: Path, latest: Path) -> None:
    """Keeps `latest` and the one before it; later ones were passed over as damaged. What cannot be deleted now is
    tried again after the next checkpoint."""
    with contextlib.suppress(OSError):
        found = sorted(folder.glob("step-*"))
        kept = [p for p in found if p.name <= latest.name][-KEEP:]
        for path in found:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
