"""Adapters: attaching them, switching them off, and their files in PEFT's layout."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier import runs
from metier.errors import ConfigError, ModelError, nearest
from metier.models import tensors, whole
from metier.models.linear import Lora, LoraLinear, QuantisedLinear

PREFIX = "base_model.model."
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    seed: int,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
) -> list[str]:
    """Puts a fresh adapter on the chosen linear layers of a frozen model; returns their full names in order.

    `targets` is `all-linear` (every linear layer but the head) or names such as `q_proj`, or longer ends of full names.
    Each A is drawn from a generator of its own, so that its values depend on the seed and the layer's place alone.
    """
    kinds = (nn.Linear, QuantisedLinear)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not n.endswith("lm_head")}
    known = {n.rsplit(".", 1)[-1] for n in linears}
    wanted = known if targets == "all-linear" else set(targets)
    if unknown := sorted(w for w in wanted if not any(f".{n}".endswith(f".{w}") for n in linears)):
        head = "train the head whole: modules_to_save: [lm_head]" if unknown[0] == "lm_head" else ""
        raise ConfigError(
            f"no linear layer is called {unknown[0]}", where="train.targets", fix=head or nearest(unknown[0], known)
        )
    if not wanted:
        raise ConfigError("no module is named", where="train.targets", fix="use all-linear, or names such as [q_proj]")
    chosen = [n for n in linears if any(f".{n}".endswith(f".{w}") for w in wanted)]
    smallest = min(min(linears[n].weight.shape) for n in chosen)
    if rank > smallest:
        raise ConfigError(
            f"rank {rank} is over the smallest side of the adapted layers",
            where="train.rank",
            fix=f"use at most {smallest}",
        )
    lora = Lora(rank, alpha, rslora, dora, dropout)
    for place, name in enumerate(chosen):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(linears[name], lora, generator))
    return chosen


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by full name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's trainable tensors in the order of `state`, a tied one once."""
    return list({id(p): p for p in _named(model).values()}.values())


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, inside the block: every adapter is switched off."""
    _switch(model, on=False)
    try:
        yield
    finally:
        _switch(model, on=True)


def _switch(model: nn.Module, *, on: bool) -> None:
    for layer in adapted(model).values():
        layer.enabled = on
    for weight in {id(w): w for w in whole.attached(model).values()}.values():
        weight.switch()


@contextlib.contextmanager
def dropping(model: nn.Module, *key: int) -> Iterator[None]:
    """Inside the block adapters with dropout drop; each layer's mask is a function of `key` and its place alone."""
    layers = [layer for layer in adapted(model).values() if layer.lora.dropout]
    for place, layer in enumerate(layers):
        digest = hashlib.sha256(f"dropout:{':'.join(map(str, key))}:{place}".encode()).digest()
        layer.seed = int.from_bytes(digest[:8], "big") >> 1
    try:
        yield
    finally:
        for layer in layers:
            layer.seed = None


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {name: parameter.detach() for name, parameter in _named(model).items()}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors under PEFT's names: layer by layer A, B and magnitude, then modules trained whole."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted(model).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
    return found | {f"{PREFIX}{name}": weight for name, weight in whole.attached(model).items()}


def save(model: nn.Module, folder: Path, *, base: str) -> None:
    """Writes the adapter in PEFT's layout; the same adapter gives the same bytes."""
    layers = adapted(model)
    lora = next(iter(layers.values())).lora
    folder.mkdir(parents=True, exist_ok=True)
    runs.write(folder / WEIGHTS, tensors.pieces(state(model)))
    settings: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": whole.names(model) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": sorted({n.rsplit(".", 1)[-1] for n in layers}),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }
    runs.write_json(folder / SETTINGS, settings)


def load(model: PreTrainedModel, folder: Path) -> None:
    """Attaches a saved adapter to its base; every tensor must be expected, present, finite and of the right shape."""
    settings = _settings(folder)
    attach(
        model,
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        rslora=settings.get("use_rslora", False),
        dora=settings.get("use_dora", False),
        dropout=settings.get("lora_dropout", 0.0),
        targets=settings["target_modules"],
        seed=0,
    )
    found = tensors.read(folder / WEIGHTS)
    if settings.get("modules_to_save"):
        whole.attach(model, settings["modules_to_save"], apart=_untied(model, found))
    expected = state(model)
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


def _untied(model: nn.Module, found: dict[str, Tensor]) -> bool:
    """Whether the saved values of weights that the base ties have parted: PEFT trains each of them on its own."""
    for group in whole.tied(model):
        saved = [found[PREFIX + name] for name in group if PREFIX + name in found]
        if saved and (len(saved) < len(group) or not all(torch.equal(saved[0], other) for other in saved[1:])):
            return True
    return False


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    settings = runs.read_json(path)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    sound = isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float)) and 0 < alpha < 1e9
    targets = settings.get("target_modules")
    sound = sound and (targets == "all-linear" or (isinstance(targets, list) and targets != []))
    if not sound or settings.get("peft_type") != "LORA":
        raise ModelError("not the settings of a LoRA adapter", where=str(path), fix="use an adapter in PEFT's layout")
    for key, plain in (("bias", "none"), ("fan_in_fan_out", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if settings.get(key, plain) not in (plain, None):
            raise ModelError(f"{key} is not supported", where=str(path), fix="use an adapter without it")
    return dict(settings)
