"""The output head on chosen positions only, and its cross-entropy in chunks.

Logits of a 50k vocabulary are the largest tensor of a step; they are made for the K supervised rows alone, a chunk at
a time, turned into the gradient in place, and forgotten.

Shape legend: K supervised positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 256
BLOCK = 16
GRAIN = 32


def logprobs(hidden_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:
    """(K,) float32 natural-log probabilities of the targets; differentiable in `hidden_KD` only."""
    logprob_K: Tensor = _TargetLogprobs.apply(hidden_KD, weight_VD, target_K)
    return logprob_K


class _TargetLogprobs(torch.autograd.Function):
    """Two passes over the head: logits, and their gradient at once.

    The gradient of position k is grad_k times a vector that does not depend on the loss, −(softmax − onehot) W, so it
    is made while the logits are at hand and only (K, D) numbers are kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:  # type: ignore[override]
        logprob_K = hidden_KD.new_empty(len(target_K), dtype=torch.float32)
        slope_KD = torch.empty_like(hidden_KD) if ctx.needs_input_grad[0] else None
        for at in range(0, len(target_K), CHUNK):
            chunk = slice(at, at + CHUNK)
            target = target_K[chunk]
            logits = F.linear(_filled(hidden_KD[chunk]), weight_VD)
            logprob_K[chunk] = _soften(logits, target)
            if slope_KD is not None:
                slope_KD[chunk] = (logits @ weight_VD)[: len(target)]
        ctx.save_for_backward(slope_KD)
        return logprob_K

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slope_KD,) = ctx.saved_tensors
        return -grad_K[:, None].to(slope_KD.dtype) * slope_KD, None, None


def _soften(logits: Tensor, target_K: Tensor) -> Tensor:
    """The targets' float32 log-probabilities; the logits become softmax − onehot in place.

    A few rows at a time, so that the float32 numbers stay in the processor's cache.
    """
    logprobs = []
    for at in range(0, len(target_K), BLOCK):
        target = target_K[at : at + BLOCK, None]
        rows = logits[at : at + len(target)]
        block = rows.float()
        block -= block.amax(1, keepdim=True)
        logit = block.gather(1, target)
        total = block.exp_().sum(1, keepdim=True)
        logprobs.append((logit - total.log())[:, 0])
        block.div_(total).scatter_add_(1, target, torch.full_like(total, -1))
        rows.copy_(block)
    logits[len(target_K) :] = 0
    return torch.cat(logprobs)


def _filled(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple of `GRAIN`: a CPU compiles a matrix kernel for every new number of rows."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % GRAIN))
