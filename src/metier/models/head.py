"""The output head on chosen positions only, and its losses in chunks.

Logits of a 50k vocabulary are the largest tensor of a step; they are made for the K supervised rows alone, a chunk at
a time, turned into the gradient in place, and forgotten. Where the head itself is trained, they are made once more for
its gradient, which needs the loss's slope. Some models cap their logits, softcap · tanh(logit / softcap) (Gemma Team
2024, "Gemma 2", §2).

Shape legend: K supervised positions, D hidden size, V vocabulary, C chosen columns of it, k positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

CHUNK = 256
WIDE = 1024
BLOCK = 16
GRAIN = 32
SMALLEST = 1e-30

ColumnLoss = Callable[[Tensor, slice], Tensor]


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


def likeliest(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    target_K: Tensor,
    count: int,
    *,
    softcap: float | None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The target and the likeliest other tokens of each position, `count` in all (or V, where that is less): their ids
    (K, C) int64, the target first, and log-probabilities (K, C + 1) float32, the last that of all other tokens.

    Logits are divided by `temperature`, behind the softcap.
    """
    count = min(count, weight_VD.shape[0])
    column_KC = target_K.new_empty(len(target_K), count)
    logprob_KC = hidden_KD.new_empty(len(target_K), count + 1, dtype=torch.float32)
    for at in range(0, len(target_K), CHUNK):
        chunk = slice(at, at + CHUNK)
        logprob_kV, _ = _logprobs(hidden_KD[chunk], weight_VD, temperature, softcap)
        first = logprob_kV.scatter(1, target_K[chunk, None], torch.inf)
        column_KC[chunk] = first.topk(count, dim=1).indices
        logprob_KC[chunk] = torch.cat(_split(logprob_kV, column_KC[chunk])[:2], dim=1)
    return column_KC, logprob_KC


def column_loss(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    column_KC: Tensor,
    loss: ColumnLoss,
    *,
    softcap: float | None,
    temperature: float = 1.0,
) -> Tensor:
    """The sum of `loss` over all positions, float32; differentiable in `hidden_KD` and `weight_VD`.

    `loss` gets log-probabilities (k, C + 1) of a chunk at the columns of `column_KC` (ids, distinct within a position),
    the last that of all other tokens, and which positions the chunk holds; it returns their sum. `temperature` and
    `softcap` are as in `likeliest`.
    """
    if not torch.is_grad_enabled():
        hidden_KD, weight_VD = hidden_KD.detach(), weight_VD.detach()
    total: Tensor = _ColumnLoss.apply(hidden_KD, weight_VD, column_KC, loss, temperature, softcap)
    return total


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


class _ColumnLoss(torch.autograd.Function):
    """Two passes over the head, as above: the loss of a chunk is differentiated while its probabilities are at hand.

    With g the gradient at the columns, g' at the bucket of probability q, and G = Σ g + g', the gradient of the logits
    is g_c − G p_c at a column and (g'/q − G) p_v elsewhere.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        column_KC: Tensor,
        loss: ColumnLoss,
        temperature: float,
        softcap: float | None,
    ) -> Tensor:
        total = hidden_KD.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad
        slope_KD = torch.empty_like(hidden_KD) if wanted[0] else None
        slope_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        for at in range(0, len(column_KC), CHUNK):
            chunk = slice(at, at + CHUNK)
            column_kC = column_KC[chunk]
            logprob_kV, bend_kV = _logprobs(hidden_KD[chunk], weight_VD, temperature, softcap)
            own, bucket, rest_kV = _split(logprob_kV, column_kC)
            student = torch.cat([own, bucket], dim=1)
            if not any(wanted[:2]):
                total += loss(student, chunk)
                continue
            with torch.enable_grad():
                value = loss(student.requires_grad_(), chunk)
                (grad,) = torch.autograd.grad(value, student)
            total += value.detach()
            whole = grad.sum(1, keepdim=True)
            slope_kV = rest_kV.mul_(grad[:, -1:] / bucket.exp() - whole)
            slope_kV.scatter_(1, column_kC, grad[:, :-1] - whole * own.exp())
            slope_kV = slope_kV if bend_kV is None else slope_kV.mul_(bend_kV)
            slope = _filled(slope_kV.div_(temperature).to(hidden_KD.dtype))
            if slope_KD is not None:
                slope_KD[chunk] = (slope @ weight_VD)[: len(column_kC)]
            if slope_VD is not None:
                slope_VD += slope.t() @ _filled(hidden_KD[chunk])
        ctx.save_for_backward(slope_KD, slope_VD if slope_VD is None else slope_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        slopes = [s if s is None else grad.to(s.dtype) * s for s in ctx.saved_tensors]
        return *slopes, None, None, None, None


def _logprobs(
    hidden_kD: Tensor, weight_VD: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """(k, V) float32 log-probabilities of a chunk, and the slope of its softcap, where there is one."""
    logits_kV = _capped(F.linear(_filled(hidden_kD), weight_VD)[: len(hidden_kD)].float(), softcap)
    bend_kV = None if softcap is None else 1 - (logits_kV / softcap).square_()
    if temperature != 1:
        logits_kV /= temperature
    logits_kV -= logits_kV.logsumexp(1, keepdim=True)
    return logits_kV, bend_kV


def _split(logprob_kV: Tensor, column_kC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at the columns (k, C) and of all others together (k, 1), and the probabilities (k, V) of the
    others, in the storage of the first argument. The bucket is summed, not taken from 1, and is never below SMALLEST:
    differences would drown in rounding, and log 0 would turn into NaN."""
    own_kC = logprob_kV.gather(1, column_kC)
    rest_kV = logprob_kV.exp_().scatter_(1, column_kC, 0.0)
    bucket_k1 = rest_kV.sum(1, keepdim=True).clamp_(min=SMALLEST).log_()
    return own_kC, bucket_k1, rest_kV


def _filled(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple of `GRAIN`: a CPU compiles a matrix kernel for every new number of rows."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % GRAIN))
