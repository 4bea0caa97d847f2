"""The page: complete, self-contained, escaped, deterministic, and whole where pieces are missing."""

from __future__ import annotations

import hashlib
import html.parser
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from metier import config, cost, plots, records, runs
from metier.errors import ResourceError
from metier.records import Completion, Example, Message, Score
from metier.release import gate, report

EVIL = '<script>alert(1)</script><img src="http://evil.test/x"> @import url(http://evil.test) {{ 7*7 }} \u202egpj.exe \x1b[31m'
LICENCES = ("apache-2.0", "bsd-new", "gpl-2.0-plus", "lgpl-2.1", "mit", "mpl-2.0")
CATEGORIES = {"apache-2.0": "permissive", "bsd-new": "permissive", "mit": "permissive", "mpl-2.0": "weak copyleft"}
SKILL = {"base": 0.1, "prompt": 0.4, "few-shot": 0.55, "tuned": 0.85}
NOTICES = (
    "Licensed under the {0} license; you may not use this file except in compliance with it.\n\nUnless required by "
    "applicable law or agreed to in writing, software distributed under the licence is provided “as is”.",
    "The terms of use of the software are governed by {0}. See the file COPYING for the details.",
    "This plugin is free software: you can redistribute it and/or modify it under the terms of {0}, or (at your option) "
    "any later version. It comes WITHOUT ANY WARRANTY; without even the implied warranty of merchantability.",
)


def make_run(
    run: Path,
    *,
    cases: int = 60,
    arms: tuple[str, ...] = config.ARMS,
    skill: dict[str, float] = SKILL,
    hostile: str = "",
    fields: tuple[str, str] = ("license", "category"),
    **sealed: Any,
) -> Path:
    """A small finished run, its figures drawn at random with a fixed seed, and every text `hostile` where it may be."""
    random_ = random.Random(0)
    spec = _spec(arms)
    for folder in ("data", "train", "proof"):
        (run / folder).mkdir(parents=True)
    runs.write(run / "specialist.yaml", config.dump(spec))
    examples = [_example(i, random_, hostile, fields) for i in range(cases)]
    _write_data(run / "data", examples, hostile)
    _write_training(run / "train", hostile)
    outputs, scores = [], []
    for arm in arms:
        for example in examples:
            completion, judged = _answer(example, arm, skill[arm], random_, hostile)
            outputs.append(completion)
            scores += judged
    proof = run / "proof"
    runs.write(proof / "outputs.jsonl", records.lines(outputs))
    runs.write(proof / "scores.jsonl", records.lines(scores))
    seal = runs.sha256(run / "data" / "test.jsonl")
    found = gate.verdict(
        scores,
        outputs,
        {e.id: e.group for e in examples},
        spec.prove,
        sealed={"registered": "ab" * 32, "seal": seal, "registered_before_training": True} | sealed,
        costs={arm: _cost([o for o in outputs if o.arm == arm]) for arm in arms},
    )
    runs.write_json(proof / "verdict.json", found)
    return run


def _spec(arms: tuple[str, ...]) -> config.Spec:
    rivals = [arm for arm in ("prompt", "few-shot") if arm in arms] or (["base"] if "base" in arms else [])
    claims = [{"beats": arm} for arm in rivals] + [{"format": "valid"}]
    return config.validate(
        {
            "name": "licence-clerk",
            "task": {"instruction": "Read the notice and answer with one JSON object.", "schema": "answer.schema.json"},
            "data": {"examples": ["pairs.jsonl"], "attribution": "Notices from the ScanCode data set, CC BY 4.0."},
            "prove": {"arms": list(arms), "claims": claims},
        },
        "a test",
    )


def _example(number: int, random_: random.Random, hostile: str, fields: tuple[str, str]) -> Example:
    licence = random_.choice(LICENCES)
    expected = {fields[0]: licence, fields[1]: CATEGORIES.get(licence, "copyleft")}
    notice = random_.choice(NOTICES).format(licence) + hostile
    messages = (Message("system", "Read it."), Message("user", notice), Message("assistant", json.dumps(expected)))
    return Example(f"case-{number:03}{hostile}", messages, {"row": number}, f"group-{number}", expected, ("json",))


def _write_data(folder: Path, examples: list[Example], hostile: str) -> None:
    runs.write(folder / "test.jsonl", records.lines(examples))
    runs.write(folder / "card.md", f"# Data card\n\nNotices and their licences. {hostile}\n")
    test = runs.sha256(folder / "test.jsonl")
    split = {"rows": 700, "groups": 650, "tokens": 84_000, "supervised_tokens": 15_400}
    dataset = {
        "counts": {"in": 947, "used": 900, "duplicate": 40, "rejected": 7},
        "splits": {"train": split, "valid": split | {"rows": 140}, "test": split | {"rows": len(examples)}},
        "hashes": {"test.jsonl": test},
        "seal": test,
        "opened": 1,
        "reasons": {"the same as another row": 40, f"empty answer{hostile}": 7},
        "findings": [{"what": f"train has 700 rows of the 1,000 asked for{hostile}", "fix": "give more data"}],
    }
    runs.write_json(folder / "dataset.json", dataset)


def _write_training(folder: Path, hostile: str) -> None:
    random_ = random.Random(1)
    metrics: list[dict[str, Any]] = []
    for step in range(1, 89):
        loss = 0.06 + 2.6 * 0.93**step + 0.25 * random_.random() * 0.97**step
        metrics.append(
            {"step": step, "stage": "sft", "loss": loss, "lr": 1e-3, "grad_norm": 0.8, "tokens": 1900}
            | {"supervised_tokens": 350, "seconds": 1.9}
        )
        if step % 22 == 0:
            metrics.append({"step": step, "stage": "sft", "valid_loss": 0.09 + 2.4 * 0.93**step})
    runs.write(folder / "metrics.jsonl", records.lines(metrics))
    plan = {
        "device": "cpu",
        "dtype": "bf16",
        "micro_batch_tokens": 4096,
        "checkpointing": "none",
        "memory_gb": {"predicted": 2.31, "measured": 2.187},
        "tokens_per_second": {"predicted": 1010.0, "measured": 942.5},
        "seconds": {"predicted": 740.0, "measured": None},
        "why": [f"bf16: the faster number format in this machine's own measurement {hostile}".strip()],
    }
    runs.write_json(folder / "plan.json", plan)
    act = {"format": 1, "act": "train", "inputs": {"base": "cd" * 32}, "seconds": 812.4}
    runs.write_json(folder / "act.json", act | {"outputs": {"adapter/adapter_model.safetensors": "ef" * 32}})


def _answer(
    example: Example, arm: str, skill: float, random_: random.Random, hostile: str
) -> tuple[Completion, list[Score]]:
    """A completion that is right as often as `skill`, and what the graders say of it."""
    answer = dict(example.expected)
    kind = random_.random()
    first, second = answer
    if kind > skill:
        answer[first] = random_.choice([x for x in LICENCES if x != answer[first]]) + hostile
        if random_.random() < 0.4:
            answer[second] = "public domain" + hostile
    valid = kind < skill or random_.random() < skill
    parses = valid or random_.random() < 0.6
    answer |= {} if valid else {"note": "I think so" + hostile}
    text = json.dumps(answer) if parses else f"Sure! The licence is {answer[first]}, because{hostile}"
    values: dict[str, float | None] = {"json": float(parses), "schema": float(valid)}
    values |= {f"field:{k}": float(parses and answer[k] == v) for k, v in example.expected.items()}
    values["all"] = float(valid and parses and answer == example.expected)
    why = {"json": f"Expecting value: line 1 column 1 {hostile}", "schema": f"`note` is not allowed {hostile}"}
    scores = [Score(example.id, arm, g, v, "" if v else why.get(g, "differs")) for g, v in values.items()]
    tokens = {"base": 110, "prompt": 240, "few-shot": 610, "tuned": 110}[arm] + random_.randrange(40)
    finish = "stop" if parses else "length"
    return Completion(example.id, arm, text, tokens, len(text) // 4, finish, 0.11), scores


def _cost(outputs: list[Completion]) -> dict[str, float]:
    prompt, new = sum(o.prompt_tokens for o in outputs), sum(o.new_tokens for o in outputs)
    return cost.arm_cost(prompt, 60, new, len(outputs), cost.Rates(1000, 100), 0.10)
