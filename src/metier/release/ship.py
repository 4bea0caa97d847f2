"""The front of the ship act: the adapter, the card and the certificate."""

from __future__ import annotations

import shutil
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
    data, trained, proof = (run.require(act) for act in ("build", "train", "prove"))
    shipped = work / "adapter"
    with runs.disk(shipped):
        shutil.rmtree(shipped, ignore_errors=True)
        shutil.copytree(trained / "adapter", shipped)
    runs.write(work / "README.md", card.model_card(loaded, run, base))
    runs.write(shipped / "README.md", (work / "README.md").read_bytes())

    prompts = [e.prompt for e in records.examples(data / "valid.jsonl")[:PROMPTS]]
    checks = certificate.adapter_checks(base, trained / "adapter", shipped, prompts)
    artefact = {
        "path": "adapter",
        "kind": "adapter",
        "sha256": runs.sha256(shipped / "adapter_model.safetensors"),
        "checks": checks,
    }
    seal = runs.read_json(data / "dataset.json")["seal"]
    made = certificate.certificate(base, seal, proof / "verdict.json", [artefact])
    if not made["pass"]:
        failed = next(c for c in checks if not c["pass"])
        raise PolicyError(
            f"the release is not what was proved: {failed['name']} is {failed['value']}, {failed['what']}",
            where=str(shipped),
            fix="run `metier train` and `metier prove` again",
        )
    runs.write_json(work / "certificate.json", made)
    return {"pass": True, "checks": checks}
