"""Log-probabilities of another model as columns of the rows: computed once, kept on disk, and read back.

A loss never looks for a second model: what a teacher or the untouched base says about a row is fixed by the row's
tokens, so it is computed before the first step and travels in the batch. Rows are scored some at a time, and each such
part is kept as one file whose name is the hash of its tokens and of whatever else decided the numbers: an interrupted
scoring goes on where it stopped, and a part is never taken for another's.

Shape legend: K supervised positions, B rows, C columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from metier import runs
from metier.progress import note
from metier.records import Batch
from metier.text import batches
from metier.text.batches import Row

TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"
REFERENCE_LOGPS, DRAWN_LOGPS, PLACES = "reference_logps", "drawn_logps", "places"
PART, TOKENS = 64, 2048

Columns = Callable[[Batch], dict[str, np.ndarray]]


def with_teacher(
    rows: Sequence[Row], score: Callable[[Batch], tuple[np.ndarray, np.ndarray]], kept: Path, key: str
) -> list[Row]:
    """The rows with a teacher's columns at their supervised tokens: `teacher_ids` (K, C), the token itself first, and
    `teacher_logps` (K, C + 1), the last that of all other tokens.

    `score` gives both for a batch; `key` names everything besides the tokens that decides them.
    """

    def columns(batch: Batch) -> dict[str, np.ndarray]:
        return teacher_columns(*score(batch))

    return _with_columns(rows, columns, kept, f"teacher:{key}")


def with_reference(rows: Sequence[Row], score: Callable[[Batch], np.ndarray], kept: Path, key: str) -> list[Row]:
    """The rows with a column `reference_logps` (K,): log-probabilities of their supervised tokens under the untouched
    base, as `score` gives them for a batch; `key` names everything besides the tokens that decides them."""

    def columns(batch: Batch) -> dict[str, np.ndarray]:
        return {REFERENCE_LOGPS: score(batch).astype(np.float32)}

    return _with_columns(rows, columns, kept, f"reference:{key}")


def with_places(rows: Sequence[Row]) -> list[Row]:
    """The rows with a column `places` (K,): how many tokens of the same answer stand before each supervised one."""

    def places(row: Row) -> np.ndarray:
        at = np.flatnonzero(row.supervised)
        starts = at[np.diff(at, prepend=-2) > 1]
        found: np.ndarray = at - starts[np.searchsorted(starts, at, side="right") - 1]
        return found

    return [replace(row, columns={**row.columns, PLACES: places(row)}) for row in rows]


def teacher_columns(ids_KC: np.ndarray, logprob_KC: np.ndarray) -> dict[str, np.ndarray]:
    """What a teacher says, under the names that losses look for."""
    return {TEACHER_IDS: ids_KC.astype(np.int32), TEACHER_LOGPS: logprob_KC.astype(np.float32)}


def scored(rows: Sequence[Row], columns: Columns) -> list[Row]:
    """The rows with the columns that a function of a batch gives; nothing is kept."""
    return dealt(rows, _computed(rows, columns))


def per_row(logprob_K: Tensor, batch: Batch) -> Tensor:
    """(B,) the sums over each row's supervised tokens."""
    row_K = np.searchsorted(np.cumsum(batch.lengths_B), batch.predict_K, side="right")
    zeros_B = logprob_K.new_zeros(batch.lengths_B.size)
    return zeros_B.index_add(0, torch.from_numpy(row_K).to(logprob_K.device), logprob_K)


def _with_columns(rows: Sequence[Row], columns: Columns, kept: Path, key: str) -> list[Row]:
    with runs.disk(kept):
        kept.mkdir(parents=True, exist_ok=True)
    out: list[Row] = []
    for at in range(0, len(rows), PART):
        part = rows[at : at + PART]
        path = kept / f"{_hash(part, key)}.safetensors"
        made = read(path)
        if made is None:
            made = _computed(part, columns)
            write(path, made)
        out += dealt(part, made)
    return out


def _computed(rows: Sequence[Row], columns: Columns) -> dict[str, np.ndarray]:
    """The columns of all rows' supervised tokens, in the order of the rows whatever batches they were computed in."""
    numbered = [replace(row, id=str(place), columns={}) for place, row in enumerate(rows)]
    found: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for batch in batches.micro_batches(numbered, batches.shared_prefix(rows), TOKENS):
        places = [int(name) for name in batch.ids]
        for row in dealt([numbered[p] for p in places], columns(batch)):
            found[int(row.id)] = dict(row.columns)
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def dealt(rows: Sequence[Row], columns: Mapping[str, np.ndarray]) -> list[Row]:
    """The rows, each with its share of columns that hold all their supervised tokens in order."""
    ends = np.cumsum([int(r.supervised.sum()) for r in rows])[:-1]
    pieces = {name: np.split(column, ends) for name, column in columns.items()}
    return [
        replace(row, columns={**row.columns, **{name: of_rows[place] for name, of_rows in pieces.items()}})
        for place, row in enumerate(rows)
    ]


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays in one file, whole or not at all, with the hash of their contents."""
    held = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    runs.write(path, save(held, metadata={"sha256": _contents(held)}))


def read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None where there is none or it is not what was written (which is said)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if file.metadata().get("sha256") == _contents(found):
                return found
    except (SafetensorError, OSError, AttributeError):
        pass
    note(f"{path.name} is damaged; what it held is computed again")
    return None


def _hash(rows: Sequence[Row], key: str) -> str:
    state = hashlib.sha256(key.encode())
    for row in rows:
        state.update(row.ids.size.to_bytes(8, "little"))
        state.update(row.ids.astype("<i8").tobytes())
        state.update(row.supervised.astype("u1").tobytes())
    return state.hexdigest()[:40]


def _contents(arrays: Mapping[str, np.ndarray]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name}:{array.dtype}:{array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()
