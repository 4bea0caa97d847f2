"""Exact duplicates and conflicts by hand; near duplicates against brute force."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.data import dedupe
from metier.records import Example, Message


def example(name: str, question: str, answer: object, system: str = "s") -> Example:
    messages = (Message("system", system), Message("user", question), Message("assistant", str(answer)))
    return Example(name, messages, {"document": name}, name, answer)


def brute(texts: list[str], threshold: float) -> list[int]:
    """Groups by comparing every pair."""
    rows = [dedupe.shingles(t) for t in texts]
    bare = ["".join(c for c in t.casefold() if c.isalnum()) for t in texts]
    labels = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            same = bare[i] == bare[j] != ""
            if same or (rows[i] and len(rows[i] & rows[j]) / len(rows[i] | rows[j]) >= threshold):
                old, new = labels[i], labels[j]
                labels = [new if label == old else label for label in labels]
    names: dict[int, int] = {}
    return [names.setdefault(label, len(names)) for label in labels]


def test_the_same_question_and_answer_stays_once() -> None:
    rows = [example("a", "q", "1"), example("b", "q", "1"), example("c", "Q", "1"), example("d", "q", "1", system="t")]
    assert dedupe.exact(rows) == {1: ("duplicate", "duplicate: of a")}


def test_the_most_frequent_answer_wins_and_the_first_of_equals() -> None:
    votes = [example("a", "q", {"x": 1}), example("b", "q", {"x": 2}), example("c", "q", {"x": 2})]
    assert dedupe.exact(votes) == {
        0: ("rejected", "conflict: another answer than b to the same question"),
        2: ("duplicate", "duplicate: of b"),
    }
    equal = [example("a", "q", "1"), example("b", "q", "2")]
    assert dedupe.exact(equal) == {1: ("rejected", "conflict: another answer than a to the same question")}


def test_answers_are_compared_by_value() -> None:
    rows = [
        example("a", "q", {"x": 1, "y": 2}),
        example("b", "q", {"y": 2, "x": 1}),
        example("c", "q", {"x": True, "y": 2}),
    ]
    assert [fate for fate, _ in dedupe.exact(rows).values()] == ["duplicate", "rejected"]


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("12")), max_size=12))
def test_one_row_of_each_question_stays(pairs: list[tuple[str, str]]) -> None:
    rows = [example(str(n), q, a) for n, (q, a) in enumerate(pairs)]
    out = dedupe.exact(rows)
    kept = [pairs[i] for i in range(len(rows)) if i not in out]
    assert sorted(q for q, _ in kept) == sorted({q for q, _ in pairs})
    for question, answer in kept:
        votes = [a for q, a in pairs if q == question]
        assert votes.count(answer) == max(votes.count(a) for a in votes)


def test_shingles_by_hand() -> None:
    assert dedupe.shingles("The MIT-License, 2.0!") == {
        "the", "mit", "license", "2", "0", "the mit license", "mit license 2", "license 2 0",
    }  # fmt: skip
    assert dedupe.shingles("MIT") == {"mit"}
    assert dedupe.shingles("許諾 x") == {"許", "諾", "x", "許 諾 x"}
    assert dedupe.shingles("") == frozenset()


def test_groups_by_hand() -> None:
    texts = [
        "licensed under the MIT license",
        "Licensed under\nthe MIT-license.",
        "licensed under the BSD license",
        "GPL-2.0",
        "gpl 2.0",
        "GPL-3.0",
        "!!!",
        "???",
        "",
        "",
    ]
    assert dedupe.groups(texts, 0.8) == [0, 0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_rows_that_belong_together_are_one_group_and_join_groups() -> None:
    texts = ["one two three four", "five six seven eight", "ONE two three four", "nine ten"]
    assert dedupe.groups(texts, 0.8) == [0, 1, 0, 2]
    assert dedupe.groups(texts, 0.8, ["", "d", "d", ""]) == [0, 0, 0, 1]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_groups_equal_brute_force(threshold: float) -> None:
    chooser = random.Random(threshold)
    words = [f"w{n}" for n in range(60)]
    base = [[chooser.choice(words) for _ in range(chooser.randint(1, 40))] for _ in range(60)]
    texts = []
    for _ in range(350):
        row = list(chooser.choice(base))
        for _ in range(chooser.randint(0, 4)):
            row[chooser.randrange(len(row))] = chooser.choice(words)
        texts.append(" ".join(row))
    wanted = brute(texts, threshold)
    assert 60 < len(set(wanted)) < 350
    assert dedupe.groups(texts, threshold) == wanted


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abcDE é木", min_size=1, max_size=8), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
    st.floats(0.3, 1),
)
def test_case_white_space_and_punctuation_never_separate(
    parts: list[str], chooser: random.Random, threshold: float
) -> None:
    plain = " ".join(parts)
    other = "".join(chooser.choice(["", " ", ", ", "\n"]) + chooser.choice([c.upper(), c.lower()]) for c in plain)
    first, second = dedupe.groups([plain, other + "."], threshold)
    assert first == second or not any(c.isalnum() for c in plain)


def test_groups_do_not_depend_on_the_order_of_texts() -> None:
    chooser = random.Random(1)
    texts = [" ".join(chooser.choice("abcdef") for _ in range(6)) for _ in range(200)]
    shuffled = list(range(200))
    chooser.shuffle(shuffled)
    one = dedupe.groups(texts, 0.6)
    two = dedupe.groups([texts[i] for i in shuffled], 0.6)
    pairs = {(i, j) for i in range(200) for j in range(i) if one[i] == one[j]}
    assert pairs == {
        (max(a, b), min(a, b)) for x, a in enumerate(shuffled) for b in shuffled[:x] if two[x] == two[shuffled.index(b)]
    }


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("abc ", max_size=14), max_size=12), st.floats(0.01, 1))
def test_no_pair_is_missed_at_any_threshold(texts: list[str], threshold: float) -> None:
    assert dedupe.groups(texts, threshold) == brute(texts, threshold)


def test_ten_thousand_rows_of_one_template_take_seconds() -> None:
    """Forms are the hard case: every pair is half alike. Comparing all would take minutes."""
    chooser = random.Random(0)
    names = [f"name{n}" for n in range(300)]
    texts = [
        f"Dear {chooser.choice(names)}, your order {chooser.randrange(10**6)} of {chooser.choice(names)} was shipped on"
        f" {chooser.randint(1, 28)} May to {chooser.choice(names)} street. Please reply if it is late. Thank you."
        for _ in range(10_000)
    ]
    start = time.process_time()
    assert len(set(dedupe.groups(texts, 0.8))) > 9_900
    assert time.process_time() - start < 20
