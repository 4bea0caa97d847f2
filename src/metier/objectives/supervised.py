"""Someone gave the answer: losses over supervised positions.

A divergence compares two distributions over the same C columns at each position: chosen tokens and, last, a bucket that
holds the probability of all others, so that the columns sum to 1. By the data-processing inequality it is at most the
divergence over the whole vocabulary, and equal to it where the columns are the whole vocabulary.

Shape legend: K supervised positions, C columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# β of the first tokens of an answer and of those behind them (Qi et al. 2024, section 4.2).
CONSTRAINT = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)


def cross_entropy(logprob_K: Tensor) -> tuple[Tensor, int]:
    """(sum of −log p over supervised positions, their number); the loss is the first over the second, in nats."""
    return -logprob_K.sum(), logprob_K.numel()


def dft(logprob_K: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy with each position weighted by its own probability, held constant: −sg(p) log p, and K
    (dynamic fine-tuning, arXiv 2508.05629)."""
    return -(logprob_K.detach().exp() * logprob_K).sum(), logprob_K.numel()


def constraint(place_K: Tensor) -> Tensor:
    """(K,) the β of tokens by their place in their answer, counted from 0."""
    table = torch.tensor(CONSTRAINT, device=place_K.device)
    return table[place_K.clamp(max=len(CONSTRAINT) - 1)]


def constrained(logprob_K: Tensor, reference_K: Tensor, beta_K: Tensor) -> tuple[Tensor, int]:
    """−(2/β) log σ(β (log p − log p_ref)) summed, and K: cross-entropy that lets go of a token once it has left the
    reference, the sooner the larger its β (Qi et al. 2024, arXiv 2406.05946)."""
    return -(2 / beta_K * F.logsigmoid(beta_K * (logprob_K - reference_K))).sum(), logprob_K.numel()


def forward_kl(student_KC: Tensor, teacher_KC: Tensor) -> tuple[Tensor, int]:
    """KL(teacher ‖ student) of log-probabilities, summed over positions, and K."""
    return _kl(teacher_KC, student_KC).sum(), student_KC.shape[0]


def reverse_kl(student_KC: Tensor, teacher_KC: Tensor) -> tuple[Tensor, int]:
    """KL(student ‖ teacher) of log-probabilities, summed over positions, and K."""
    return _kl(student_KC, teacher_KC).sum(), student_KC.shape[0]


def jsd(student_KC: Tensor, teacher_KC: Tensor, *, beta: float) -> tuple[Tensor, int]:
    """The generalised Jensen-Shannon divergence β KL(T ‖ M) + (1 − β) KL(S ‖ M) with M = β T + (1 − β) S, summed, and K
    (GKD, Agarwal et al. 2024, eq. 1). At β = 0 and 1 that sum vanishes; by custom they stand for the forward KL(T ‖ S)
    and the reverse KL(S ‖ T)."""
    if beta == 0:
        return forward_kl(student_KC, teacher_KC)
    if beta == 1:
        return reverse_kl(student_KC, teacher_KC)
    mixture_KC = torch.logaddexp(teacher_KC + math.log(beta), student_KC + math.log1p(-beta))
    both_K = beta * _kl(teacher_KC, mixture_KC) + (1 - beta) * _kl(student_KC, mixture_KC)
    return both_K.sum(), student_KC.shape[0]


def self_distillation(
    student_KC: Tensor, teacher_KC: Tensor, logprob_K: Tensor, drawn_K: Tensor, *, clip: float
) -> tuple[Tensor, int]:
    """The reverse KL at tokens that an earlier student drew, each position weighted by min(p / p_drawn, clip), and K.

    `logprob_K` are the drawn tokens' log-probabilities under the student of now, `drawn_K` under the one that drew
    them; their ratio corrects for the difference, and is held constant (SDFT, arXiv 2601.19897).
    """
    ratio_K = (logprob_K - drawn_K).detach().exp().clamp(max=clip)
    return (ratio_K * _kl(student_KC, teacher_KC)).sum(), student_KC.shape[0]


def _kl(p_KC: Tensor, q_KC: Tensor) -> Tensor:
    """(K,) KL(p ‖ q) in nats, of log-probabilities that are finite."""
    return (p_KC.exp() * (p_KC - q_KC)).sum(-1)
