"""The equalities of the loop: micro-batches, order, schedule, AdamW, and steps that are refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_model
from metier.errors import NumericError
from metier.models import load, lora
from metier.text import batches
from metier.text.batches import Row
from metier.training import loop

CPU = torch.device("cpu")
SCHEDULE = loop.Schedule(
    steps=3, batch_size=8, learning_rate=1e-2, warmup=0.3, weight_decay=0.1, clip=1.0, seed=5, tokens=10_000
)


def rows(count: int = 8) -> list[Row]:
    random = np.random.default_rng(1)
    made = []
    for n in range(count):
        ids = np.concatenate([[3, 4, 5], random.integers(6, 384, random.integers(4, 30))])
        supervised = np.zeros(ids.size, bool)
        supervised[-int(random.integers(1, 4)) :] = True
        made.append(Row(f"r{n}", ids, supervised))
    return made


def trained(
    tiny: Path, data: list[Row], schedule: loop.Schedule, prefix: int
) -> tuple[torch.Tensor, list[loop.StepResult]]:
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    results = list(loop.steps(model, flat, data, prefix, schedule))
    return flat.value_N.clone(), results


def test_one_by_eight_equals_eight_by_one_equals_two_by_four(tiny: Path) -> None:
    data = rows()
    whole, _ = trained(tiny, data, SCHEDULE, 0)
    start = trained(tiny, data, replace(SCHEDULE, steps=0), 0)[0]
    assert (whole - start).abs().max() > 1e-2
    for tokens in (1, 60):  # one row at a time; a few at a time
        pieces, _ = trained(tiny, data, replace(SCHEDULE, tokens=tokens), 0)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=3e-4)


def test_a_shared_prefix_changes_nothing(tiny: Path) -> None:
    data = rows()
    prefix = batches.shared_prefix(data)
    assert prefix == 3
    apart, one = trained(tiny, data, SCHEDULE, 0)
    together, other = trained(tiny, data, SCHEDULE, prefix)
    torch.testing.assert_close(together, apart, rtol=0, atol=3e-4)
    assert [r.loss for r in one] == pytest.approx([r.loss for r in other], rel=1e-4)
    assert [r.tokens for r in one] == [r.tokens for r in other], "tokens are counted as a user counts them"


def test_two_trainings_are_equal_bit_for_bit(tiny: Path) -> None:
    assert torch.equal(trained(tiny, rows(), SCHEDULE, 3)[0], trained(tiny, rows(), SCHEDULE, 3)[0])


def test_memorises_a_few_rows(tiny: Path) -> None:
    schedule = replace(SCHEDULE, steps=120, learning_rate=2e-2, weight_decay=0.0)
    _, results = trained(tiny, rows(), schedule, 3)
    assert results[0].loss > 4 and results[-1].loss < 0.05


def test_adamw_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    flat = loop.Flat([parameter])
    flat.grad_N.copy_(torch.tensor([0.5, 0.0]))
    flat.update(1, rate=0.1, weight_decay=0.2)
    # step 1: the bias-corrected quotient is sign(g); 1·(1 − .1·.2) − .1 = .88, and −2·.98 = −1.96
    assert parameter.detach()[0].tolist() == pytest.approx([0.88, -1.96], abs=1e-6)


def test_adamw_equals_torchs() -> None:
    ours, theirs = (torch.nn.Parameter(torch.tensor([[0.3, -1.0, 2.0]])) for _ in range(2))
    flat = loop.Flat([ours])
    oracle = torch.optim.AdamW([theirs], lr=0.05, betas=(loop.BETA1, loop.BETA2), eps=loop.EPSILON, weight_decay=0.1)
    for step in range(1, 20):
        grad = torch.sin(torch.arange(3.0) * step)
        flat.grad_N.copy_(grad)
        theirs.grad = grad[None].clone()
        flat.update(step, 0.05, 0.1)
        oracle.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_rate_rises_then_falls_to_zero() -> None:
    schedule = replace(SCHEDULE, steps=100, warmup=0.1, learning_rate=1.0)
    rates = [schedule.rate(s) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_clipping_bounds_the_step(tiny: Path) -> None:
    _, results = trained(tiny, rows(), replace(SCHEDULE, steps=1), 3)
    tight, _ = trained(tiny, rows(), replace(SCHEDULE, steps=1, clip=1e-9, weight_decay=0.0), 3)
    start, _ = trained(tiny, rows(), replace(SCHEDULE, steps=0), 3)
    assert results[0].grad_norm > 1e-3 and (tight - start).abs().max() < 3e-3


@pytest.mark.parametrize("poison", ["weights", "rate"])
def test_a_step_that_is_not_finite_is_refused_and_not_applied(tiny: Path, poison: str) -> None:
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    if poison == "weights":
        model.get_decoder().norm.weight.data[0] = torch.nan
    else:
        flat.value_N.fill_(1e30)
    before = flat.value_N.clone()
    with pytest.raises(NumericError) as caught:
        next(loop.steps(model, flat, rows(), 3, SCHEDULE))
    assert "step 1" in caught.value.what and "r0" in caught.value.where
    assert torch.equal(flat.value_N, before)


def test_a_poisoned_row_is_named_and_no_other(tmp_path: Path) -> None:
    """One token's embedding is NaN, and one row holds that token."""
    folder = write_model(tmp_path, tie_word_embeddings=False)
    model = load.model(load.resolve(str(folder), folder), dtype=torch.float32, device=CPU)
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    data = rows()
    strange = next(i for i in data[5].ids[3:] if sum(i in r.ids for r in data) == 1)
    model.get_input_embeddings().weight.data[int(strange)] = torch.nan
    before = flat.value_N.clone()
    with pytest.raises(NumericError) as caught:
        next(loop.steps(model, flat, data, 3, SCHEDULE))
    assert caught.value.where == "rows r5" and torch.equal(flat.value_N, before)


def test_a_rate_that_explodes_stops_at_its_first_step_that_is_not_finite(tiny: Path) -> None:
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    lora.attach(model, rank=4, alpha=8, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    walk = loop.steps(model, flat, rows(), 3, replace(SCHEDULE, learning_rate=1e20, steps=9))
    kept = []
    with pytest.raises(NumericError, match="the step was not applied") as caught:
        kept.extend(flat.value_N.clone() for _ in walk)
    assert f"step {len(kept) + 1} " in f"{caught.value.what} ".replace(";", " ") and "learning_rate" in caught.value.fix
    assert kept and torch.equal(flat.value_N, kept[-1]) and bool(torch.isfinite(kept[-1]).all())


@pytest.mark.parametrize("prefix", [0, 3])
def test_packed_equals_unpacked_for_every_row(tiny: Path, prefix: int) -> None:
    """The log-probabilities of each answer in one batch are those of its row alone."""
    data = rows()
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        together = loop.logprobs(model, batches.layout(data, prefix))
        apart = [loop.logprobs(model, batches.layout([row], 0)) for row in data]
    for got, expected in zip(together.split([a.numel() for a in apart]), apart, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_is_a_sum_over_one_weight(tiny: Path) -> None:
    """By hand: every row alone through the model, summed, divided once."""
    data = rows(5)
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    total, weight = 0.0, 0
    for row in data:
        batch = batches.layout([row], 0)
        total -= float(loop.logprobs(model, batch).sum())
        weight += int(row.supervised.sum())
    assert loop.mean_loss(model, data, 3, 50) == pytest.approx(total / weight, rel=1e-5)
    assert math.isfinite(total)
