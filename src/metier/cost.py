"""What answers and training cost, from counted tokens and calibrated rates; arithmetic only.

The proof prices every arm from its token counts and the two rates this machine was calibrated at, never from a
stopwatch, so that the same answers always cost the same. Seconds as they were measured stay beside each answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """How fast this machine reads prompts and writes answers, over all the rows it answers at once."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float

    def __post_init__(self) -> None:
        rates = (self.prefill_tokens_per_second, self.decode_tokens_per_second)
        assert all(0 < rate < math.inf for rate in rates), f"rates must be positive and finite: {rates}"


def arm_cost(
    prompt_tokens: int, shared_prompt_tokens: int, new_tokens: int, cases: int, rates: Rates, dollars_per_hour: float
) -> dict[str, float]:
    """Seconds, tokens and dollars of one arm's answers.

    `prompt_tokens` and `new_tokens` are sums over all cases. `shared_prompt_tokens` is the length of the prefix that
    every prompt starts with: it is read once for all cases. `tokens_per_case` counts it in every case all the same,
    because that is what a provider who bills by the token sees.
    """
    assert cases > 0, "an arm without cases has no cost"
    repeated = shared_prompt_tokens * (cases - 1)
    assert 0 <= repeated <= prompt_tokens and new_tokens >= 0, "the shared prefix is part of every prompt"
    reading = (prompt_tokens - repeated) / rates.prefill_tokens_per_second
    writing = new_tokens / rates.decode_tokens_per_second
    seconds = (reading + writing) / cases
    return {
        "seconds_per_case": seconds,
        "tokens_per_case": (prompt_tokens + new_tokens) / cases,
        "dollars_per_1000": 1000 * seconds * dollars_per_hour / 3600,
    }


def training_cost(seconds: float, dollars_per_hour: float) -> float:
    """Dollars for so many seconds of this machine."""
    return seconds * dollars_per_hour / 3600


def sum_seconds(numbers: int, processes: int, gb_per_second: float) -> float:
    """Seconds to add up so many float32 numbers over all processes, each with a link of `gb_per_second`.

    Each sends and receives 2 (R - 1) / R of them, once to add up and once to share the sums: bytes alone, no latency.
    """
    return 2 * (processes - 1) / processes * 4 * numbers / (gb_per_second * 1e9)


def answers_to_break_even(dollars: float, ours_per_1000: float, theirs_per_1000: float) -> int | None:
    """Answers after which the dollars spent on training have come back; None where ours is not the cheaper arm."""
    saved_per_1000 = theirs_per_1000 - ours_per_1000
    return math.ceil(1000 * dollars / saved_per_1000) if saved_per_1000 > 0 else None
