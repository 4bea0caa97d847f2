"""Bases by every kind of name, and the ones that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, write_base
from metier.errors import ModelError
from metier.models import load

CPU = torch.device("cpu")


def test_a_folder_is_known_by_its_bytes(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    one, other = load.resolve(str(tiny), tmp_path), load.resolve("copy", tmp_path)
    assert one.sha256 == other.sha256
    with pytest.raises(ModelError, match="another hash"):
        load.resolve("copy", tmp_path, "0" * 64)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a.gguf", "org/name"])
def test_a_base_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load.resolve(name, tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_name_and_not_opened(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"weights{suffix}").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match="unsafe format"):
        load.resolve(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt9\nimport os"}, "not supported"),
        ({"model_type": "gemma3"}, "'gemma3' is not supported"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "both directions"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already"),
    ],
)
def test_architectures_that_are_not_exact_are_refused(tiny: Path, tmp_path: Path, changes: dict, says: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=says) as caught:
        load.model(load.resolve(str(folder), tmp_path), dtype=torch.float32, device=CPU)
    assert all(kind in caught.value.fix for kind in load.ARCHITECTURES)


def test_tensors_that_are_missing_or_not_finite_are_named(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for damage, says in (("missing", "q_proj"), ("nan", "NaN")):
        folder = tmp_path / damage
        shutil.copytree(tiny, folder)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        if damage == "missing":
            del tensors[name]
        else:
            tensors[name][0, 0] = torch.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=says):
            load.model(load.resolve(str(folder), tmp_path), dtype=torch.float32, device=CPU)


def test_a_file_that_only_says_it_is_safetensors_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError):
        load.model(load.resolve(str(folder), tmp_path), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", [*FAMILIES, "yarn", "longrope"])
def test_the_stated_context_is_that_of_the_model(tmp_path: Path, name: str) -> None:
    base = load.resolve(str(write_base(tmp_path, name)), tmp_path)
    assert load.stated_context(base) == load.context(load.skeleton(base)) == (140 if name == "longrope" else 512)
