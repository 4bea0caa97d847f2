"""The front of the ship act: the adapter, the card and the certificate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metier import machine, records, runs
from metier.config import Loaded
from metier.errors import PolicyError
from metier.models import load
from metier.release import card, certificate
from metier.runs import Run

PROMPTS = 32


def ship(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    """Writes the release into `work`; an artefact that fails a check is not published."""
    machine.prepare(loaded.spec.machine.threads)
    base = load.resolve(loaded.spec.base, loaded.folder, loaded.spec.base_sha256)
    data, proof = run.require("build"), run.require("prove")
    runs.write(work / "README.md", card.model_card(loaded, run, base))
    artefacts = [_ARTEFACTS[kind](run, base, work) for kind in loaded.spec.ship.formats]
    seal = runs.read_json(data / "dataset.json")["seal"]
    made = certificate.certificate(base, seal, proof / "verdict.json", artefacts)
    _hold(made, work)
    runs.write_json(work / "certificate.json", made)
    return {"pass": True, "artefacts": artefacts}


def _adapter(run: Run, base: load.Base, work: Path) -> dict[str, Any]:
    """The adapter folder, copied, read back and compared."""
    proved, shipped = run.require("train") / "adapter", work / "adapter"
    with runs.disk(shipped):
        shutil.rmtree(shipped, ignore_errors=True)
        shutil.copytree(proved, shipped)
    runs.write(shipped / "README.md", (work / "README.md").read_bytes())
    prompts = [e.prompt for e in records.examples(run.act("build") / "valid.jsonl")[:PROMPTS]]
    return {
        "path": "adapter",
        "kind": "adapter",
        "sha256": runs.sha256(shipped / "adapter_model.safetensors"),
        "checks": certificate.adapter_checks(base, proved, shipped, prompts),
    }


_ARTEFACTS: dict[str, Callable[[Run, load.Base, Path], dict[str, Any]]] = {"adapter": _adapter}


def _hold(made: dict[str, Any], work: Path) -> None:
    failed = next((c for a in made["artefacts"] for c in a["checks"] if not c["pass"]), None)
    if failed:
        raise PolicyError(
            f"the release is not what was proved: {failed['name']} is {failed['value']}, {failed['what']}",
            where=str(work),
            fix="run `metier train` and `metier prove` again",
        )
