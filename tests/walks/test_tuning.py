"""The whole line for what is trained besides a plain adapter: killed, resumed, proved, shipped and asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import metier
from conftest import write_specialist
from metier import runs
from metier.training import loop

COMMON = {"learning_rate": 0.01, "epochs": 2, "batch_size": 4, "checkpoint_every": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": (
        "adapter/adapter_model.safetensors",
        {"rank": 4, "alpha": 8, "rslora": True, "dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "model": ("model/model.safetensors", {"tune": "full"}),
}


def interrupted(spec: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a training behind its fifth step, as a kill would: the last checkpoint is older."""
    real = loop.steps

    def cut(*args: Any, **kwargs: Any) -> Iterator[loop.StepResult]:
        for result in real(*args, **kwargs):
            if result.step == 5:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(loop, "steps", cut)
        with pytest.raises(KeyboardInterrupt):
            metier.train(spec, runs=folder)


@pytest.mark.parametrize("kind", KINDS)
def test_from_rows_to_a_release(tiny: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, settings = KINDS[kind]
    stages = [COMMON | settings]
    spec = write_specialist(tmp_path / "colours", tiny, train=stages, ship={"unproved": True})
    metier.run(spec, runs=tmp_path / "one")
    run = tmp_path / "one" / "colours"

    metier.build(spec, runs=tmp_path / "two")
    interrupted(spec, tmp_path / "two", monkeypatch)
    metier.train(spec, runs=tmp_path / "two")
    again = tmp_path / "two" / "colours" / "train" / weights
    assert runs.sha256(again) == runs.sha256(run / "train" / weights), "killed and resumed = uninterrupted"

    certificate = json.loads((run / "release" / "certificate.json").read_text())
    folder = weights.split("/")[0]
    [artefact] = certificate["artefacts"]
    assert (artefact["kind"], artefact["path"]) == (folder, folder) and certificate["pass"]
    assert artefact["sha256"] == runs.sha256(run / "release" / weights)
    assert f"{folder}-acts" in [check["name"] for check in artefact["checks"]]
    assert f"train/{weights}" in json.loads((run / "proof" / "act.json").read_text())["inputs"]
    said = metier.ask(run, "thing 5 of lot 9 is red")
    assert said["base"]["text"] != said["tuned"]["text"]
    card = (run / "release" / "README.md").read_text()
    assert ("Full fine-tuning: every weight" if kind == "model" else "LoRA with DoRA, rank 4") in card
    assert [o.status for o in metier.run(spec, runs=tmp_path / "one")] == ["up to date"] * 4
    if kind == "model":
        assert not (run / "train" / "adapter").exists()
        assert AutoModelForCausalLM.from_pretrained(run / "release" / "model").num_parameters() > 0
        assert (run / "release" / "model" / "chat_template.jinja").is_file()
