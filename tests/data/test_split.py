"""Groups stay whole, the order of input does not matter, and what is left over says why."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.config import Sizes
from metier.data.split import split
from metier.errors import ConfigError, DataError
from metier.records import Example, Message


def examples(sizes: list[int]) -> list[Example]:
    """Groups of the given sizes."""
    return [
        Example(f"r{g}.{k}", (Message("user", f"{g} {k}"), Message("assistant", "a")), {}, f"g{g}")
        for g, size in enumerate(sizes)
        for k in range(size)
    ]


def ids(splits: dict[str, list[Example]]) -> dict[str, list[str]]:
    return {name: [e.id for e in rows] for name, rows in splits.items()}


groups = st.lists(st.integers(1, 6), min_size=8, max_size=40)


@settings(max_examples=100, deadline=None)
@given(groups, st.integers(1, 60), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**63 - 1), st.randoms())
def test_every_row_is_in_one_place(
    sizes: list[int], train: int, valid: int, test: int, seed: int, chooser: random.Random
) -> None:
    rows = examples(sizes)
    wanted = Sizes(train=train, valid=valid, test=test)
    splits, left = split(rows, wanted, seed)
    placed = [e.id for part in splits.values() for e in part]
    assert sorted([*placed, *left]) == sorted(e.id for e in rows)
    assert len(splits["valid"]) == valid
    assert len(splits["test"]) == test
    taken = {name: [e.group for e in part] for name, part in splits.items()}
    assert not set(taken["train"]) & (set(taken["valid"]) | set(taken["test"]))
    assert len(set(taken["valid"] + taken["test"])) == valid + test
    room = sum(sizes[int(g[1:])] for g in {e.group for e in rows} - set(taken["valid"]) - set(taken["test"]))
    assert len(taken["train"]) == min(train, room)
    counts = sorted(taken["train"].count(g) for g in set(taken["train"]))
    unfilled = [g for g in set(taken["train"]) if taken["train"].count(g) < sizes[int(g[1:])]]
    assert all(taken["train"].count(g) >= counts[-1] - 1 for g in unfilled)
    shuffled = list(rows)
    chooser.shuffle(shuffled)
    assert (ids(splits), left) == (ids(split(shuffled, wanted, seed)[0]), split(shuffled, wanted, seed)[1])


def test_the_seed_decides() -> None:
    rows = examples([1] * 40)
    wanted = Sizes(train=20, valid=5, test=10)
    assert len({tuple(ids(split(rows, wanted, seed)[0])["test"]) for seed in range(5)}) == 5


def test_reasons_of_what_is_left() -> None:
    rows = examples([2] * 6)
    splits, left = split(rows, Sizes(train=3, valid=1, test=2), 0)
    assert [len(splits[n]) for n in ("train", "valid", "test")] == [3, 1, 2]
    assert sorted(left.values()) == [
        *["not sampled: its group is in test, with one row"] * 2,
        "not sampled: its group is in valid, with one row",
        *["not sampled: train has its 3 rows"] * 3,
    ]
    assert len({e.group for e in splits["train"]}) == 3


def test_second_rows_come_when_the_groups_run_out() -> None:
    splits, left = split(examples([3] * 5), Sizes(train=7, valid=1, test=1), 0)
    counts = sorted([e.group for e in splits["train"]].count(g) for g in {e.group for e in splits["train"]})
    assert counts == [2, 2, 3]
    assert len({e.group for e in splits["train"][:3]}) == 3
    assert len(left) == 6


@pytest.mark.parametrize(
    ("count", "fix"),
    [
        (10, "give more data, or set data.sizes.valid=2 and data.sizes.test=4"),
        (3, "give more data, or set data.sizes.valid=1 and data.sizes.test=1"),
        (2, "give examples of at least 3 groups; rows of one document count as one group"),
        (0, "give examples of at least 3 groups; rows of one document count as one group"),
    ],
)
def test_too_few_groups_name_sizes_that_fit(count: int, fix: str) -> None:
    rows = examples([4] * count)
    with pytest.raises(DataError) as caught:
        split(rows, Sizes(train=100, valid=50, test=100), 0)
    assert caught.value.what.startswith(f"{count} groups of different examples are too few")
    assert caught.value.fix == fix
    if count > 2:
        valid, test = (int(part.split("=")[1].split()[0]) for part in fix.split("data.sizes.")[1:])
        assert split(rows, Sizes(train=100, valid=valid, test=test), 0)


def test_the_order_is_pinned() -> None:
    """A change here changes every sealed test set."""
    splits, _ = split(examples([1] * 8), Sizes(train=3, valid=2, test=2), 7)
    assert ids(splits) == {"train": ["r2.0", "r7.0", "r0.0"], "valid": ["r6.0", "r1.0"], "test": ["r4.0", "r5.0"]}


def labelled(counts: dict[str, int]) -> list[Example]:
    names = [(name, n) for name, count in counts.items() for n in range(count)]
    return [
        Example(
            f"{name}{n}", (Message("user", f"{name} {n}"), Message("assistant", "a")), {}, f"{name}{n}", {"x": name}
        )
        for name, n in names
    ]


def test_balance_takes_values_by_the_square_root_of_their_number() -> None:
    rows = labelled({"often": 406, "seldom": 6})
    splits, _ = split(rows, Sizes(train=22, valid=1, test=5), 3, "x")
    free = [e.expected["x"] for e in rows if e not in splits["test"] + splits["valid"]]
    often, seldom = free.count("often"), free.count("seldom")
    taken = [e.expected["x"] for e in splits["train"]]
    # 22 rows are shared as √often : √seldom, about 20 : 2, where plain order would give 0.3 of the seldom ones
    assert taken.count("seldom") == pytest.approx(22 * seldom**0.5 / (often**0.5 + seldom**0.5), abs=1)
    plain, _ = split(rows, Sizes(train=22, valid=1, test=5), 3)
    assert ids(plain)["test"] == ids(splits)["test"] and ids(plain)["valid"] == ids(splits)["valid"]


def test_balance_on_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no field 'y'"):
        split(labelled({"a": 9}), Sizes(train=3, valid=1, test=1), 0, "y")
