"""Answers against their schema, leaks, labels, findings."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from metier.config import Sizes
from metier.data import check
from metier.errors import ConfigError, DataError
from metier.records import Example, Message

OBJECT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["b"],
    "properties": {"b": {"enum": ["x", "y"]}, "a": {"type": "array", "items": {"properties": {"q": {}, "p": {}}}}},
}


def example(name: str, question: str, expected: Any, group: str = "") -> Example:
    messages = (Message("user", question), Message("assistant", json.dumps(expected)))
    return Example(name, messages, {}, group or name, expected)


def splits(train: list[Any], valid: list[Any], test: list[Any]) -> dict[str, list[Example]]:
    parts = {"train": train, "valid": valid, "test": test}
    return {name: [example(f"{name}{n}", f"{name}{n}", v) for n, v in enumerate(part)] for name, part in parts.items()}


def test_answers_are_held_against_the_schema() -> None:
    answers = check.Answers(check.schema(json.dumps(OBJECT), "s"))
    assert answers.wrong({"b": "x"}) == ""
    assert answers.wrong({"b": "z"}).startswith("/b 'z' is not one of")
    assert answers.wrong({}).startswith("answer 'b' is a required property")
    assert "unexpected" in answers.wrong({"b": "x", "c": 1})
    assert answers.wrong({"b": True}) != ""
    assert check.Answers(None).wrong("anything") == ""


def test_one_and_true_are_different_answers() -> None:
    answers = check.Answers({"properties": {"n": {"const": 1}}})
    assert answers.wrong({"n": 1}) == ""
    assert answers.wrong({"n": True}) != ""


def test_keys_come_in_the_order_of_the_schema() -> None:
    answers = check.Answers(OBJECT)
    value = {"z": 1, "a": [{"p": 1, "q": 2}, 3], "b": "x"}
    assert json.dumps(answers.ordered(value)) == '{"b": "x", "a": [{"q": 2, "p": 1}, 3], "z": 1}'
    assert answers.ordered(value) == value
    assert check.Answers(None).ordered(value) == value


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[]", "not a JSON object"),
        ("true", "not a JSON object"),
        ('{"type": "objekt"}', "not a JSON Schema: /type"),
        ('{"properties": {"a": {"minimum": "3"}}}', "not a JSON Schema: /properties/a/minimum"),
        ('{"$schema": "http://json-schema.org/draft-07/schema#"}', "of another draft"),
        ('{"$ref": "#/$defs/missing"}', "leads nowhere"),
        ('{"properties": {"a": {"$ref": "http://127.0.0.1:1/x.json"}}}', "leads nowhere"),
        ('{"properties": {"a": {"$ref": "file:///etc/passwd"}}}', "leads nowhere"),
        ('{"properties": {"a": {"$ref": "#missing"}}}', "leads nowhere"),
        ('{"pattern": "("}', "not a JSON Schema: /pattern"),
        ('{"patternProperties": {"(": {}}}', "not a JSON Schema: /patternProperties"),
    ],
)
def test_what_is_no_schema_is_refused_without_the_network(
    monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(ConfigError) as caught:
        check.schema(text, "answer.schema.json")
    assert what in caught.value.what
    assert caught.value.where == "answer.schema.json"
    assert caught.value.fix


def test_references_within_a_schema_and_data_that_looks_like_them_are_fine() -> None:
    text = '{"$defs": {"a": {"enum": [{"$ref": "#/nowhere"}]}}, "properties": {"x": {"$ref": "#/$defs/a"}}}'
    answers = check.Answers(check.schema(text, "s"))
    assert answers.wrong({"x": {"$ref": "#/nowhere"}}) == ""
    assert answers.wrong({"x": 1}) != ""


def test_an_endless_schema_is_an_error_not_a_crash() -> None:
    answers = check.Answers(check.schema('{"$ref": "#"}', "s"))
    with pytest.raises(ConfigError, match="without end"):
        answers.wrong({})


def test_leaks_are_found() -> None:
    good = {"train": [example("a", "p", 1), example("b", "q", 1, "a")], "test": [example("c", "r", 1)]}
    check.leaks(good)
    with pytest.raises(DataError, match="group a is in train and test"):
        check.leaks({**good, "valid": [], "test": [example("c", "r", 1, "a")]})
    with pytest.raises(DataError, match="the same question is in train and test"):
        check.leaks({**good, "test": [example("c", "q", 1)]})


def test_labels_are_counted_by_split_the_most_frequent_first() -> None:
    parts = splits(
        [{"l": "x", "t": "1"}, {"l": "y", "t": "2"}, {"l": "y", "t": "3"}], [{"l": "x", "t": "4"}], [{"l": "x"}]
    )
    assert check.labels(parts) == {"l": {"x": {"test": 1, "train": 1, "valid": 1}, "y": {"train": 2}}}
    assert check.labels(splits(["a", "a"], ["b"], ["b"])) == {
        "answer": {"a": {"train": 2}, "b": {"test": 1, "valid": 1}}
    }
    assert check.labels(
        splits([{"n": True}, {"n": 1}, {"n": None}], [{"n": [1]}, {"n": True}], [{"n": 1}, {"n": None}])
    ) == {"n": {"1": {"test": 1, "train": 1}, "null": {"test": 1, "train": 1}, "true": {"train": 1, "valid": 1}}}


def test_findings_say_what_and_what_to_do() -> None:
    parts = splits([{"l": "x"}] * 4, [{"l": "x"}], [{"l": "x"}] * 10 + [{"l": "z"}])
    found = check.findings(parts, Sizes(train=5, valid=1, test=11), {"conflict": 2}, {"id": 3})
    assert [f["what"] for f in found] == [
        "l: 1 values of test are never seen in train: z",
        "l: 91% of test is x, so a constant answer looks good",
        "train has 4 rows of the 5 asked for",
        "2 rows answer a question otherwise than another row does",
        "keys that are not used: 'id' (3 rows)",
    ]
    assert all(f["fix"] for f in found)
    sound = splits([{"l": "x"}, {"l": "y"}], [{"l": "x"}], [{"l": "x"}, {"l": "y"}])
    assert check.findings(sound, Sizes(train=2, valid=1, test=2), {}, {}) == []


def test_quantiles_are_values_that_occur() -> None:
    assert check.quantiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert check.quantiles([7]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert check.quantiles([3, 1, 2]) == {"p50": 2, "p90": 3, "p99": 3, "max": 3}
    assert check.quantiles([]) == {}
