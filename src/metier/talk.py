"""One question, base and specialist side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metier import config, machine, runs
from metier.config import Loaded
from metier.errors import DataError, RunError
from metier.models import tuned
from metier.records import Message


def ask(run_folder: Path, text: str) -> dict[str, Any]:
    """{"base", "tuned"}: the two answers to `text`, each with its number of tokens and how it ended."""
    loaded = of_run(run_folder)
    if not text.strip():
        raise DataError("the question is empty", fix='give a text: metier ask RUN "your text"')
    tuned.folder(run_folder / "train")
    machine.import_torch()
    from metier.evaluate import run as evaluation
    from metier.models import load
    from metier.models.generate import Decoding
    from metier.text import chat

    machine.prepare(loaded.spec.machine.threads)
    device = machine.device(loaded.spec.machine.device)
    base = load.resolve(loaded.spec.base, loaded.folder, loaded.spec.base_sha256)
    dtype = machine.dtype(loaded.spec.machine.dtype, device)
    pair = tuned.Pair(base, run_folder / "train", dtype=dtype, device=device)
    renderer = chat.of_run(base.folder, run_folder / "data")
    task = runs.read_json(run_folder / "data" / "task.json")
    prompt = renderer.prompt((Message("system", task["instruction"]), Message("user", text)))
    prove = loaded.spec.prove
    decoding = Decoding(prove.max_new_tokens, prove.temperature, prove.top_p, loaded.spec.seed)
    grammar = evaluation.constraint(loaded, task, renderer)
    said = {}
    for name in ("base", "tuned"):
        [[(_, answer)]] = evaluation.answers(pair, [prompt], renderer, decoding, tuned=name == "tuned", grammar=grammar)
        said[name] = {"text": renderer.parse(answer.ids), "new_tokens": len(answer.ids), "finish": answer.finish}
    return said


def of_run(run_folder: Path) -> Loaded:
    """The settings a run was made with."""
    file = run_folder / "specialist.yaml"
    if not file.is_file():
        raise RunError(
            f"no run at {run_folder}", where=str(run_folder), fix="give a run folder, such as runs/licence-clerk"
        )
    return config.load(file)
