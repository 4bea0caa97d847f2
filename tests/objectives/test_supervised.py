"""Cross-entropy by hand: a sum and its weight."""

import math

import torch

from metier.objectives.supervised import cross_entropy


def test_two_positions_by_hand() -> None:
    total, weight = cross_entropy(torch.log(torch.tensor([0.5, 0.25])))
    assert weight == 2 and math.isclose(float(total), math.log(2) + math.log(4), rel_tol=1e-6)
