"""A frozen linear layer with a LoRA update, as one autograd function, and its variants.

The frozen weight is a tensor or a quantised record. Of the latter the full weight is made for the forward product, and
made again for the backward one; it is never kept between the two.

Shape legend: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metier.models import quant
from metier.models.quant import Quantised, Weight

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Lora:
    """What kind of update a layer gets; the words are PEFT's."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What the update counts: alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski 2023, eq. 3)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class QuantisedLinear(nn.Module):
    """y = x Wᵀ (+ b) with a frozen quantised weight."""

    def __init__(self, weight: Quantised, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ (+ b) of a frozen weight, whatever it is kept as; differentiable in x."""
    if isinstance(weight, Tensor):
        return nn.functional.linear(x, weight, bias)
    y: Tensor = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), weight)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


class LoraLinear(nn.Module):
    """y = x Wᵀ (+ b) + scale · (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3). W and b are frozen; A and B are float32 masters.

    A is Kaiming-uniform as in the paper's code and PEFT, B is zero, so a fresh adapter is the base model. While
    `enabled` is False the layer is the frozen linear alone.

    With `dora` (Liu et al. 2024, eq. 5) row o of W + scale·BA is rescaled to the length `magnitude[o]`, which starts
    as the length of W's row; its present length counts as a constant in the gradient (section 4.3). With `dropout`
    the update's input loses entries while `seed` is set; the mask is a function of `seed` alone.
    """

    square_O: Tensor

    def __init__(self, linear: nn.Linear | QuantisedLinear, lora: Lora, generator: torch.Generator) -> None:
        super().__init__()
        self.weight: Weight = linear.weight
        self.bias = linear.bias
        self.lora = lora
        self.enabled = True
        self.seed: int | None = None
        outputs, inputs = linear.weight.shape
        bound = (3 / inputs) ** 0.5 / 3**0.5  # kaiming_uniform_(a=√5): gain² = 1/3, bound = gain·√(3/fan_in)
        a_RI = torch.empty(lora.rank, inputs).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a_RI.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank, device=linear.weight.device))
        self.magnitude: nn.Parameter | None = None
        if lora.dora:
            with torch.no_grad(), quant.lent(self.weight, torch.float32) as w_OI:
                self.register_buffer("square_O", w_OI.float().square().sum(1), persistent=False)
            self.magnitude = nn.Parameter(self._lengths())

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return frozen_linear(x, self.weight, self.bias)
        flat_TI = x.reshape(-1, x.shape[-1])
        mask_TI, scale = None, self.lora.scale
        if self.seed is not None:
            mask_TI, scale = _mask(flat_TI, self.lora.dropout, self.seed), scale / (1 - self.lora.dropout)
        y_TO: Tensor = _LoraProduct.apply(flat_TI, self.weight, self.lora_A, self.lora_B, scale, mask_TI)
        if self.magnitude is not None:
            y_TO = (y_TO * (self.magnitude / self._lengths())).to(y_TO.dtype)
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """(O,) ‖W + scale·BA‖ of each row in float32, by ‖W‖² + 2·scale·⟨W, BA⟩ + scale²·‖BA‖²: BA is never formed."""
        a_RI, b_OR, scale = self.lora_A, self.lora_B, self.lora.scale
        with quant.lent(self.weight, torch.float32) as w_OI:
            cross_O = ((w_OI @ a_RI.to(w_OI.dtype).t()).float() * b_OR).sum(1)
        own_O = ((b_OR @ (a_RI @ a_RI.t())) * b_OR).sum(1)
        square_O = self.square_O + 2 * scale * cross_O + scale * scale * own_O
        return square_O.clamp_min(_TINY).sqrt()


def _mask(x_TI: Tensor, dropout: float, seed: int) -> Tensor:
    """Zero with probability `dropout`, else one; the scale makes up for what is lost, as one cannot in bf16."""
    generator = torch.Generator(x_TI.device).manual_seed(seed)
    return torch.empty_like(x_TI).bernoulli_(1 - dropout, generator=generator)


class _LoraProduct(torch.autograd.Function):
    """Keeps x and x Aᵀ; accumulates the update inside the matrix products; computes in the dtype of x."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TI: Tensor, weight: Weight, a_RI: Tensor, b_OR: Tensor, scale: float, mask_TI: Tensor | None
    ) -> Tensor:
        a_RI, b_OR = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        kept_TI = x_TI if mask_TI is None else x_TI * mask_TI
        xa_TR = kept_TI @ a_RI.t()
        with quant.lent(weight, x_TI.dtype) as w_OI:
            y_TO = x_TI @ w_OI.t()
        y_TO.addmm_(xa_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(kept_TI, a_RI, b_OR, xa_TR, mask_TI)
        ctx.weight, ctx.scale = weight, scale
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept_TI, a_RI, b_OR, xa_TR, mask_TI = ctx.saved_tensors
        dxa_TR = (dy_TO @ b_OR).mul_(ctx.scale)
        da_RI = dxa_TR.t() @ kept_TI
        db_OR = (dy_TO.t() @ xa_TR).mul_(ctx.scale)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            with quant.lent(ctx.weight, dy_TO.dtype) as w_OI:
                dx_TI = dy_TO @ w_OI
            if mask_TI is None:
                dx_TI.addmm_(dxa_TR, a_RI)
            else:
                dx_TI.addcmul_(dxa_TR @ a_RI, mask_TI)
        return dx_TI, None, da_RI.float(), db_OR.float(), None, None


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ of a quantised weight; nothing is kept but its codes."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: Quantised) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        with weight.lent(x_TI.dtype) as w_OI:
            return x_TI @ w_OI.t()

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with ctx.weight.lent(dy_TO.dtype) as w_OI:
            return dy_TO @ w_OI, None
