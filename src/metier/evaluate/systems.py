"""The arms: how each system asks the model about a case.

All arms share weights, renderer, generator and graders; they differ in the messages and in whether the adapter is on.
`base` gets the instruction, `prompt` the best prompt one can write, `few-shot` that and the nearest training examples,
`tuned` what `base` gets, with the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from metier.records import Case, Example, Message
from metier.retrieve import Index

Ask = Callable[[Case], tuple[Message, ...]]


def asks(task: dict[str, Any], train: Sequence[Example]) -> dict[str, Ask]:
    """For each arm, the function from a case to the messages the model sees."""
    best = task["prompt"] or written_out(task["instruction"], task["schema"])
    shown = _Nearest(train, task["shots"])

    def instructed(case: Case) -> tuple[Message, ...]:
        return case.messages

    def prompted(case: Case) -> tuple[Message, ...]:
        return (Message("system", best), *_without_system(case.messages))

    def few_shot(case: Case) -> tuple[Message, ...]:
        turns = [m for e in shown.to(case) for m in _without_system(e.messages)]
        return (Message("system", best), *turns, *_without_system(case.messages))

    return {"base": instructed, "prompt": prompted, "few-shot": few_shot, "tuned": instructed}


def written_out(instruction: str, schema: dict[str, Any] | None) -> str:
    """The instruction with the schema and its rules in words: the prompt where the specialist gives none."""
    if schema is None:
        return instruction
    return (
        f"{instruction}\n\nThe answer must be valid against this JSON Schema:\n"
        f"{json.dumps(schema, ensure_ascii=False)}\n\nAnswer with the JSON object alone: no explanation, no code fence."
    )


class _Nearest:
    """The training examples nearest to a case, the nearest last, where the model looks most."""

    def __init__(self, train: Sequence[Example], shots: int) -> None:
        self._train, self._shots = train, shots
        self._index = Index([_question(e.messages) for e in train])

    def to(self, case: Case) -> list[Example]:
        found = self._index.search(_question(case.messages), self._shots)
        return [self._train[i] for i in reversed(found)]


def _question(messages: Sequence[Message]) -> str:
    return next((m.content for m in reversed(messages) if m.role == "user"), "")


def _without_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(m for m in messages if m.role != "system")
