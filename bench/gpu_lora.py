"""LoRA on a GPU: an 8B Llama-shaped model with random weights, rows of 4,096 tokens, beside TRL + PEFT in one run.

    python bench/gpu_lora.py [--pairs 3] [--steps 20] [--layers 32] [--hidden 4096]

Random weights of the exact shape have the speed of real ones. Both sides get bf16 weights on the GPU, rank 16 on all
linear layers, every token supervised, one row a step; TRL is tried with and without gradient checkpointing at batch 1
and 2 and keeps its best. Without a CUDA device the script says so and ends with `skipped`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sides
from metier.models import attention, block, lora
from metier.text.batches import Row
from metier.training import loop

TOKENS, VOCABULARY, WARM_UP = 4096, 128_256, 5


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--pairs", type=int, default=3)
    words.add_argument("--steps", type=int, default=20)
    words.add_argument("--layers", type=int, default=32)
    words.add_argument("--hidden", type=int, default=4096)
    words.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    words.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    words.add_argument("--checkpointing", type=int, default=0, help=argparse.SUPPRESS)
    given = words.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"what": "LoRA on a GPU, 8B", "skipped": "no CUDA device on this machine"}))
    elif given.worker:
        print(json.dumps(_ours(given) if given.worker == "ours" else _trl(given)))
    else:
        _compare(given)


def _compare(given: argparse.Namespace) -> None:
    tried = {
        (batch, kept): _run(given, "trl", 3, batch, kept).get("tokens_per_second", 0.0)
        for batch in (1, 2)
        for kept in (0, 1)
    }
    best = max(tried, key=lambda k: tried[k])
    found = []
    for _ in range(given.pairs):
        found.append({"ours": _run(given, "ours", given.steps), "trl+peft": _run(given, "trl", given.steps, *best)})
        print(found[-1], file=sys.stderr)
    speeds = {side: [f[side]["tokens_per_second"] for f in found] for side in ("ours", "trl+peft")}
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["trl+peft"], strict=True)]
    print(
        json.dumps(
            {
                "what": f"LoRA rank 16, {given.layers} layers of {given.hidden}, rows of {TOKENS} tokens, bf16",
                "ours": statistics.median(speeds["ours"]),
                "peers": {"trl+peft": statistics.median(speeds["trl+peft"])},
                "ratio": {"trl+peft": round(statistics.median(ratios), 3)},
                "unit": "tokens/s",
                "pairs": found,
                "trl_by_batch_and_checkpointing": {f"{b}, {c}": v for (b, c), v in tried.items()},
                "machine": f"{torch.cuda.get_device_name()}, {sides.machine_name()}",
            }
        )
    )


def _run(
    given: argparse.Namespace, worker: str, steps: int, batch: int = 1, checkpointing: int = 0
) -> dict[str, float]:
    """What a worker measured; nothing where it ran out of memory."""
    words = {"--worker": worker, "--steps": steps, "--batch": batch, "--checkpointing": checkpointing}
    words |= {"--layers": given.layers, "--hidden": given.hidden}
    argv = [sys.executable, __file__, *(str(w) for pair in words.items() for w in pair)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-800:], file=sys.stderr)
        return {}
    return dict(json.loads(done.stdout.strip().split("\n")[-1]))


def _model(given: argparse.Namespace, attention_name: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 7 // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 128,
        num_key_value_heads=max(1, given.hidden // 512),
        head_dim=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention_name)
    return model.requires_grad_(False)


def _rows(steps: int) -> list[Row]:
    numbers = np.random.Generator(np.random.PCG64(0))
    learnt = np.ones(TOKENS, dtype=bool)
    learnt[0] = False
    return [Row(str(i), numbers.integers(0, VOCABULARY, TOKENS), learnt) for i in range(steps)]


def _ours(given: argparse.Namespace) -> dict[str, float]:
    model = _model(given, attention.NAME).eval()
    block.install(model)
    lora.attach(model, rank=sides.RANK, alpha=sides.ALPHA, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    steps = given.steps + WARM_UP
    schedule = sides.Constant(steps, 1, 1e-4, 0.03, 0.0, 1.0, 0, TOKENS)
    results = loop.steps(model, flat, _rows(steps), 0, schedule)
    for _ in range(WARM_UP):
        next(results)
    torch.cuda.synchronize()
    start = time.perf_counter()
    last = list(results)[-1]
    torch.cuda.synchronize()
    return _measured(given.steps * TOKENS, time.perf_counter() - start, last.loss)


def _trl(given: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    steps = given.steps + WARM_UP
    rows = [{"input_ids": r.ids.tolist(), "labels": [-100, *r.ids.tolist()[1:]]} for r in _rows(steps * given.batch)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=_model(given, "sdpa"),
            processing_class=_tokenizer(),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=given.batch,
                gradient_checkpointing=bool(given.checkpointing),
                bf16=True,
                max_length=None,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        loss = trainer.train().training_loss
    return _measured(given.steps * given.batch * TOKENS, times[-1] - times[WARM_UP], loss)


def _tokenizer() -> Any:
    """The trainer wants one; rows are token ids already."""
    from transformers import AutoTokenizer

    from metier.models import load

    return AutoTokenizer.from_pretrained(load.resolve("smollm2-135m", Path()).folder)


def _measured(tokens: int, seconds: float, loss: float) -> dict[str, float]:
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss": round(loss, 4),
    }


if __name__ == "__main__":
    main()
