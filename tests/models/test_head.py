"""Losses over chosen columns of the head, in chunks, equal plain autograd over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metier.models import head
from metier.objectives import supervised

K, D, V, C = 9, 6, 11, 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher(count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Columns of another model's head at the same positions."""
    targets = torch.arange(K) % V
    return head.likeliest(draw(1, K, D), draw(2, V, D), targets, count, softcap=None, temperature=temperature)


def columns_of(logprob_KV: Tensor, ids_KC: Tensor) -> Tensor:
    """By plain autograd: the columns, and all others as one."""
    own = logprob_KV.gather(1, ids_KC)
    others = logprob_KV.scatter(1, ids_KC, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([own, others], dim=1)


def test_the_likeliest_tokens_by_hand() -> None:
    hidden, weight = torch.eye(2), torch.log(torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.3, 0.2], [0.4, 0.1]]))
    ids, logprobs = head.likeliest(hidden, weight, torch.tensor([0, 1]), 2, softcap=None)
    assert ids.tolist() == [[0, 3], [1, 0]]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[0.1, 0.4, 0.5], [0.3, 0.4, 0.3]]))


@pytest.mark.parametrize("count", [1, C, V, V + 5])
def test_columns_and_bucket_sum_to_one(count: int) -> None:
    ids, logprobs = teacher(count)
    assert ids.shape == (K, min(count, V)) and (ids[:, 0] == torch.arange(K) % V).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(K))
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, C])
def test_value_and_gradients_equal_plain_autograd(beta: float, temperature: float, count: int) -> None:
    ids, theirs = teacher(count, temperature)
    hidden, weight = draw(3, K, D).requires_grad_(), draw(4, V, D).requires_grad_()
    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)
    expected = supervised.jsd(columns_of(logprobs, ids), theirs, beta=beta)[0]

    def loss(student: Tensor, chunk: slice) -> Tensor:
        return supervised.jsd(student, theirs[chunk], beta=beta)[0]

    got = head.column_loss(hidden, weight, ids, loss, softcap=None, temperature=temperature)
    torch.testing.assert_close(got, expected)
    grads = zip(*(torch.autograd.grad(v / 3, (hidden, weight)) for v in (got, expected)), strict=True)
    for one, other in grads:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(
            head.column_loss(hidden, weight, ids, loss, softcap=None, temperature=temperature), expected
        )


def test_a_softcap_bends_values_and_gradients() -> None:
    ids, theirs = teacher(C)
    hidden, weight = draw(3, K, D).requires_grad_(), draw(4, V, D).requires_grad_()
    logprobs = ((hidden @ weight.t() / 3).tanh() * 3 / 2).log_softmax(-1)
    expected = supervised.reverse_kl(columns_of(logprobs, ids), theirs)[0]
    got = head.column_loss(
        hidden, weight, ids, lambda s, c: supervised.reverse_kl(s, theirs[c])[0], temperature=2, softcap=3
    )
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(v, (hidden, weight)) for v in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    targets = torch.arange(K) % V
    found, own = head.likeliest(hidden.detach(), weight.detach(), targets, C, temperature=2, softcap=3)
    torch.testing.assert_close(own, columns_of(logprobs.detach(), found))


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_all_columns_equal_the_divergence_over_the_whole_vocabulary(beta: float) -> None:
    ids, theirs = teacher(V)
    hidden, weight = draw(3, K, D).requires_grad_(), draw(4, V, D)
    whole = supervised.jsd(
        (hidden @ weight.t()).log_softmax(-1), (draw(1, K, D) @ draw(2, V, D).t()).log_softmax(-1), beta=beta
    )[0]
    got = head.column_loss(hidden, weight, ids, lambda s, c: supervised.jsd(s, theirs[c], beta=beta)[0], softcap=None)
    torch.testing.assert_close(got, whole)
    torch.testing.assert_close(
        torch.autograd.grad(got, hidden)[0], torch.autograd.grad(whole, hidden)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("count", [1, C, V])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(count: int, beta: float) -> None:
    ids, theirs = teacher(count)
    hidden, weight = draw(1, K, D).requires_grad_(), draw(2, V, D)
    got = head.column_loss(hidden, weight, ids, lambda s, c: supervised.jsd(s, theirs[c], beta=beta)[0], softcap=None)
    assert abs(got.item()) < 1e-5 and float(torch.autograd.grad(got, hidden)[0].abs().max()) < 1e-5


def test_probabilities_that_vanish_stay_finite() -> None:
    """Logits so far apart that the bucket, and most columns, are 0 in float32."""
    hidden, weight = (300 * torch.eye(2)).requires_grad_(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    ids = torch.tensor([[0, 1], [1, 0]])
    theirs = torch.log(torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]))
    for beta in (0, 0.5, 1):
        got = head.column_loss(
            hidden, weight, ids, lambda s, c, b=beta: supervised.jsd(s, theirs[c], beta=b)[0], softcap=None
        )
        assert torch.isfinite(got) and torch.isfinite(torch.autograd.grad(got, hidden)[0]).all()


def test_no_tensor_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest storage that the loss makes does not grow with the number of positions."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for made in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(made, Tensor):
                    self.seen = max(self.seen, made.numel())
            return out

    monkeypatch.setattr(head, "CHUNK", 32)

    def largest(positions: int) -> int:
        hidden, weight = draw(3, positions, D).requires_grad_(), draw(4, 500, D)
        targets = torch.arange(positions) % 500
        with Largest() as mode:
            ids, theirs = head.likeliest(hidden.detach(), weight, targets, C, softcap=None)
            head.column_loss(
                hidden, weight, ids, lambda s, c: supervised.forward_kl(s, theirs[c])[0], softcap=None
            ).backward()
        return mode.seen

    assert largest(64) == largest(640) == 32 * 500
