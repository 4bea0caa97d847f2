"""Graders: pure functions from a case and a completion to a score. An exam and a reward are the same function."""

from __future__ import annotations

from typing import Any

from metier.config import Prove
from metier.errors import ConfigError, nearest
from metier.evaluate import format
from metier.records import Case, Completion, Score


def grade(case: Case, completion: Completion, schema: dict[str, Any] | None) -> list[Score]:
    """All graders that apply: form first, then content."""
    if isinstance(case.expected, str) and schema is None:
        return [_exact(case, completion)]
    form = [format.parses(case, completion)]
    if schema is not None:
        form.append(format.valid(case, completion, schema))
    content = _fields(case, completion) if isinstance(case.expected, dict) else [_value(case, completion)]
    return [*form, *content]


def hold_claims(prove: Prove, expected: Any) -> None:
    """Refuses, before anything is trained, a claim about a grader that this task does not have."""
    fields = {f"field:{name}" for name in expected} if isinstance(expected, dict) else set()
    known = {"all", "json", "schema", *fields}
    for claim in prove.claims:
        if claim.grader not in known:
            raise ConfigError(
                f"claim `{claim.name}`: there is no grader {claim.grader!r} here",
                where="prove.claims",
                fix=nearest(claim.grader, known),
            )


def _fields(case: Case, completion: Completion) -> list[Score]:
    """One score per expected field, and `all`: every field right and none besides."""
    value, _ = format.parsed(completion.text)
    answer = value if isinstance(value, dict) else {}
    scores = []
    for name, expected in case.expected.items():
        right = name in answer and same(answer[name], expected)
        why = "" if right else f"{_shown(answer.get(name))} where {_shown(expected)} is right"
        scores.append(Score(case.id, completion.arm, f"field:{name}", float(right), why))
    whole = all(s.value for s in scores) and answer.keys() == case.expected.keys()
    wrong = ", ".join(s.grader.removeprefix("field:") for s in scores if not s.value)
    return [
        *scores,
        Score(case.id, completion.arm, "all", float(whole), "" if whole else f"wrong: {wrong or 'extra keys'}"),
    ]


def _value(case: Case, completion: Completion) -> Score:
    """1 where the answer is the expected JSON value."""
    value, why = format.parsed(completion.text)
    right = not why and same(value, case.expected)
    why = "" if right else why or f"{_shown(value)} is another value"
    return Score(case.id, completion.arm, "all", float(right), why)


def _exact(case: Case, completion: Completion) -> Score:
    """1 where the answer is the expected text, white space around it aside."""
    right = completion.text.strip() == str(case.expected).strip()
    return Score(case.id, completion.arm, "all", float(right), "" if right else "another text")


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values in which true is not 1, however deep."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
