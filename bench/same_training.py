"""Is it the same training? Loss, gradient and a curve of losses beside TRL + PEFT, from the same adapter and rows.

    python bench/same_training.py [--steps 100] [--dtype fp32|bf16] [--data rows.jsonl]

Step 0 loss and the adapter's first gradient are taken from both sides on the same rows; then both train and every
step's loss is compared. TRL reads the adapter that Metier wrote. In fp32 the differences are rounding; in bf16 the
same figure between TRL at batch 1 and TRL at batch 4 says how large its own noise is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sides
from metier.models import load, lora
from metier.objectives import supervised
from metier.text import batches
from metier.training import loop
from sft_speed import ROOT


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--steps", type=int, default=100)
    words.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    words.add_argument("--data", type=Path)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = given.data
        if data is None:
            import metier

            metier.build(ROOT / "recipes" / "licence-clerk", runs=folder)
            data = Path(folder) / "licence-clerk" / "data" / "train.jsonl"
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
        print(json.dumps(_compare(sides.work(data), given.steps, dtype, Path(folder))))


def _compare(todo: sides.Work, steps: int, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    fresh = folder / "fresh"
    model = load.model(todo.base, dtype=dtype, device=torch.device("cpu"))
    lora.attach(model, rank=sides.RANK, alpha=sides.ALPHA, targets="all-linear", seed=0)
    lora.save(model, fresh, base=str(todo.base.folder))
    first = _first_step(todo, model, fresh, dtype)
    _, mine = sides.our_steps(todo, steps, sides.Constant, dtype=dtype)
    theirs = sides.trl(todo, steps, str(folder / "trl"), batch=4, dtype=dtype, adapter=fresh)
    curve = np.array([r.loss for r in mine]), np.array(theirs.losses)
    apart = np.abs(curve[0] - curve[1]) / curve[1]
    found = {**first, "curve_mean_relative": float(apart.mean()), "curve_largest_relative": float(apart.max())}
    if dtype == torch.bfloat16:
        again = sides.trl(todo, steps, str(folder / "again"), batch=1, dtype=dtype, adapter=fresh)
        own = np.abs(np.array(again.losses) - curve[1]) / curve[1]
        found |= {"trl_batch_1_against_4_mean_relative": float(own.mean())}
    return {
        "what": f"the same training as TRL + PEFT over {steps} steps, {str(dtype).removeprefix('torch.')}",
        "ours": found["curve_mean_relative"],
        "peers": {},
        "ratio": {},
        "unit": "mean relative difference of the losses",
        "pairs": [found],
        "last_losses": [float(c[-1]) for c in curve],
        "machine": sides.machine_name(),
    }


def _first_step(todo: sides.Work, model: Any, fresh: Path, dtype: torch.dtype) -> dict[str, float]:
    """Loss and gradient of the first step: ours packed, PEFT's row by row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = todo.of_step(0)
    weight = sum(int(r.supervised.sum()) for r in rows)
    total = 0.0
    for batch in batches.micro_batches(rows, batches.shared_prefix(todo.rows), 4096):
        loss_sum, _ = supervised.cross_entropy(loop.logprobs(model, batch))
        (loss_sum / weight).backward()
        total += float(loss_sum.detach())
    mine = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(todo.base.folder, dtype=dtype), fresh, is_trainable=True
    )
    expected = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids)[None]
        labels = torch.where(torch.from_numpy(row.supervised)[None], ids, -100)
        logits = peft(input_ids=ids).logits[0, :-1].float()
        loss_sum = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        (loss_sum / weight).backward()
        expected += float(loss_sum.detach())
    theirs = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for n, p in peft.named_parameters()
        if p.grad is not None
    }
    assert mine.keys() == theirs.keys()
    a, b = (torch.cat([grads[n].flatten().float() for n in sorted(grads)]) for grads in (mine, theirs))
    return {
        "first_loss_relative": abs(total - expected) / expected,
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)),
        "gradient_norm_ratio": float(a.norm() / b.norm()),
    }


if __name__ == "__main__":
    main()
