"""A decoder layer as three autograd functions around its attention.

The model code of `transformers` runs a layer as some forty operations, most of them passes over memory between the
matrix products. A `Block` computes the same numbers with fewer: norm, query, key, value and rotation are one function,
output and residual another, the feed-forward half a third. Frozen weights that read the same input lie side by side,
once, for both directions, and their adapters' A matrices are one product. Weights may be trained themselves. A layer
with other parts runs as it came, and so does one whose adapters are DoRA, or drop inputs in this step.

Shape legend: T tokens, D hidden size, I inputs, O outputs (of all joined layers), F feed-forward size, R rank (of all
joined adapters), N rotated heads, E half of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from metier.models import quant
from metier.models.attention import Scoring
from metier.models.linear import LoraLinear, QuantisedLinear
from metier.models.quant import Quantised, Weight

Linear = nn.Linear | QuantisedLinear | LoraLinear
PLAIN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def install(model: PreTrainedModel) -> None:
    """Puts a `Block` in the place of every plain decoder layer; names of modules and tensors stay as they are."""
    layers = model.get_decoder().layers
    for place, layer in enumerate(layers):
        if type(layer).__name__ in PLAIN and model.config.hidden_act in ("silu", "swish"):
            layers[place] = Block(layer)


class Block(nn.Module):
    """h + Attention(norm(h)), then h + Down(silu(Gate(norm(h))) · Up(norm(h)))."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.as_it_came = layer.forward
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.scoring = _scoring(layer.self_attn)
        self.lay_out()

    def lay_out(self) -> None:
        """Lays weights that read the same input side by side; again after they were moved to another device."""
        _lay_side_by_side(self._inputs())
        _lay_side_by_side(self._gate_up())

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], layout: Any, **rest: Any
    ) -> Tensor:
        if not all(_joins(linear) for linear in self._linears()):
            out: Tensor = self.as_it_came(hidden_states, position_embeddings=position_embeddings, layout=layout, **rest)
            return out
        h_TD = hidden_states[0]
        h_TD = self._attention(h_TD, position_embeddings, layout)
        return self._feed_forward(h_TD)[None]

    def _inputs(self) -> list[Linear]:
        return [self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj]

    def _gate_up(self) -> list[Linear]:
        return [self.mlp.gate_proj, self.mlp.up_proj]

    def _linears(self) -> list[Linear]:
        return [*self._inputs(), self.self_attn.o_proj, *self._gate_up(), self.mlp.down_proj]

    def _attention(self, h_TD: Tensor, rotary: tuple[Tensor, Tensor], layout: Any) -> Tensor:
        attn, norm = self.self_attn, self.input_layernorm
        joined = join(self._inputs())
        cos_TE, sin_TE = (t[0, :, : t.shape[-1] // 2] for t in rotary)
        heads = [linear.weight.shape[0] // attn.head_dim for linear in self._inputs()]
        queries_keys = heads[0] + heads[1]
        normed = hasattr(attn, "q_norm")
        y_TO: Tensor = _NormLinear.apply(
            h_TD,
            norm.weight,
            norm.variance_epsilon,
            joined,
            None if normed else (cos_TE, sin_TE, queries_keys),
            *joined.trained,
        )
        y_TND = y_TO.view(y_TO.shape[0], -1, attn.head_dim)
        q, k, v = y_TND.split(heads, dim=1)
        if normed:
            q, k = (_Rotation.apply(n(t), cos_TE, sin_TE) for n, t in ((attn.q_norm, q), (attn.k_norm, k)))
        out_THD = layout.attend(attn.layer_idx, q, k, v, self.scoring)
        output = join([attn.o_proj])
        return _LinearAdd.apply(out_THD.reshape(h_TD.shape[0], -1), h_TD, output, *output.trained)  # type: ignore[no-any-return]

    def _feed_forward(self, h_TD: Tensor) -> Tensor:
        norm, gate_up, down = self.post_attention_layernorm, join(self._gate_up()), join([self.mlp.down_proj])
        return _FeedForward.apply(  # type: ignore[no-any-return]
            h_TD, norm.weight, norm.variance_epsilon, gate_up, down, *gate_up.trained, *down.trained
        )


def _scoring(attn: Any) -> Scoring:
    """Mistral has one window for all layers, the Qwens one a layer; Llama has none, whatever its settings say."""
    everywhere = attn.config.model_type == "mistral"
    return Scoring(
        attn.scaling, None, attn.config.sliding_window if everywhere else getattr(attn, "sliding_window", None)
    )


@dataclass(frozen=True)
class Joined:
    """Linear layers that read the same input, as one.

    `parts` names, for each adapted layer, its output columns and its scale; `adapters` are its A (R, I) and B (O, R).
    `whole` are the weights and biases that are trained themselves, with their output columns.
    The weights are joined anew in each direction, and kept whole in neither.
    """

    weights: tuple[Weight, ...]
    bias_O: Tensor | None
    parts: tuple[tuple[slice, float], ...]
    adapters: tuple[Tensor, ...]
    whole: tuple[tuple[slice, Tensor], ...]

    def lent(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """The one (O, I) weight, inside the block."""
        return quant.lent(_side_by_side(self.weights), dtype)

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return (*self.adapters, *(tensor for _, tensor in self.whole))


def _joins(linear: Linear) -> bool:
    """Whether a layer's output is a product and its low-rank update, and nothing else."""
    if not isinstance(linear, LoraLinear) or not linear.enabled:
        return True
    return linear.magnitude is None and linear.seed is None


def join(linears: Sequence[Linear]) -> Joined:
    """Layers whose weights lie side by side as one layer."""
    weights = tuple(linear.weight for linear in linears)
    biases: list[Tensor] = [linear.bias.detach() for linear in linears if linear.bias is not None]
    parts: list[tuple[slice, float]] = []
    adapters: list[Tensor] = []
    whole: list[tuple[slice, Tensor]] = []
    at = 0
    for linear, weight in zip(linears, weights, strict=True):
        columns = slice(at, at + weight.shape[0])
        if isinstance(linear, LoraLinear) and linear.enabled:
            parts.append((columns, linear.lora.scale))
            adapters += [linear.lora_A, linear.lora_B]
        whole += [(columns, t) for t in (weight, linear.bias) if isinstance(t, Tensor) and t.requires_grad]
        at = columns.stop
    bias_O = torch.cat(biases) if biases else None
    return Joined(weights, bias_O, tuple(parts), tuple(adapters), tuple(whole))


def _side_by_side(weights: Sequence[Weight]) -> Weight:
    """The weights as one (O, I): where they lie side by side, that memory itself; else a copy. Quantised ones are made
    full side by side."""
    if few := [w for w in weights if isinstance(w, Quantised)]:
        return quant.SideBySide.of(few)
    plain = [w.detach() for w in weights if isinstance(w, Tensor)]
    first = plain[0]
    rows = [0, *accumulate(w.shape[0] for w in plain)]
    start, row = first.data_ptr(), first.stride(0) * first.element_size()
    if any(w.data_ptr() != start + at * row for w, at in zip(plain, rows, strict=False)):
        return torch.cat(plain)
    return first.as_strided((rows[-1], first.shape[1]), first.stride())


def _lay_side_by_side(linears: Sequence[Linear]) -> None:
    """Moves frozen weights into one storage; each stays a view of it under its own name. Quantised ones stay apart."""
    plain = [linear.weight for linear in linears if isinstance(linear.weight, Tensor)]
    if not plain:
        return
    views = torch.cat([weight.detach() for weight in plain]).split([weight.shape[0] for weight in plain])
    for weight, view in zip(plain, views, strict=True):
        weight.data = view


def _product(x_TI: Tensor, joined: Joined, add_TO: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(T, O) of the joined layers, plus `add_TO`, and x Aᵀ (T, R) for the way back."""
    add = joined.bias_O if add_TO is None else add_TO if joined.bias_O is None else add_TO + joined.bias_O
    with joined.lent(x_TI.dtype) as weight_OI:
        y_TO = x_TI @ weight_OI.t() if add is None else torch.addmm(add, x_TI, weight_OI.t())
    if not joined.parts:
        return y_TO, x_TI[:, :0]
    a_RI, bs = _low_rank(joined, x_TI.dtype)
    xa_TR = x_TI @ a_RI.t()
    at = 0
    for (columns, scale), b_OR in zip(joined.parts, bs, strict=True):
        rank = b_OR.shape[1]
        y_TO[:, columns].addmm_(xa_TR[:, at : at + rank], b_OR.t(), alpha=scale)
        at += rank
    return y_TO, xa_TR


def _product_backward(
    dy_TO: Tensor, x_TI: Tensor, xa_TR: Tensor, joined: Joined, *, input_gradient: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of x, and those of each A and B in float32 and of what is trained whole."""
    dx_TI = None
    if input_gradient:
        with joined.lent(dy_TO.dtype) as weight_OI:
            dx_TI = dy_TO @ weight_OI
    whole = [dy_TO[:, c].sum(0) if t.dim() == 1 else dy_TO[:, c].t() @ x_TI for c, t in joined.whole]
    if not joined.parts:
        return dx_TI, whole
    a_RI, bs = _low_rank(joined, x_TI.dtype)
    dxa_TR = torch.empty_like(xa_TR)
    gradients: list[Tensor] = []
    at = 0
    for (columns, scale), b_OR in zip(joined.parts, bs, strict=True):
        ranks = slice(at, at + b_OR.shape[1])
        dy = dy_TO[:, columns]
        dxa_TR[:, ranks] = (dy @ b_OR).mul_(scale)
        gradients += [torch.empty(0), (dy.t() @ xa_TR[:, ranks]).float().mul_(scale)]
        at = ranks.stop
    da_RI = (dxa_TR.t() @ x_TI).float()
    gradients[::2] = da_RI.split([b.shape[1] for b in bs])
    if dx_TI is not None:
        dx_TI.addmm_(dxa_TR, a_RI)
    return dx_TI, gradients + whole


def _low_rank(joined: Joined, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A matrices, stacked (R, I), and each B (O, R), in the dtype of the computation."""
    stacked = torch.cat([a.detach() for a in joined.adapters[::2]]).to(dtype)
    return stacked, [b.detach().to(dtype) for b in joined.adapters[1::2]]


def _norm(h_TD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang & Sennrich 2019): h / sqrt(mean(h²) + ε) · w, and 1 / sqrt(…) (T, 1) in float32."""
    norm_T1 = torch.linalg.vector_norm(h_TD, dim=-1, keepdim=True, dtype=torch.float32)
    inverse_T1 = norm_T1.square_().div_(h_TD.shape[-1]).add_(epsilon).rsqrt_()
    return _scaled(h_TD, inverse_T1).to(h_TD.dtype).mul_(weight_D), inverse_T1


def _norm_backward(dx_TD: Tensor, h_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor) -> Tensor:
    """The gradient of h: (g − ĥ · mean(g · ĥ)) / sqrt(…), with g = dx · w and ĥ the normalised h, in float32."""
    unit_TD = _scaled(h_TD, inverse_T1)
    g_TD = (dx_TD * weight_D).float()
    mean_T1 = torch.bmm(g_TD[:, None], unit_TD[:, :, None])[:, :, 0].div_(-h_TD.shape[-1])
    return g_TD.addcmul_(unit_TD, mean_T1).mul_(inverse_T1).to(h_TD.dtype)


def _norm_weight_backward(dx_TD: Tensor, h_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor) -> Tensor:
    """The gradient of w: dx · ĥ, summed over tokens in float32."""
    return _scaled(h_TD, inverse_T1).mul_(dx_TD).sum(0).to(weight_D.dtype)


def _scaled(h_TD: Tensor, inverse_T1: Tensor) -> Tensor:
    return h_TD.to(torch.float32, copy=True).mul_(inverse_T1)


def _rotate(y_TN2E: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> None:
    """Rotary positions (Su et al. 2021) in place: the two halves of each head as the plane's coordinates."""
    first, second = y_TN2E[:, :, 0], y_TN2E[:, :, 1]
    cos, sin = cos_TE[:, None], sin_TE[:, None]
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)


def _halves(y_TO: Tensor, heads: int, half: int) -> Tensor:
    """The first `heads` heads of (T, O) as a view (T, N, 2, E)."""
    return y_TO[:, : heads * 2 * half].view(-1, heads, 2, half)


class _NormLinear(torch.autograd.Function):
    """Norm, joined product, and the rotation of its first heads."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h_TD: Tensor,
        norm_D: Tensor,
        epsilon: float,
        joined: Joined,
        rotation: tuple[Tensor, Tensor, int] | None,
        *adapters: Tensor,
    ) -> Tensor:
        x_TD, inverse_T1 = _norm(h_TD, norm_D, epsilon)
        y_TO, xa_TR = _product(x_TD, joined)
        if rotation is not None:
            cos, sin, heads = rotation
            _rotate(_halves(y_TO, heads, cos.shape[-1]), cos, sin)
        ctx.save_for_backward(h_TD, norm_D, inverse_T1, x_TD, xa_TR)
        ctx.joined, ctx.rotation = joined, rotation
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_TD, norm_D, inverse_T1, x_TD, xa_TR = ctx.saved_tensors
        if ctx.rotation is not None:
            cos, sin, heads = ctx.rotation
            _rotate(_halves(dy_TO, heads, cos.shape[-1]), cos, -sin)
        need_h, need_norm = ctx.needs_input_grad[:2]
        dx_TD, gradients = _product_backward(dy_TO, x_TD, xa_TR, ctx.joined, input_gradient=need_h or need_norm)
        dnorm_D = _norm_weight_backward(dx_TD, h_TD, inverse_T1, norm_D) if dx_TD is not None and need_norm else None
        dh_TD = _norm_backward(dx_TD, h_TD, inverse_T1, norm_D) if dx_TD is not None and need_h else None
        return dh_TD, dnorm_D, None, None, None, *gradients


class _LinearAdd(torch.autograd.Function):
    """residual + product."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, residual_TD: Tensor, joined: Joined, *adapters: Tensor) -> Tensor:  # type: ignore[override]
        y_TD, xa_TR = _product(x_TI, joined, residual_TD)
        ctx.save_for_backward(x_TI, xa_TR)
        ctx.joined = joined
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, xa_TR = ctx.saved_tensors
        need = ctx.needs_input_grad[0]
        dx_TI, gradients = _product_backward(dy_TD, x_TI, xa_TR, ctx.joined, input_gradient=need)
        return dx_TI, dy_TD, None, *gradients


class _FeedForward(torch.autograd.Function):
    """h + Down(silu(Gate(norm(h))) · Up(norm(h))) (Shazeer 2020, SwiGLU); the product of the two is made again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h_TD: Tensor,
        norm_D: Tensor,
        epsilon: float,
        gate_up: Joined,
        down: Joined,
        *adapters: Tensor,
    ) -> Tensor:
        x_TD, inverse_T1 = _norm(h_TD, norm_D, epsilon)
        y_TO, xa_TR = _product(x_TD, gate_up)
        gate_TF, up_TF = y_TO.chunk(2, dim=1)
        out_TD, aa_TR = _product(F.silu(gate_TF).mul_(up_TF), down, h_TD)
        ctx.save_for_backward(h_TD, norm_D, inverse_T1, x_TD, xa_TR, y_TO, aa_TR)
        ctx.gate_up, ctx.down = gate_up, down
        return out_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_TD, norm_D, inverse_T1, x_TD, xa_TR, y_TO, aa_TR = ctx.saved_tensors
        gate_TF, up_TF = y_TO.chunk(2, dim=1)
        silu_TF = F.silu(gate_TF)
        dact_TF, down_gradients = _product_backward(dy_TD, silu_TF * up_TF, aa_TR, ctx.down)
        assert dact_TF is not None
        dgate_up_TO = torch.empty_like(y_TO)
        dgate_TF, dup_TF = dgate_up_TO.chunk(2, dim=1)
        torch.mul(dact_TF, silu_TF, out=dup_TF)
        torch.ops.aten.silu_backward(dact_TF.mul_(up_TF), gate_TF, grad_input=dgate_TF)
        need_h, need_norm = ctx.needs_input_grad[:2]
        dx_TD, gradients = _product_backward(dgate_up_TO, x_TD, xa_TR, ctx.gate_up, input_gradient=need_h or need_norm)
        dnorm_D = _norm_weight_backward(dx_TD, h_TD, inverse_T1, norm_D) if dx_TD is not None and need_norm else None
        dh_TD = _norm_backward(dx_TD, h_TD, inverse_T1, norm_D).add_(dy_TD) if dx_TD is not None and need_h else None
        return dh_TD, dnorm_D, None, None, None, *gradients, *down_gradients


class _Rotation(torch.autograd.Function):
    """The rotation alone, for models that normalise queries and keys before it."""

    @staticmethod
    def forward(ctx: Any, y_TND: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:  # type: ignore[override]
        ctx.cos, ctx.sin = cos_TE, sin_TE
        turned = y_TND.clone()
        _rotate(turned.unflatten(2, (2, -1)), cos_TE, sin_TE)
        return turned

    @staticmethod
    def backward(ctx: Any, dy_TND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        turned = dy_TND.clone()
        _rotate(turned.unflatten(2, (2, -1)), ctx.cos, -ctx.sin)
        return turned, None, None
