"""Does the answer parse, and is it valid against the schema? Two questions, two graders."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from metier.records import Case, Completion, Score


def parsed(text: str) -> tuple[Any, str]:
    """(value, "") of an answer that is one strict JSON value and nothing else, or (None, why not).

    Strict: no code fence, no prose around it, no duplicate keys, no NaN or Infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant), ""
    except RecursionError:
        return None, "nested too deep"
    except ValueError as error:
        return None, str(error)[:120]


def parses(case: Case, completion: Completion) -> Score:
    """1 where the whole answer is one strict JSON value."""
    _, why = parsed(completion.text)
    return Score(case.id, completion.arm, "json", float(not why), why)


def valid(case: Case, completion: Completion, schema: dict[str, Any]) -> Score:
    """1 where the answer is valid against the task's schema (JSON Schema, draft 2020-12)."""
    value, why = parsed(completion.text)
    if not why:
        error = next(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value), None)
        why = "" if error is None else error.message[:120]
    return Score(case.id, completion.arm, "schema", float(not why), why)


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
