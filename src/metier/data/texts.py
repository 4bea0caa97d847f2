"""Raw text for continued pre-training: read, duplicates set aside, split by document.

Near duplicates are left out altogether, not only kept on one side: a text that comes ten times is learnt by heart, and
what is learnt by heart is not understood (Lee et al. 2022).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from metier import config
from metier.data import check, dedupe, importers, ingest
from metier.data.ingest import Rejected
from metier.data.split import key
from metier.errors import DataError
from metier.records import Document, Example

TRAIN, VALID, TEST, REPLAY = NAMES = ("text-train", "text-valid", "text-test", "replay")
# Shorter questions stand in any text by chance.
LEAK_CHARACTERS = 60


class Renderer(Protocol):
    def document(self, text: str, /) -> Any: ...


@dataclass
class Texts:
    """The documents of each split, what became of every input, and the tokens of each document by id."""

    splits: dict[str, list[Document]] = field(default_factory=dict)
    ledger: list[dict[str, str]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)

    def rejected(self) -> list[Rejected]:
        return [Rejected(line["where"], line["reason"]) for line in self.ledger if line["fate"] == "rejected"]


def texts(loaded: config.Loaded, renderer: Renderer) -> Texts:
    """The raw text and the replay text of a specialist; empty where it names none."""
    data, made = loaded.spec.data, Texts()
    if not data.text:
        return made
    found = [(False, d) for d in _documents(loaded, data.text, made.unused)]
    found += [(True, d) for d in _documents(loaded, data.replay, made.unused)]
    readable = [(replay, _measured(d, renderer, made.tokens)) for replay, d in found]
    firsts = iter(_firsts([d for _, d in readable if isinstance(d, Document)], data.near_duplicate))
    own: list[Document] = []
    general: list[Document] = []
    for replay, document in readable:
        first = document if isinstance(document, Rejected) else next(firsts)
        made.ledger.append(_line(document, first))
        if document is first and isinstance(document, Document):
            (general if replay else own).append(document)
    importers.hold_share(made.rejected(), len(readable), data.max_rejected, left=bool(own))
    made.splits = _split(own, data.held_out, loaded.spec.seed) | ({REPLAY: general} if data.replay else {})
    return made


def figures(documents: Sequence[Document], tokens: dict[str, int]) -> dict[str, Any]:
    """A split's line in dataset.json; `bytes` are of the UTF-8 text."""
    counts = [tokens[d.id] for d in documents]
    return {
        "rows": len(documents),
        "groups": len(documents),
        "tokens": sum(counts),
        "supervised_tokens": sum(counts) - len(counts),
        "lengths": check.quantiles(counts),
        "bytes": sum(len(d.text.encode()) for d in documents),
    }


def leaked(tests: Sequence[Example], documents: Sequence[Document]) -> int:
    """How many test questions stand word for word in the text that is trained on."""
    whole = "\0".join(_folded(d.text) for d in documents)
    questions = [_folded(next(m.content for m in reversed(e.prompt) if m.role == "user")) for e in tests]
    return sum(len(q) >= LEAK_CHARACTERS and q in whole for q in questions)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _documents(loaded: config.Loaded, patterns: Sequence[str], unused: Counter[str]) -> Iterator[Document | Rejected]:
    for name, path in ingest.paths(loaded, patterns):
        if path.suffix == ".jsonl":
            yield from importers.texts(path, name, unused)
        else:
            yield ingest.file_document(name, path)


def _measured(document: Document | Rejected, renderer: Renderer, tokens: dict[str, int]) -> Document | Rejected:
    """The document, its tokens counted, or why it cannot be trained on."""
    if isinstance(document, Rejected):
        return document
    try:
        tokens[document.id] = int(renderer.document(document.text).size)
    except DataError as error:
        return Rejected(document.where, error.what)
    return document


def _firsts(documents: Sequence[Document], threshold: float) -> list[Document]:
    """For each document the first of those that are equal or similar to it, or to one that is."""
    first: dict[int, Document] = {}
    groups = dedupe.groups([d.text for d in documents], threshold)
    return [first.setdefault(g, d) for d, g in zip(documents, groups, strict=True)]


def _line(document: Document | Rejected, first: Document | Rejected) -> dict[str, str]:
    if isinstance(document, Rejected):
        return {"where": document.where, "fate": "rejected", "reason": document.reason}
    assert isinstance(first, Document)
    if first is document:
        return {"where": document.where, "fate": "used", "id": document.id}
    kind = "duplicate" if first.text == document.text else "near_duplicate"
    return {"where": document.where, "fate": "duplicate", "reason": f"{kind}: of {first.id}"}


def _split(documents: Sequence[Document], held_out: float, seed: int) -> dict[str, list[Document]]:
    """Whole documents, in the order of a keyed hash: first for test, then valid, then train."""
    each = max(1, round(held_out * len(documents) / 2))
    if len(documents) < 2 * each + 1:
        raise DataError(
            f"{len(documents)} different documents are too few to train on some and hold others out",
            where="data.text",
            fix="give at least three: several files, or JSON Lines with a `text` a line; or a smaller data.held_out",
        )
    ranked = sorted(documents, key=lambda d: key(seed, d.id))
    return {TEST: ranked[:each], VALID: ranked[each : 2 * each], TRAIN: ranked[2 * each :]}
