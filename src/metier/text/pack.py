"""Documents to rows of a fixed length: split where they are longer, packed together where they are shorter.

Nothing is cut: every token but the first of a document is supervised exactly once. Documents that share a row do not
see each other (`batches.Row.lengths`), so packing changes what a step holds and never what a token is predicted from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metier.text.batches import Row


def pieces(name: str, ids: np.ndarray, length: int, *, ends: bool = True) -> list[Row]:
    """A document (T,) as rows of at most `length` tokens.

    A continuation begins with the last token of the piece before it, as context that is not supervised again. With
    `ends` False the last token, which ends the document, is not supervised.
    """
    made = []
    for start in range(0, ids.size - 1, length - 1):
        part = ids[start : start + length]
        supervised = np.ones(part.size, bool)
        supervised[0] = False
        supervised[-1] = ends or start + length < ids.size
        if supervised.any():
            made.append(Row(f"{name}+{start}" if start else name, part, supervised))
    return made


def pack(rows: Sequence[Row], length: int) -> list[Row]:
    """The rows in packed rows of at most `length` tokens, by best-fit decreasing: the longest first, each to where the
    least room remains (Johnson et al. 1974: at most 11/9 of the fewest rows possible, and a few)."""
    bins: list[list[Row]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where some bin has room for r tokens
    for row in sorted(rows, key=lambda r: (-r.ids.size, r.id)):
        size = row.ids.size
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = length, len(bins)
            bins.append([])
        bins[chosen].append(row)
        with_room[room - size].append(chosen)
        rooms |= 1 << (room - size)
    return [_joined(b) for b in bins]


def _joined(rows: Sequence[Row]) -> Row:
    return Row(
        id=" ".join(r.id for r in rows),
        ids=np.concatenate([r.ids for r in rows]),
        supervised=np.concatenate([r.supervised for r in rows]),
        lengths=tuple(r.ids.size for r in rows),
    )
