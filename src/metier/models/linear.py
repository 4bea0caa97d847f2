"""A frozen linear layer with a LoRA update, as one autograd function.

Shape legend: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """y = x Wᵀ (+ b) + scale · (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3). W and b are frozen; A and B are float32 masters.

    A is Kaiming-uniform as in the paper's code and PEFT, B is zero, so a fresh adapter is the base model. While
    `enabled` is False the layer is the frozen linear alone.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.enabled = True
        outputs, inputs = linear.weight.shape
        bound = (3 / inputs) ** 0.5 / 3**0.5  # kaiming_uniform_(a=√5): gain² = 1/3, bound = gain·√(3/fan_in)
        a_RI = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a_RI.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        flat_TI = x.reshape(-1, x.shape[-1])
        y_TO: Tensor = _LoraProduct.apply(flat_TI, self.weight, self.lora_A, self.lora_B, self.scale)
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class _LoraProduct(torch.autograd.Function):
    """Keeps x and x Aᵀ; accumulates the update inside the matrix products; computes in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        a_RI, b_OR = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        xa_TR = x_TI @ a_RI.t()
        y_TO = x_TI @ w_OI.t()
        y_TO.addmm_(xa_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_TI, w_OI, a_RI, b_OR, xa_TR)
        ctx.scale = scale
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, w_OI, a_RI, b_OR, xa_TR = ctx.saved_tensors
        dxa_TR = (dy_TO @ b_OR).mul_(ctx.scale)
        da_RI = dxa_TR.t() @ x_TI
        db_OR = (dy_TO.t() @ xa_TR).mul_(ctx.scale)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ w_OI
            dx_TI.addmm_(dxa_TR, a_RI)
        return dx_TI, None, da_RI.float(), db_OR.float(), None
