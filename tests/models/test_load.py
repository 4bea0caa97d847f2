"""Bases by every kind of name, and the ones that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, write_base, write_model
from metier.errors import ModelError, ResourceError
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


@pytest.mark.parametrize("kind", load.ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_read_tensor_by_tensor_is_that_of_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path, kind, tie_word_embeddings=tied)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ours = load.model(load.resolve(str(folder), tmp_path), dtype=dtype, device=CPU)
        for one, other in (
            (dict(ours.named_parameters()), dict(theirs.named_parameters())),
            (dict(ours.named_buffers()), dict(theirs.named_buffers())),
        ):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_old_names_and_computed_tensors_in_files_are_known(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "old"
    shutil.copytree(tiny, folder)
    tensors = {n.removeprefix("model."): t for n, t in load_file(folder / "model.safetensors").items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["embed_out.weight"] = tensors.pop("embed_tokens.weight")  # tied, so either name will do
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    new, old = (load.model(load.resolve(str(f), f), dtype=torch.float32, device=CPU) for f in (tiny, folder))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))


def test_shards_are_found_by_their_index(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shards"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "consolidated.safetensors").write_bytes(b"a second copy of the weights, which no index names")
    whole, parts = (load.model(load.resolve(str(f), f), dtype=torch.float32, device=CPU) for f in (tiny, folder))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))

    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = sorted(good["weight_map"])[0]
    for place, says in (("../elsewhere.safetensors", "outside"), ("gone.safetensors", "cannot be loaded")):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: place}}))
        with pytest.raises(ModelError, match=says):
            load.model(load.resolve(str(folder), folder), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("damage", "says"),
    [("extra", "unexpected: stranger"), ("shape", r"norm.weight is \(47,\)"), ("whole", "fractions")],
)
def test_tensors_that_do_not_fit_are_named(tiny: Path, tmp_path: Path, damage: str, says: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    if damage == "extra":
        tensors["stranger"] = torch.zeros(1)
    elif damage == "shape":
        tensors["model.norm.weight"] = torch.ones(47)
    else:
        tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=says):
        load.model(load.resolve(str(folder), tmp_path), dtype=torch.float32, device=CPU, quantize="nf4")


def test_a_base_that_does_not_fit_in_memory_is_refused_with_the_way_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load.resolve(str(tiny), tiny)
    # 48 · (48 · 2 + 16 · 2 + 80 · 3) · 2 = 35,328 linear weights of 4 bytes or 4.127 bits; 18,672 others of 4; and the
    # largest tensor, 384 · 48, once more: 289,728 and 166,611 bytes
    monkeypatch.setattr(load, "available_memory", lambda device: 200_000)
    load.model(base, dtype=torch.float32, device=CPU, quantize="nf4")
    with pytest.raises(ResourceError) as caught:
        load.model(base, dtype=torch.float32, device=CPU)
    assert "nf4" in caught.value.fix


@pytest.mark.parametrize("name", [*FAMILIES, "yarn", "longrope"])
def test_the_stated_context_is_that_of_the_model(tmp_path: Path, name: str) -> None:
    base = load.resolve(str(write_base(tmp_path, name)), tmp_path)
    assert load.stated_context(base) == load.context(load.skeleton(base)) == (140 if name == "longrope" else 512)
