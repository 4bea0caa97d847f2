"""What training will take on this machine, said before the first step; pure arithmetic over shapes and speeds.

The operation counts are those of LoRA on frozen linear layers: 4 per weight and token (forward, and the gradient of
the input), 6 per adapter weight, and the head on supervised tokens only. A weight that is itself trained takes 6, and
a trained head 8, because its logits are made twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from metier.cost import sum_seconds
from metier.errors import ResourceError

EFFICIENCY = 0.55
LINK_GB_PER_SECOND = 1.0  # 10 Gbit Ethernet, less its overhead
_BYTES = {"bf16": 2, "fp32": 4}
QUANTISED_BYTES = {"nf4": 4.127 / 8, "int8": 1.0}
_BUDGETS = (2048, 1024, 512)
_FULL = 0.85
_RUNTIME_GB = 0.45


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide memory and time."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linear_weights: int
    all_weights: int
    adapter_weights: int
    whole_weights: int = 0
    whole_linear_weights: int = 0
    head_trained: bool = False


def shape(model: PreTrainedModel, *, rank: int, targets: str | tuple[str, ...]) -> Shape:
    """The sizes of a model without an adapter (its skeleton will do), with a LoRA adapter of `rank` on `targets`."""
    config, head = model.config, model.get_output_embeddings()
    linears = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    adapted = [w for n, w in linears.items() if targets == "all-linear" or n.rsplit(".", 1)[-1] in targets]
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        linear_weights=sum(w.numel() for w in linears.values()),
        all_weights=sum(p.numel() for p in model.parameters()),
        adapter_weights=rank * sum(sum(w.shape) for w in adapted),
    )


@dataclass(frozen=True)
class Load:
    """The sizes of a data set that do: tokens as computed, of the longest row, and supervised."""

    computed_tokens: int
    real_tokens: int
    supervised_tokens: int
    longest: int
    epochs: float
    steps: int


@dataclass(frozen=True)
class Held:
    """How the model is kept: the number format, the bits of its frozen linear layers, what backward passes keep."""

    dtype: str
    quantize: str = "none"
    checkpointing: str = "none"


def plan(
    shape: Shape,
    load: Load,
    *,
    dtype: str,
    gflops: float,
    memory_gb: float,
    device: str,
    tokens: int,
    quantize: str = "none",
    weights_per_second: float = math.inf,
) -> dict[str, Any]:
    """`plan.json`: choices with their reasons, memory and speed as predicted; measurements are added afterwards.

    `weights_per_second` is how fast a quantised weight becomes a full one.
    """
    budget, held = _fitting(shape, load, Held(dtype, quantize), memory_gb, tokens)
    products = load.computed_tokens * _flops_per_token(shape, load, held) / (gflops * 1e9 * EFFICIENCY)
    batches = max(load.steps, load.computed_tokens / budget)
    passes = 3 if held.checkpointing == "layer" else 2
    seconds = load.epochs * (products + batches * passes * shape.linear_weights / weights_per_second)
    return {
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "micro_batch_tokens": budget,
        "checkpointing": held.checkpointing,
        "attention": "rows behind a shared prefix, padded products for short rows, flash for long ones",
        "memory_gb": {"predicted": round(_memory_gb(shape, budget, held), 2), "measured": None},
        "tokens_per_second": {"predicted": round(load.real_tokens * load.epochs / seconds, 1), "measured": None},
        "seconds": {"predicted": round(seconds, 1), "measured": None},
        "why": [
            f"{dtype}: the faster number format in this machine's own measurement ({gflops:,.0f} GFLOP/s)",
            *_why_memory(shape, budget, held, memory_gb),
            "the tokens that all rows begin with are computed once a batch",
        ],
    }


def spared_gb(shape: Shape, dtype: str, size: int) -> float:
    """What each of `size` processes spares where the frozen layers are spread over all, one of them gathered at a
    time."""
    return shape.linear_weights * _BYTES[dtype] / 1e9 * (1 - 1 / size) * (1 - 1 / shape.layers)


def spread(
    plan: dict[str, Any], *, shape: Shape, steps: int, size: int, beside: int, shard: str, memory_gb: float
) -> dict[str, Any]:
    """The plan for `size` processes, `beside` of them on a machine (or each with a GPU of its own).

    A base that does not fit on each process's GPU is spread over all of them. On CPUs it is not, unless that is asked
    for: there the buffers of gathering took more than spreading spared (docs/scale.md). Processes on one CPU share its
    cores, so there only machines add speed. Every step sums the gradient over a link of `LINK_GB_PER_SECOND`; what a
    base that is spread sends for every layer is left out.
    """
    own_gb = memory_gb if plan["device"] == "cuda" else memory_gb / beside
    whole_gb = plan["memory_gb"]["predicted"]
    sharded = size > 1 and (shard == "always" or (shard == "auto" and plan["device"] == "cuda" and whole_gb > own_gb))
    less_gb = spared_gb(shape, plan["dtype"], size) if sharded else 0.0
    faster = size if plan["device"] == "cuda" else max(1, size // beside)
    before = plan["seconds"]["predicted"]
    seconds = before / faster + steps * sum_seconds(
        shape.adapter_weights + shape.whole_weights, size, LINK_GB_PER_SECOND
    )
    speed = plan["tokens_per_second"]["predicted"] * (before / seconds if before else faster)
    why = f"each of {size} processes holds the base" if not sharded else f"the base is spread over {size} processes"
    return plan | {
        "world_size": size,
        "sharded": sharded,
        "memory_gb": plan["memory_gb"] | {"predicted": round(whole_gb - less_gb, 2)},
        "tokens_per_second": plan["tokens_per_second"] | {"predicted": round(speed, 1)},
        "seconds": plan["seconds"] | {"predicted": round(seconds, 1)},
        "why": plan["why"] + ([f"{why}: {whole_gb:.1f} GB of {own_gb:.0f} GB"] if size > 1 else []),
    }


def learning_rate(method: str, hidden: int, *, tune: str = "lora") -> float:
    """The peak rate of a stage that names none, on a base of width `hidden`.

    The best rate of Adam falls as the width grows (for hidden matrices as its inverse: Yang et al. 2022, arXiv
    2203.03466). The line is laid through 1e-3 at width 576, and narrower bases get no more. Raw text gets half: every
    token of it pulls, and what a base forgets grows with the rate. Every weight (`tune: full`) gets a tenth of LoRA's
    ("LoRA Without Regret", 2025).
    """
    share = (0.5 if method == "cpt" else 1.0) * (0.1 if tune == "full" else 1.0)
    return float(f"{share * min(1e-3, 1e-3 * 576 / hidden):.2g}")


_TOTALS = ("seconds", "memory_gb", "tokens_per_second")
_OF_STAGE = ("stage", "rows", "tokens", "steps", "learning_rate", "micro_batch_tokens", *_TOTALS)


def joined(plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plan of a training from those of its stages: what they share and their totals, then a list of the stages.

    Seconds add up, memory is the most of any stage, and tokens per second are all tokens over all seconds.
    """
    seconds = sum(p["tokens"] / p["tokens_per_second"]["predicted"] for p in plans)
    rates = [f"{p['stage']}: peak learning rate {p['learning_rate']:g}" for p in plans]
    whole = {k: v for k, v in plans[0].items() if k not in _OF_STAGE or k in ("micro_batch_tokens", *_TOTALS)}
    return whole | {
        "micro_batch_tokens": max(p["micro_batch_tokens"] for p in plans),
        "memory_gb": {"predicted": max(p["memory_gb"]["predicted"] for p in plans), "measured": None},
        "tokens_per_second": {"predicted": round(sum(p["tokens"] for p in plans) / seconds, 1), "measured": None},
        "seconds": {"predicted": round(seconds, 1), "measured": None},
        "why": list(dict.fromkeys([*(w for p in plans for w in p["why"]), *rates])),
        "stages": [{k: p[k] for k in _OF_STAGE} for p in plans],
    }


def measured(plan: dict[str, Any], metrics: Sequence[dict[str, Any]], *, memory_gb: float) -> dict[str, Any]:
    """The plan with what the lines of `metrics.jsonl` and the peak memory say, beside what was predicted."""
    stages = [_measured(s, [m for m in metrics if m["stage"] == s["stage"]]) for s in plan["stages"]]
    bits = {s["stage"]: s["bits_per_byte"] for s in stages if "bits_per_byte" in s}
    steps = [m for m in metrics if "loss" in m]
    out = _measured(plan, steps) | {"stages": stages} | ({"bits_per_byte": bits} if bits else {})
    return out | {"memory_gb": plan["memory_gb"] | {"measured": round(memory_gb, 2)}}


def _measured(plan: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = [m for m in metrics if "loss" in m]
    seconds, tokens = sum(m["seconds"] for m in steps), sum(m["tokens"] for m in steps)
    found = {"seconds": round(seconds, 2), "tokens_per_second": round(tokens / max(seconds, 1e-4), 2)}
    bits = [m["bits_per_byte"] for m in metrics if "bits_per_byte" in m]
    before_after = {"bits_per_byte": {"before": bits[0], "after": bits[-1]}} if bits else {}
    return plan | {k: plan[k] | {"measured": v} for k, v in found.items()} | before_after


def _flops_per_token(shape: Shape, load: Load, held: Held) -> float:
    per_logit = 8 if shape.head_trained else 4
    head = per_logit * shape.vocabulary * shape.hidden * load.supervised_tokens / load.computed_tokens
    attention = 2 * shape.layers * shape.heads * shape.head_dim * load.longest / 2
    passes = 3 if held.checkpointing == "layer" else 2
    trained = (passes + 1) * (2 * shape.adapter_weights + attention) + 2 * shape.whole_linear_weights
    return 2 * passes * shape.linear_weights + trained + head


def _fitting(shape: Shape, load: Load, held: Held, memory_gb: float, tokens: int) -> tuple[int, Held]:
    """Tokens at once, and how the model is kept: comfortably, or else so that it fits.

    Every micro-batch makes all weights of a quantised base full again, so there more tokens are worth more memory.
    """
    budgets = [tokens] if tokens else [max(budget, load.longest) for budget in _BUDGETS]
    comfortable, full = memory_gb / _shares(held), memory_gb * _FULL
    layer = replace(held, checkpointing="layer")
    choices = [
        *((budget, held, comfortable) for budget in budgets),
        (budgets[-1], held, full),
        *((budget, layer, full) for budget in budgets),
    ]
    for budget, kept, limit in choices:
        if _memory_gb(shape, budget, kept) <= limit:
            return budget, kept
    least = _memory_gb(shape, budgets[-1], layer)
    raise ResourceError(
        f"training needs about {least:.1f} GB of memory, {full:.1f} of {memory_gb:.1f} GB may be used",
        where=f"{budgets[-1]:,} tokens at once",
        fix="set train.quantize to nf4, use shorter rows, a smaller base or a larger machine",
    )


def _shares(held: Held) -> int:
    return 4 if held.quantize == "none" else 2


def _why_memory(shape: Shape, budget: int, held: Held, memory_gb: float) -> list[str]:
    plain = replace(held, checkpointing="none")
    share = {4: "a quarter", 2: "half"}[_shares(held)]
    comfortable = _memory_gb(shape, budget, held) <= memory_gb / _shares(held)
    room = f"{share} of {memory_gb:.0f} GB" if comfortable else f"{memory_gb:.0f} GB"
    more = "more brings no speed" if budget >= _BUDGETS[0] else "more would not"
    reasons = [f"{budget:,} tokens at once: fits in {room}; {more}"]
    if held.checkpointing == "layer":
        needed = _memory_gb(shape, budget, plain)
        reasons.append(
            f"activation checkpointing of every layer: without it {needed:.1f} GB would be needed, of which "
            f"{memory_gb:.1f} GB are there; a third pass through the layers buys the difference"
        )
    else:
        reasons.append("no activation checkpointing: it would add half of the forward work, and memory suffices")
    if held.quantize != "none":
        reasons.append(f"{held.quantize}: the frozen linear layers in {QUANTISED_BYTES[held.quantize] * 8:.3g} bits")
    return reasons


def _memory_gb(shape: Shape, tokens: int, held: Held) -> float:
    """Weights, what is trained with gradient, moments and best values, and what a micro-batch keeps for going back.

    A weight trained whole is its own master in float32; in bf16 it has one, and for a while a gradient in bf16. Beside
    an adapter its frozen values are kept.
    """
    size = _BYTES[held.dtype]
    weights = float(shape.all_weights * size + shape.adapter_weights * 4 * 5)
    weights += shape.whole_weights * (4 * 4 if held.dtype == "fp32" else 4 * 5 + size)
    weights += shape.whole_weights * size if shape.adapter_weights else 0
    if held.quantize != "none":
        weights -= shape.linear_weights * (size - QUANTISED_BYTES[held.quantize])
        weights += 2 * shape.hidden * shape.intermediate * size  # the one full weight: gate and up side by side
    attention = shape.heads * shape.head_dim
    kept = 6 * shape.hidden + 4 * attention + 2 * shape.kv_heads * shape.head_dim + 5 * shape.intermediate
    layers = shape.layers * kept if held.checkpointing == "none" else shape.layers * shape.hidden + kept
    head = min(tokens, 1024) * shape.vocabulary * 4 * 2
    return (weights + tokens * layers * size + head) / 1e9 + _RUNTIME_GB
