"""Adapters: attaching them, switching them off, and their files in PEFT's layout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from metier import runs
from metier.errors import ConfigError, ModelError, nearest
from metier.models.linear import LoraLinear

PREFIX = "base_model.model."
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def attach(model: nn.Module, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> list[str]:
    """Puts a fresh adapter on the chosen linear layers of a frozen model; returns their full names in order.

    `targets` is `all-linear` (every linear layer but the head) or names such as `q_proj`. Each A is drawn from a
    generator of its own, so that its values depend on the seed and the layer's place alone.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}
    known = {n.rsplit(".", 1)[-1] for n in linears}
    wanted = known if targets == "all-linear" else set(targets)
    if unknown := sorted(wanted - known):
        raise ConfigError(
            f"no linear layer is called {unknown[0]}", where="train.targets", fix=nearest(unknown[0], known)
        )
    chosen = [n for n in linears if n.rsplit(".", 1)[-1] in wanted]
    smallest = min(min(linears[n].weight.shape) for n in chosen)
    if rank > smallest:
        raise ConfigError(
            f"rank {rank} is over the smallest side of the adapted layers",
            where="train.rank",
            fix=f"use at most {smallest}",
        )
    for place, name in enumerate(chosen):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(linears[name], rank, alpha, generator))
    return chosen


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by full name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's trainable tensors, A before B, in the model's order."""
    return [p for layer in adapted(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, inside the block: every adapter is switched off."""
    layers = adapted(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {
        f"{PREFIX}{name}.lora_{side}.weight": getattr(layer, f"lora_{side}").detach()
        for name, layer in adapted(model).items()
        for side in "AB"
    }


def save(model: nn.Module, folder: Path, *, base: str) -> None:
    """Writes the adapter in PEFT's layout; the same adapter gives the same bytes."""
    layers = adapted(model)
    first = next(iter(layers.values()))
    rank = first.lora_A.shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    runs.write(folder / WEIGHTS, tensors_bytes(state(model)))
    settings: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted({n.rsplit(".", 1)[-1] for n in layers}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    runs.write_json(folder / SETTINGS, settings)


def load(model: nn.Module, folder: Path) -> None:
    """Attaches a saved adapter to its base; every tensor must be expected, present, finite and of the right shape."""
    settings = _settings(folder)
    attach(model, rank=settings["r"], alpha=settings["lora_alpha"], targets=settings["target_modules"], seed=0)
    expected = state(model)
    found = read_tensors(folder / WEIGHTS)
    if strange := sorted(found.keys() ^ expected.keys()):
        raise ModelError(
            f"the adapter does not fit this base: {strange[0]} is on one side only ({len(strange)} such)",
            where=str(folder / WEIGHTS),
            fix="use the base model it was trained on",
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{name} is {tuple(tensor.shape)}, this base needs {tuple(expected[name].shape)}",
                where=str(folder / WEIGHTS),
                fix="use the base model it was trained on",
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or infinity", where=str(folder / WEIGHTS), fix="train it again")
        expected[name].copy_(tensor)


def tensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file as bytes, tensors in name order, float32, with a canonical header: no map order leaks in."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    payload = []
    at = 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name].detach().to("cpu", torch.float32).numpy())
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        payload.append(array.tobytes())
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *payload])


def read_tensors(path: Path) -> dict[str, Tensor]:
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


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    settings = runs.read_json(path)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    sound = isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float)) and 0 < alpha < 1e9
    if not sound or settings.get("peft_type") != "LORA" or not settings.get("target_modules"):
        raise ModelError("not the settings of a LoRA adapter", where=str(path), fix="use an adapter in PEFT's layout")
    for key, plain in (("use_dora", False), ("use_rslora", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if settings.get(key, plain) not in (plain, None):
            raise ModelError(f"{key} is not supported", where=str(path), fix="use a plain LoRA adapter")
    return dict(settings)
