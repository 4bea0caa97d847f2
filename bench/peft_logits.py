"""Does PEFT load the adapter to the same model? Largest difference of the next-token logits on real test prompts.

    python bench/peft_logits.py runs/licence-clerk [--prompts 50]

Both sides in float32: ours packs the prompts in one batch with its own attention and LoRA layers; PEFT runs the
untouched `transformers` model, one prompt at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from metier import records, talk
from metier.models import load, lora
from metier.release.certificate import last_logits
from metier.text.chat import Renderer


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("run", type=Path)
    words.add_argument("--prompts", type=int, default=50)
    given = words.parse_args()
    loaded = talk.of_run(given.run)
    base = load.resolve(loaded.spec.base, loaded.folder)
    renderer = Renderer(base.folder)
    cases = records.examples(given.run / "data" / "test.jsonl")[: given.prompts]
    prompts = [renderer.prompt(c.prompt) for c in cases]

    model = load.model(base, dtype=torch.float32, device=torch.device("cpu"))
    lora.load(model, given.run / "train" / "adapter")
    ours = last_logits(model, prompts)
    untouched = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    theirs_model = PeftModel.from_pretrained(untouched, given.run / "train" / "adapter").eval()
    with torch.inference_mode():
        theirs = torch.stack([theirs_model(torch.from_numpy(p)[None]).logits[0, -1] for p in prompts])
    difference = float((ours - theirs).abs().max())
    print(
        json.dumps(
            {
                "what": f"adapter loaded by PEFT: largest logit difference on {len(prompts)} test prompts, float32",
                "ours": difference,
                "peers": {"peft": 0.0},
                "ratio": {},
                "unit": "logits",
                "pairs": len(prompts),
                "same_next_token": bool((ours.argmax(1) == theirs.argmax(1)).all()),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
