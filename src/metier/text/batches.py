"""Token rows to batches: which rows a step takes, and how they are laid out.

The order is a keyed permutation of (seed, epoch), indexed by the step, so a step is the same whoever asks for it and
whenever: a resumed run needs no loader state. Weighted sources are drawn in the same way. Rows are laid end to end
without padding. The tokens that every row begins with (the instruction, and with it the chat header) are computed once
a batch and shared: exact, because causal attention makes them independent of what follows, and cheap, because they are
often a third of all tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from metier.records import Batch
from metier.text.chat import Rendered


@dataclass(frozen=True, slots=True)
class Row:
    """One rendered conversation: ids (T,), supervised (T,).

    A row of packed documents has their lengths, which add up to T; no document sees another. `columns` hold, by name,
    an entry per supervised token.
    """

    id: str
    ids: np.ndarray
    supervised: np.ndarray
    lengths: tuple[int, ...] = ()
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def of(name: str, rendered: Rendered) -> Row:
        return Row(name, rendered.ids, rendered.supervised)


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: their indices (n,), and how many of them an epoch draws."""

    rows: np.ndarray
    draws: int


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
    return _permutation(f"order:{seed}:{epoch}", count)


def _permutation(key: str, count: int) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).permutation(count)


def apportioned(weights: Sequence[float], places: int) -> list[int]:
    """`places` divided in proportion to the weights: each gets its share rounded down, the largest remainders one more.

    Hamilton's method; among equal remainders the first comes first.
    """
    shares = [places * w / sum(weights) for w in weights]
    whole = [int(share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in by_rest[: places - sum(whole)]:
        whole[i] += 1
    return whole


def epoch_of(sources: Sequence[Source], seed: int, epoch: int) -> np.ndarray:
    """Indices of the rows of an epoch, in order: of each source as many as it draws, the sources shuffled together.

    A source goes through all of its rows before any comes again, however few of them an epoch draws.
    """
    drawn = np.sort(np.concatenate([_drawn(s, f"{seed}:{n}", epoch) for n, s in enumerate(sources)]))
    shuffled: np.ndarray = drawn[order(drawn.size, seed, epoch)]
    return shuffled


def _drawn(source: Source, key: str, epoch: int) -> np.ndarray:
    if source.draws == source.rows.size:
        return source.rows
    places = np.arange(epoch * source.draws, (epoch + 1) * source.draws)
    size = source.rows.size
    drawn: np.ndarray = source.rows[_walk(places, size, lambda turn: _permutation(f"draw:{key}:{turn}", size))]
    return drawn


def rows_of_step(count: int, batch_size: int, seed: int, step: int, sources: Sequence[Source] = ()) -> np.ndarray:
    """Indices of the rows that step number `step` (from 0) trains on; steps walk through epochs without a gap.

    Without `sources` an epoch draws each of the `count` rows once.
    """
    sources = sources or (Source(np.arange(count), count),)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return _walk(places, sum(s.draws for s in sources), lambda epoch: epoch_of(sources, seed, epoch))


def _walk(places: np.ndarray, size: int, turn: Callable[[int], np.ndarray]) -> np.ndarray:
    """What stands at `places` (n,) of the endless row of turns, each of `size` entries."""
    turns = places // size
    found: np.ndarray = np.concatenate([turn(int(t))[places[turns == t] % size] for t in np.unique(turns)])
    return found


def layout(rows: Sequence[Row], prefix: int) -> Batch:
    """Rows as one batch behind their shared prefix of `prefix` tokens; packed rows share none."""
    assert prefix == 0 or not any(r.lengths for r in rows)
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
        lengths_B=np.array(
            [n for r, t in zip(rows, tails, strict=True) for n in r.lengths or (t.size,)], dtype=np.int64
        ),
        predict_K=np.concatenate(predict).astype(np.int64),
        target_K=np.concatenate(target).astype(np.int64),
        ids=tuple(r.id for r in rows),
        columns={name: np.concatenate([r.columns[name] for r in rows]) for name in rows[0].columns},
    )


def deal(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """Rows in `count` shares of about as many tokens: the longest first, each to the share that has fewest so far.

    A function of the rows alone, so that every process deals the same way. A share may be empty.
    """
    shares: list[list[Row]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(rows, key=lambda r: (-r.ids.size, r.id)):
        place = tokens.index(min(tokens))
        shares[place].append(row)
        tokens[place] += int(row.ids.size)
    return shares


def silent(row: Row, prefix: int) -> Batch:
    """A batch of the prefix and one token of `row` that supervises nothing: its loss and gradient are zero."""
    nothing = {name: column[:0] for name, column in row.columns.items()}
    ids, supervised = row.ids[: prefix + 1], np.zeros(prefix + 1, dtype=bool)
    return layout([replace(row, ids=ids, supervised=supervised, lengths=(), columns=nothing)], prefix)


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
