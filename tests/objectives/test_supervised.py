"""The supervised losses by hand, against golden vectors, and their gradients by finite differences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metier.objectives import supervised
from metier.objectives.supervised import constrained, cross_entropy, dft, forward_kl, jsd, reverse_kl, self_distillation


def log(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.log(torch.tensor(rows, dtype=torch.float64))


def drawn(seed: int, count: int = 5, columns: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator, dtype=torch.float64).log_softmax(-1)


HALF, SKEW = (0.5, 0.5), (0.75, 0.25)


def test_two_positions_by_hand() -> None:
    total, weight = cross_entropy(torch.log(torch.tensor([0.5, 0.25])))
    assert weight == 2 and math.isclose(float(total), math.log(2) + math.log(4), rel_tol=1e-6)


def test_dft_by_hand() -> None:
    logprob = log((0.5, 0.25))[0].requires_grad_()
    total, weight = dft(logprob)
    assert weight == 2 and total.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(4))
    total.backward()
    assert logprob.grad is not None and logprob.grad.tolist() == pytest.approx([-0.5, -0.25]), "the weight is constant"


def test_divergences_by_hand() -> None:
    student, teacher = log(SKEW), log(HALF)
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(forward_kl(student, teacher)[0]) == pytest.approx(forward)
    assert float(reverse_kl(student, teacher)[0]) == pytest.approx(reverse)
    # β = .2: M = .2 T + .8 S = (.7, .3)
    to_teacher = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    to_student = 0.75 * math.log(0.75 / 0.7) + 0.25 * math.log(0.25 / 0.3)
    assert float(jsd(student, teacher, beta=0.2)[0]) == pytest.approx(0.2 * to_teacher + 0.8 * to_student)


def test_a_sum_over_positions_and_their_number() -> None:
    student, teacher = drawn(0), drawn(1)
    for beta in (0, 0.3, 1):
        total, weight = jsd(student, teacher, beta=beta)
        each = [jsd(student[[k]], teacher[[k]], beta=beta) for k in range(5)]
        assert weight == 5 and float(total) == pytest.approx(sum(float(t) for t, _ in each))
        assert all(float(t) > 0 for t, _ in each)


def test_the_ends_are_the_limits_of_the_slope() -> None:
    student, teacher = drawn(0), drawn(1)
    near = 1e-7
    assert float(jsd(student, teacher, beta=near)[0]) / near == pytest.approx(
        float(forward_kl(student, teacher)[0]), rel=1e-4
    )
    assert float(jsd(student, teacher, beta=1 - near)[0]) / near == pytest.approx(
        float(reverse_kl(student, teacher)[0]), rel=1e-4
    )


def test_a_bucket_hides_what_it_holds_and_nothing_else() -> None:
    """Merging columns never raises a divergence, and leaves it where the merged ones agree up to a factor."""
    student, teacher = drawn(2), drawn(3)

    def merged(logprob: torch.Tensor) -> torch.Tensor:
        return torch.cat([logprob[:, :2], logprob[:, 2:].logsumexp(1, keepdim=True)], dim=1)

    for beta in (0, 0.5, 1):
        assert float(jsd(merged(student), merged(teacher), beta=beta)[0]) < float(jsd(student, teacher, beta=beta)[0])
    alike = torch.cat([teacher[:, :2], student[:, 2:] - student[:, 2:].logsumexp(1, keepdim=True)], dim=1)
    alike[:, 2:] += teacher[:, 2:].logsumexp(1, keepdim=True)
    assert float(forward_kl(merged(student), merged(alike))[0]) == pytest.approx(float(forward_kl(student, alike)[0]))


def test_self_distillation_by_hand() -> None:
    student, teacher = log(SKEW, SKEW), log(HALF, HALF)
    now, before = log((0.75, 0.25))[0], log((0.5, 0.05))[0]
    total, weight = self_distillation(student, teacher, now, before, clip=2)
    each = float(reverse_kl(log(SKEW), log(HALF))[0])
    assert weight == 2 and float(total) == pytest.approx((1.5 + 2) * each), "ratios .75/.5 and .25/.05, cut at 2"


def test_the_ratio_of_self_distillation_is_constant() -> None:
    student, teacher = drawn(0).requires_grad_(), drawn(1)
    before = student.detach()[:, 0] - 0.3
    self_distillation(student, teacher, student[:, 0], before, clip=9)[0].backward()
    other = student.detach().clone().requires_grad_()
    (math.exp(0.3) * reverse_kl(other, teacher)[0]).backward()
    torch.testing.assert_close(student.grad, other.grad)


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_equal_distributions_have_no_loss_and_no_gradient(beta: float) -> None:
    logits = drawn(4).requires_grad_()
    total, _ = jsd(logits.log_softmax(-1), drawn(4), beta=beta)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12) and float(logits.grad.abs().max()) < 1e-12  # type: ignore[union-attr]


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda z: cross_entropy(z.log_softmax(-1)[:, 0])[0],
    "constrained": lambda z: constrained(z.log_softmax(-1)[:, 0], drawn(1)[:, 0], torch.tensor([0.5, 2, 2, 2, 0.1]))[0],
    "forward_kl": lambda z: forward_kl(z.log_softmax(-1), drawn(1))[0],
    "reverse_kl": lambda z: reverse_kl(z.log_softmax(-1), drawn(1))[0],
    "jsd": lambda z: jsd(z.log_softmax(-1), drawn(1), beta=0.3)[0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], drawn(7).requires_grad_())


def test_the_constraint_by_place() -> None:
    found = supervised.constraint(torch.tensor([0, 1, 4, 5, 90, 0])).tolist()
    assert found == pytest.approx([0.5, 2, 2, 0.1, 0.1, 0.5])


def golden(shared: Path) -> dict:
    return json.loads((shared / "golden" / "golden_losses.json").read_text())


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden_distillation(shared: Path, kind: torch.dtype, tolerance: float) -> None:
    rows = golden(shared)["distill"]
    student, teacher = (torch.tensor([rows[f"{n}_logits"]], dtype=kind).log_softmax(-1) for n in ("student", "teacher"))
    for key, beta in (("forward_kl_beta0", 0), ("jsd_beta0_5", 0.5), ("reverse_kl_beta1", 1)):
        assert float(jsd(student, teacher, beta=beta)[0]) == pytest.approx(rows[key], rel=tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden_constrained_sft(shared: Path, kind: torch.dtype, tolerance: float) -> None:
    rows = golden(shared)["constrained_sft"]
    logprob, reference, beta = (torch.tensor(rows[n], dtype=kind) for n in ("logp", "logp_ref", "beta_t"))
    logprob.requires_grad_()
    each = [constrained(logprob[[k]], reference[[k]], beta[[k]])[0] for k in range(len(beta))]
    assert [e.item() for e in each] == pytest.approx(rows["per_token"], rel=tolerance)
    constrained(logprob, reference, beta)[0].backward()
    assert logprob.grad is not None
    assert (-logprob.grad).tolist() == pytest.approx(rows["grad_weight"], rel=tolerance)


def test_equal_to_the_reference_library() -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    for beta in (0, 0.1, 0.5, 0.9, 1):
        expected = trainer.GKDTrainer.generalized_jsd_loss(
            student, teacher, beta=beta, temperature=2.0, reduction="sum"
        )
        total, _ = supervised.jsd((student[0] / 2).log_softmax(-1), (teacher[0] / 2).log_softmax(-1), beta=beta)
        assert float(total) == pytest.approx(float(expected), rel=1e-9)
