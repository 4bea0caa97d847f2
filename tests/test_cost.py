"""Prices by hand: tokens over rates, a shared prefix read once, dollars by the hour."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier import cost

RATES = cost.Rates(prefill_tokens_per_second=1000, decode_tokens_per_second=100)


def test_an_arm_by_hand() -> None:
    # 10 prompts of 110 tokens, 60 of them the same in all: 60 + 10 * 50 = 560 tokens are read, in 0.56 s.
    # 10 answers of 20 tokens are written in 2 s. Together 2.56 s, so 0.256 s a case, 256 s for 1,000.
    found = cost.arm_cost(1100, 60, 200, 10, RATES, dollars_per_hour=0.36)
    assert found == {
        "seconds_per_case": pytest.approx(0.256),
        "tokens_per_case": 130,
        "dollars_per_1000": pytest.approx(0.0256),
    }
    assert list(found) == ["seconds_per_case", "tokens_per_case", "dollars_per_1000"]


def test_one_case_shares_nothing() -> None:
    assert cost.arm_cost(110, 60, 20, 1, RATES, 0) == cost.arm_cost(110, 0, 20, 1, RATES, 0)


@given(st.integers(1, 500), st.integers(0, 200), st.integers(0, 300), st.integers(0, 10_000), st.floats(0, 100))
def test_more_sharing_never_costs_more(cases: int, shared: int, own: int, new: int, hour: float) -> None:
    prompt = cases * (shared + own)
    with_sharing = cost.arm_cost(prompt, shared, new, cases, RATES, hour)
    without = cost.arm_cost(prompt, 0, new, cases, RATES, hour)
    assert with_sharing["dollars_per_1000"] <= without["dollars_per_1000"]
    assert with_sharing["tokens_per_case"] == without["tokens_per_case"]
    assert all(math.isfinite(v) and v >= 0 for v in with_sharing.values())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(AssertionError, match="without cases"):
        cost.arm_cost(0, 0, 0, 0, RATES, 1)
    with pytest.raises(AssertionError, match="part of every prompt"):
        cost.arm_cost(100, 60, 0, 10, RATES, 1)
    for rate in (0, -1, math.inf, math.nan):
        with pytest.raises(AssertionError, match="positive and finite"):
            cost.Rates(rate, 1)


def test_training_by_the_hour() -> None:
    assert cost.training_cost(1800, 0.10) == pytest.approx(0.05)


def test_when_training_has_paid_for_itself() -> None:
    # A saving of $1 for 1,000 answers brings $0.05 back in 50 answers; half an answer more rounds up.
    assert cost.answers_to_break_even(0.05, 2, 3) == 50
    assert cost.answers_to_break_even(0.0505, 2, 3) == 51
    assert cost.answers_to_break_even(0.05, 3, 3) is None
    assert cost.answers_to_break_even(0.05, 4, 3) is None


def test_sums_over_processes_by_hand() -> None:
    # 10 million numbers are 40 MB; two processes send half of it twice, so 40 MB: 0.04 s at 1 GB/s
    assert cost.sum_seconds(10_000_000, 2, 1.0) == pytest.approx(0.04)
    assert cost.sum_seconds(10_000_000, 4, 2.0) == pytest.approx(0.03)
    assert cost.sum_seconds(10_000_000, 1, 1.0) == 0
