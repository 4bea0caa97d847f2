"""Packing: every token but a document's first is supervised once, rows are full, and nothing is cut."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.text import batches, pack


def document(name: str, size: int) -> tuple[str, np.ndarray]:
    return name, np.arange(size) + 1000 * sum(map(ord, name))


def test_a_long_document_by_hand() -> None:
    name, ids = document("d", 8)
    made = pack.pieces(name, ids, 4)
    assert [list(r.ids - ids[0]) for r in made] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert [r.supervised.tolist() for r in made] == [[False, True, True, True]] * 2 + [[False, True]]
    assert [r.id for r in made] == ["d", "d+3", "d+6"]
    assert pack.pieces(name, ids, 8)[0].ids.size == 8 and len(pack.pieces(name, ids, 8)) == 1


def test_without_its_end_mark_by_hand() -> None:
    name, ids = document("d", 5)
    assert [r.supervised.tolist() for r in pack.pieces(name, ids, 8, ends=False)] == [[False, True, True, True, False]]
    assert len(pack.pieces(name, ids, 4, ends=False)) == 1, "a piece with nothing but the end mark is left out"


def test_best_fit_by_hand() -> None:
    rows = [
        r for n, size in zip("abcdef", (6, 5, 5, 4, 3, 2), strict=True) for r in pack.pieces(*document(n, size), 10)
    ]
    # 6, 5 open two rows; the next 5 fills the second; 4 fills the first; 3 and 2 share a third.
    assert [r.lengths for r in pack.pack(rows, 10)] == [(6, 4), (5, 5), (3, 2)]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(2, 300), min_size=1, max_size=60), length=st.integers(8, 64))
def test_every_token_but_the_first_is_supervised_once(sizes: list[int], length: int) -> None:
    documents = [(f"d{n}", np.arange(size) + n * 1000) for n, size in enumerate(sizes)]
    packed = pack.pack([p for d in documents for p in pack.pieces(*d, length)], length)
    assert all(r.ids.size == sum(r.lengths) <= length for r in packed)
    seen = Counter(i for r in packed for i in r.ids[r.supervised].tolist())
    assert seen == Counter(i for _, ids in documents for i in ids[1:].tolist())
    for batch in batches.micro_batches(packed, 0, 2 * length):
        before = batch.tokens_T[batch.predict_K]
        assert (batch.target_K == before + 1).all(), "a token is predicted from the one before it in its document"
        assert (batch.tokens_T[batch.predict_K + 1] == batch.target_K).all()
        assert int(batch.lengths_B.sum()) == batch.tokens_T.size


def test_rows_are_nearly_full() -> None:
    random = np.random.default_rng(0)
    sizes = np.minimum(random.lognormal(5, 1, 400).astype(int) + 3, 3000)
    rows = [p for n, size in enumerate(sizes) for p in pack.pieces(f"d{n}", np.arange(size), 1024)]
    packed = pack.pack(rows, 1024)
    assert sum(r.ids.size for r in packed) / (1024 * len(packed)) > 0.95
