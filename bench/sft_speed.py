"""Training speed beside TRL + PEFT: same rows, same base, same adapter shape, alternating in one run.

    python bench/sft_speed.py [--pairs 3] [--steps 6]

Every measurement is a process of its own, so that no allocator setting or patched class leaks from one to the other.
TRL gets a bf16 base, no gradient checkpointing, a loss on the answer only, and the best of the batch sizes 1, 2, 4, 8
(found first, in the same run); all accumulate to 16 rows a step. Tokens are real tokens of the rows, padding never
counts, and the first two steps of each process are warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS_A_STEP, WARM_UP = 16, 2


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--pairs", type=int, default=3)
    words.add_argument("--steps", type=int, default=6)
    words.add_argument("--worker", choices=("ours", "trl"))
    words.add_argument("--batch", type=int, default=1)
    words.add_argument("--data", type=Path)
    given = words.parse_args()
    if given.worker:
        measure = _ours if given.worker == "ours" else _trl
        print(json.dumps(measure(given.data, given.steps + WARM_UP, given.batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        import metier

        metier.build(ROOT / "recipes" / "licence-clerk", runs=folder)
        _compare(Path(folder) / "licence-clerk" / "data", given.pairs, given.steps)


def _compare(data: Path, pairs: int, steps: int) -> None:
    sweep = {batch: _run("trl", data, 2, batch)["tokens_per_second"] for batch in (1, 2, 4, 8)}
    best = max(sweep, key=lambda b: sweep[b])
    print(f"TRL by batch size: {sweep}, best {best}", file=sys.stderr)
    found = []
    for _ in range(pairs):
        ours, theirs = _run("ours", data, steps, 1), _run("trl", data, steps, best)
        found.append((ours, theirs))
        print(f"ours {ours}, TRL {theirs}", file=sys.stderr)
    ratios = [o["tokens_per_second"] / t["tokens_per_second"] for o, t in found]
    middle = {
        side: statistics.median(f[i]["tokens_per_second"] for f in found) for i, side in enumerate(("ours", "trl"))
    }
    print(
        json.dumps(
            {
                "what": "LoRA SFT rank 16 on all linear layers, SmolLM2-135M, licence-clerk rows",
                "ours": middle["ours"],
                "peers": {"trl+peft": middle["trl"]},
                "ratio": {"trl+peft": round(statistics.median(ratios), 2)},
                "unit": "real tokens/s",
                "pairs": [{"ours": o, "trl+peft": t} for o, t in found],
                "trl_by_batch": sweep,
                "machine": f"{platform.machine()}, {_cpu()}",
            }
        )
    )


def _run(worker: str, data: Path, steps: int, batch: int) -> dict[str, float]:
    argv = [
        sys.executable,
        __file__,
        "--worker",
        worker,
        "--data",
        str(data),
        "--steps",
        str(steps),
        "--batch",
        str(batch),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.strip().split("\n")[-1]))


def _ours(data: Path, steps: int, _: int) -> dict[str, float]:
    import torch

    from metier import machine, records
    from metier.models import load, lora
    from metier.text import batches
    from metier.text.batches import Row
    from metier.text.chat import Renderer
    from metier.training import loop

    machine.prepare()
    base = load.resolve("smollm2-135m", data)
    renderer = Renderer(base.folder)
    rows = [Row.of(e.id, renderer.render(e.messages)) for e in records.examples(data / "train.jsonl")]
    model = load.model(base, dtype=torch.bfloat16, device=torch.device("cpu"))
    lora.attach(model, rank=16, alpha=32, targets="all-linear", seed=0)
    flat = loop.Flat(lora.parameters(model))
    schedule = loop.Schedule(steps, ROWS_A_STEP, 1e-3, 0.03, 0.0, 1.0, 0, 4096)
    results = list(loop.steps(model, flat, rows, batches.shared_prefix(rows), schedule))[WARM_UP:]
    return {
        "tokens_per_second": round(sum(r.tokens for r in results) / sum(r.seconds for r in results), 1),
        "loss": round(results[-1].loss, 3),
        "memory_gb": round(machine.peak_memory_gb(), 2),
    }


def _trl(data: Path, steps: int, batch: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from metier import machine, records
    from metier.models import load
    from metier.text import batches
    from metier.text.chat import Renderer

    torch.set_num_threads(machine.cores())
    base = load.resolve("smollm2-135m", data)
    renderer = Renderer(base.folder)
    examples = records.examples(data / "train.jsonl")
    chosen = [examples[i] for s in range(steps) for i in batches.rows_of_step(len(examples), ROWS_A_STEP, 0, s)]
    tokens = [renderer.render(e.messages).ids.size for e in chosen]
    chats = [[{"role": m.role, "content": m.content} for m in e.messages] for e in chosen]
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16),
            processing_class=AutoTokenizer.from_pretrained(base.folder),
            train_dataset=Dataset.from_list([{"prompt": c[:-1], "completion": c[-1:]} for c in chats]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=ROWS_A_STEP // batch,
                learning_rate=1e-3,
                gradient_checkpointing=False,
                bf16=True,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                shuffle_dataset=False,
                dataset_num_proc=1,
                disable_tqdm=True,
            ),
        )
        trainer.train()
    rows = tokens[WARM_UP * ROWS_A_STEP :]
    return {
        "tokens_per_second": round(sum(rows) / (times[-1] - times[WARM_UP]), 1),
        "loss": round(losses[-1], 3),
        "memory_gb": round(machine.peak_memory_gb(), 2),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
