"""What training will take on this machine, said before the first step; pure arithmetic over shapes and speeds.

The operation counts are those of LoRA on frozen linear layers: 4 per weight and token (forward, and the gradient of
the input), 6 per adapter weight, and the head on supervised tokens only. A weight that is itself trained takes 6, and
a trained head 8, because its logits are made twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

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
    per_logit = 8 if shape.head_trained else 4
    head = per_logit * shape.vocabulary * shape.hidden * load.supervised_tokens / load.computed_tokens
    attention = 6 * shape.layers * shape.heads * shape.head_dim * load.longest / 2
    trained = 6 * shape.adapter_weights + 2 * shape.whole_linear_weights
    return 4 * shape.linear_weights + trained + head + attention


def _token_budget(shape: Shape, load: Load, dtype: str, memory_gb: float) -> int:
    budget = _LARGEST
    while budget > _SMALLEST and _memory_gb(shape, budget, dtype) > memory_gb / 4:
        budget //= 2
    return max(budget, load.longest)


def _memory_gb(shape: Shape, tokens: int, dtype: str) -> float:
    """Weights, what is trained with gradient, moments and best values, and what a micro-batch keeps for going back.

    A weight trained whole is its own master in float32; in bf16 it has one, and for a while a gradient in bf16. Beside
    an adapter its frozen values are kept.
    """
    size = _BYTES[dtype]
    weights = shape.all_weights * size + shape.adapter_weights * 4 * 5
    weights += shape.whole_weights * (4 * 4 if dtype == "fp32" else 4 * 5 + size)
    weights += shape.whole_weights * size if shape.adapter_weights else 0
    attention = shape.heads * shape.head_dim
    kept = 6 * shape.hidden + 4 * attention + 2 * shape.kv_heads * shape.head_dim + 5 * shape.intermediate
    head = min(tokens, 1024) * shape.vocabulary * 4 * 2
    return (weights + tokens * shape.layers * kept * size + head) / 1e9 + _RUNTIME_GB
