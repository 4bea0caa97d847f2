"""Peak memory of training a LoRA adapter on an 8B-shaped base in 4 bits.

    python bench/qlora_8b.py [--quantize nf4] [--memory-gb 12] [--layers 32] [--vocabulary 128256]

Writes a model with the sizes of Llama 3.1 8B and random bf16 weights into a temporary folder, a shard a layer (16 GB of
disk; the layers hold the same numbers, on which neither memory nor time depends), then loads, plans and trains three
steps of 256 tokens as `metier train` does, in a process of its own. The plan is told how much memory there is.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INNER, HEADS, KV_HEADS = 4096, 14336, 32, 8
STEPS, ROWS, ROW_TOKENS = 3, 4, 64
RANK = 16


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quantize", choices=("none", "nf4", "int8"), default="nf4")
    words.add_argument("--memory-gb", type=float, default=12.0)
    words.add_argument("--layers", type=int, default=32)
    words.add_argument("--vocabulary", type=int, default=128256)
    words.add_argument("--threads", type=int, default=0, help="0 uses every core")
    words.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        print(json.dumps(_train(given.worker, given.quantize, given.memory_gb, given.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), given.layers, given.vocabulary)
        argv = [sys.executable, __file__, "--worker", folder, *sys.argv[1:]]
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    found = json.loads(done.stdout.strip().split("\n")[-1])
    print(
        json.dumps(
            {
                "what": f"peak resident memory, LoRA rank {RANK} on a {found['weights'] / 1e9:.2f} B Llama in "
                f"{given.quantize}, {STEPS} steps of {ROWS * ROW_TOKENS} tokens",
                "ours": found["memory_gb"]["measured"],
                "peers": {},
                "ratio": {},
                "unit": "GB",
                "pairs": [],
                "machine": f"{platform.machine()}, {found.pop('cores')} cores",
                **found,
            }
        )
    )


def _write(folder: Path, layers: int, vocabulary: int) -> None:
    """The model's folder: config, shards and their index."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    narrow = HIDDEN * KV_HEADS // HEADS
    sizes = {"q": (HIDDEN, HIDDEN), "k": (narrow, HIDDEN), "v": (narrow, HIDDEN), "o": (HIDDEN, HIDDEN)}
    linears = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
    linears |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}

    def drawn(size: tuple[int, int]) -> Any:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02)

    torch.manual_seed(0)
    layer = {f"{name}.weight": drawn(size) for name, size in linears.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    layer |= {f"{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
    places: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
        places.update(dict.fromkeys(tensors, f"{name}.safetensors"))

    for number in range(layers):
        shard(f"layer-{number:02}", {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()})
    shard("norm", {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shard(name.split(".")[-2], {name: drawn((vocabulary, HIDDEN))})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _train(folder: Path, quantize: Any, memory_gb: float, threads: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from metier import machine
    from metier.models import load, lora, quant, recompute
    from metier.text.batches import Row
    from metier.training import loop
    from metier.training.plan import Load, plan, shape

    machine.prepare(threads)
    device = machine.device("cpu")
    dtype = machine.dtype("auto", device)
    settings = json.loads((folder / "config.json").read_bytes())
    base = load.Base("8b-shaped", folder, sha256="", license="unknown", source="random")
    sizes = shape(load.skeleton(base), rank=RANK, targets="all-linear")
    tokens = STEPS * ROWS * ROW_TOKENS
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    chosen = plan(
        sizes,
        Load(tokens, tokens, tokens // 2, ROW_TOKENS, 1, STEPS),
        dtype=name,
        gflops=machine.gflops()[name],
        memory_gb=memory_gb,
        device="cpu",
        tokens=0,
        quantize=quantize,
        weights_per_second=float("inf") if quantize == "none" else quant.measured_speed(quantize, dtype, device),
    )
    began = time.perf_counter()
    model = load.model(base, dtype=dtype, device=device, quantize=quantize)
    loading = time.perf_counter() - began
    after_loading = machine.peak_memory_gb()
    print(f"loaded in {loading:.0f} s, {after_loading:.2f} GB at most", file=sys.stderr)
    lora.attach(model, rank=RANK, alpha=32, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    if chosen["checkpointing"] == "layer":
        recompute.layers(model)
    random = np.random.default_rng(0)
    supervised = np.arange(ROW_TOKENS) >= ROW_TOKENS // 2
    rows = [
        Row(f"r{n}", random.integers(0, settings["vocab_size"], ROW_TOKENS), supervised) for n in range(STEPS * ROWS)
    ]
    schedule = loop.Schedule(STEPS, ROWS, 1e-4, 0.0, 0.0, 1.0, 0, chosen["micro_batch_tokens"])
    results = []
    for result in loop.steps(model, flat, rows, 0, schedule):
        results.append(result)
        print(f"step {result.step}: {result.seconds:.0f} s, {machine.peak_memory_gb():.2f} GB", file=sys.stderr)
    seconds = [round(r.seconds, 1) for r in results]
    return {
        "memory_gb": chosen["memory_gb"] | {"measured": round(machine.peak_memory_gb(), 2)},
        "memory_after_loading_gb": round(after_loading, 2),
        "seconds": {"loading": round(loading, 1), "steps": seconds, "predicted": chosen["seconds"]["predicted"]},
        "tokens_per_second": round(sum(r.tokens for r in results) / sum(seconds), 1),
        "losses": [round(r.loss, 4) for r in results],
        "weights": sizes.all_weights,
        "plan": {key: chosen[key] for key in ("dtype", "quantize", "micro_batch_tokens", "checkpointing", "why")},
        "threads": torch.get_num_threads(),
        "cores": machine.cores(),
    }


if __name__ == "__main__":
    main()
