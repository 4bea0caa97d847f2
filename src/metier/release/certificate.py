"""What ships is what was proved: checks that compare a release, read back from disk, with what the proof measured.

An artefact without a passed check is not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from metier import runs
from metier.models import head, load, tuned
from metier.models.attention import Rows, hidden_states
from metier.text.chat import Renderer

LOGITS_TOLERANCE = 1e-3


def checks(base: load.Base, own: Renderer, proved: Path, shipped: Path, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """The shipped folder, an adapter or a model, against the proved one, on real prompts that `own` renders, in
    float32 on the CPU."""
    theirs = Renderer(shipped)
    ids = [own.prompt(p) for p in prompts]
    unlike = sum(not np.array_equal(i, theirs.prompt(p)) for i, p in zip(ids, prompts, strict=True))
    before, after, bare = (_last_logits(base, folder, ids) for folder in (proved, shipped, None))
    return [
        _check("token-ids", unlike, 0, "prompts whose token ids differ with the shipped tokenizer"),
        _check("stop", int(own.stop_ids != theirs.stop_ids), 0, "stop tokens differ"),
        _check("logits", float((before - after).abs().max()), LOGITS_TOLERANCE, "largest logit difference, reloaded"),
        {
            "name": f"{shipped.name}-acts",
            "value": float((after - bare).abs().max()),
            "tolerance": LOGITS_TOLERANCE,
            "pass": bool((after - bare).abs().max() > LOGITS_TOLERANCE),
            "what": "largest logit difference from the base: must be over the tolerance, or training did nothing",
        },
    ]


def certificate(base: load.Base, data_seal: str, verdict: Path, artefacts: list[dict[str, Any]]) -> dict[str, Any]:
    """`certificate.json`: base, data and proof by hash, and each artefact with its checks."""
    passed = all(c["pass"] for a in artefacts for c in a["checks"])
    return {
        "base": base.sha256,
        "data": data_seal,
        "proof": runs.sha256(verdict),
        "artefacts": artefacts,
        "pass": passed,
    }


def _check(name: str, value: float, tolerance: float, what: str) -> dict[str, Any]:
    return {"name": name, "value": value, "tolerance": tolerance, "pass": value <= tolerance, "what": what}


def _last_logits(base: load.Base, folder: Path | None, prompts: Sequence[np.ndarray]) -> Tensor:
    """(prompts, vocabulary) float32 logits behind each prompt, of what a folder holds or of the base."""
    cpu = torch.device("cpu")
    if folder is None:
        return last_logits(load.model(base, dtype=torch.float32, device=cpu), prompts)
    return last_logits(tuned.load(base, folder, dtype=torch.float32, device=cpu), prompts)


@torch.inference_mode()
def last_logits(model: PreTrainedModel, prompts: Sequence[np.ndarray]) -> Tensor:
    """(prompts, vocabulary) logits of the token behind each prompt."""
    lengths = [p.size for p in prompts]
    rows = Rows(lengths, prefix=0, device=model.device)
    hidden_TD = hidden_states(model, np.concatenate(prompts), rows)
    last = torch.tensor(np.cumsum(lengths) - 1, device=model.device)
    return head.logits(model, hidden_TD[last])
