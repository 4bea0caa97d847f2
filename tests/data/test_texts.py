"""Raw text: read, duplicates set aside, split by document, every input a line of the ledger."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metier import config, records
from metier.data import build, texts
from metier.errors import DataError
from metier.records import Document, Example, Message


class Words:
    """A word is a token, between two marks."""

    def render(self, messages: tuple[Message, ...], /) -> Any:
        raise AssertionError("there is nothing to ask")

    def document(self, text: str, /) -> np.ndarray:
        if "\x14" in text:
            raise DataError("unwritable: no token for U+0014", where="words", fix="remove it")
        return np.arange(len(text.split()) + 2)


def spec(folder: Path, **data: Any) -> config.Loaded:
    stage = {"method": "cpt", "replay": 0.1 if "replay" in data else 0}
    tree = {"name": "t", "task": {"instruction": "Be brief."}, "data": data, "train": [stage]}
    return config.Loaded(spec=config.validate(tree, "t"), folder=folder)


def run(loaded: config.Loaded, work: Path) -> dict[str, Any]:
    work.mkdir()
    build.build(loaded, work, Words())
    card: dict[str, Any] = json.loads((work / "dataset.json").read_text())
    return card


def put(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def story(n: int) -> str:
    return " ".join(f"s{n}w{k}" for k in range(20))


def test_every_input_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(story(0))
    (tmp_path / "b.md").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.md").write_text("  \n")
    near = story(1).replace("s1w19", "another")  # 19 of 20 words and 17 of 18 runs: 36 shared, 40 in all
    rows: list[Any] = [{"text": story(n), "url": "x"} for n in range(1, 8)]
    rows += [{"text": story(0)}, {"text": near}, "{", {"body": "x"}, {"text": "a \x14 b"}, {"text": 3}]
    put(tmp_path / "d.jsonl", rows)
    card = run(spec(tmp_path, text=["*.md", "d.jsonl"], held_out=0.25), tmp_path / "data")
    ledger = [row for _, row in records.objects(tmp_path / "data" / "ledger.jsonl")]
    assert [line["where"] for line in ledger] == ["a.md", "b.md", "c.md", *(f"d.jsonl:{n}" for n in range(1, 14))]
    assert card["counts"] == {"in": 16, "used": 8, "duplicate": 2, "rejected": 6}
    reasons = {"schema": 2, "duplicate": 1, "empty_document": 1, "near_duplicate": 1, "not_utf8": 1, "truncated": 1}
    assert card["reasons"] == reasons | {"unwritable": 1}
    assert Counter(line["fate"] for line in ledger) == {"used": 8, "duplicate": 2, "rejected": 6}
    splits = {name: records.documents(tmp_path / "data" / f"{name}.jsonl") for name in texts.NAMES[:3]}
    assert {name: len(d) for name, d in splits.items()} == {"text-train": 6, "text-valid": 1, "text-test": 1}
    used = {line["id"]: line["where"] for line in ledger if line["fate"] == "used"}
    assert used == {d.id: d.where for documents in splits.values() for d in documents}
    train = card["splits"]["text-train"]
    assert (train["tokens"], train["supervised_tokens"]) == (6 * 22, 6 * 21)
    assert train["bytes"] == sum(len(d.text.encode()) for d in splits["text-train"])
    assert any("'url' (7 rows)" in f["what"] for f in card["findings"])
    assert card["seal"] == card["hashes"]["text-test.jsonl"]
    assert "raw text `*.md`" in (tmp_path / "data" / "card.md").read_text()


def test_replay_text_is_no_copy_of_the_text(tmp_path: Path) -> None:
    put(tmp_path / "own.jsonl", [{"text": story(n)} for n in range(6)])
    put(tmp_path / "general.jsonl", [{"text": story(n)} for n in (3, 10, 11, 10)])
    card = run(spec(tmp_path, text=["own.jsonl"], replay=["general.jsonl"]), tmp_path / "data")
    assert card["splits"]["replay"]["rows"] == 2 and card["counts"]["duplicate"] == 2
    put(tmp_path / "both.jsonl", [{"text": story(n)} for n in range(6)])
    twice = spec(tmp_path, text=["both.jsonl"], replay=["both.jsonl"])
    assert run(twice, tmp_path / "twice")["splits"]["replay"]["rows"] == 0


def test_a_document_of_many_megabytes_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text('"' * (2 << 20))
    put(tmp_path / "own.jsonl", [{"text": story(n)} for n in range(3)])
    run(spec(tmp_path, text=["*.txt", "own.jsonl"]), tmp_path / "data")
    found = [d for n in texts.NAMES[:3] for d in records.documents(tmp_path / "data" / f"{n}.jsonl")]
    assert max(len(d.text) for d in found) == 2 << 20


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"text": story(0)}, {"text": story(0)}, {"text": story(1)}], {}, "2 different documents are too few"),
        ([{"text": story(n)} for n in range(4)], {"held_out": 0.9}, "too few"),
        ([{"text": story(0)}, "{", "{", "{"], {"max_rejected": 0.5}, "3 of 4 rows were rejected"),
        (["{"], {}, "1 of 1 rows were rejected"),
    ],
)
def test_too_little_text_stops_the_build(tmp_path: Path, rows: list[Any], more: dict[str, Any], said: str) -> None:
    put(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError, match=said):
        run(spec(tmp_path, text=["own.jsonl"], **more), tmp_path / "data")


def test_test_questions_in_the_text_are_found() -> None:
    question = "what is the " + "very " * 12 + "long question?"
    asked = [
        Example(name, (Message("user", text), Message("assistant", "a")), {}, name)
        for name, text in (("in", question.upper()), ("out", question + " no"), ("short", "what is"))
    ]
    assert texts.leaked(asked, [Document("d", "d", f"so,\n{question.replace(' ', '  ')} what is it")]) == 1
