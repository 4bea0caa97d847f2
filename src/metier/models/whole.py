"""Weights that are trained whole: all of a model (full fine-tuning), or chosen modules beside an adapter.

A module trained beside an adapter keeps its frozen values too, so that the base model is never lost. PEFT calls such
modules `modules_to_save`, and so do the settings. Where the base is in bf16 these weights work in bf16, and the loop
holds float32 masters of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier import runs
from metier.errors import ConfigError, ResourceError, nearest
from metier.models import load, tensors
from metier.models.linear import LoraLinear, QuantisedLinear

SHARD_BYTES = 5_000_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Whole(nn.Parameter):
    """A weight of the base that is trained whole; `other` holds the base's values while these are in use."""

    other: Tensor

    def switch(self) -> None:
        """Trained values for the base's, or back."""
        self.data, self.other = self.other, self.data


def everything(model: PreTrainedModel) -> list[nn.Parameter]:
    """Sets every weight of the model free; returns them in the model's order, a tied one once."""
    _hold_memory(model)
    model.requires_grad_(True)
    _look_up_sparsely(model)
    return list(model.parameters())


def attach(model: PreTrainedModel, names: Sequence[str], *, apart: bool = False) -> None:
    """Sets the modules free whose full names end as one of `names`: PEFT's rule.

    Weights that the base ties must be named together and stay one tensor; with `apart` each becomes its own.
    """
    chosen = _chosen(model, names)
    for group in () if apart else tied(model):
        if len({name in chosen for name in group}) == 2:
            raise ConfigError(
                f"the base ties {' and '.join(group)}, and only one of them would be trained",
                where="train.modules_to_save",
                fix=f"name all: [{', '.join(sorted({_module(name) for name in group}))}]; they stay one tensor",
            )
    shared: dict[int, Whole] = {}
    for name, parameter in chosen.items():
        whole = shared.get(id(parameter))
        if whole is None or apart:
            whole = shared[id(parameter)] = Whole(parameter.detach().clone())
            whole.other = parameter.detach()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, whole)
    _look_up_sparsely(model)


def attached(model: nn.Module) -> dict[str, Whole]:
    """The weights trained whole beside an adapter by full name; a tied one under each of its names."""
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, Whole)}


def names(model: nn.Module) -> list[str]:
    """What `attach` was told, or the like: the shortest names that mean these modules and no others."""
    weights = attached(model)
    short = sorted({_module(n) for n in weights})
    exact = _chosen(model, short).keys() == weights.keys() if short else True
    return short if exact else sorted({n.rpartition(".")[0] for n in weights})


def tied(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of weights that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [tuple(g) for g in groups.values() if len(g) > 1]


def save(model: PreTrainedModel, folder: Path, *, base: Path) -> None:
    """Writes the whole model into `folder`: the base's settings, and weights in files of at most `SHARD_BYTES`.

    Equal weights give equal bytes; a tied weight is written once, under its first name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.named_parameters())
    settings = json.loads((base / "config.json").read_bytes())
    settings.pop("torch_dtype", None)
    runs.write_json(folder / "config.json", settings | {"dtype": _DTYPES[next(iter(weights.values())).dtype]})
    if (base / "generation_config.json").is_file():
        runs.write(folder / "generation_config.json", (base / "generation_config.json").read_bytes())
    shards = _shards(weights)
    if len(shards) == 1:
        runs.write(folder / WEIGHTS, tensors.pieces(weights))
        return
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        runs.write(folder / file, tensors.pieces(shard))
    total = sum(w.nbytes for w in weights.values())
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    runs.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights in name order, cut before a file would grow over `SHARD_BYTES`."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(weights):
        if shards[-1] and size + weights[name].nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weights[name]
        size += weights[name].nbytes
    return shards


def _chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights of the modules that `names` mean, by full name."""
    _hold_not_quantised(model, names)
    weights = dict(model.named_parameters(remove_duplicate=False))
    modules = [n for n, _ in model.named_modules(remove_duplicate=False) if any(w.startswith(f"{n}.") for w in weights)]
    for name in names:
        if not any(m.endswith(name) for m in modules):
            raise ConfigError(
                f"no module is called {name}",
                where="train.modules_to_save",
                fix=nearest(name, {m.rsplit(".", 1)[-1] for m in modules if m}),
            )
    inside = tuple(f"{m}." for m in modules if m and any(m.endswith(n) for n in names))
    if twice := [n for n, m in model.named_modules() if isinstance(m, LoraLinear) and f"{n}.".startswith(inside)]:
        raise ConfigError(
            f"{twice[0]} would get an adapter and be trained whole as well",
            where="train.modules_to_save",
            fix="name it in targets or in modules_to_save, not in both",
        )
    return {n: p for n, p in weights.items() if n.startswith(inside)}


def _hold_not_quantised(model: nn.Module, names: Sequence[str]) -> None:
    chosen = tuple(f"{n}." for n, _ in model.named_modules() if n.endswith(tuple(names)))
    if few := [n for n, m in model.named_modules() if isinstance(m, QuantisedLinear) and f"{n}.".startswith(chosen)]:
        raise ConfigError(
            f"{few[0]} is quantised, and only plain weights can be trained whole",
            where="train.modules_to_save",
            fix="leave it out, or set train.quantize to none",
        )


def _module(name: str) -> str:
    """`embed_tokens` of `model.embed_tokens.weight`."""
    return name.rsplit(".", 2)[-2]


def _hold_memory(model: PreTrainedModel) -> None:
    """Refuses where the memory cannot hold a gradient, two moments and a master in float32 of every weight."""
    needed, free = 16 * model.num_parameters(), load.available_memory(model.device)
    if model.device.type == "cpu" and needed > free:
        raise ResourceError(
            f"full fine-tuning needs about {needed / 1e9:.1f} GB besides the weights, {free / 1e9:.1f} GB are free",
            where="train.tune",
            fix="train an adapter (tune: lora), or use a smaller base",
        )


def _look_up_sparsely(model: PreTrainedModel) -> None:
    """The gradient of an embedding has the rows of the batch's tokens; the others are neither made nor added."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.sparse = embedding.weight.requires_grad
