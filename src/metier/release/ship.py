"""The front of the ship act: what was trained, the card and the certificate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from metier import machine, records, runs
from metier.config import Loaded
from metier.errors import PolicyError
from metier.models import load, tuned
from metier.release import card, certificate
from metier.runs import Run
from metier.text import chat

PROMPTS = 32


def ship(loaded: Loaded, run: Run, work: Path) -> dict[str, Any]:
    """Writes the release into `work`; an artefact that fails a check is not published."""
    machine.prepare(loaded.spec.machine.threads)
    base = load.resolve(loaded.spec.base, loaded.folder, loaded.spec.base_sha256)
    data, proof = run.require("build"), run.require("prove")
    runs.write(work / "README.md", card.model_card(loaded, run, base))
    trained = tuned.folder(run.require("train"))
    artefacts = [_copied(run, base, trained, work / name) for name in loaded.spec.ship.formats or (trained.name,)]
    seal = runs.read_json(data / "dataset.json")["seal"]
    made = certificate.certificate(base, seal, proof / "verdict.json", artefacts)
    _hold(made, work)
    runs.write_json(work / "certificate.json", made)
    return {"pass": True, "artefacts": artefacts}


def _copied(run: Run, base: load.Base, proved: Path, shipped: Path) -> dict[str, Any]:
    """The trained folder, an adapter or a model, copied, read back and compared."""
    with runs.disk(shipped):
        shutil.rmtree(shipped, ignore_errors=True)
        shutil.copytree(proved, shipped)
    runs.write(shipped / "README.md", (shipped.parent / "README.md").read_bytes())
    prompts = [e.prompt for e in records.examples(run.act("build") / "valid.jsonl")[:PROMPTS]]
    hashes = {path.name: runs.sha256(path) for path in sorted(shipped.glob("*.safetensors"))}
    return {
        "path": shipped.name,
        "kind": shipped.name,
        "sha256": runs.digest(hashes) if len(hashes) > 1 else next(iter(hashes.values())),
        "checks": certificate.checks(base, chat.of_run(base.folder, run.act("build")), proved, shipped, prompts),
    }


def _hold(made: dict[str, Any], work: Path) -> None:
    failed = next((c for a in made["artefacts"] for c in a["checks"] if not c["pass"]), None)
    if failed:
        raise PolicyError(
            f"the release is not what was proved: {failed['name']} is {failed['value']}, {failed['what']}",
            where=str(work),
            fix="run `metier train` and `metier prove` again",
        )
