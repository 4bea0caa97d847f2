"""What each stage trains on: its rows, how an epoch draws them, and what it is measured by.

Methods differ here and in the loss. A feed is made for every stage before the first step, so that what is wrong with
the last stage's data is found before the first one has trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metier import records, runs
from metier.config import Spec, Stage
from metier.errors import DataError
from metier.records import Document
from metier.text import batches, pack
from metier.text.batches import Row, Source
from metier.text.chat import Renderer

# Documents of at least so many tokens in all.
General = Callable[[int], list[Document]]


@dataclass(frozen=True)
class HeldOut:
    """Sealed documents: rows in which every token of the text is supervised, and the bytes of the texts."""

    rows: list[Row]
    bytes: int


@dataclass(frozen=True)
class Feed:
    """A stage with its data. `name` is the method, with a number from its second stage on: sft, sft-2.

    `prefix` tokens are shared by all rows; an epoch draws `sources`; `held_out` is there for raw text.
    """

    name: str
    stage: Stage
    rows: list[Row]
    valid: list[Row]
    prefix: int
    sources: tuple[Source, ...]
    held_out: HeldOut | None = None

    @property
    def draws(self) -> int:
        """Rows of an epoch."""
        return sum(s.draws for s in self.sources)

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.stage.epochs * self.draws / self.stage.batch_size))

    def tokens(self, *, supervised: bool = False) -> int:
        """Tokens of an epoch, on average where it does not draw every row."""
        sizes = np.array([r.supervised.sum() if supervised else r.ids.size for r in self.rows])
        return round(sum(s.draws * float(sizes[s.rows].mean()) for s in self.sources))


def feeds(spec: Spec, data: Path, renderer: Renderer, context: int | None, general: General) -> list[Feed]:
    """The feed of every stage, in order; `general` gives text against forgetting."""
    names = [s.method for s in spec.train]
    made = []
    for place, stage in enumerate(spec.train):
        earlier = names[:place].count(stage.method)
        name = f"{stage.method}-{earlier + 1}" if earlier else stage.method
        if stage.method == "cpt":
            made.append(_texts(name, stage, data, renderer, stage.limit(context) or 0, general))
        else:
            made.append(_conversations(name, stage, data, renderer, stage.limit(context), spec.data.mix))
    return made


def _conversations(
    name: str, stage: Stage, data: Path, renderer: Renderer, limit: int | None, mix: dict[str, float]
) -> Feed:
    """Rows that are conversations, drawn by the weights of their sources, behind the prefix they all share."""
    rows, valid = (_rendered(data / f"{split}.jsonl", renderer, limit) for split in ("train", "valid"))
    sources = _mixed(data / "train.jsonl", mix) if mix else (Source(np.arange(len(rows)), len(rows)),)
    return Feed(name, stage, rows, valid, batches.shared_prefix([*rows, *valid]), sources)


def _rendered(path: Path, renderer: Renderer, limit: int | None) -> list[Row]:
    rows = [Row.of(e.id, renderer.render(e.messages)) for e in records.examples(path)]
    if empty := next((r for r in rows if not r.supervised.any()), None):
        raise DataError(f"row {empty.id} has no answer to learn", where=str(path), fix="run `metier build` again")
    if long := [r for r in rows if limit and r.ids.size > limit]:
        shown = ", ".join(f"{r.id} ({r.ids.size:,})" for r in long[:8])
        raise DataError(
            f"{len(long):,} rows have more than {limit:,} tokens: {shown}",
            where=str(path),
            fix="raise train.max_length as far as the base's context allows, or run `metier build` again",
        )
    return rows


def hold_context(rows: Sequence[Row], context: int, data: Path) -> None:
    """Refuses a row that a model would have to read beyond its context."""
    longest = max(rows, key=lambda row: row.ids.size)
    if longest.ids.size > context:
        raise DataError(
            f"row {longest.id} has {longest.ids.size:,} tokens, over this model's context of {context:,}",
            where=str(data),
            fix="shorten the row, or use a base with a longer context",
        )


def _mixed(path: Path, mix: dict[str, float]) -> tuple[Source, ...]:
    """The sources of the training rows, each with its share of an epoch that is as long as there are rows."""
    of_row = [e.source["mix"] for e in records.examples(path)]
    draws = batches.apportioned(list(mix.values()), len(of_row))
    if (least := min(draws)) == 0:
        raise DataError(
            f"{list(mix)[draws.index(least)]} has so small a weight that an epoch of {len(of_row):,} rows draws none",
            where="data.mix",
            fix="give it a larger weight, or take it out",
        )
    return tuple(Source(np.flatnonzero([s == name for s in of_row]), n) for name, n in zip(mix, draws, strict=True))


def _texts(name: str, stage: Stage, data: Path, renderer: Renderer, length: int, general: General) -> Feed:
    """Packed rows of documents; replayed text fills rows of its own, so that its share can be counted."""

    def packed(documents: Sequence[Document]) -> list[Row]:
        return pack.pack([p for d in documents for p in pack.pieces(d.id, renderer.document(d.text), length)], length)

    rows, valid = (packed(records.documents(data / f"text-{split}.jsonl")) for split in ("train", "valid"))
    sources: tuple[Source, ...] = (Source(np.arange(len(rows)), len(rows)),)
    if stage.replay:
        wanted = sum(r.ids.size for r in rows) * stage.replay / (1 - stage.replay)
        replayed = packed(general(math.ceil(wanted)))
        draws = max(1, round(wanted * len(replayed) / sum(r.ids.size for r in replayed)))
        sources = (*sources, Source(len(rows) + np.arange(len(replayed)), draws))
        rows = rows + replayed
    return Feed(name, stage, rows, valid, 0, sources, _held_out(data, renderer, length))


def _held_out(data: Path, renderer: Renderer, length: int) -> HeldOut:
    """The sealed documents. The mark that ends one is no byte of it, so it is not supervised."""
    path = data / "text-test.jsonl"
    documents = records.documents(path)
    if runs.sha256(path) != runs.read_json(data / "dataset.json")["hashes"][path.name]:
        raise DataError("the sealed text was altered", where=str(path), fix="run `metier build` again")
    rows = [p for d in documents for p in pack.pieces(d.id, renderer.document(d.text), length, ends=False)]
    return HeldOut(rows, sum(len(d.text.encode()) for d in documents))
