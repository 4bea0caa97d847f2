"""Licence notices from the ScanCode licence database, each with its licence, category and kind.

A `.RULE` document is a notice under a YAML head that says what it is; each gives one row. The `.LICENSE` documents are
looked up for the category of a licence and give no row. Kept are the notices of one single licence, of 20 to 900
characters, among the 40 commonest licences; each of the others is rejected with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from metier.data.ingest import Found, Rejected
from metier.records import Document

LICENCES = 40
SHORTEST, LONGEST = 20, 900
KINDS = ("text", "notice", "reference", "tag", "intro", "clue")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def examples(documents: Iterable[Document]) -> Iterator[Found | Rejected]:
    """One reading for each rule, in the order of the documents."""
    categories: dict[str, str] = {}
    rules: list[tuple[str, dict[str, Any], str]] = []
    for document in documents:
        head, text = split_head(document.text)
        if document.where.endswith(".LICENSE"):
            categories[head["key"]] = head["category"]
        else:
            rules.append((document.where, head, text))
    reasons = [unfit(head, text, categories) for _, head, text in rules]
    common = commonest(
        head["license_expression"] for (_, head, _), reason in zip(rules, reasons, strict=True) if not reason
    )
    for (where, head, text), reason in zip(rules, reasons, strict=True):
        licence = head.get("license_expression")
        if reason or licence not in common:
            yield Rejected(where, reason or f"rare licence: {licence}")
        else:
            answer = {"license": licence, "category": categories[licence], "kind": kinds(head)[0]}
            yield Found(where, text, answer)


def split_head(text: str) -> tuple[dict[str, Any], str]:
    """The YAML between the first two `---` lines, and the text after them without the marks of required phrases."""
    lines = text.split("\n")
    end = next(i for i, line in enumerate(lines) if i and line.strip() == "---")
    body = "\n".join(lines[end + 1 :]).replace("{{", "").replace("}}", "")
    return yaml.load("\n".join(lines[1:end]), LOADER), body.strip()  # noqa: S506 (a safe loader)


def kinds(head: dict[str, Any]) -> list[str]:
    return [kind for kind in KINDS if head.get(f"is_license_{kind}")]


def unfit(head: dict[str, Any], text: str, categories: dict[str, str]) -> str:
    """Why a rule makes no row, whatever the other rules are; empty where it may."""
    licence = head.get("license_expression", "")
    if head.get("is_false_positive"):
        return "no licence: a text that only looks like a notice"
    if head.get("is_deprecated"):
        return "withdrawn: by the authors of the database"
    if licence not in categories:
        return f"several licences: {licence}" if " " in licence else f"unknown licence: {licence}"
    if len(kinds(head)) != 1:
        return f"kind unclear: {' '.join(kinds(head)) or 'none'}"
    if head.get("language", "en") != "en":
        return f"not English: {head['language']}"
    if not SHORTEST <= len(text) <= LONGEST:
        return f"length: {len(text)} characters"
    return ""


def commonest(licences: Iterable[str]) -> set[str]:
    """The most frequent licences; of equally frequent ones, the first by name."""
    counts = Counter(licences)
    return set(sorted(counts, key=lambda licence: (-counts[licence], licence))[:LICENCES])
