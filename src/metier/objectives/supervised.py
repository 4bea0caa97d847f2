"""Someone gave the answer: losses over supervised positions.

Shape legend: K supervised positions.
"""

from __future__ import annotations

from torch import Tensor


def cross_entropy(logprob_K: Tensor) -> tuple[Tensor, int]:
    """(sum of −log p over supervised positions, their number); the loss is the first over the second, in nats."""
    return -logprob_K.sum(), logprob_K.numel()
