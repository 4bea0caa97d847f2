"""The plan: counts by hand, monotone predictions, and the token budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import write_base
from metier.errors import ResourceError
from metier.models import load, lora
from metier.training.plan import Load, joined, learning_rate, measured, plan, shape

CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
DATA = Load(computed_tokens=50_000, real_tokens=80_000, supervised_tokens=20_000, longest=300, epochs=2, steps=63)


# Llama 3.1 8B
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@cache
def skeleton(large: bool = False) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(LARGE if large else CONFIG)))


def made(large: bool = False, **changes: object) -> dict:
    facts = {"dtype": "bf16", "gflops": 300.0, "memory_gb": 24.0, "device": "cpu", "tokens": 0} | changes
    return plan(shape(skeleton(large), rank=16, targets="all-linear"), DATA, **facts)


def test_a_quantised_base_takes_what_its_bits_say() -> None:
    """6.98 G linear weights of 2 bytes, or of 4.127 bits and two of 4096 · 14336 full."""
    linear = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert shape(skeleton(True), rank=16, targets="all-linear").linear_weights == linear
    whole, few = (made(True, memory_gb=500.0, tokens=2048, quantize=q)["memory_gb"] for q in ("none", "nf4"))
    saved = linear * (2 - 4.127 / 8) - 2 * 4096 * 14336 * 2
    assert whole["predicted"] - few["predicted"] == pytest.approx(saved / 1e9, abs=0.02)


@pytest.mark.parametrize(
    ("memory_gb", "quantize", "tokens", "checkpointing"),
    [
        (200.0, "none", 2048, "none"),
        (64.0, "nf4", 2048, "none"),  # half of the memory is for a quantised base
        (16.0, "nf4", 512, "none"),
        (12.0, "nf4", 2048, "layer"),
        (24.0, "none", 2048, "layer"),
    ],
)
def test_layers_are_recomputed_only_where_memory_would_not_do(
    memory_gb: float, quantize: str, tokens: int, checkpointing: str
) -> None:
    found = made(True, memory_gb=memory_gb, quantize=quantize)
    assert (found["micro_batch_tokens"], found["checkpointing"]) == (tokens, checkpointing)
    assert found["memory_gb"]["predicted"] <= memory_gb * 0.85 and found["quantize"] == quantize
    reason = next(line for line in found["why"] if "checkpointing" in line)
    assert reason.startswith("activation" if checkpointing == "layer" else "no activation")


def test_what_fits_in_no_way_is_refused_with_the_way_out() -> None:
    with pytest.raises(ResourceError) as caught:
        made(True, memory_gb=12.0)
    assert "nf4" in caught.value.fix and "10.2 of 12.0 GB" in caught.value.what


def test_time_counts_recomputation_and_making_weights_full() -> None:
    plain = made(True, memory_gb=200.0)["seconds"]["predicted"]
    # 63 batches in each of 2 epochs, two passes, 6.98 G weights at 1 G a second: 1,759 s more
    slower = made(True, memory_gb=200.0, quantize="nf4", weights_per_second=1e9)["seconds"]["predicted"]
    assert slower - plain == pytest.approx(63 * 2 * 2 * 6.979321856, abs=1)
    assert 1.4 < made(True, memory_gb=24.0)["seconds"]["predicted"] / plain < 1.5


def test_smollm2_has_the_weights_it_is_named_for() -> None:
    sizes = shape(skeleton(), rank=16, targets="all-linear")
    assert sizes.linear_weights == 106_168_320  # 30 · (576·576·2 + 576·192·2 + 576·1536·3)
    assert sizes.all_weights == 134_515_008
    assert sizes.adapter_weights == 30 * 16 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536))


@pytest.mark.parametrize("name", [*load.ARCHITECTURES, "untied", "biases"])
def test_the_shape_counts_what_loading_and_attaching_make(tmp_path: Path, name: str) -> None:
    base = load.resolve(str(write_base(tmp_path, name)), tmp_path)
    model = load.model(base, dtype=torch.float32, device=torch.device("cpu"))
    weights = sum(p.numel() for p in model.parameters())
    for targets in ("all-linear", ("down_proj", "dense_4h_to_h")):
        sizes = shape(load.skeleton(base), rank=4, targets=targets)
        assert sizes.all_weights == weights
        ours = load.model(base, dtype=torch.float32, device=torch.device("cpu"))
        known = {n.rsplit(".", 1)[-1] for n, _ in ours.named_modules()}
        chosen = targets if targets == "all-linear" else [t for t in targets if t in known]
        lora.attach(ours, rank=4, alpha=8, targets=chosen, seed=0)
        assert sizes.adapter_weights == sum(p.numel() for p in lora.parameters(ours))


def test_predictions_move_the_right_way() -> None:
    base = made()
    assert made(gflops=600.0)["seconds"]["predicted"] < base["seconds"]["predicted"]
    assert made(dtype="fp32")["memory_gb"]["predicted"] > base["memory_gb"]["predicted"]
    assert made(tokens=512)["memory_gb"]["predicted"] < base["memory_gb"]["predicted"]
    assert made(tokens=512)["micro_batch_tokens"] == 512
    assert made(memory_gb=2.0)["micro_batch_tokens"] < base["micro_batch_tokens"]


def test_the_budget_always_takes_the_longest_row() -> None:
    long = replace(DATA, longest=9000)
    out = plan(
        shape(skeleton(), rank=16, targets="all-linear"),
        long,
        dtype="bf16",
        gflops=300.0,
        memory_gb=4.0,
        device="cpu",
        tokens=0,
    )
    assert out["micro_batch_tokens"] == 9000


def test_measurements_stand_beside_predictions() -> None:
    stages = [
        made() | {"stage": "cpt", "rows": 3, "tokens": 160_000, "steps": 2, "learning_rate": 5e-4},
        made() | {"stage": "sft", "rows": 9, "tokens": 80_000, "steps": 1, "learning_rate": 1e-3},
    ]
    metrics = [
        {"step": 0, "stage": "cpt", "bits_per_byte": 1.5},
        {"step": 1, "stage": "cpt", "loss": 2.0, "tokens": 700, "seconds": 1.0},
        {"step": 2, "stage": "cpt", "loss": 1.0, "tokens": 300, "seconds": 1.0},
        {"step": 2, "stage": "cpt", "valid_loss": 1.0},
        {"step": 2, "stage": "cpt", "bits_per_byte": 1.25},
        {"step": 3, "stage": "sft", "loss": 1.0, "tokens": 100, "seconds": 2.0},
    ]
    whole = joined(stages)
    alone = joined(stages[1:])
    assert alone["tokens_per_second"] == stages[1]["tokens_per_second"]
    assert whole["tokens_per_second"]["predicted"] == pytest.approx(stages[0]["tokens_per_second"]["predicted"])
    assert "cpt: peak learning rate 0.0005" in whole["why"] and len(whole["why"]) == len(made()["why"]) + 2
    out = measured(whole, metrics, memory_gb=3.21)
    assert out["tokens_per_second"]["measured"] == 275.0 and out["seconds"]["measured"] == 4.0
    assert out["memory_gb"]["measured"] == 3.21 and out["bits_per_byte"] == {"cpt": {"before": 1.5, "after": 1.25}}
    first, second = out["stages"]
    assert (first["tokens_per_second"]["measured"], second["tokens_per_second"]["measured"]) == (500.0, 50.0)
    assert "bits_per_byte" in first and "bits_per_byte" not in second


def test_rates_fall_with_the_width() -> None:
    assert [learning_rate("sft", h) for h in (48, 576, 1152, 4096)] == [1e-3, 1e-3, 5e-4, 1.4e-4]
    assert learning_rate("cpt", 576) == 5e-4
    assert learning_rate("sft", 4096, tune="full") == 1.4e-5
