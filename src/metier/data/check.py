"""Is the data set sound: answers against their schema, splits against leaks, labels and lengths for people to judge."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metier import records
from metier.config import Sizes
from metier.errors import ConfigError, DataError
from metier.records import Example

MAX_LABELS = 64
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Splits = Mapping[str, Sequence[Example]]


class Answers:
    """The schema of valid answers; `schema` None accepts every text."""

    def __init__(self, schema: dict[str, Any] | None) -> None:
        self.schema = schema
        self._validator = _validator(schema) if schema is not None else None
        self._known: dict[str, str] = {}

    def wrong(self, value: Any) -> str:
        """Why an answer is not valid against the schema; empty where it is."""
        if self._validator is None:
            return ""
        text = json.dumps(value, sort_keys=True)
        if text not in self._known:
            self._known[text] = self._first_error(value)
        return self._known[text]

    def ordered(self, value: Any) -> Any:
        """The value with the keys of its objects in the order of the schema's properties, others after them."""
        return _ordered(value, self.schema or {})

    def _first_error(self, value: Any) -> str:
        assert self._validator
        try:
            error = next(iter(self._validator.iter_errors(value)), None)
        except RecursionError as recursion:
            raise ConfigError(
                "the schema refers to itself without end", where="task.schema", fix="mend its $ref"
            ) from recursion
        if error is None:
            return ""
        place = "".join(f"/{p}" for p in error.absolute_path)
        return f"{place or 'answer'} {error.message}"[:200]


def schema(text: str, where: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) in a text; anything else is a `ConfigError`."""
    try:
        value = records.loads(text.encode("utf-8"), where)
    except DataError as error:
        raise ConfigError(f"the schema is {error.what}", where=where, fix=error.fix) from error
    if not isinstance(value, dict):
        raise ConfigError("the schema is not a JSON object", where=where, fix='write {"type": "object", ...}')
    if value.get("$schema", DIALECT).rstrip("#") != DIALECT:
        raise ConfigError(
            f"the schema is of another draft: {str(value['$schema'])[:80]}",
            where=where,
            fix=f"rewrite it for draft 2020-12 and set $schema to {DIALECT}",
        )
    _hold_schema(value, where)
    return value


def leaks(splits: Splits) -> None:
    """Raises where a group, or the same question, is in two splits."""
    groups: dict[str, str] = {}
    questions: dict[tuple[tuple[str, str], ...], str] = {}
    for name, examples in splits.items():
        for example in examples:
            asked = tuple((m.role, m.content) for m in example.prompt)
            for what, other in (
                (f"group {example.group}", groups.setdefault(example.group, name)),
                ("the same question", questions.setdefault(asked, name)),
            ):
                if other != name:
                    raise DataError(
                        f"{what} is in {other} and {name}", where=f"row {example.id}", fix="build the data set again"
                    )


def labels(splits: Splits) -> dict[str, dict[str, dict[str, int]]]:
    """field -> value -> split -> rows, for fields of answers that have few values; a text is field `answer`."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for name, examples in splits.items():
        for example in examples:
            for field, value in _fields(example.expected):
                counts.setdefault(field, {}).setdefault(value, Counter())[name] += 1
    return {
        field: {v: dict(sorted(c.items())) for v, c in sorted(values.items(), key=_most_frequent)}
        for field, values in counts.items()
        if len(values) <= MAX_LABELS and sum(c.total() for c in values.values()) >= 2 * len(values)
    }


def findings(
    splits: Splits, sizes: Sizes, reasons: Mapping[str, int], unused: Mapping[str, int]
) -> list[dict[str, str]]:
    """What a person should know before training on this, and what to do about it."""
    out = [_finding(*f) for f in _label_findings(splits)]
    if "train" in splits and len(splits["train"]) < sizes.train:
        what = f"train has {len(splits['train']):,} rows of the {sizes.train:,} asked for"
        out.append(_finding(what, "give more data, or smaller data.sizes"))
    if conflicts := reasons.get("conflict", 0):
        what = f"{conflicts:,} rows answer a question otherwise than another row does"
        out.append(_finding(what, "look at `conflict` in ledger.jsonl: the labels may be wrong, or need more input"))
    if long := reasons.get("too_long", 0):
        what = f"{long:,} rows are longer than the base or train.max_length takes"
        out.append(_finding(what, "raise train.max_length, split them, or cut their questions: data.truncate=true"))
    if unused:
        keys = ", ".join(f"{k!a} ({n:,} rows)" for k, n in sorted(unused.items())[:8])
        out.append(_finding(f"keys that are not used: {keys}", "nothing, if they are notes; else see the known forms"))
    return out


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Median, 90 %, 99 % and largest of some lengths: values that occur."""
    ranked = sorted(lengths)
    out = {f"p{q}": ranked[math.ceil(q / 100 * len(ranked)) - 1] for q in (50, 90, 99)} if ranked else {}
    return {**out, "max": ranked[-1]} if ranked else {}


def _label_findings(splits: Splits) -> Iterator[tuple[str, str]]:
    for field, values in labels(splits).items():
        unseen = [v for v, c in values.items() if c.get("test") and not c.get("train")]
        if unseen:
            shown = ", ".join(unseen[:8]) + (" ..." if len(unseen) > 8 else "")
            yield f"{field}: {len(unseen)} values of test are never seen in train: {shown}", "give more training rows"
        rows = {v: c.get("test", 0) for v, c in values.items()}
        top = max(rows, key=lambda v: rows[v])
        if len(rows) > 1 and rows[top] > 0.9 * sum(rows.values()):
            share = rows[top] / sum(rows.values())
            yield f"{field}: {share:.0%} of test is {top}, so a constant answer looks good", "balance the examples"


def _fields(expected: Any) -> Iterator[tuple[str, str]]:
    for field, value in expected.items() if isinstance(expected, dict) else [("answer", expected)]:
        if isinstance(value, (str, int, float, bool)) or value is None:
            yield field, value if isinstance(value, str) else json.dumps(value)


def _most_frequent(item: tuple[str, Counter[str]]) -> tuple[int, str]:
    return -item[1].total(), item[0]


def _finding(what: str, fix: str) -> dict[str, str]:
    return {"what": what, "fix": fix}


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    # An empty registry: a reference outside the schema is never fetched.
    return Draft202012Validator(schema, registry=Registry())


def _hold_schema(value: dict[str, Any], where: str) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(value)
    except SchemaError as error:
        place = "".join(f"/{p}" for p in error.absolute_path)
        raise ConfigError(
            f"not a JSON Schema: {place} {error.message[:160]}", where=where, fix="mend the schema there"
        ) from error
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(value))
    for reference in _references(value):
        try:
            resolver.lookup(reference)
        except (Unresolvable, ValueError) as error:
            raise ConfigError(
                f"{reference!r} in the schema leads nowhere",
                where=where,
                fix="refer to a part of this file: #/$defs/...",
            ) from error


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("$ref", "$dynamicRef") and isinstance(inner, str):
                yield inner
            elif key not in ("enum", "const", "default", "examples"):
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _ordered(value: Any, schema: Any) -> Any:
    known = schema.get("properties", {}) if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        keys = [*(k for k in known if k in value), *(k for k in value if k not in known)]
        return {k: _ordered(value[k], known.get(k)) for k in keys}
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [_ordered(v, items) for v in value]
    return value
