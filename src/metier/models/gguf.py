"""GGUF in, a Hugging Face model folder out.

A `.gguf` base comes from a stranger, and the usual readers believe it: a count in the header becomes an
allocation, an offset becomes a pointer. This one believes nothing. Every string, count, offset, type and
alignment is held against the size of the file and a cap before it is used, nothing is allocated from a number
in the header, and nothing inside the file is executed: a chat template is text, copied and never rendered.

`read` returns the header. `to_folder` writes a folder that `transformers` loads, and writes it exactly or not at
all: a tokenizer, a rotary scaling or a metadata key whose meaning is not known here is refused by name, because
a model that is nearly right trains and scores like one that is right, only worse.

The `gguf` library gives two things: the sizes of the quantised blocks and the arithmetic that expands them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from metier import runs
from metier.errors import ModelError, ResourceError, needs_extra

Scalar = str | int | float | bool
Value = Scalar | tuple[Scalar, ...]

# Caps, far above any real model. The header cap bounds what `read` can allocate: a file's tensors are mapped,
# its header is what becomes Python objects.
MAX_HEADER = 1 << 26
MAX_TEXT = 1 << 24
MAX_KEY = (1 << 16) - 1
MAX_NAME = 64
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 22
MAX_ALIGNMENT = 1 << 16
MAX_TEMPLATE = 1 << 20
MAX_RANK = 4

_BROKEN = "download the file again, or convert the model again with a current llama.cpp"
_FOLDER = "use the model's Hugging Face folder instead of this GGUF"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place: `shape` in torch order, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself, checked: every tensor lies inside the file and overlaps no other."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]


def read(path: str | Path) -> Header:
    """The header of a GGUF v2 or v3 file; a `ModelError` with file and byte where it is malformed."""
    with _mapped(Path(path)) as data:
        return _header(data, Path(path))


def to_folder(path: str | Path, folder: str | Path) -> Header:
    """Write the model in `path` as a Hugging Face folder into the empty `folder`, and return its header.

    Files: config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, and
    chat_template.jinja where the file has a template (only the default one; sampling hints are not carried over).
    The same file gives the same bytes. Weights are float32 whatever they were, since no smaller type holds every
    dequantised value: the folder takes four bytes a parameter, so 0.54 GB for 135 M and 4 GB for 1 B. A tensor is
    expanded a few rows at a time, so memory holds the mapped file, the vocabulary and some MB of values. Nothing is
    fsynced: the caller publishes, and throws the folder away where this raises.
    """
    path, folder = Path(path), Path(folder)
    if any(folder.iterdir()):
        raise ModelError("the folder for the converted model is not empty", where=str(folder), fix="give an empty one")
    with _mapped(path) as data:
        header = _header(data, path)
        model = _model(header, data)
        texts = _texts(header, model)
        _write_texts(folder, texts)
        _write_weights(folder / "model.safetensors", model.weights, data, path)
    return header


# --- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, mapped for reading; refused when it changed before the block ended."""
    with _opened(path) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode) or before.st_size == 0:
            raise ModelError("not a GGUF file: it is empty or not a regular file", where=str(path), fix=_BROKEN)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            yield data
        finally:
            # An exception on its way up can still hold views of the map; the map then closes with them.
            with contextlib.suppress(BufferError):
                data.close()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ModelError("the GGUF file changed while it was read", where=str(path), fix="wait for the copy to end")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except PermissionError as error:
        raise ResourceError("the GGUF file may not be read", where=str(path), fix="check its permissions") from error
    except OSError as error:
        raise ModelError("no GGUF file there", where=str(path), fix="check the path of the .gguf file") from error


class _Cursor:
    """A position in the mapped bytes. Every read is held against the end of the file and the header cap."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.size = len(data)
        self.elements = 0

    def error(self, what: str, at: int | None = None) -> ModelError:
        place = self.at if at is None else at
        return ModelError(f"malformed GGUF: {what}", where=f"{self.path} (byte {place})", fix=_BROKEN)

    def need(self, length: int, what: str) -> None:
        if length > self.size - self.at:
            raise self.error(f"{what} needs {length} bytes, {self.size - self.at} are left in the file")
        if length > MAX_HEADER - self.at:
            raise self.error(f"{what} takes the header past {MAX_HEADER} bytes")

    def number(self, code: str, what: str) -> Any:
        length = struct.calcsize("<" + code)
        self.need(length, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += length
        return value

    def count(self, most: int, each: int, what: str) -> int:
        """A count that can be true: at most `most`, and the file is long enough for `each` bytes of every one."""
        start = self.at
        count = int(self.number("Q", what))
        if count > most:
            raise self.error(f"{what} is {count}, at most {most} is possible", start)
        if count * each > self.size - self.at:
            raise self.error(f"{what} is {count}, more than the {self.size - self.at} bytes left can hold", start)
        return count

    def text(self, most: int, what: str) -> str:
        length = self.count(most, 1, f"the length of {what}")
        self.need(length, what)
        start, self.at = self.at, self.at + length
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8", start + error.start) from error


def _header(data: mmap.mmap, path: Path) -> Header:
    cursor = _Cursor(data, path)
    version = _version(cursor)
    tensor_count = cursor.count(MAX_TENSORS, 32, "the number of tensors")
    key_count = cursor.count(MAX_KEYS, 13, "the number of metadata keys")
    metadata = _metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata)
    described = [_described(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return Header(path, version, alignment, metadata, _placed(cursor, described, start, alignment))


def _version(cursor: _Cursor) -> int:
    cursor.need(4, "the magic number")
    magic, cursor.at = cursor.data[:4], 4
    if magic != b"GGUF":
        raise ModelError(
            "not a GGUF file: it does not start with GGUF",
            where=f"{cursor.path} (byte 0)",
            fix="give a .gguf file; weights in pickle formats are never opened",
        )
    version = int(cursor.number("I", "the version"))
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = "a big-endian file" if swapped in (2, 3) else f"version {version}"
        raise cursor.error(f"{kind} is not read, only little-endian versions 2 and 3", 4)
    return version


def _metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        start = cursor.at
        key = cursor.text(MAX_KEY, "a metadata key")
        if key in metadata:
            raise cursor.error(f"the metadata key {_shown(key)} comes twice", start)
        metadata[key] = _value(cursor, key)
    return metadata


def _value(cursor: _Cursor, key: str) -> Value:
    start = cursor.at
    kind = int(cursor.number("I", f"the type of {_shown(key)}"))
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind == _STRING:
        return cursor.text(MAX_TEXT, f"the value of {_shown(key)}")
    if kind not in _NUMBERS:
        raise cursor.error(f"{_shown(key)} has the unknown value type {kind}", start)
    return _numbers(cursor, kind, 1, key)[0]


def _array(cursor: _Cursor, key: str) -> tuple[Scalar, ...]:
    start = cursor.at
    kind = int(cursor.number("I", f"the element type of {_shown(key)}"))
    if kind != _STRING and kind not in _NUMBERS:
        raise cursor.error(f"{_shown(key)} has the unknown or nested element type {kind}", start)
    each = 8 if kind == _STRING else struct.calcsize("<" + _NUMBERS[kind])
    count = cursor.count(MAX_ELEMENTS - cursor.elements, each, f"the length of {_shown(key)}")
    cursor.elements += count
    if kind == _STRING:
        return tuple(cursor.text(MAX_TEXT, f"an element of {_shown(key)}") for _ in range(count))
    return _numbers(cursor, kind, count, key)


def _numbers(cursor: _Cursor, kind: int, count: int, key: str) -> tuple[Scalar, ...]:
    # A bool is read as a byte, because `?` takes any byte for true.
    code = "B" if kind == _BOOL else _NUMBERS[kind]
    length = count * struct.calcsize("<" + code)
    cursor.need(length, f"the value of {_shown(key)}")
    values = struct.unpack_from(f"<{count}{code}", cursor.data, cursor.at)
    if kind == _BOOL and any(value > 1 for value in values):
        raise cursor.error(f"{_shown(key)} is a boolean that is neither 0 nor 1")
    cursor.at += length
    return tuple(bool(value) for value in values) if kind == _BOOL else values


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):  # type: ignore[operator]
        raise cursor.error(f"general.alignment is {_shown(value)}, not a power of two from 8 to {MAX_ALIGNMENT}")
    assert isinstance(value, int)
    return value


def _described(cursor: _Cursor) -> TensorInfo:
    """The next tensor as the header describes it: its offset still counts from the start of the tensor data."""
    start = cursor.at
    name = cursor.text(MAX_NAME, "a tensor name")
    rank = int(cursor.number("I", f"the rank of {_shown(name)}"))
    if not 1 <= rank <= MAX_RANK:
        raise cursor.error(f"tensor {_shown(name)} has {rank} dimensions, 1 to {MAX_RANK} are possible", start)
    cursor.need(8 * rank, f"the shape of {_shown(name)}")
    dims = struct.unpack_from(f"<{rank}Q", cursor.data, cursor.at)
    cursor.at += 8 * rank
    kind, block, size = _block(cursor, name)
    if 0 in dims or dims[0] % block:
        raise cursor.error(f"tensor {_shown(name)} has shape {dims}, rows must be whole blocks of {block}", start)
    nbytes = math.prod(dims) // block * size
    if nbytes > cursor.size:
        raise cursor.error(f"tensor {_shown(name)} has shape {dims}, more than the file holds", start)
    return TensorInfo(name, tuple(reversed(dims)), kind, int(cursor.number("Q", "a tensor offset")), nbytes)


def _block(cursor: _Cursor, name: str) -> tuple[str, int, int]:
    """(type name, values in a block, bytes in a block) of the type at the cursor."""
    constants = _library().constants
    start = cursor.at
    number = int(cursor.number("I", f"the type of {_shown(name)}"))
    try:
        kind = constants.GGMLQuantizationType(number)
    except ValueError as error:
        raise cursor.error(f"tensor {_shown(name)} has the unknown type {number}", start) from error
    block, size = constants.GGML_QUANT_SIZES[kind]
    return str(kind.name), int(block), int(size)


def _placed(cursor: _Cursor, described: list[TensorInfo], start: int, alignment: int) -> tuple[TensorInfo, ...]:
    """The tensors with offsets from the start of the file, in file order.

    Each must begin at the first aligned byte after the one before it, as llama.cpp writes and demands: this one
    rule excludes overlaps, gaps, misalignment and doubled data.
    """
    names: set[str] = set()
    expected, tensors = 0, []
    for tensor in sorted(described, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            raise cursor.error(f"the tensor name {_shown(tensor.name)} comes twice")
        if tensor.offset != expected:
            raise cursor.error(f"tensor {_shown(tensor.name)} is at offset {tensor.offset}, expected {expected}")
        if start + tensor.offset + tensor.nbytes > cursor.size:
            raise cursor.error(f"tensor {_shown(tensor.name)} ends after the end of the file", cursor.size)
        names.add(tensor.name)
        expected = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
        tensors.append(TensorInfo(tensor.name, tensor.shape, tensor.type, start + tensor.offset, tensor.nbytes))
    return tuple(tensors)


@functools.cache
def _library() -> ModuleType:
    try:
        import gguf
        import gguf.constants
        import gguf.quants
    except ImportError as error:
        raise needs_extra("gguf", "train") from error
    library: ModuleType = gguf
    return library


def _shown(value: object) -> str:
    """A stranger's text, quoted, escaped and short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- architectures ---------------------------------------------------------------------------------------------------
# Sizes: d hidden, q query, k key and value, f feed-forward, v vocabulary, h one head.


@dataclass(frozen=True)
class _Architecture:
    """How one `general.architecture` is written in `transformers`; `permuted` marks llama.cpp's rotary row order."""

    model: str
    permuted: bool = False
    layer: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


_ENDS = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
    "output.weight": ("lm_head.weight", "vd"),
}
_LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "d"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qd"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kd"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": ("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "d"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": ("mlp.down_proj.weight", "df"),
}
_BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "k"),
    "attn_v.bias": ("self_attn.v_proj.bias", "k"),
}
_HEAD_NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "h"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "h"),
}
_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", True, _LAYER, {"attention_bias": False, "mlp_bias": False}),
    "qwen2": _Architecture("Qwen2ForCausalLM", False, _LAYER | _BIASES, {"use_sliding_window": False}),
    "qwen3": _Architecture(
        "Qwen3ForCausalLM", False, _LAYER | _HEAD_NORMS, {"attention_bias": False, "use_sliding_window": False}
    ),
}


@dataclass(frozen=True)
class _Weight:
    """One tensor of the folder, and the order in which it takes its rows from the file (None: as they are)."""

    name: str
    source: TensorInfo
    order: npt.NDArray[np.intp] | None


@dataclass(frozen=True)
class _Model:
    config: dict[str, Any]
    weights: tuple[_Weight, ...]


class _Facts:
    """The metadata under one prefix, typed on the way out, and a list of what nobody asked for."""

    def __init__(self, header: Header, prefix: str) -> None:
        self.where, self.prefix = str(header.path), prefix
        self.values = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
        self.asked: set[str] = set()

    def error(self, what: str, fix: str = _FOLDER) -> ModelError:
        return ModelError(what, where=self.where, fix=fix)

    def get(self, key: str) -> Value | None:
        self.asked.add(key)
        return self.values.get(key)

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 24) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(f"{self.prefix}{key} is {_shown(value)}, expected one whole number from {least} to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive float32 as its shortest decimal, so 9.999999747378752e-06 reads 1e-05."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(f"{self.prefix}{key} is {_shown(value)}, expected one positive number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(f"{self.prefix}{key} is {_shown(value)}, expected true or false")
        return value

    def refuse_unread(self) -> None:
        """A key that is not understood may change what the model computes."""
        unread = sorted(self.values.keys() - self.asked)
        if unread:
            names = ", ".join(_shown(self.prefix + key) for key in unread[:10])
            more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
            raise self.error(f"the meaning of these metadata keys is not known: {names}{more}")


def _model(header: Header, data: mmap.mmap) -> _Model:
    """The config and the weights of the folder, every name and shape checked before a byte is written."""
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(
            "this is one part of a split GGUF", where=str(header.path), fix="join the parts: llama-gguf-split --merge"
        )
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelError(
            f"the architecture {_shown(name)} cannot be converted exactly; known: {known}",
            where=str(header.path),
            fix=_FOLDER,
        )
    architecture = _ARCHITECTURES[name]
    facts = _Facts(header, name + ".")
    config = _config(facts, header, data) | dict(architecture.config)
    config |= {"architectures": [architecture.model], "model_type": name}
    facts.refuse_unread()
    return _Model(config, _weights(header, architecture, config))


def _config(facts: _Facts, header: Header, data: mmap.mmap) -> dict[str, Any]:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    hidden, heads = facts.whole("embedding_length"), facts.whole("attention.head_count")
    if hidden % heads:
        raise facts.error(f"{heads} attention heads do not divide the {hidden} hidden values")
    shared = facts.whole("attention.head_count_kv", heads)
    width = facts.whole("attention.key_length", hidden // heads)
    if heads % shared or width % 2:
        raise facts.error(f"{heads} query heads, {shared} key heads of {width} values do not fit together")
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.whole(key, width) != width:
            raise facts.error(f"{facts.prefix}{key} differs from the width of a head ({width})")
    if facts.whole("expert_count", 0, least=0) or facts.whole("expert_used_count", 0, least=0):
        raise facts.error("a mixture of experts cannot be converted exactly")
    facts.get("tensor_data_layout")
    vocabulary = len(_tokens(header))
    if facts.whole("vocab_size", vocabulary) != vocabulary:
        raise facts.error(f"{facts.prefix}vocab_size is not the number of tokens ({vocabulary})")
    return {
        "attention_dropout": 0.0,
        "head_dim": width,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": facts.whole("feed_forward_length"),
        "max_position_embeddings": facts.whole("context_length", most=1 << 30),
        "num_attention_heads": heads,
        "num_hidden_layers": facts.whole("block_count", most=max(1, len(tensors))),
        "num_key_value_heads": shared,
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        **_rope(facts, tensors.get("rope_freqs.weight"), width, data),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _rope(facts: _Facts, factors: TensorInfo | None, width: int, data: mmap.mmap) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`. Linear scaling is in the metadata, Llama 3's only as a tensor of factors."""
    theta = facts.real("rope.freq_base", 10000.0)
    kind = facts.get("rope.scaling.type")
    facts.get("rope.scaling.finetuned")
    if factors is not None and kind in (None, "none"):
        return {"rope_theta": theta, "rope_scaling": _llama3(facts, factors, width, theta, data)}
    if factors is None and kind in (None, "none"):
        if facts.real("rope.scaling.factor", 1.0) != 1.0:
            raise facts.error("a rope scaling factor without a rope scaling type is ambiguous")
        return {"rope_theta": theta, "rope_scaling": None}
    if factors is None and kind == "linear":
        facts.get("rope.scaling.original_context_length")
        return {
            "rope_theta": theta,
            "rope_scaling": {"rope_type": "linear", "factor": facts.real("rope.scaling.factor")},
        }
    raise facts.error(f"the rope scaling {_shown(kind)} cannot be converted exactly")


def _llama3(facts: _Facts, factors: TensorInfo, width: int, theta: float, data: mmap.mmap) -> dict[str, Any]:
    """The settings whose factors are those in the file; llama.cpp keeps the factors and drops the settings."""
    if factors.type != "F32" or factors.shape != (width // 2,):
        raise facts.error(f"rope_freqs.weight is {factors.type} {factors.shape}, expected F32 ({width // 2},)")
    stored = np.frombuffer(data, "<f4", width // 2, factors.offset)
    factor, low, high, context = float(stored.max()), 1.0, 4.0, 8192
    turns = context / (2 * math.pi) * theta ** (-np.arange(0, width, 2) / width)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(stored, 1 / ((1 - share) / factor + share), rtol=1e-4, atol=0.0):
        raise facts.error("the rope factors in rope_freqs.weight are not those of Llama 3's scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _weights(header: Header, architecture: _Architecture, config: Mapping[str, Any]) -> tuple[_Weight, ...]:
    """Every tensor of the folder with its source; one missing, left over or of the wrong shape is refused."""
    wanted = _wanted(architecture, config)
    tensors = {tensor.name: tensor for tensor in header.tensors if tensor.name != "rope_freqs.weight"}
    _refuse_names("lacks", sorted(wanted.keys() - tensors.keys()), header.path)
    _refuse_names("has unknown", sorted(tensors.keys() - wanted.keys()), header.path)
    weights = []
    for name, (target, shape) in wanted.items():
        source = tensors[name]
        if source.shape != shape:
            what = f"tensor {name} has shape {source.shape}, the metadata says {shape}"
            raise ModelError(what, where=str(header.path), fix=_BROKEN)
        _refuse_type(source, header.path)
        weights.append(_Weight(target, source, _order(architecture, name, config)))
    return tuple(sorted(weights, key=lambda weight: weight.name))


def _wanted(architecture: _Architecture, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{GGUF name: (name in the folder, shape)} of every tensor the config calls for."""
    sizes = {
        "d": config["hidden_size"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "k": config["num_key_value_heads"] * config["head_dim"],
        "f": config["intermediate_size"],
        "v": config["vocab_size"],
        "h": config["head_dim"],
    }
    wanted = {name: entry for name, entry in _ENDS.items() if name != "output.weight"}
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = _ENDS["output.weight"]
    for index in range(config["num_hidden_layers"]):
        for name, (target, shape) in architecture.layer.items():
            wanted[f"blk.{index}.{name}"] = (f"model.layers.{index}.{target}", shape)
    return {name: (target, tuple(sizes[size] for size in shape)) for name, (target, shape) in wanted.items()}


def _refuse_names(verb: str, names: list[str], path: Path) -> None:
    if names:
        listed = ", ".join(_shown(name) for name in names[:10])
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ModelError(f"the file {verb} tensors: {listed}{more}", where=str(path), fix=_FOLDER)


def _refuse_type(source: TensorInfo, path: Path) -> None:
    if not _expandable(source.type):
        what = f"tensor {source.name} has type {source.type}, which cannot be expanded"
        raise ModelError(what, where=str(path), fix=_FOLDER)


@functools.cache
def _expandable(type_name: str) -> bool:
    """Whether the library can expand this type, found out on one empty block before anything is written."""
    library = _library()
    kind = library.constants.GGMLQuantizationType[type_name]
    try:
        library.quants.dequantize(np.zeros((1, library.constants.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _order(architecture: _Architecture, name: str, config: Mapping[str, Any]) -> npt.NDArray[np.intp] | None:
    """The row order that undoes llama.cpp's: it keeps the two halves of a rotary pair side by side."""
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(name.split(".", 2)[-1])
    if not architecture.permuted or heads is None:
        return None
    rows = np.arange(config[heads] * config["head_dim"], dtype=np.intp)
    return rows.reshape(config[heads], config["head_dim"] // 2, 2).swapaxes(1, 2).reshape(-1)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Splitter:
    """How text is cut before the merges, and what llama.cpp assumes about BOS where the file does not say."""

    pre: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


_DIGITS = [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _Splitter(_split(_WORDS + r"|\p{N}{1,3}" + _REST), ignore_merges=True, add_bos=True)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS = {
    "gpt-2": _Splitter([_byte_level(use_regex=True)]),
    "smollm": _Splitter(_DIGITS),
    "starcoder": _Splitter(_DIGITS),
    "refact": _Splitter(_DIGITS),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitter(_split(_WORDS + r"|\p{N}" + _REST), normalizer={"type": "NFC"}),
    "tekken": _Splitter(_split(_TEKKEN), ignore_merges=True, add_bos=True),
}

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}


def _tokens(header: Header) -> tuple[str, ...]:
    return _strings(header, "tokenizer.ggml.tokens")


def _strings(header: Header, key: str) -> tuple[str, ...]:
    values = header.metadata.get(key)
    strings = tuple(value for value in values if isinstance(value, str)) if isinstance(values, tuple) else ()
    if not isinstance(values, tuple) or not values or len(strings) != len(values):
        raise ModelError(f"{key} is missing or not a list of strings", where=str(header.path), fix=_FOLDER)
    return strings


def _texts(header: Header, model: _Model) -> dict[str, str]:
    """{file name: content} of every file of the folder but the weights."""
    facts = _Facts(header, "tokenizer.ggml.")
    splitter = _splitter(facts)
    tokens = _tokens(header)
    kinds = _kinds(facts, tokens)
    ids = _special_ids(facts, tokens, kinds)
    document = _tokenizer(header, facts, splitter, kinds, ids)
    for key in facts.values:
        if key.endswith("_token_id") or key in ("tokens", "merges", "scores", "token_type_count"):
            facts.get(key)
    facts.refuse_unread()
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    _refuse_leaks(facts, text, {i: tokens[i] for i, kind in enumerate(kinds) if kind in (_CONTROL, _UNKNOWN)})
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": _json(_tokenizer_config(tokens, ids, model.config["max_position_embeddings"])),
        "config.json": _json(model.config | _config_ids(ids)),
        "generation_config.json": _json(_config_ids(ids)),
        **_template(header),
    }


def _splitter(facts: _Facts) -> _Splitter:
    if facts.get("model") != "gpt2":
        raise facts.error(f"the tokenizer {_shown(facts.get('model'))} cannot be converted exactly; known: gpt2")
    name = facts.get("pre")
    if not isinstance(name, str) or name not in _SPLITTERS:
        known = ", ".join(sorted(_SPLITTERS))
        raise facts.error(f"the pre-tokenizer {_shown(name)} cannot be converted exactly; known: {known}")
    if facts.flag("add_space_prefix", False):
        raise facts.error("a byte-level tokenizer that adds a space prefix cannot be converted exactly")
    return _SPLITTERS[name]


def _kinds(facts: _Facts, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """One token type per token. Without them a control token could not be told from a word."""
    values = facts.get("token_type")
    if not isinstance(values, tuple) or len(values) != len(tokens):
        raise facts.error("tokenizer.ggml.token_type is missing or not as long as the list of tokens")
    for token, value in zip(tokens, values, strict=True):
        if value not in (_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED) or not token:
            raise facts.error(f"token {_shown(token)} of type {_shown(value)} has no place in a byte-level vocabulary")
    if len(set(tokens)) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if tokens.index(token) != index)
        raise facts.error(f"token {_shown(twice)} has two ids", fix=_BROKEN)
    return tuple(int(value) for value in values)


def _special_ids(facts: _Facts, tokens: tuple[str, ...], kinds: tuple[int, ...]) -> dict[str, int]:
    """{role: id} of the tokens with a role. Each must be a control token, since text must never spell one."""
    ids = {
        role: facts.whole(key, least=0, most=len(tokens) - 1)
        for role, key in _IDS.items()
        if facts.get(key) is not None
    }
    if "eos" not in ids:
        raise facts.error("tokenizer.ggml.eos_token_id is missing, so no answer would ever end")
    for role, index in ids.items():
        if kinds[index] not in (_CONTROL, _UNKNOWN):
            raise facts.error(f"the {role} token {_shown(tokens[index])} is not marked as a control token")
    return ids


def _tokenizer(
    header: Header, facts: _Facts, splitter: _Splitter, kinds: tuple[int, ...], ids: Mapping[str, int]
) -> dict[str, Any]:
    """tokenizer.json. Padding rows are left out; every other token keeps its id."""
    tokens = _tokens(header)
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != _UNUSED}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kinds[index] != _USER,
            }
            for index, token in enumerate(tokens)
            if kinds[index] in (_UNKNOWN, _CONTROL, _USER)
        ],
        "normalizer": splitter.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitter.pre},
        "post_processor": _post_processor(facts, splitter, tokens, ids),
        "decoder": _byte_level(use_regex=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitter.ignore_merges,
            "vocab": vocabulary,
            "merges": _merges(header, vocabulary),
        },
    }


def _merges(header: Header, vocabulary: Mapping[str, int]) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _strings(header, "tokenizer.ggml.merges")]
    for index, merge in enumerate(merges):
        if len(merge) != 2 or not {merge[0], merge[1], "".join(merge)} <= vocabulary.keys():
            what = f"merge {index} {_shown(' '.join(merge))} does not join two tokens into a third"
            raise ModelError(what, where=str(header.path), fix=_BROKEN)
    return merges


def _post_processor(
    facts: _Facts, splitter: _Splitter, tokens: tuple[str, ...], ids: Mapping[str, int]
) -> dict[str, Any]:
    """Puts BOS before and EOS after a text where the file, or llama.cpp's habit for its kind, says so."""
    first = ["bos"] if facts.flag("add_bos_token", splitter.add_bos) else []
    last = ["eos"] if facts.flag("add_eos_token", False) else []
    if first and "bos" not in ids:
        raise facts.error("the tokenizer adds a BOS token, but tokenizer.ggml.bos_token_id is missing")
    if not first and not last:
        return _byte_level(use_regex=False)
    named = {role: tokens[ids[role]] for role in first + last}

    def around(text: str, kind: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": named[role], "type_id": kind}} for role in first]
        after = [{"SpecialToken": {"id": named[role], "type_id": kind}} for role in last]
        return [*before, {"Sequence": {"id": text, "type_id": kind}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[role]], "tokens": [token]} for role, token in sorted(named.items())
        },
    }


def _refuse_leaks(facts: _Facts, text: str, control: Mapping[int, str]) -> None:
    """Load the tokenizer, and refuse one whose merges spell a control token: plain text would become control."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise facts.error(f"the tokenizer does not load: {_shown(str(error))}") from error
    tokenizer.encode_special_tokens = True
    for index, token in control.items():
        if index in tokenizer.encode(token, add_special_tokens=False).ids:
            raise facts.error(f"the control token {_shown(token)} is also an ordinary word")


def _tokenizer_config(tokens: tuple[str, ...], ids: Mapping[str, int], length: int) -> dict[str, Any]:
    named = {f"{role}_token": tokens[ids[role]] for role in ("bos", "eos", "unk", "pad") if role in ids}
    return {
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        # The general class uses tokenizer.json as it stands; a model's own class would rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }


def _config_ids(ids: Mapping[str, int]) -> dict[str, Any]:
    ends = sorted({ids[role] for role in ("eos", "eot", "eom") if role in ids})
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": ids.get("pad"),
    }


def _template(header: Header) -> dict[str, str]:
    template = header.metadata.get("tokenizer.chat_template")
    if template is None:
        return {}
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        what = f"tokenizer.chat_template is not a text of at most {MAX_TEMPLATE} characters"
        raise ModelError(what, where=str(header.path), fix=_FOLDER)
    return {"chat_template.jinja": template}


# --- writing ---------------------------------------------------------------------------------------------------------

_CHUNK = 1 << 20  # values expanded at a time: 4 MiB of float32


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        with runs.disk(folder / name, len(text.encode())), (folder / name).open("xb") as file:
            file.write(text.encode())


def _write_weights(target: Path, weights: tuple[_Weight, ...], data: mmap.mmap, path: Path) -> None:
    """A safetensors file with its names sorted and one metadata key, so that equal weights are equal bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + 4 * math.prod(weight.source.shape)
        entries[weight.name] = {"dtype": "F32", "shape": list(weight.source.shape), "data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    needed = 8 + len(head) + end
    runs.need_space(target, needed)
    with runs.disk(target, needed), target.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for weight in weights:
            for values in _expanded(weight, data):
                if not np.isfinite(values).all():
                    raise ModelError(f"tensor {weight.source.name} holds NaN or Inf", where=str(path), fix=_BROKEN)
                file.write(values.tobytes())


def _expanded(weight: _Weight, data: mmap.mmap) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's values, float32, a few rows at a time."""
    library, source = _library(), weight.source
    kind = library.constants.GGMLQuantizationType[source.type]
    rows = math.prod(source.shape[:-1])
    raw = np.frombuffer(data, np.uint8, source.nbytes, source.offset).reshape(rows, -1)
    step = max(1, _CHUNK // source.shape[-1])
    for start in range(0, rows, step):
        part = raw[start : start + step] if weight.order is None else raw[weight.order[start : start + step]]
        with np.errstate(all="ignore"):
            values = library.quants.dequantize(part, kind)
        yield np.ascontiguousarray(values, dtype="<f4")
