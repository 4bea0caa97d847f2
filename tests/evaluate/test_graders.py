"""Graders on answers labelled by hand."""

from __future__ import annotations

import pytest

from metier.evaluate import metrics, systems
from metier.evaluate.format import parsed
from metier.records import Case, Completion, Example, Message

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "n": {"type": "integer"}},
    "required": ["a", "n"],
    "additionalProperties": False,
}
EXPECTED = {"a": "x", "n": 1}

# text, parses, valid, field a, field n, all
LABELLED = [
    ('{"a": "x", "n": 1}', 1, 1, 1, 1, 1),
    ('  {"n": 1, "a": "x"}\n', 1, 1, 1, 1, 1),
    ('{"a": "x", "n": 2}', 1, 1, 1, 0, 0),
    ('{"a": "z", "n": 1}', 1, 0, 0, 1, 0),
    ('{"a": "x", "n": 1, "more": 0}', 1, 0, 1, 1, 0),
    ('{"a": "x"}', 1, 0, 1, 0, 0),
    ('{"a": "x", "n": true}', 1, 0, 1, 0, 0),
    ('{"a": "x", "n": 1.0}', 1, 1, 1, 0, 0),
    ('{"a": "x", "n": "1"}', 1, 0, 1, 0, 0),
    ('```json\n{"a": "x", "n": 1}\n```', 0, 0, 0, 0, 0),
    ('Sure! {"a": "x", "n": 1}', 0, 0, 0, 0, 0),
    ('{"a": "x", "n": 1} done', 0, 0, 0, 0, 0),
    ('{"a": "x", "n": 1}{"a": "x", "n": 1}', 0, 0, 0, 0, 0),
    ('{"a": "y", "a": "x", "n": 1}', 0, 0, 0, 0, 0),
    ('{"a": "x", "n": NaN}', 0, 0, 0, 0, 0),
    ("{'a': 'x', 'n': 1}", 0, 0, 0, 0, 0),
    ('{"a": "x", "n": 1', 0, 0, 0, 0, 0),
    ('["x", 1]', 1, 0, 0, 0, 0),
    ('"x"', 1, 0, 0, 0, 0),
    ("null", 1, 0, 0, 0, 0),
    ("", 0, 0, 0, 0, 0),
    ('{"A": "x", "n": 1}', 1, 0, 0, 1, 0),
    ("[" * 100_000, 0, 0, 0, 0, 0),
    ('{"a": "\\u0078", "n": 1}', 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize(("text", "json", "schema", "a", "n", "whole"), LABELLED)
def test_labelled_answers(text: str, json: int, schema: int, a: int, n: int, whole: int) -> None:
    case = Case("c", (Message("user", "q"),), "g", EXPECTED, ())
    scores = metrics.grade(case, Completion("c", "tuned", text, 1, 1, "stop", 0.0), SCHEMA)
    got = {s.grader: s.value for s in scores}
    assert got == {"json": json, "schema": schema, "field:a": a, "field:n": n, "all": whole}
    assert all(bool(s.why) == (s.value == 0) for s in scores), "a wrong answer says why, a right one does not"


def test_texts_are_compared_as_texts() -> None:
    case = Case("c", (Message("user", "q"),), "g", "Paris", ())
    for text, value in (("Paris", 1), (" Paris\n", 1), ("paris", 0), ("Paris.", 0)):
        [score] = metrics.grade(case, Completion("c", "base", text, 1, 1, "stop", 0.0), None)
        assert (score.grader, score.value) == ("all", value)


def test_parsed_says_why() -> None:
    assert parsed('{"a": 1}') == ({"a": 1}, "")
    assert "twice" in parsed('{"a": 1, "a": 2}')[1]


def example(name: str, text: str) -> Example:
    return Example(name, (Message("system", "I"), Message("user", text), Message("assistant", name)), {}, name)


def test_arms_differ_only_in_what_is_said() -> None:
    train = [example("a", "red apple"), example("b", "green pear"), example("c", "grey stone road")]
    task = {"instruction": "I", "schema": SCHEMA, "prompt": "Best.", "shots": 2}
    asks = systems.asks(task, train)
    case = Case("q", (Message("system", "I"), Message("user", "a green pear tree")), "q", EXPECTED, ())
    assert asks["base"](case) == asks["tuned"](case) == case.messages
    assert asks["prompt"](case) == (Message("system", "Best."), case.messages[1])
    shown = asks["few-shot"](case)
    assert [m.role for m in shown] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert shown[4] == Message("assistant", "b"), "the nearest example stands last"
    assert shown[-1] == case.messages[1]


def test_without_a_prompt_the_schema_is_written_out() -> None:
    text = systems.written_out("Do it.", SCHEMA)
    assert text.startswith("Do it.") and '"enum": ["x", "y"]' in text
    assert systems.written_out("Do it.", None) == "Do it."


@pytest.mark.parametrize(
    ("expected", "schema", "right", "wrong"),
    [
        (["MIT"], None, '["MIT"]', '["BSD"]'),
        ([1], None, "[1]", "[true]"),
        (True, None, "true", "1"),
        (None, None, "null", "0"),
        ("MIT", {"type": "string"}, '"MIT"', "MIT"),
        ({"a": [1, {"b": True}]}, None, '{"a": [1, {"b": true}]}', '{"a": [1, {"b": 1}]}'),
    ],
)
def test_answers_that_are_any_json_value(expected: object, schema: dict | None, right: str, wrong: str) -> None:
    case = Case("c", (Message("user", "q"),), "g", expected, ())
    for text, value in ((right, 1.0), (wrong, 0.0)):
        scores = metrics.grade(case, Completion("c", "tuned", text, 1, 1, "stop", 0.0), schema)
        assert {s.grader: s.value for s in scores}["all"] == value
