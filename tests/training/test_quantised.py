"""Training on a base in few bits, from a specialist to an adapter that fits the base as released."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import metier
from conftest import write_specialist
from metier import machine
from metier.models import load, lora
from metier.training import plan

ADAPTER = Path("colours", "train", "adapter")


def trained(folder: Path, tiny: Path, *settings: str) -> Path:
    """The run folder's parent, after build and train."""
    spec = write_specialist(folder / "own", tiny, rows=24)
    metier.build(spec, runs=folder / "runs")
    metier.train(spec, runs=folder / "runs", settings=[*settings, "train.epochs=1"])
    return folder / "runs"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_learnt_on_few_bits_fits_the_base_as_released(tiny: Path, tmp_path: Path, kind: str) -> None:
    runs = trained(tmp_path, tiny, f"train.quantize={kind}")
    chosen = json.loads((runs / "colours" / "train" / "plan.json").read_text())
    assert chosen["quantize"] == kind and any(line.startswith(kind) for line in chosen["why"])
    model = load.model(load.resolve(str(tiny), tiny), dtype=torch.float32, device=torch.device("cpu"))
    lora.load(model, runs / ADAPTER)
    assert any(float(layer.lora_B.detach().abs().max()) > 0 for layer in lora.adapted(model).values())


def test_two_quantised_trainings_are_equal_byte_for_byte(tiny: Path, tmp_path: Path) -> None:
    once, again, plain = (
        (trained(tmp_path / name, tiny, f"train.quantize={kind}") / ADAPTER / lora.WEIGHTS).read_bytes()
        for name, kind in (("once", "nf4"), ("again", "nf4"), ("plain", "none"))
    )
    assert once == again != plain


def test_a_machine_too_small_recomputes_layers_and_learns_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = plan.shape(load.skeleton(load.resolve(str(tiny), tiny)), rank=4, targets="all-linear")
    needed = {c: plan._memory_gb(sizes, 512, plan.Held("fp32", checkpointing=c)) for c in ("none", "layer")}
    expected = (trained(tmp_path / "large", tiny, "machine.tokens=512") / ADAPTER / lora.WEIGHTS).read_bytes()
    between = sum(needed.values()) / 2
    monkeypatch.setattr(machine, "memory_gb", lambda where=None: between / plan._FULL)
    runs = trained(tmp_path / "small", tiny, "machine.tokens=512")
    chosen = json.loads((runs / "colours" / "train" / "plan.json").read_text())
    assert chosen["checkpointing"] == "layer" and any("activation checkpointing" in line for line in chosen["why"])
    assert (runs / ADAPTER / lora.WEIGHTS).read_bytes() == expected
