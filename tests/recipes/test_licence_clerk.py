"""The recipe: its files agree with each other, and its reader keeps and refuses what it says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from metier import config, fetch
from metier.data import build, check, ingest
from metier.data.ingest import Found, Rejected
from metier.errors import ResourceError
from metier.records import Document

RECIPE = Path(__file__).parents[2] / "recipes" / "licence-clerk"
SCHEMA = check.schema((RECIPE / "answer.schema.json").read_text(), "answer.schema.json")
ALLOWED = {name: set(field["enum"]) for name, field in SCHEMA["properties"].items()}


def rule(name: str, text: str, **head: object) -> Document:
    whole = yaml.safe_dump({"license_expression": "mit", "is_license_notice": True, **head})
    return Document(name, f"p:rules/{name}.RULE", f"---\n{whole}---\n\n{text}\n")


def licence(key: str, category: str) -> Document:
    return Document(key, f"p:licenses/{key}.LICENSE", f"---\nkey: {key}\ncategory: {category}\n---\n\nterms\n")


def read(*documents: Document) -> dict[str, Found | Rejected]:
    known = [licence("mit", "Permissive"), licence("gpl-2.0", "Copyleft")]
    found = ingest.readings(RECIPE / "reader.py", [*documents, *known])
    assert len(found) == len(documents), "one reading for each rule, none for a licence"
    return {f.where.removeprefix("p:rules/").removesuffix(".RULE"): f for f in found}


NOTICE = "Licensed under the MIT license."


def test_a_notice_becomes_a_row() -> None:
    text = "  Licensed under the {{MIT license}},\n see LICENSE.\n\n---\nmore\n\n"
    found = read(
        rule("a", text), rule("b", NOTICE, license_expression="gpl-2.0", is_license_notice=False, is_license_tag=True)
    )
    assert found["a"] == Found(
        "p:rules/a.RULE",
        "Licensed under the MIT license,\n see LICENSE.\n\n---\nmore",
        {"license": "mit", "category": "Permissive", "kind": "notice"},
    )
    answer = found["b"].answer if isinstance(found["b"], Found) else {}
    assert list(answer.items()) == [("license", "gpl-2.0"), ("category", "Copyleft"), ("kind", "tag")]


@pytest.mark.parametrize(
    ("text", "head", "reason"),
    [
        (NOTICE, {"license_expression": "mit AND gpl-2.0"}, "several licences: mit AND gpl-2.0"),
        (NOTICE, {"license_expression": "nowhere"}, "unknown licence: nowhere"),
        (NOTICE, {"is_license_notice": False}, "kind unclear: none"),
        (NOTICE, {"is_license_text": True}, "kind unclear: text notice"),
        (NOTICE, {"is_false_positive": True}, "no licence: a text that only looks like a notice"),
        (NOTICE, {"is_deprecated": True}, "withdrawn: by the authors of the database"),
        (NOTICE, {"language": "fr"}, "not English: fr"),
        ("x" * 19, {}, "length: 19 characters"),
        ("x" * 901, {}, "length: 901 characters"),
        ("{{" + "x" * 900 + "}}", {}, ""),
        ("x" * 20, {"language": "en"}, ""),
    ],
)
def test_what_is_kept_and_why_not(text: str, head: dict[str, object], reason: str) -> None:
    found = read(rule("a", text, **head))["a"]
    assert (found.reason if isinstance(found, Rejected) else "") == reason


def test_only_the_commonest_licences_are_kept() -> None:
    keys = [f"l{n:02}" for n in range(42)]
    rules = [rule(f"{k}{n}", NOTICE, license_expression=k) for k in keys for n in range(2 if k > "l01" else 1)]
    found = ingest.readings(RECIPE / "reader.py", [*rules, *(licence(k, "Permissive") for k in keys)])
    refused = [f.reason for f in found if isinstance(f, Rejected)]
    assert refused == ["rare licence: l00", "rare licence: l01"]


def test_equally_common_licences_are_chosen_by_name() -> None:
    reader = module()
    assert reader.commonest([f"l{n:02}" for n in reversed(range(50))]) == {f"l{n:02}" for n in range(40)}


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clerk_reader", RECIPE / "reader.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_settings_load_and_name_what_is_there() -> None:
    loaded = config.load(RECIPE)
    assert loaded.spec.name == "licence-clerk"
    assert len(loaded.spec.task.instruction.split()) <= 60, "every answer reads it again"
    assert sorted(build.inputs(loaded)) == ["answer.schema.json", "licensedcode-data==32.1.0", "prompt.md", "reader.py"]
    assert "CC-BY-4.0" in (loaded.spec.data.attribution or "")
    assert {c.name for c in loaded.spec.prove.claims} == {"beats: prompt", "beats: few-shot", "format: valid"}


def test_the_schema_is_strict() -> None:
    reader = module()
    assert (len(ALLOWED["license"]), ALLOWED["kind"]) == (reader.LICENCES, set(reader.KINDS))
    assert SCHEMA["additionalProperties"] is False
    assert SCHEMA["required"] == list(SCHEMA["properties"]) == ["license", "category", "kind"]


def test_the_prompt_lists_every_licence_under_its_category_and_shows_a_valid_answer() -> None:
    prompt = (RECIPE / "prompt.md").read_text()
    listed = dict(re.findall(r"^([A-Z][A-Za-z ]+): ((?:[a-z0-9.-]+(?:, )?)+)$", prompt, re.M))
    assert set(listed) == ALLOWED["category"]
    keys = [key for line in listed.values() for key in line.split(", ")]
    assert sorted(keys) == sorted(ALLOWED["license"])
    assert set(re.findall(r"^- (\w+): ", prompt, re.M)) == ALLOWED["kind"]
    shown = re.findall(r"^\{.*\}$", prompt, re.M)
    assert len(shown) == 1
    answer = json.loads(shown[0])
    assert check.Answers(SCHEMA).wrong(answer) == ""
    assert answer["license"] in listed[answer["category"]].split(", ")
    assert shown[0] == json.dumps(answer, separators=(",", ":")), "spelt as the training rows are"


@pytest.mark.slow
def test_the_real_database_agrees_with_the_schema_and_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METIER_CACHE", raising=False)
    loaded = config.load(RECIPE)
    package = loaded.spec.data.package
    assert package
    try:
        fetch.wheel(fetch.Package(package.name, package.version, package.sha256), offline=True)
    except ResourceError as error:
        pytest.skip(f"{error.what}")
    documents = (d for d in ingest.documents(loaded) if isinstance(d, Document))
    found = ingest.readings(RECIPE / "reader.py", documents)
    rows = [f for f in found if isinstance(f, Found)]
    assert (len(found), len(rows)) == (34_859, 14_943)
    for name, allowed in ALLOWED.items():
        assert {row.answer[name] for row in rows} == allowed
    prompt = (RECIPE / "prompt.md").read_text()
    for licence_key, category in {(r.answer["license"], r.answer["category"]) for r in rows}:
        assert re.search(rf"^{category}: (.*, )?{re.escape(licence_key)}(,|$)", prompt, re.M), licence_key
