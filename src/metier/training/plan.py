"""What training will take on this machine, said before the first step; pure arithmetic over shapes and speeds.

The operation counts are those of LoRA on frozen linear layers: 4 per weight and token (forward, and the gradient of
the input), 6 per adapter weight, and the head on supervised tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EFFICIENCY = 0.55
_BYTES = {"bf16": 2, "fp32": 4}
_SMALLEST, _LARGEST = 512, 2048
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


def shape(settings: dict[str, Any], *, rank: int, targets: str | tuple[str, ...]) -> Shape:
    """The sizes that a model's `config.json` implies, with a LoRA adapter of `rank` on `targets`."""
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    head_dim = settings.get("head_dim") or hidden // heads
    linears = {
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, kv_heads * head_dim),
        "v_proj": (hidden, kv_heads * head_dim),
        "o_proj": (heads * head_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    layers = settings["num_hidden_layers"]
    linear_weights = layers * sum(i * o for i, o in linears.values())
    tables = 1 if settings.get("tie_word_embeddings") else 2
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=settings["vocab_size"],
        linear_weights=linear_weights,
        all_weights=linear_weights + tables * settings["vocab_size"] * hidden + (2 * layers + 1) * hidden,
        adapter_weights=layers
        * rank
        * sum(i + o for name, (i, o) in linears.items() if targets == "all-linear" or name in targets),
    )


@dataclass(frozen=True)
class Load:
    """The sizes of a data set that do: tokens as computed, of the longest row, and supervised."""

    computed_tokens: int
    real_tokens: int
    supervised_tokens: int
    longest: int
    epochs: float


def plan(
    shape: Shape, load: Load, *, dtype: str, gflops: float, memory_gb: float, device: str, tokens: int
) -> dict[str, Any]:
    """`plan.json`: choices with their reasons, memory and speed as predicted; measurements are added afterwards."""
    budget = tokens or _token_budget(shape, load, dtype, memory_gb)
    seconds = load.computed_tokens * load.epochs * _flops_per_token(shape, load) / (gflops * 1e9 * EFFICIENCY)
    return {
        "device": device,
        "dtype": dtype,
        "micro_batch_tokens": budget,
        "checkpointing": "none",
        "attention": "rows behind a shared prefix, padded products for short rows, flash for long ones",
        "memory_gb": {"predicted": round(_memory_gb(shape, budget, dtype), 2), "measured": None},
        "tokens_per_second": {"predicted": round(load.real_tokens * load.epochs / seconds, 1), "measured": None},
        "seconds": {"predicted": round(seconds, 1), "measured": None},
        "why": [
            f"{dtype}: the faster number format in this machine's own measurement ({gflops:,.0f} GFLOP/s)",
            f"{budget:,} tokens at once: fits in a quarter of {memory_gb:.0f} GB; more brings no speed",
            "no activation checkpointing: it would add half of the forward work, and memory suffices",
            "the tokens that all rows begin with are computed once a batch",
        ],
    }


def measured(plan: dict[str, Any], *, memory_gb: float, tokens_per_second: float, seconds: float) -> dict[str, Any]:
    """The plan with what was measured beside what was predicted."""
    found = {"memory_gb": memory_gb, "tokens_per_second": tokens_per_second, "seconds": seconds}
    return plan | {k: plan[k] | {"measured": round(v, 2)} for k, v in found.items()}


def _flops_per_token(shape: Shape, load: Load) -> float:
    head = 4 * shape.vocabulary * shape.hidden * load.supervised_tokens / load.computed_tokens
    attention = 6 * shape.layers * shape.heads * shape.head_dim * load.longest / 2
    return 4 * shape.linear_weights + 6 * shape.adapter_weights + head + attention


def _token_budget(shape: Shape, load: Load, dtype: str, memory_gb: float) -> int:
    budget = _LARGEST
    while budget > _SMALLEST and _memory_gb(shape, budget, dtype) > memory_gb / 4:
        budget //= 2
    return max(budget, load.longest)


def _memory_gb(shape: Shape, tokens: int, dtype: str) -> float:
    """Weights, adapter with gradient and moments, and what one micro-batch keeps for its backward pass."""
    size = _BYTES[dtype]
    weights = shape.all_weights * size + shape.adapter_weights * 4 * 5
    attention = shape.heads * shape.head_dim
    kept = 6 * shape.hidden + 4 * attention + 2 * shape.kv_heads * shape.head_dim + 5 * shape.intermediate
    head = min(tokens, 1024) * shape.vocabulary * 4 * 2
    return (weights + tokens * shape.layers * kept * size + head) / 1e9 + _RUNTIME_GB
