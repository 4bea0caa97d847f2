"""What the bits of a training depend on besides its settings and data.

Rounding follows the order of additions, and that follows from the library, the processor, the number of threads and the
sizes of the pieces. A training whose steps all ran under one fingerprint can be repeated bit for bit under it; one that
was interrupted and went on under another can not, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from metier import machine, runs

ENGINE = ("models", "objectives", "text", "training")


def fingerprint(device: torch.device, dtype: str, tokens: int, world_size: int) -> dict[str, Any]:
    """The state of this process that decides rounding; `tokens` are the most of a micro-batch."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "code": _code(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type} {accelerator}".strip(),
        "processor": f"{machine.processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "micro_batch_tokens": tokens,
        "world_size": world_size,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """One sentence for every item that `step` and those before it ran under, and later ones do not."""
    return [
        f"{key.replace('_', ' ')} changed after step {step}: {before.get(key)}, then {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if before.get(key) != now.get(key)
    ]


def _code() -> str:
    """A hash of the engine's source files."""
    root = Path(__file__).parents[1]
    files = sorted(p for name in ENGINE for p in (root / name).glob("*.py"))
    return runs.digest({p.relative_to(root).as_posix(): runs.sha256(p) for p in files})[:16]
