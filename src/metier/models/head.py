"""The output head on chosen positions only, and its cross-entropy in chunks.

Logits of a 50k vocabulary are the largest tensor of a step; they are made for the K supervised rows alone, a chunk at
a time, turned into the gradient in place, and forgotten. Where the head itself is trained, they are made once more for
its gradient, which needs the loss's slope. Some models cap their logits, softcap · tanh(logit / softcap) (Gemma Team
2024, "Gemma 2", §2).

Shape legend: K supervised positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

CHUNK = 256
WIDE = 1024
BLOCK = 16
GRAIN = 32


def softcap(model: PreTrainedModel) -> float | None:
    """The bound of a model's logits, where it has one."""
    return getattr(model.config, "final_logit_softcapping", None)


def logits(model: PreTrainedModel, hidden_KD: Tensor) -> Tensor:
    """(K, V) float32 logits of a model's last hidden states."""
    return _capped(model.get_output_embeddings()(hidden_KD).float(), softcap(model))


def logprobs(hidden_KD: Tensor, weight_VD: Tensor, target_K: Tensor, *, softcap: float | None) -> Tensor:
    """(K,) float32 natural-log probabilities of the targets; differentiable in `hidden_KD`, and in a trained head."""
    kind = _TrainedTargetLogprobs if weight_VD.requires_grad and torch.is_grad_enabled() else _TargetLogprobs
    logprob_K: Tensor = kind.apply(hidden_KD, weight_VD, target_K, softcap)
    return logprob_K


class _TargetLogprobs(torch.autograd.Function):
    """Two passes over the head: logits, and their gradient at once.

    The gradient of position k is grad_k times a vector that does not depend on the loss, −(softmax − onehot) W, so it
    is made while the logits are at hand and only (K, D) numbers are kept.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, target_K: Tensor, softcap: float | None
    ) -> Tensor:
        logprob_K = hidden_KD.new_empty(len(target_K), dtype=torch.float32)
        slope_KD = torch.empty_like(hidden_KD) if ctx.needs_input_grad[0] else None
        for at in range(0, len(target_K), CHUNK):
            chunk = slice(at, at + CHUNK)
            target = target_K[chunk]
            logits = F.linear(_filled(hidden_KD[chunk]), weight_VD)
            logprob_K[chunk] = _soften(logits, target, softcap)
            if slope_KD is not None:
                slope_KD[chunk] = (logits @ weight_VD)[: len(target)]
        ctx.save_for_backward(slope_KD)
        return logprob_K

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slope_KD,) = ctx.saved_tensors
        return -grad_K[:, None].to(slope_KD.dtype) * slope_KD, None, None, None


def _soften(logits: Tensor, target_K: Tensor, softcap: float | None) -> Tensor:
    """The targets' float32 log-probabilities; the logits become softmax − onehot in place, times a soft-cap's slope.

    A few rows at a time, so that the float32 numbers stay in the processor's cache.
    """
    logprobs = []
    for at in range(0, len(target_K), BLOCK):
        target = target_K[at : at + BLOCK, None]
        rows = logits[at : at + len(target)]
        block = _capped(rows.float(), softcap)
        bend = None if softcap is None else 1 - (block / softcap).square_()
        block -= block.amax(1, keepdim=True)
        logit = block.gather(1, target)
        total = block.exp_().sum(1, keepdim=True)
        logprobs.append((logit - total.log())[:, 0])
        block.div_(total).scatter_add_(1, target, torch.full_like(total, -1))
        rows.copy_(block if bend is None else block.mul_(bend))
    logits[len(target_K) :] = 0
    return torch.cat(logprobs)


class _TrainedTargetLogprobs(torch.autograd.Function):
    """The head as a trained weight: its gradient is summed over chunks in float32, and rounded once.

    Chunks are wide, because each brings a whole (V, D) product.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, target_K: Tensor, softcap: float | None
    ) -> Tensor:
        logprob_K = hidden_KD.new_empty(len(target_K), dtype=torch.float32)
        for at in range(0, len(target_K), WIDE):
            chunk = slice(at, at + WIDE)
            logprob_K[chunk] = _soften(F.linear(_filled(hidden_KD[chunk]), weight_VD), target_K[chunk], softcap)
        ctx.save_for_backward(hidden_KD, weight_VD, target_K)
        ctx.softcap = softcap
        return logprob_K

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_KD, weight_VD, target_K = ctx.saved_tensors
        dhidden_KD = torch.empty_like(hidden_KD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for at in range(0, len(target_K), WIDE):
            chunk = slice(at, at + WIDE)
            states = _filled(hidden_KD[chunk])
            slope = F.linear(states, weight_VD)
            _soften(slope, target_K[chunk], ctx.softcap)
            slope.mul_(-_filled(grad_K[chunk, None]))
            dhidden_KD[chunk] = (slope @ weight_VD)[: len(target_K[chunk])]
            dweight_VD += slope.t() @ states
        return dhidden_KD, dweight_VD.to(weight_VD.dtype), None, None


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div(softcap).tanh_().mul_(softcap)


def _filled(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple of `GRAIN`: a CPU compiles a matrix kernel for every new number of rows."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % GRAIN))
