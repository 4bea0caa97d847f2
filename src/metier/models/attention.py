"""Attention over rows laid end to end, and over a cache while generating.

The model code of `transformers` calls `attend` through its attention interface; the `layout` keyword tells how the
tokens at hand relate. Short rows go through padded matrix products with a float32 softmax, which beat the flash
kernels on CPUs in both directions; long rows go one by one through the flash kernel, so nothing quadratic is kept.

Shape legend: T tokens, B rows, S tokens of the longest row, P shared prefix tokens, K keys that a row sees at most, H
query heads, J key-value heads, G = H / J, D head size, C cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

NAME = "metier"
GRAIN = 64
LONG = 768
BLOCK = 256
APART_FROM = 96
ALIKE = 1.6


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer scores a key: `scale` times the product of query and key; with `softcap`, softcap · tanh(score /
    softcap) of that (Gemma Team 2024, "Gemma 2", §2); with `window`, only the last `window` keys, the own one among
    them (Beltagy et al. 2020, §3.1)."""

    scale: float
    softcap: float | None = None
    window: int | None = None


class Rows:
    """Rows of `lengths_B` tokens behind `prefix` tokens which they all see; the prefix is part of the tokens.

    With `cache`, the shared prefix comes from it instead, and the rows' keys and values are kept in it. Spare tokens
    that nobody sees fill up to a multiple of `GRAIN`: a CPU compiles matrix kernels for every new number of tokens and
    never forgets them, so free lengths would cost ever more memory.
    """

    def __init__(self, lengths_B: list[int], *, prefix: int, device: torch.device, cache: Cache | None = None) -> None:
        self.prefix, self.cache, self.lengths = prefix, cache, lengths_B
        self.tokens = prefix + sum(lengths_B)
        self.spare = -self.tokens % GRAIN
        self.longest = max(lengths_B)
        self.size = (len(lengths_B), self.longest)
        self.place_T = _places(lengths_B, self.longest, device)
        behind = prefix if cache is None else cache.prefix
        within_T = torch.cat([torch.arange(n) for n in lengths_B]).to(device)
        spare = within_T.new_zeros(self.spare)
        self.position_T = torch.cat([torch.arange(prefix, device=device), within_T + behind, spare])
        self.parts = _Parts(lengths_B, behind, device)
        self.prefix_parts = _Parts([prefix], 0, device)

    def attend(self, layer: int, q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, scoring: Scoring) -> Tensor:
        # One split and one concatenation: their gradients are a concatenation and a split, where slices would each
        # give a whole tensor of zeros.
        parts = self.parts(scoring.window)
        sizes = [self.prefix, *(part.tokens for part in parts), self.spare]
        (q_PHD, *qs, q_spare), (kp_PJD, *ks, _), (vp_PJD, *vs, _) = (t.split(sizes) for t in (q_THD, k_TJD, v_TJD))
        out = [self.prefix_parts.one_row(q_PHD, kp_PJD, vp_PJD, scoring)] if self.prefix else []
        if self.cache is not None:
            self.cache.keep(layer, k_TJD[: self.tokens], v_TJD[: self.tokens], self)
            plain = scoring.softcap is None and self.parts.cut(scoring.window) is None
            if plain and self.cache.prefix >= APART_FROM and self.longest <= LONG:
                return torch.cat([self._apart(qs, ks, vs, *self.cache.prefix_of(layer), scoring.scale), q_spare])
            if self.cache.prefix:
                kp_JDP, vp_JPD = self.cache.prefix_of(layer)
                kp_PJD, vp_PJD = kp_JDP.permute(2, 0, 1), vp_JPD.transpose(0, 1)
        for part, q, k, v in zip(parts, qs, ks, vs, strict=True):
            out.append(part.attend(q, k, v, kp_PJD, vp_PJD, scoring))
        return torch.cat([*out, q_spare.new_zeros(q_spare.shape)])

    def _apart(
        self, qs: list[Tensor], ks: list[Tensor], vs: list[Tensor], kp_JDP: Tensor, vp_JPD: Tensor, scale: float
    ) -> Tensor:
        """Long shared prefixes while generating: prefix and rows apart, joined by their log-sum-exps, exactly.

        A softmax over two sets of keys is the mean of the two softmaxes, weighted by their sums of exponentials; so
        the prefix is read once for all rows, by the flash kernel, and never copied into each of them.
        """
        own = [part.own(q, k, v, scale) for part, q, k, v in zip(self.parts(None), qs, ks, vs, strict=True)]
        mine_THD, lse_TH1 = (torch.cat(pieces) for pieces in zip(*own, strict=True))
        q_THD = torch.cat(qs)
        shared_THD, shared_lse_TH1 = _all_keys(q_THD, kp_JDP.permute(2, 0, 1), vp_JPD.transpose(0, 1), scale)
        share_TH1 = torch.sigmoid(shared_lse_TH1 - lse_TH1)
        return torch.lerp(mine_THD.float(), shared_THD.float(), share_TH1).to(q_THD.dtype)


@dataclass(frozen=True)
class _Part:
    """Neighbouring rows of similar length, padded to the longest of them: little of the padding is computed."""

    lengths: list[int]
    tokens: int
    size: tuple[int, int]
    place_T: Tensor
    window: int | None
    blocked_SK: Tensor | None

    def attend(
        self, q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, kp_PJD: Tensor, vp_PJD: Tensor, scoring: Scoring
    ) -> Tensor:
        """Each row to the prefix and to itself."""
        if self.blocked_SK is None:
            return self._one_by_one(q_THD, k_TJD, v_TJD, kp_PJD, vp_PJD, scoring)
        out_THD: Tensor = _PaddedAttention.apply(
            q_THD, k_TJD, v_TJD, kp_PJD, vp_PJD, self.place_T, self.size, self.blocked_SK, scoring
        )
        return out_THD

    def own(self, q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Each row to itself alone (T, H, D), and the log-sum-exp of its scores (T, H, 1)."""
        assert self.blocked_SK is not None
        heads = (k_TJD.shape[1], q_THD.shape[1] // k_TJD.shape[1])
        q = _pad_queries(q_THD, self.place_T, self.size, heads)
        k, v = (_pad(t, self.place_T, self.size).transpose(1, 2) for t in (k_TJD, v_TJD))
        scores = torch.matmul(q, k.transpose(2, 3)).float().mul_(scale)
        blocked = self.blocked_SK[:, -self.size[1] :]
        scores.view(self.size[0], *heads, *blocked.shape).masked_fill_(blocked, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        out = torch.matmul((scores - lse).exp_().to(q.dtype), v)
        return tuple(_unpad_queries(t, self.place_T, self.size, heads) for t in (out, lse))  # type: ignore[return-value]

    def _one_by_one(
        self, q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, kp_PJD: Tensor, vp_PJD: Tensor, scoring: Scoring
    ) -> Tensor:
        out = []
        for q, k, v in zip(*(t.split(self.lengths) for t in (q_THD, k_TJD, v_TJD)), strict=True):
            keys, values = torch.cat([kp_PJD, k]), torch.cat([vp_PJD, v])
            if scoring.softcap is not None or self.window is not None:
                out.append(_in_blocks(q, keys, values, self.window, scoring))
            else:
                allowed = ~_blocked(q.shape[0], kp_PJD.shape[0], q.device) if kp_PJD.shape[0] else None
                out.append(_flash(q, keys, values, allowed, scoring.scale))
        return torch.cat(out)


class _Parts:
    """Rows in runs whose longest is at most `ALIKE` times their shortest, with the masks of a window, made once."""

    def __init__(self, lengths_B: list[int], behind: int, device: torch.device) -> None:
        self._lengths, self._behind, self._device = lengths_B, behind, device
        self._made: dict[int | None, list[_Part]] = {}

    def cut(self, window: int | None) -> int | None:
        """The window, if it hides a key from any of the rows."""
        return window if window is not None and window < self._behind + max(self._lengths) else None

    def __call__(self, window: int | None) -> list[_Part]:
        window = self.cut(window)
        if window not in self._made:
            self._made[window] = [self._part(run, window) for run in self._runs()]
        return self._made[window]

    def one_row(self, q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, scoring: Scoring) -> Tensor:
        """The only row, to itself alone."""
        [part] = self(scoring.window)
        return part.attend(q_THD, k_TJD, v_TJD, k_TJD[:0], v_TJD[:0], scoring)

    def _runs(self) -> list[list[int]]:
        runs: list[list[int]] = []
        for length in self._lengths:
            if not runs or max(*runs[-1], length) > ALIKE * min(*runs[-1], length):
                runs.append([])
            runs[-1].append(length)
        return runs

    def _part(self, run: list[int], window: int | None) -> _Part:
        longest = max(run)
        return _Part(
            lengths=run,
            tokens=sum(run),
            size=(len(run), longest),
            place_T=_places(run, longest, self._device),
            window=window,
            blocked_SK=_blocked(longest, self._behind, self._device, window) if longest <= LONG else None,
        )


def _places(lengths_B: list[int], stride: int, device: torch.device) -> Tensor:
    """Where each of T tokens lies in rows padded to `stride`."""
    return torch.cat([torch.arange(n) + row * stride for row, n in enumerate(lengths_B)]).to(device)


class Cache:
    """Keys and values of a shared prefix (once) and of B rows, with room for the tokens to come.

    Rows lie as (B, J, C, D) and are never sliced while decoding: a slice would be copied for every product.
    """

    def __init__(self) -> None:
        self.prefix = 0
        self._prefix: list[tuple[Tensor, Tensor]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._size = (0, 0)
        self._at = 0

    def keep_prefix(self, k_PJD: Tensor, v_PJD: Tensor) -> None:
        self._prefix.append((k_PJD.permute(1, 2, 0).contiguous(), v_PJD.transpose(0, 1).contiguous()))

    def prefix_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (J, D, P) and values (J, P, D)."""
        return self._prefix[layer]

    def open_rows(self, rows: int, slots: int) -> None:
        """Forgets the rows it held and makes room for others, of `slots` tokens each; layers fill them in turn."""
        self._rows, self._size, self._at = [], (rows, slots), 0

    def keep(self, layer: int, k_TJD: Tensor, v_TJD: Tensor, rows: Rows) -> None:
        """Stores what the next few rows computed in a layer."""
        if layer == len(self._rows):
            shape = (self._size[0], k_TJD.shape[1], self._size[1], k_TJD.shape[2])
            self._rows.append((k_TJD.new_zeros(shape), v_TJD.new_zeros(shape)))
        for stored, flat in zip(self._rows[layer], (k_TJD, v_TJD), strict=True):
            padded = _pad(flat, rows.place_T, rows.size).transpose(1, 2)
            stored[self._at : self._at + rows.size[0], :, : rows.longest] = padded

    def kept(self, rows: int) -> None:
        """All layers have stored these rows; the next ones come behind them."""
        self._at += rows

    def rows_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, J, C, D)."""
        return self._rows[layer]

    def select(self, keep_B: Tensor) -> None:
        """Keeps only the rows of `keep_B` (indices)."""
        self._rows = [(k.index_select(0, keep_B), v.index_select(0, keep_B)) for k, v in self._rows]


class Prefix:
    """The first pass over a shared prefix: plain causal attention, keys and values kept in the cache."""

    def __init__(self, length: int, cache: Cache, device: torch.device) -> None:
        self.cache = cache
        cache.prefix = length
        self.position_T = torch.arange(length, device=device)
        self.parts = _Parts([length], 0, device)

    def attend(self, layer: int, q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, scoring: Scoring) -> Tensor:
        self.cache.keep_prefix(k_TJD, v_TJD)
        return self.parts.one_row(q_THD, k_TJD, v_TJD, scoring)


class Step:
    """One new token for each of B cached rows; `filled_B` is how many own tokens each row holds before it."""

    def __init__(self, cache: Cache, filled_B: Tensor) -> None:
        self.cache, self.filled_B = cache, filled_B
        self.position_T = filled_B + cache.prefix
        self.row_B = torch.arange(len(filled_B), device=filled_B.device)
        self._blocked: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def attend(self, layer: int, q_BHD: Tensor, k_BJD: Tensor, v_BJD: Tensor, scoring: Scoring) -> Tensor:
        """Scores against prefix and own keys apart, joined in one softmax, so that the prefix is never copied."""
        keys, values = self.cache.rows_of(layer)
        keys[self.row_B, :, self.filled_B] = k_BJD
        values[self.row_B, :, self.filled_B] = v_BJD
        b, h, d = q_BHD.shape
        j, p = keys.shape[1], self.cache.prefix
        blocked_BC, blocked_BP = self._blocked_by(scoring.window, keys.shape[2])
        q_BJGD = (q_BHD * scoring.scale).view(b, j, h // j, d)
        scores = _capped((q_BJGD @ keys.transpose(2, 3)).float(), scoring.softcap).masked_fill_(blocked_BC, -torch.inf)
        if not p:
            return (scores.softmax(-1).to(q_BHD.dtype) @ values).reshape(b, h, d)
        kp_JDP, vp_JPD = self.cache.prefix_of(layer)
        shared = (q_BJGD.transpose(0, 1).reshape(j, -1, d) @ kp_JDP).float().view(j, b, h // j, p).transpose(0, 1)
        shared = _capped(shared, scoring.softcap)
        shared = shared if blocked_BP is None else shared.masked_fill(blocked_BP, -torch.inf)
        weights = torch.cat([shared, scores], dim=3).softmax(-1).to(q_BHD.dtype)
        from_prefix = weights[..., :p].transpose(0, 1).reshape(j, -1, p) @ vp_JPD
        out = weights[..., p:] @ values + from_prefix.view(j, b, h // j, d).transpose(0, 1)
        return out.reshape(b, h, d)

    def _blocked_by(self, window: int | None, slots: int) -> tuple[Tensor, Tensor | None]:
        """Which own keys (B, 1, 1, C) and prefix keys (B, 1, 1, P), if any, a row may not see; made once a step."""
        if window not in self._blocked:
            slot_C = torch.arange(slots, device=self.filled_B.device)
            filled_B1 = self.filled_B[:, None]
            blocked_BC, blocked_BP = slot_C > filled_B1, None
            if window is not None:
                blocked_BC |= slot_C <= filled_B1 - window
                prefix_P = torch.arange(self.cache.prefix, device=self.filled_B.device)
                blocked_BP = (prefix_P <= filled_B1 + self.cache.prefix - window)[:, None, None]
            self._blocked[window] = blocked_BC[:, None, None], blocked_BP
        return self._blocked[window]


def hidden_states(model: PreTrainedModel, ids_T: np.ndarray | Tensor, layout: Rows | Prefix | Step) -> Tensor:
    """(T, D) last hidden states of flat tokens under a layout."""
    ids_T = torch.as_tensor(ids_T, device=model.device)
    filled_T = F.pad(ids_T, (0, layout.position_T.numel() - ids_T.numel()))
    out = model.get_decoder()(
        input_ids=filled_T[None], position_ids=layout.position_T[None], use_cache=False, layout=layout
    )
    return out.last_hidden_state[0, : ids_T.numel()]  # type: ignore[no-any-return]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    layout: Any,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention interface of `transformers`: (1, heads, T, D) in, (1, T, heads, D) out, by the layout at hand."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return layout.attend(module.layer_idx, q, k, v, Scoring(scaling, softcap, sliding_window))[None], None


AttentionInterface.register(NAME, attend)


class _PaddedAttention(torch.autograd.Function):
    """Rows as a padded batch behind a shared prefix: two matrix products and a softmax (in float32) each way."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q_THD: Tensor,
        k_TJD: Tensor,
        v_TJD: Tensor,
        kp_PJD: Tensor,
        vp_PJD: Tensor,
        place_T: Tensor,
        size: tuple[int, int],
        blocked_SK: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        heads = (k_TJD.shape[1], q_THD.shape[1] // k_TJD.shape[1])
        q = _pad_queries(q_THD, place_T, size, heads).mul_(scoring.scale)
        k = _pad_keys(k_TJD, kp_PJD, place_T, size)
        v = _pad_keys(v_TJD, vp_PJD, place_T, size)
        scores = _capped(torch.matmul(q, k.transpose(2, 3)).float(), scoring.softcap)
        scores.view(size[0], *heads, *blocked_SK.shape).masked_fill_(blocked_SK, -torch.inf)
        weights = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, place_T)
        ctx.size, ctx.heads, ctx.scoring, ctx.prefix = size, heads, scoring, kp_PJD.shape[0]
        return _unpad_queries(torch.matmul(weights, v), place_T, size, heads)

    @staticmethod
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, weights, place_T = ctx.saved_tensors
        dout = _pad_queries(dout_THD, place_T, ctx.size, ctx.heads)
        dv = torch.matmul(weights.transpose(2, 3), dout)
        dweights = torch.matmul(dout, v.transpose(2, 3))
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        if (softcap := ctx.scoring.softcap) is not None:
            dscores.mul_(1 - torch.matmul(q, k.transpose(2, 3)).float().div_(softcap).tanh_().square_())
        dq_THD = _unpad_queries(torch.matmul(dscores, k).mul_(ctx.scoring.scale), place_T, ctx.size, ctx.heads)
        dk = torch.matmul(dscores.transpose(2, 3), q)
        (dkp, dk_T), (dvp, dv_T) = (_unpad_keys(t, ctx.prefix, place_T) for t in (dk, dv))
        return dq_THD, dk_T, dv_T, dkp, dvp, None, None, None, None


def _pad(flat: Tensor, place_T: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, ...) to (B, S, ...), zeros between."""
    padded = flat.new_zeros(size[0] * size[1], *flat.shape[1:]).index_copy_(0, place_T, flat)
    return padded.view(*size, *flat.shape[1:])


def _pad_queries(q_THD: Tensor, place_T: Tensor, size: tuple[int, int], heads: tuple[int, int]) -> Tensor:
    """(T, H, D) to (B, J, G·S, D): the queries that share keys side by side."""
    q = _pad(q_THD, place_T, size).view(*size, *heads, -1).permute(0, 2, 3, 1, 4)
    return q.reshape(size[0], heads[0], heads[1] * size[1], -1)


def _unpad_queries(q: Tensor, place_T: Tensor, size: tuple[int, int], heads: tuple[int, int]) -> Tensor:
    """The inverse of `_pad_queries`."""
    back = q.view(size[0], *heads, size[1], -1).permute(0, 3, 1, 2, 4)
    return back.reshape(size[0] * size[1], heads[0] * heads[1], -1)[place_T]


def _pad_keys(k_TJD: Tensor, kp_PJD: Tensor, place_T: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, J, D) to (B, J, P + S, D), the shared prefix before every row."""
    shared = kp_PJD.expand(size[0], *kp_PJD.shape)
    return torch.cat([shared, _pad(k_TJD, place_T, size)], dim=1).transpose(1, 2).contiguous()


def _unpad_keys(dk: Tensor, prefix: int, place_T: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (B, J, P + S, D) as those of the prefix (P, J, D), summed over rows, and of the rows (T, J, D)."""
    back = dk.transpose(1, 2)
    rows = back[:, prefix:].reshape(-1, *back.shape[2:])
    return back[:, :prefix].sum(0), rows[place_T]


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _blocked(queries: int, behind: int, device: torch.device, window: int | None = None) -> Tensor:
    """(S, behind + S) bool: True where a query may not look: at later tokens, and at those before its window."""
    every = torch.ones(queries, behind + queries, dtype=torch.bool, device=device)
    ahead = every.triu(1 + behind)
    return ahead if window is None else ahead | every.tril(behind - window)


def _in_blocks(q_THD: Tensor, k_KJD: Tensor, v_KJD: Tensor, window: int | None, scoring: Scoring) -> Tensor:
    """One long row, `BLOCK` queries at a time against the keys they see: a window makes the work linear in the length.

    The flash kernels know no soft-cap; with one, a block's scores are made again in the backward pass, not kept.
    """
    behind = k_KJD.shape[0] - q_THD.shape[0]
    out, end = [], behind
    for q in q_THD.split(BLOCK):
        first, end = 0 if window is None else max(0, end - window + 1), end + q.shape[0]
        k, v, earlier = k_KJD[first:end], v_KJD[first:end], end - q.shape[0] - first
        blocked = _blocked(q.shape[0], earlier, q.device, window)
        if scoring.softcap is None:
            out.append(_flash(q, k, v, ~blocked, scoring.scale))
        else:
            place_T = torch.arange(q.shape[0], device=q.device)
            rows = (q, k[earlier:], v[earlier:], k[:earlier], v[:earlier], place_T, (1, q.shape[0]), blocked, scoring)
            out.append(checkpoint(_PaddedAttention.apply, *rows, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out)


def _all_keys(q_THD: Tensor, k_PJD: Tensor, v_PJD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key (T, H, D), and its log-sum-exp (T, H, 1) in float32."""
    groups = q_THD.shape[1] // k_PJD.shape[1]
    q = q_THD.transpose(0, 1)[None]
    k, v = (t.transpose(0, 1).repeat_interleave(groups, 0)[None] for t in (k_PJD, v_PJD))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        lse = lse[..., None] if lse.dim() == 3 else lse
    else:
        scores = (q @ k.transpose(2, 3)).float().mul_(scale)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp_().to(q.dtype) @ v
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _flash(q_THD: Tensor, k_TJD: Tensor, v_TJD: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q_THD, k_TJD, v_TJD))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)
