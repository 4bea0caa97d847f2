"""The equalities of the loop for everything that can be trained: micro-batches, shared prefixes, and going on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metier.config import Stage
from metier.models import load, whole
from metier.text.batches import Row
from metier.training import loop, run
from metier.training.plan import Load, plan, shape

CPU = torch.device("cpu")
SCHEDULE = loop.Schedule(
    steps=3, batch_size=8, learning_rate=1e-2, warmup=0.3, weight_decay=0.1, clip=1.0, seed=5, tokens=10_000
)
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "beside": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "full": {"tune": "full"},
}
DROPOUT = {"dropout": 0.2}


def stage(**settings: Any) -> Stage:
    adapter = {} if settings.get("tune") == "full" else {"rank": 4, "alpha": 8}
    return Stage.model_validate(adapter | settings)


def rows(count: int = 8) -> list[Row]:
    random = np.random.default_rng(1)
    made = []
    for n in range(count):
        ids = np.concatenate([[3, 4, 5], random.integers(6, 384, random.integers(4, 30))])
        supervised = np.zeros(ids.size, bool)
        supervised[-int(random.integers(1, 4)) :] = True
        made.append(Row(f"r{n}", ids, supervised))
    return made


def begun(tiny: Path, kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, loop.Flat]:
    model = load.model(load.resolve(str(tiny), tiny), dtype=dtype, device=CPU)
    return model, loop.Flat(run.set_free(model, stage(**kind), 0))


def trained(
    tiny: Path,
    kind: dict[str, Any],
    schedule: loop.Schedule = SCHEDULE,
    prefix: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    model, flat = begun(tiny, kind, dtype)
    for _ in loop.steps(model, flat, rows(), prefix, schedule):
        pass
    return flat.value_N.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_a_shared_prefix_change_nothing(tiny: Path, kind: str) -> None:
    """By norms: Adam's first steps go by a gradient's sign, which rounding decides where it is almost zero."""
    model, flat = begun(tiny, KINDS[kind])
    start = flat.value_N.clone()

    def made(tokens: int, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
        flat.restore({n: torch.zeros_like(t) for n, t in flat.tensors().items()} | {"value": start})
        results = loop.steps(model, flat, rows(), prefix, replace(SCHEDULE, tokens=tokens))
        next(results)
        gradient = flat.grad_N.clone()
        for _ in results:
            pass
        return gradient, flat.value_N - start

    gradient, moved = made(10_000, 0)
    assert moved.abs().max() > 1e-2
    for tokens, prefix in ((1, 0), (60, 0), (60, 3), (10_000, 3)):
        other_gradient, other_moved = made(tokens, prefix)
        assert (other_gradient - gradient).norm() < 1e-5 * gradient.norm()
        assert (other_moved - moved).norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [*KINDS, "dropout"])
def test_going_on_equals_never_stopping_bit_for_bit(tiny: Path, kind: str, dtype: torch.dtype) -> None:
    settings = KINDS.get(kind, DROPOUT)
    schedule = replace(SCHEDULE, tokens=60)
    model, flat = begun(tiny, settings, dtype)
    stopped = next(loop.steps(model, flat, rows(), 3, schedule))
    kept = {n: t.clone() for n, t in flat.tensors().items()}
    model, flat = begun(tiny, settings, dtype)
    flat.restore(kept)
    for _ in loop.steps(model, flat, rows(), 3, schedule, start=stopped.step):
        pass
    assert torch.equal(flat.value_N, trained(tiny, settings, schedule, 3, dtype))


def test_dropout_changes_what_is_learnt_and_validation_drops_nothing(tiny: Path) -> None:
    dropping, plain = trained(tiny, DROPOUT), trained(tiny, {})
    assert not torch.equal(dropping, plain)
    model, _ = begun(tiny, DROPOUT)
    assert loop.mean_loss(model, rows(), 3, 50) == loop.mean_loss(begun(tiny, {})[0], rows(), 3, 50)


def test_bf16_weights_follow_float32_masters_and_sum_gradients_in_float32(tiny: Path) -> None:
    """Steps far below bf16's resolution add up in the masters."""
    model, flat = begun(tiny, {"tune": "full"}, torch.bfloat16)
    before = flat.value_N.clone()
    schedule = replace(SCHEDULE, steps=2, learning_rate=1e-6, warmup=0, weight_decay=0, tokens=60)
    for _ in loop.steps(model, flat, rows(), 3, schedule):
        pass
    moved = (flat.value_N - before).abs()
    assert 0 < moved.max() < 1e-5
    at = 0
    for parameter in flat.parameters:
        end = at + parameter.numel()
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.reshape(-1), flat.value_N[at:end].bfloat16())
        at = end


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """1 + 2⁻⁹ is no bf16 number: summed in bf16 the small gradient would be lost."""
    parameter = torch.nn.Parameter(torch.ones(1, 2, dtype=torch.bfloat16))
    flat = loop.Flat([parameter])
    for size in (1.0, 2.0**-9):
        (parameter * size).sum().backward()
        flat.gather()
    assert flat.grad_N.tolist() == [1 + 2.0**-9] * 2 and parameter.grad is None


def test_the_best_values_come_back_into_the_working_weights() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, 2, dtype=torch.bfloat16))
    flat = loop.Flat([parameter])
    flat.take(torch.tensor([3.0, 1 + 2.0**-9]))
    assert parameter.tolist() == [[3, 1]] and flat.value_N.tolist() == [3, 1 + 2.0**-9]


def test_sparse_rows_are_added_where_they_belong() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.bfloat16)
    flat = loop.Flat([embedding.weight])
    embedding(torch.tensor([1, 3, 1])).sum().backward()
    flat.gather()
    assert flat.grad_N.view(5, 2)[:, 0].tolist() == [0, 2, 0, 1, 0]


def test_only_matrices_decay() -> None:
    vector, matrix = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1, 3))
    flat = loop.Flat([vector, matrix])
    flat.update(1, rate=0.5, weight_decay=0.1)
    assert vector.tolist() == [1, 1] and matrix[0].tolist() == pytest.approx([0.95] * 3)


def test_updates_in_pieces_are_updates_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.linspace(-1, 1, 64)
    made = []
    for piece in (1 << 24, 16):
        monkeypatch.setattr(loop, "PIECE", piece)
        flat = loop.Flat([torch.nn.Parameter(values.clone().view(8, 8))])
        for count in (1, 2):
            flat.grad_N.copy_(values.sin() * count)
            flat.update(count, 0.01, 0.1)
        made.append(flat.value_N)
    assert torch.equal(*made)


def test_full_tuning_has_its_own_defaults() -> None:
    assert (stage(tune="full").checkpoint_every, stage().checkpoint_every) == (50, 10)
    assert stage(tune="full", checkpoint_every=7).checkpoint_every == 7


def test_the_plan_counts_what_is_trained(tiny: Path) -> None:
    table = 384 * 48
    sizes = shape(load.skeleton(load.resolve(str(tiny), tiny)), rank=4, targets="all-linear")

    def counted(**kind: Any) -> Any:
        return run._counted(sizes, begun(tiny, kind)[0])

    full = counted(tune="full")
    assert (full.whole_weights, full.whole_linear_weights) == (sizes.all_weights, sizes.linear_weights)
    assert full.adapter_weights == 0 and full.head_trained
    beside = counted(modules_to_save=["embed_tokens", "lm_head"])
    assert (beside.whole_weights, beside.whole_linear_weights, beside.head_trained) == (table, 0, True)
    assert counted().adapter_weights == sizes.adapter_weights and not counted().head_trained
    assert counted(dora=True).adapter_weights == sizes.adapter_weights + 2 * (48 + 16 + 16 + 48 + 80 + 80 + 48)

    def gb(of: Any, dtype: str) -> float:
        facts = Load(
            computed_tokens=50_000, real_tokens=80_000, supervised_tokens=20_000, longest=300, epochs=2, steps=63
        )
        large = replace(of, all_weights=10**9, whole_weights=10**9 if of.whole_weights else 0)
        made = plan(large, facts, dtype=dtype, gflops=300.0, memory_gb=240.0, device="cpu", tokens=512)
        return made["memory_gb"]["predicted"]

    # a weight, its gradient, two moments and the best value; in bf16 a master and a passing gradient as well
    assert gb(full, "fp32") - gb(replace(full, whole_weights=0), "fp32") == pytest.approx(16, abs=0.02)
    assert gb(full, "bf16") - gb(replace(full, whole_weights=0), "bf16") == pytest.approx(22, abs=0.02)


def test_sparse_lookup_is_for_trained_embeddings_only(tiny: Path) -> None:
    assert not begun(tiny, {})[0].get_input_embeddings().sparse
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=CPU)
    whole.everything(model)
    assert model.get_input_embeddings().sparse
