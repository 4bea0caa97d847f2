"""Token rows to batches: which rows a step takes, and how they are laid out.

The order is a keyed permutation of (seed, epoch), indexed by the step, so a step is the same whoever asks for it and
whenever: a resumed run needs no loader state. Rows are laid end to end without padding. The tokens that every row
begins with (the instruction, and with it the chat header) are computed once a batch and shared: exact, because causal
attention makes them independent of what follows, and cheap, because they are often a third of all tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metier.records import Batch
from metier.text.chat import Rendered


@dataclass(frozen=True, slots=True)
class Row:
    """One rendered conversation: ids (T,), supervised (T,); `columns` by name, an entry per supervised token."""

    id: str
    ids: np.ndarray
    supervised: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def of(name: str, rendered: Rendered) -> Row:
        return Row(name, rendered.ids, rendered.supervised)


def shared_prefix(rows: Sequence[Row]) -> int:
    """How many leading tokens all rows share, at most up to the token before the first supervised one."""
    if not rows:
        return 0
    limit = min(int(np.argmax(r.supervised)) - 1 if r.supervised.any() else r.ids.size - 1 for r in rows)
    first = rows[0].ids[: max(limit, 0)]
    for row in rows[1:]:
        same = first == row.ids[: first.size]
        first = first[: int(np.argmin(same))] if not same.all() else first
    return int(first.size)


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (count,) of rows in an epoch; a function of its arguments alone."""
    key = hashlib.sha256(f"order:{seed}:{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big"))).permutation(count)


def rows_of_step(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the rows that step number `step` (from 0) trains on; steps walk through epochs without a gap."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // count
    return np.concatenate([order(count, seed, int(e))[places[epochs == e] % count] for e in np.unique(epochs)])


def layout(rows: Sequence[Row], prefix: int) -> Batch:
    """Rows as one batch behind their shared prefix of `prefix` tokens."""
    tails = [r.ids[prefix:] for r in rows]
    starts = np.cumsum([0, *(t.size for t in tails)])
    predict, target = [], []
    for row, start in zip(rows, starts[:-1], strict=True):
        at = np.flatnonzero(row.supervised[prefix:])
        predict.append(at + start - 1)
        target.append(row.ids[prefix:][at])
    return Batch(
        prefix_P=rows[0].ids[:prefix],
        tokens_T=np.concatenate(tails),
        lengths_B=np.array([t.size for t in tails], dtype=np.int64),
        predict_K=np.concatenate(predict).astype(np.int64),
        target_K=np.concatenate(target).astype(np.int64),
        ids=tuple(r.id for r in rows),
        columns={name: np.concatenate([r.columns[name] for r in rows]) for name in rows[0].columns},
    )


def micro_batches(rows: Sequence[Row], prefix: int, tokens: int) -> list[Batch]:
    """Rows in batches of similar length, each of at most `tokens` computed tokens (or one row)."""
    batches: list[Batch] = []
    taken: list[Row] = []
    used = prefix
    for row in sorted(rows, key=lambda r: (r.ids.size, r.id)):
        size = row.ids.size - prefix
        if taken and used + size > tokens:
            batches.append(layout(taken, prefix))
            taken, used = [], prefix
        taken.append(row)
        used += size
    if taken:
        batches.append(layout(taken, prefix))
    return batches
