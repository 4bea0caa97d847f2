"""Order is a function of (seed, epoch, step); batches carry every token once and supervise the right ones."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.text import batches
from metier.text.batches import Row, Source


def row(name: str, ids: list[int], answer: int) -> Row:
    supervised = np.zeros(len(ids), bool)
    supervised[-answer:] = True
    return Row(name, np.array(ids), supervised)


@settings(deadline=None)
@given(count=st.integers(1, 50), size=st.integers(1, 20), seed=st.integers(0, 9))
def test_an_epoch_takes_every_row_once(count: int, size: int, seed: int) -> None:
    steps = -(-3 * count // size)
    taken = np.concatenate([batches.rows_of_step(count, size, seed, s) for s in range(steps)])
    for epoch in range(3):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_shares_are_apportioned_by_hand() -> None:
    assert batches.apportioned([1, 3], 16) == [4, 12]
    assert batches.apportioned([1, 1, 1], 10) == [4, 3, 3]  # 3.33 each: the first gets the place that is left
    assert batches.apportioned([0.5, 0.3, 0.2], 9) == [4, 3, 2]  # 4.5, 2.7, 1.8: rests .5 < .7 < .8


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    draws=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    batch=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_an_epoch_draws_each_source_as_often_as_it_says(
    sizes: list[int], draws: list[int], batch: int, seed: int
) -> None:
    """And a source's rows all come before any comes again, over the epochs."""
    starts = np.cumsum([0, *sizes])
    sources = tuple(Source(np.arange(a, a + n), d) for a, n, d in zip(starts, sizes, draws, strict=False))
    epoch = sum(s.draws for s in sources)
    steps = -(-4 * epoch // batch)
    taken = np.concatenate([batches.rows_of_step(0, batch, seed, s, sources) for s in range(steps)])[: 4 * epoch]
    for source in sources:
        for e in range(4):
            here = np.isin(taken[e * epoch : (e + 1) * epoch], source.rows).sum()
            assert here == source.draws
        counts = [int((taken == row).sum()) for row in source.rows]
        assert max(counts) - min(counts) <= 1


def test_one_whole_source_is_the_order_without_sources() -> None:
    whole = (Source(np.arange(13), 13),)
    for step in range(9):
        assert (batches.rows_of_step(13, 4, 7, step) == batches.rows_of_step(13, 4, 7, step, whole)).all()


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(batches.order(30, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_shared_prefix_stops_before_the_answer() -> None:
    rows = [row("a", [5, 6, 7, 8], 1), row("b", [5, 6, 7, 9, 9], 2)]
    assert batches.shared_prefix(rows) == 2  # 7 predicts an answer, so it belongs to the rows
    assert batches.shared_prefix([row("a", [5, 6, 7, 8], 1), row("b", [4, 6, 7], 1)]) == 0


def test_layout_by_hand() -> None:
    batch = batches.layout([row("a", [5, 6, 1, 2, 3], 2), row("b", [5, 6, 4, 9], 1)], prefix=2)
    assert batch.prefix_P.tolist() == [5, 6]
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 9]
    assert batch.lengths_B.tolist() == [3, 2]
    assert batch.predict_K.tolist() == [0, 1, 3]  # 1 predicts 2, 2 predicts 3, 4 predicts 9
    assert batch.target_K.tolist() == [2, 3, 9]
    assert batch.real_tokens == 9


@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=30),
    tokens=st.integers(10, 200),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    rows = [row(str(i), [1, 2, *range(3, n + 1)], 1) for i, n in enumerate(lengths)]
    made = batches.micro_batches(rows, 1, tokens)
    assert sorted(name for b in made for name in b.ids) == sorted(r.id for r in rows)
    assert sum(b.real_tokens for b in made) == sum(lengths)
    assert all(b.tokens_T.size + 1 <= tokens or len(b.ids) == 1 for b in made)
