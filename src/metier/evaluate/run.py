"""Every arm answers every sealed case, and every answer is graded: the measuring part of the prove act.

Arms go one after another, batches within an arm in a fixed order, and each batch is on disk before the next begins;
an interrupted proof goes on with the batch it was in. The test set is read only if its seal is whole, and each proof
counts as one opening.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from metier import machine, progress, records, runs
from metier.config import Loaded
from metier.cost import Rates
from metier.errors import RunError
from metier.evaluate import metrics, systems
from metier.models import generate, load
from metier.models.generate import Decoding, Generated
from metier.models.schema import Grammar
from metier.models.tuned import Pair
from metier.records import Case, Completion, Score
from metier.runs import Run
from metier.text import chat
from metier.text.chat import Renderer

OUTPUTS, SCORES = "outputs.jsonl", "scores.jsonl"


def measure(loaded: Loaded, run: Run, work: Path) -> None:
    """Writes `outputs.jsonl` and `scores.jsonl` into `work`."""
    spec = loaded.spec
    data, trained = run.require("build"), run.require("train")
    open_seal(data, first=not (work / OUTPUTS).exists())
    cases = [records.case(e) for e in records.examples(data / "test.jsonl")]
    task = runs.read_json(data / "task.json")
    asks = systems.asks(task, records.examples(data / "train.jsonl"))

    machine.prepare(spec.machine.threads)
    device = machine.device(spec.machine.device)
    dtype = machine.dtype(spec.machine.dtype, device)
    base = load.resolve(spec.base, loaded.folder, spec.base_sha256)
    renderer = chat.of_run(base.folder, data)
    pair = Pair(base, trained, dtype=dtype, device=device)
    decoding = Decoding(spec.prove.max_new_tokens, spec.prove.temperature, spec.prove.top_p, spec.seed)

    grammar = constraint(loaded, task, renderer)
    shared: dict[str, int] = {}
    done = _whole_lines(work / OUTPUTS)
    with (
        runs.stoppable() as stop,
        progress.bar("prove", len(cases) * len(spec.prove.arms), "answers", len(done)) as bar,
    ):
        for arm in spec.prove.arms:
            prompts = [renderer.prompt(asks[arm](case)) for case in cases]
            shared[arm] = generate.common_prefix(prompts)
            skip = frozenset(i for i, case in enumerate(cases) if (case.id, arm) in done)
            for batch in answers(pair, prompts, renderer, decoding, tuned=arm == "tuned", grammar=grammar, skip=skip):
                fresh = [(i, g) for i, g in batch if (cases[i].id, arm) not in done]
                found = [_completion(cases[i], arm, prompts[i], g, renderer) for i, g in fresh]
                _append(work / OUTPUTS, found)
                bar(len(found), arm)
                stop.check()
    runs.write_json(work / "shared.json", shared)
    runs.write(work / SCORES, records.lines(_scores(cases, work / OUTPUTS, task["schema"], spec.prove.arms)))


def answers(
    pair: Pair,
    prompts: Sequence[np.ndarray],
    renderer: Renderer,
    decoding: Decoding,
    *,
    tuned: bool,
    grammar: Grammar | None = None,
    skip: frozenset[int] = frozenset(),
) -> Iterator[list[tuple[int, Generated]]]:
    """Batches of (index, answer) from the tuned model, or from the base."""
    with pair.model(tuned=tuned) as model:
        yield from generate.generate(model, prompts, renderer.stop_ids, decoding, grammar=grammar, skip=skip)


def constraint(loaded: Loaded, task: dict[str, Any], renderer: Renderer) -> Grammar | None:
    """The grammar of the task's schema, where the proof constrains answers to it: in every arm alike."""
    if not loaded.spec.prove.constrained:
        return None
    return Grammar(task["schema"], renderer.folder / "tokenizer.json", renderer.stop_ids, renderer.around)


def open_seal(data: Path, *, first: bool) -> None:
    """Holds the test set against its seal, and counts the opening."""
    card = runs.read_json(data / "dataset.json")
    actual = runs.sha256(data / "test.jsonl")
    if actual != card["seal"]:
        raise RunError(
            f"the test set was altered after it was sealed: expected {card['seal'][:16]}…, found {actual[:16]}…",
            where=str(data / "test.jsonl"),
            fix="build the data again in a new run folder; a proof on it would mean nothing",
        )
    if first:
        runs.write_json(data / "dataset.json", card | {"opened": card["opened"] + 1})


def rates(loaded: Loaded) -> Rates:
    """This machine's remembered speeds with this base, for the cost figures of the verdict."""
    spec = loaded.spec
    device = machine.device(spec.machine.device)
    dtype = machine.dtype(spec.machine.dtype, device)
    base = load.resolve(spec.base, loaded.folder, spec.base_sha256)
    name = f"rates:{base.sha256[:16]}:{device.type}:{str(dtype).removeprefix('torch.')}:{spec.machine.threads}"
    machine.prepare(spec.machine.threads)
    return Rates(**machine.remembered(name, lambda: _measure_rates(load.model(base, dtype=dtype, device=device))))


def _measure_rates(model: PreTrainedModel) -> dict[str, float]:
    """Tokens a second of reading prompts and of writing answers, on a batch of random tokens."""
    rows, length, new = 32, 64, 24
    random = np.random.default_rng(0)
    prompts = [random.integers(0, model.config.vocab_size, length) for _ in range(rows)]
    seconds = {}
    for count in (2, 1, 1 + new):  # the first warms up
        start = time.perf_counter()
        for _ in generate.generate(model, prompts, frozenset(), Decoding(count)):
            pass
        seconds[count] = time.perf_counter() - start
    return {
        "prefill_tokens_per_second": round(rows * length / seconds[1], 1),
        "decode_tokens_per_second": round(rows * new / max(seconds[1 + new] - seconds[1], 1e-3), 1),
    }


def _completion(case: Case, arm: str, prompt: np.ndarray, answer: Generated, renderer: Renderer) -> Completion:
    text = renderer.parse(answer.ids)
    new = len(answer.ids) + (answer.finish == "stop")
    return Completion(case.id, arm, text, int(prompt.size), new, answer.finish, round(answer.seconds, 4))


def _scores(cases: Sequence[Case], outputs: Path, schema: dict[str, Any] | None, arms: Sequence[str]) -> list[Score]:
    """Scores in the order of arms and cases, whatever order the answers came in."""
    found = {(c.case, c.arm): c for c in records.completions(outputs)}
    return [s for arm in arms for case in cases for s in metrics.grade(case, found[case.id, arm], schema)]


def _whole_lines(path: Path) -> set[tuple[str, str]]:
    """The (case, arm) pairs on disk; a line that a kill cut short is removed."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        runs.write(path, whole)
    return {(c.case, c.arm) for c in records.completions(path)}


def _append(path: Path, found: Sequence[Completion]) -> None:
    with runs.disk(path), path.open("ab") as file:
        file.write(records.lines(found))
