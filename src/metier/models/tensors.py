"""Safetensors files with canonical bytes: equal tensors give equal files, whatever order they came in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metier.errors import ModelError

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A safetensors file in pieces, header first, then the tensors in name order; on a CPU nothing is copied.

    bf16 stays bf16, every other format becomes float32.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    payload: list[bytes | memoryview] = []
    at = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        tensor = (tensor if tensor.dtype in _NAMES else tensor.float()).contiguous()
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        payload.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *payload]


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; anything else is refused by name."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        other = next((p.name for p in path.parent.glob("adapter_model.*")), None)
        what = f"only {other}, an unsafe format" if other else f"no {path.name}"
        raise ModelError(what, where=str(path.parent), fix="save it as safetensors") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"not a safetensors file: {error}", where=str(path), fix="fetch or make it again") from error
