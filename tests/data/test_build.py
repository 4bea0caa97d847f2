"""The whole build: every row accounted for, the same bytes everywhere, sound files, clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier import config, records
from metier.data import build
from metier.errors import ConfigError, DataError
from metier.records import Message

SCHEMA = {"type": "object", "required": ["colour"], "properties": {"colour": {"enum": ["red", "green"]}}}
READER = """
import json
from metier.data.ingest import Found, Rejected

def examples(documents):
    for document in documents:
        for number, line in enumerate(document.text.splitlines(), 1):
            thing, _, colour = line.partition(" is ")
            if colour:
                yield Found(f"{document.where}:{number}", f"What colour is {thing}?", {"size": 1, "colour": colour})
            else:
                yield Rejected(f"{document.where}:{number}", "no colour: the line has no 'is'")
"""


@dataclass
class Rendered:
    ids: np.ndarray
    supervised: np.ndarray


class Words:
    """A word is a token; the assistant's words are supervised, but for those in angle brackets."""

    def render(self, messages: tuple[Message, ...], /) -> Rendered:
        words = [(w, m.role == "assistant" and w[0] != "<") for m in messages for w in m.content.split()]
        return Rendered(np.arange(len(words)), np.array([learnt for _, learnt in words], dtype=bool))

    def document(self, text: str, /) -> np.ndarray:
        raise AssertionError("there is no raw text")


def spec(folder: Path, data: dict[str, Any], task: dict[str, Any] | None = None, **more: Any) -> config.Loaded:
    sizes = {"sizes": {"train": 6, "valid": 2, "test": 3}}
    tree = {"name": "t", "task": {"instruction": "Be brief.", **(task or {})}, "data": {**sizes, **data}, **more}
    return config.Loaded(spec=config.validate(tree, "t"), folder=folder)


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows whose questions share no word."""
    return [{"prompt": f"q{n}x q{n}y q{n}z", "completion": f"answer {n}"} for n in range(start, start + count)]


def put_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def run(loaded: config.Loaded, work: Path) -> dict[str, Any]:
    work.mkdir(exist_ok=True)
    return build.build(loaded, work, Words())


def rows_of(work: Path, *names: str) -> list[dict[str, Any]]:
    return [row for name in names or ("train", "valid", "test") for _, row in records.objects(work / f"{name}.jsonl")]


def ledger(work: Path) -> list[tuple[str, str, str]]:
    return [(r["where"], r["fate"], r.get("reason", "")) for r in rows_of(work, "ledger")]


def hold_contract(work: Path) -> dict[str, Any]:
    """The promises of the folder, checked from its files alone."""
    dataset: dict[str, Any] = json.loads((work / "dataset.json").read_text())
    lines = rows_of(work, "ledger")
    fates = Counter(line["fate"] for line in lines)
    counts = dataset["counts"]
    assert counts == {"in": len(lines), **{fate: fates[fate] for fate in ("used", "duplicate", "rejected")}}
    assert counts["in"] == counts["used"] + counts["duplicate"] + counts["rejected"]
    used = {line["id"]: line["where"] for line in lines if line["fate"] == "used"}
    rows = rows_of(work)
    assert sorted(used) == sorted(row["id"] for row in rows)
    assert all(line.get("reason") for line in lines if line["fate"] != "used")
    for name, split in dataset["splits"].items():
        mine = rows_of(work, name)
        assert (split["rows"], split["groups"]) == (len(mine), len({r["group"] for r in mine}))
        assert split["supervised_tokens"] == sum(len(r["messages"][-1]["content"].split()) for r in mine)
        assert split["tokens"] == sum(len(m["content"].split()) for r in mine for m in r["messages"])
    groups = {(r["group"], name) for name in ("train", "valid", "test") for r in rows_of(work, name)}
    assert len(groups) == len({g for g, _ in groups})
    files = {p.name for p in work.iterdir()} - {"dataset.json"}
    assert set(dataset["hashes"]) == files
    for name, digest in dataset["hashes"].items():
        assert hashlib.sha256((work / name).read_bytes()).hexdigest() == digest
    assert dataset["seal"] == dataset["hashes"]["test.jsonl"]
    assert dataset["opened"] == 0
    return dataset


def test_rows_become_a_data_set(tmp_path: Path) -> None:
    rows = [
        *pairs(20),
        *pairs(2),
        {"prompt": "q3x q3y q3z", "completion": "another"},
        "{",
        {"prompt": "x", "completion": ""},
    ]
    put_rows(tmp_path / "pairs.jsonl", rows)
    out = run(spec(tmp_path, {"examples": ["*.jsonl"]}), tmp_path / "data")
    dataset = hold_contract(tmp_path / "data")
    assert {k: out[k] for k in ("counts", "splits", "seal")} == {k: dataset[k] for k in ("counts", "splits", "seal")}
    assert out["counts"] == {"in": 25, "used": 11, "duplicate": 2, "rejected": 12}
    assert dataset["reasons"] == {"not sampled": 9, "duplicate": 2, "conflict": 1, "empty_target": 1, "truncated": 1}
    first = rows_of(tmp_path / "data")[0]
    number = first["source"]["row"] - 1
    assert first == {
        "id": first["id"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"q{number}x q{number}y q{number}z"},
            {"role": "assistant", "content": f"answer {number}"},
        ],
        "source": {"document": "pairs.jsonl", "row": number + 1},
        "group": first["id"],
        "expected": f"answer {number}",
    }
    assert len(first["id"]) == 16
    by_where = {where: (fate, reason) for where, fate, reason in ledger(tmp_path / "data")}
    assert by_where["pairs.jsonl:21"][0] == "duplicate"
    assert by_where["pairs.jsonl:23"][1].startswith("conflict: another answer than ")
    assert by_where["pairs.jsonl:24"][1].startswith("truncated")
    assert by_where["pairs.jsonl:25"] == ("rejected", "empty_target: an answer without text")


def test_task_and_card(tmp_path: Path) -> None:
    put_rows(tmp_path / "p.jsonl", [{"prompt": r["prompt"], "completion": '{"colour": "red"}'} for r in pairs(11)])
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "prompt.md").write_text("Say the colour.\n")
    data = {"examples": ["p.jsonl"], "attribution": "Ada, CC-BY-4.0\nand others\n"}
    run(spec(tmp_path, data, {"schema": "s.json", "prompt": "prompt.md", "shots": 2}), tmp_path / "data")
    hold_contract(tmp_path / "data")
    assert json.loads((tmp_path / "data" / "task.json").read_text()) == {
        "instruction": "Be brief.",
        "schema": SCHEMA,
        "prompt": "Say the colour.",
        "shots": 2,
    }
    card = (tmp_path / "data" / "card.md").read_text()
    for part in (
        "# Data of t",
        "> Ada, CC-BY-4.0\n> and others",
        "11 rows in = 11 used + 0 duplicate + 0 rejected",
        "`p.jsonl`",
    ):
        assert part in card
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["seal"] in card
    assert str(tmp_path) not in card
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), tmp_path / "data")
    assert json.loads((tmp_path / "data" / "task.json").read_text())["schema"] is None


def documents(folder: Path, count: int = 14) -> None:
    for n in range(count):
        colour = ("red", "green", "blue")[n % 3]
        (folder / f"d{n:02}.txt").write_text(f"a{n}p a{n}q is {colour}\nb{n}r b{n}s is red\nnothing\n")
    (folder / "reader.py").write_text(READER)


def test_documents_go_through_the_reader(tmp_path: Path) -> None:
    documents(tmp_path)
    (tmp_path / "d99.txt").write_bytes(b"\xff")
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    loaded = spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}, {"schema": "s.json"})
    run(loaded, tmp_path / "data")
    dataset = hold_contract(tmp_path / "data")
    assert dataset["counts"]["in"] == 14 * 3 + 1
    assert dataset["reasons"]["no colour"] == 14
    assert dataset["reasons"]["not_utf8"] == 1
    assert dataset["reasons"]["answer fails the schema"] == 4
    assert (dataset["documents"], dataset["documents_without_rows"]) == (15, 0)
    for row in rows_of(tmp_path / "data"):
        assert row["messages"][-1]["content"] == json.dumps(row["expected"], separators=(",", ":"))
        assert list(row["expected"]) == ["colour", "size"], "keys in the order of the schema"
        assert row["source"]["document"].partition(":")[0] in {f"d{n:02}.txt" for n in range(14)}
    assert dataset["labels"]["colour"].keys() == {"red", "green"}


def test_rows_of_one_document_stay_in_one_split(tmp_path: Path) -> None:
    documents(tmp_path)
    run(spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}), tmp_path / "data")
    splits: dict[str, set[str]] = {}
    for name in ("train", "valid", "test"):
        for row in rows_of(tmp_path / "data", name):
            splits.setdefault(row["source"]["document"].partition(":")[0], set()).add(name)
    assert all(len(names) == 1 for names in splits.values())
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["groups"]["groups"] == 14
    own = READER.replace('"colour": colour})', '"colour": colour}, f"{document.where}:{number}")')
    (tmp_path / "reader.py").write_text(own)
    run(spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}), tmp_path / "data")
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["groups"]["groups"] == 28


def test_near_duplicates_and_named_groups_stay_together(tmp_path: Path) -> None:
    rows = pairs(12)
    rows += [{"prompt": r["prompt"].upper() + " !", "completion": "other"} for r in rows]
    rows += [{**r, "group": "g"} for r in pairs(5, 50)]
    rows += [{"instruction": "v w x y z", "output": f"{n}", "system": f"s{n}t s{n}u s{n}v s{n}w"} for n in range(3)]
    put_rows(tmp_path / "p.jsonl", rows)
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), tmp_path / "data")
    dataset = hold_contract(tmp_path / "data")
    assert dataset["groups"] == {"rows": 32, "groups": 14, "alone": 0, "largest": [5, 3, *[2] * 6]}


def test_an_answer_that_is_an_object_is_expected_as_one(tmp_path: Path) -> None:
    rows = [{**r, "completion": f'{{ "n": {n} }}'} for n, r in enumerate(pairs(11))]
    put_rows(tmp_path / "p.jsonl", rows)
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), tmp_path / "data")
    found = rows_of(tmp_path / "data")
    assert sorted(r["expected"]["n"] for r in found) == list(range(11))
    assert {r["messages"][-1]["content"] for r in found} == {f'{{ "n": {n} }}' for n in range(11)}, (
        "texts are not respelt"
    )


def test_rows_that_cannot_be_trained_on_are_left_out_and_never_cut(tmp_path: Path) -> None:
    rows = [*pairs(14), *({"prompt": f"z{n}", "completion": "<think>"} for n in range(6))]
    rows += [{"prompt": " ".join(f"l{n}w{k}" for k in range(40)), "completion": "long"} for n in range(6)]
    put_rows(tmp_path / "p.jsonl", rows)
    loaded = spec(
        tmp_path, {"examples": ["p.jsonl"], "sizes": {"train": 9, "valid": 2, "test": 3}}, train=[{"max_length": 20}]
    )
    run(loaded, tmp_path / "data")
    dataset = hold_contract(tmp_path / "data")
    assert dataset["counts"] == {"in": 26, "used": 14, "duplicate": 0, "rejected": 12}
    assert {r for _, _, r in ledger(tmp_path / "data")[14:20]} == {"empty_target: none of its 4 tokens is supervised"}
    assert {r for _, _, r in ledger(tmp_path / "data")[20:]} == {"too_long: 43 tokens, over the limit of 20"}
    assert max(s["lengths"]["max"] for s in dataset["splits"].values()) <= 20


def test_rendering_only_what_is_chosen_changes_no_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[tuple[Message, ...]] = []
    render = Words.render
    monkeypatch.setattr(Words, "render", lambda self, messages: rendered.append(messages) or render(self, messages))
    rows = [*pairs(30), *({"prompt": f"z{n}", "completion": "<think>"} for n in range(30))]
    put_rows(tmp_path / "p.jsonl", rows)
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), tmp_path / "one")
    assert 11 < len(rendered) == len(set(rendered)) < 50
    put_rows(tmp_path / "p.jsonl", pairs(30))
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), tmp_path / "two")
    for name in ("train", "valid", "test"):
        assert rows_of(tmp_path / "one", name) == rows_of(tmp_path / "two", name)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("red", "answer fails the schema: not JSON (not_json: "),
        ('{"colour": "blue"}', "answer fails the schema: /colour 'blue' is not one of"),
        ('{"colour": "red", "colour": "red"}', "answer fails the schema: not JSON (duplicate_key: "),
        ('{"colour": "red", "x": NaN}', "answer fails the schema: not JSON (non_finite: "),
        ('{"colour": "red", "x": ' + "[" * 31 + "]" * 31 + "}", "too_deep: "),
        ('{"colour": "red", "x": "\\u0000"}', "answer fails the schema: not JSON (nul_char: "),
        ('{"colour": "red", "x": "%s"}' % ("y" * 600_000), "row_too_large: "),
    ],
)
def test_answers_that_fail_are_rejected(tmp_path: Path, completion: str, reason: str) -> None:
    rows = [{"prompt": r["prompt"], "completion": '{"colour": "red"}'} for r in pairs(11)]
    put_rows(tmp_path / "p.jsonl", [*rows, {"prompt": "odd", "completion": completion}])
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    run(spec(tmp_path, {"examples": ["p.jsonl"]}, {"schema": "s.json"}), tmp_path / "data")
    hold_contract(tmp_path / "data")
    assert ledger(tmp_path / "data")[-1][2].startswith(reason)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("float('nan')", "not JSON"),
        ("{1: 'x'}", "a key is not a text"),
        ("{'a': {None: 'x'}}", "a key is not a text"),
        ("{'a': {1, 2}}", "not JSON serializable"),
        ("b'x'", "not JSON serializable"),
    ],
)
def test_a_reader_that_answers_no_json_is_told(tmp_path: Path, answer: str, what: str) -> None:
    documents(tmp_path)
    body = "from metier.data.ingest import Found\ndef examples(documents):\n    for d in documents:\n"
    body += f"        yield Found(d.where, 'q', {answer})\n"
    (tmp_path / "reader.py").write_text(body)
    with pytest.raises(DataError) as caught:
        run(spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}), tmp_path / "data")
    assert what in caught.value.what
    assert caught.value.where == "d00.txt"


def test_texts_of_a_reader_that_no_file_can_hold_are_rejected(tmp_path: Path) -> None:
    documents(tmp_path)
    (tmp_path / "reader.py").write_text(
        READER + "    yield Found(document.where, 'q\\ud800', 'a')\n    yield Found(document.where, 'q\\0', 'a')\n"
        "    yield Found(document.where, ' ', 'a')\n    yield Found(document.where, 'q', '')\n"
    )
    run(spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}), tmp_path / "data")
    hold_contract(tmp_path / "data")
    assert [r.split(":")[0] for _, _, r in ledger(tmp_path / "data")[-4:]] == [
        "lone_surrogate",
        "nul_char",
        "empty_input",
        "empty_target",
    ]


def test_too_many_rejections_stop_the_build(tmp_path: Path) -> None:
    put_rows(tmp_path / "p.jsonl", [*pairs(16), "{", "{", '{"prompt": 1, "completion": "a"}', "[]"])
    run(spec(tmp_path, {"examples": ["p.jsonl"], "max_rejected": 0.2}), tmp_path / "data")
    with pytest.raises(DataError) as caught:
        run(spec(tmp_path, {"examples": ["p.jsonl"], "max_rejected": 0.19}), tmp_path / "none")
    assert caught.value.what.startswith("4 of 20 rows were rejected, more than data.max_rejected=0.19 accepts: ")
    assert "2 x truncated (first p.jsonl:17: truncated: " in caught.value.what
    assert "2 x schema (first p.jsonl:19: schema: /prompt is a int, not a text)" in caught.value.what
    assert list((tmp_path / "none").iterdir()) == []


def test_rows_lost_to_the_length_limit_count_and_are_named(tmp_path: Path) -> None:
    put_rows(tmp_path / "p.jsonl", pairs(20))
    short = [{"max_length": 8}]
    run(spec(tmp_path, {"examples": ["p.jsonl"]}, train=short), tmp_path / "data")
    with pytest.raises(DataError) as caught:
        run(spec(tmp_path, {"examples": ["p.jsonl"]}, {"instruction": "a b c d"}, train=short), tmp_path / "data")
    assert caught.value.what.startswith("0 groups of different examples are too few")
    assert "20 rows were rejected: 20 x too_long (first p.jsonl:1: too_long: 9 tokens" in caught.value.what
    put_rows(
        tmp_path / "p.jsonl",
        [{**r, "prompt": r["prompt"] + " long" * 2 * (n % 4 == 0)} for n, r in enumerate(pairs(40))],
    )
    data = {"examples": ["p.jsonl"], "sizes": {"train": 25, "valid": 2, "test": 3}}
    run(spec(tmp_path, {**data, "max_rejected": 0.25}, train=short), tmp_path / "data")
    with pytest.raises(DataError, match="10 of 40 rows were rejected, more than"):
        run(spec(tmp_path, {**data, "max_rejected": 0.24}, train=short), tmp_path / "data")


def test_a_question_that_is_too_long_is_cut_where_the_settings_say_so(tmp_path: Path) -> None:
    long = {"prompt": " ".join(f"w{k}" for k in range(40)), "completion": "the end"}
    hopeless = {"prompt": "short", "completion": " ".join(f"a{k}" for k in range(40))}
    put_rows(tmp_path / "p.jsonl", [*pairs(14), long, hopeless])
    data = {"examples": ["p.jsonl"], "truncate": True, "sizes": {"train": 10, "valid": 2, "test": 3}}
    run(spec(tmp_path, data, train=[{"max_length": 20}]), tmp_path / "data")
    lines = rows_of(tmp_path / "data", "ledger")
    fates = Counter(line["fate"] for line in lines)
    assert fates == {"used": 14, "truncated": 1, "rejected": 1}
    assert lines[14]["reason"].startswith("truncated: 44 tokens") and lines[15]["reason"].startswith("too_long: 43")
    counts = json.loads((tmp_path / "data" / "dataset.json").read_text())["counts"]
    assert counts == {"in": 16, "used": 15, "duplicate": 0, "rejected": 1}
    cut = next(r for r in rows_of(tmp_path / "data") if r["id"] == lines[14]["id"])
    kept = cut["messages"][1]["content"].split()
    assert kept[:15] == [f"w{k}" for k in range(15)] and len(kept) == 16, "2 + 16 + 2 tokens; the last word may be cut"
    assert cut["messages"][2]["content"] == "the end", "an answer is never cut"


def test_a_row_over_the_bases_context_is_rejected_with_what_to_do(tmp_path: Path) -> None:
    put_rows(tmp_path / "p.jsonl", [*pairs(14), {"prompt": " ".join(f"w{k}" for k in range(40)), "completion": "x"}])
    loaded = spec(tmp_path, {"examples": ["p.jsonl"], "sizes": {"train": 10, "valid": 2, "test": 3}})
    (tmp_path / "data").mkdir()
    build.build(loaded, tmp_path / "data", Words(), context=30)
    dataset = hold_contract(tmp_path / "data")
    assert dataset["reasons"] == {"too_long": 1}
    assert any("longer than the base" in f["what"] and "data.truncate" in f["fix"] for f in dataset["findings"])


def test_a_mixture_marks_rows_and_counts_its_sources(tmp_path: Path) -> None:
    put_rows(tmp_path / "a.jsonl", pairs(12))
    put_rows(tmp_path / "b.jsonl", pairs(9, start=50))
    data = {"examples": ["a.jsonl", "b*.jsonl"], "mix": {"a.jsonl": 1, "b*.jsonl": 3}}
    data["sizes"] = {"train": 16, "valid": 2, "test": 3}
    run(spec(tmp_path, data), tmp_path / "data")
    mix = hold_contract(tmp_path / "data")["mix"]
    train = Counter(row["source"]["mix"] for row in rows_of(tmp_path / "data", "train"))
    assert {name: m["rows"] for name, m in mix.items()} == dict(train) and sum(train.values()) == 16
    assert [m["share"] for m in mix.values()] == [0.25, 0.75]
    run(spec(tmp_path, {"examples": ["a.jsonl"]}), tmp_path / "plain")
    assert not any("mix" in row["source"] for row in rows_of(tmp_path / "plain"))


def test_a_build_over_the_debris_of_another_is_the_same(tmp_path: Path) -> None:
    put_rows(tmp_path / "p.jsonl", pairs(12))
    work = tmp_path / "data"
    work.mkdir()
    (work / "fingerprint").write_text("kept")
    (work / ".train.jsonl.77.tmp").write_text("torn")
    (work / "train.jsonl").write_text("torn")
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), work)
    run(spec(tmp_path, {"examples": ["p.jsonl"]}), tmp_path / "clean")
    names = {p.name for p in (tmp_path / "clean").iterdir()}
    assert {p.name for p in work.iterdir()} == {*names, "fingerprint"} and names <= set(build.FILES)
    assert all((work / n).read_bytes() == (tmp_path / "clean" / n).read_bytes() for n in names)


def test_an_input_that_changes_while_it_is_read_publishes_nothing(tmp_path: Path) -> None:
    documents(tmp_path)
    body = READER + "    open(__file__.replace('reader.py', 'd00.txt'), 'a').write('more is red')\n"
    (tmp_path / "reader.py").write_text(body)
    with pytest.raises(DataError, match="changed while it was read"):
        run(spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


BUILD = """
import sys, pathlib
sys.path[:0] = [{tests!r}]
import test_build
folder = pathlib.Path(sys.argv[1])
loaded = test_build.spec(folder, {{"documents": ["*.txt"], "reader": "reader.py", "examples": ["b.jsonl", "*.jsonl"]}})
test_build.run(loaded, folder / "out")
"""


def test_the_bytes_depend_on_nothing_else(tmp_path: Path) -> None:
    """Another hash seed, time zone, locale, folder, and order of creation give the same files."""
    digests = set()
    for number, (seed, zone) in enumerate((("0", "UTC"), ("1", "Asia/Kathmandu"))):
        folder = tmp_path / f"somewhere{number}"
        folder.mkdir()
        documents(folder)
        names = [f"{c}.jsonl" for c in "abc"][:: 1 - 2 * number]
        for name in names:
            put_rows(folder / name, [*pairs(6, 10 * ord(name[0])), *pairs(2)])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": seed,
            "TZ": zone,
            "LC_ALL": "C",
        }
        script = BUILD.format(tests=str(Path(__file__).parent))
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=environment, cwd=tmp_path)
        files = sorted((folder / "out").iterdir())
        digests.add(hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest())
    assert len(digests) == 1


def test_inputs_name_everything_and_change_with_it(tmp_path: Path) -> None:
    documents(tmp_path, 2)
    put_rows(tmp_path / "p.jsonl", pairs(1))
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "prompt.md").write_text("p")
    package = {"name": "p", "version": "1.0", "sha256": "ab" * 32, "documents": ["*"]}
    data = {"documents": ["*.txt"], "package": package, "reader": "reader.py", "examples": ["p.jsonl"]}
    loaded = spec(tmp_path, data, {"schema": "s.json", "prompt": "prompt.md"})
    before = build.inputs(loaded)
    assert sorted(before) == ["d00.txt", "d01.txt", "p.jsonl", "p==1.0", "prompt.md", "reader.py", "s.json"]
    assert before["p==1.0"] == "ab" * 32
    for name in before:
        if name != "p==1.0":
            with (tmp_path / name).open("a") as file:
                file.write(" ")
    after = build.inputs(loaded)
    assert [n for n in before if before[n] == after[n]] == ["p==1.0"]


@pytest.mark.parametrize("name", ["reader.py", "s.json", "prompt.md", "p.jsonl", "d00.txt"])
@pytest.mark.parametrize("fault", ["missing", "empty", "folder", "fifo"])
def test_inputs_refuse_what_cannot_be_read(tmp_path: Path, name: str, fault: str) -> None:
    documents(tmp_path, 1)
    put_rows(tmp_path / "p.jsonl", pairs(1))
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "prompt.md").write_text("p")
    data = {"documents": ["d00.txt"], "reader": "reader.py", "examples": ["p.jsonl"]}
    loaded = spec(tmp_path, data, {"schema": "s.json", "prompt": "prompt.md"})
    (tmp_path / name).unlink()
    match fault:
        case "empty":
            (tmp_path / name).touch()
        case "folder":
            (tmp_path / name).mkdir()
        case "fifo":
            os.mkfifo(tmp_path / name)
    if (name, fault) == ("d00.txt", "empty"):
        build.inputs(loaded)
        with pytest.raises(DataError, match="empty_document"):
            run(loaded, tmp_path / "data")
        return
    with pytest.raises(DataError) as caught:
        build.inputs(loaded)
    assert caught.value.fix
    assert name in caught.value.where


def test_a_bad_schema_is_an_error_of_the_settings(tmp_path: Path) -> None:
    put_rows(tmp_path / "p.jsonl", pairs(12))
    (tmp_path / "s.json").write_text('{"type": 3}')
    with pytest.raises(ConfigError, match="not a JSON Schema"):
        run(spec(tmp_path, {"examples": ["p.jsonl"]}, {"schema": "s.json"}), tmp_path / "data")


def test_a_reader_that_finds_nothing_is_told(tmp_path: Path) -> None:
    documents(tmp_path)
    (tmp_path / "reader.py").write_text("def examples(documents):\n    return list(documents)[:0]\n")
    with pytest.raises(DataError, match="no row was found"):
        run(spec(tmp_path, {"documents": ["*.txt"], "reader": "reader.py"}), tmp_path / "data")


row = st.one_of(
    st.builds(
        lambda n, a: json.dumps({"prompt": f"w{n} v{n}", "completion": a}), st.integers(0, 40), st.sampled_from("ab<")
    ),
    st.sampled_from(["{", "", "[]", '{"prompt": "", "completion": "x"}', '{"text": "x"}', "\\ud800", "{\x00"]),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(row, max_size=60), st.integers(0, 5))
def test_no_row_is_lost(tmp_path_factory: pytest.TempPathFactory, rows: list[str], seed: int) -> None:
    folder = tmp_path_factory.mktemp("t")
    put_rows(folder / "p.jsonl", [*rows, *pairs(5, 100)])
    run(
        spec(folder, {"examples": ["p.jsonl"], "sizes": {"train": 4, "valid": 1, "test": 2}}, seed=seed),
        folder / "data",
    )
    dataset = hold_contract(folder / "data")
    assert dataset["counts"]["in"] == len([r for r in rows if r.strip()]) + 5
