"""The figures of a comparison as texts, a column for each run: what the terminal and the page both show."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metier.progress import clock
from metier.release import gate, page
from metier.release.report import grader_name

NOTHING = "—"
HASH = 12

Cells = list[str]


@dataclass(frozen=True)
class Section:
    """A heading with its rows: what a row is, and its text in every run."""

    title: str
    rows: list[tuple[str, Cells]]


def sections(document: Mapping[str, Any]) -> list[Section]:
    """Every section that has a row, in the order of the acts."""
    each = document["runs"]
    settings = [(row["key"], [_value(value) for value in row["values"]]) for row in document["settings"]]
    found = [
        Section("Settings that differ", settings or [("none", ["" for _ in each])]),
        Section("Data", _rows(each, "data", DATA)),
        Section("Training", _rows(each, "training", TRAINING)),
        Section("Answers all right", list(_arms(each))),
        Section("The specialist's answers", list(_graders(each))),
        Section("Cost of the specialist's answers", list(_costs(each))),
        Section("Proof", _rows(each, "proof", {"verdict": ("verdict", str)})),
    ]
    return [section for section in found if section.rows]


def differences(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each paired difference of two specialists in plain texts."""
    return [
        {
            "pair": f"{row['run']} − {row['against']}",
            "what": grader_name(row["grader"]),
            "estimate": f"{gate.signed_points(row['estimate'])} points",
            "interval": f"{gate.signed_points(row['low'])} to {gate.signed_points(row['high'])}",
            "p": page.p(row["p"]),
            "cases": f"{row['n']:,}" + (f" ({row['missing']:,} not judged)" if row["missing"] else ""),
            "result": result(row),
        }
        for row in document["differences"]
    ]


def result(row: Mapping[str, Any]) -> str:
    """Which side of zero the interval lies on: `better`, `worse`, or `unclear`."""
    if row["low"] > 0:
        return "better"
    return "worse" if row["high"] < 0 else "unclear"


# name in the document -> (name for people, how it is shown)
Shown = dict[str, tuple[str, Callable[[Any], str]]]

DATA: Shown = {
    "splits.train.rows": ("training rows", "{:,}".format),
    "splits.train.tokens": ("training tokens", "{:,}".format),
    "splits.valid.rows": ("validation rows", "{:,}".format),
    "splits.test.rows": ("test rows", "{:,}".format),
    "hashes.train.jsonl": ("training set", lambda digest: digest[:HASH]),
    "hashes.valid.jsonl": ("validation set", lambda digest: digest[:HASH]),
    "seal": ("test set", lambda digest: digest[:HASH]),
    "opened": ("test set opened", lambda times: "once" if times == 1 else f"{times} times"),
}
TRAINING: Shown = {
    "steps": ("steps", "{:,}".format),
    "tokens": ("tokens", "{:,}".format),
    "loss": ("training loss, last steps", "{:.4f}".format),
    "valid_loss": ("validation loss, best", "{:.4f}".format),
    "seconds": ("time of the steps", clock),
    "act_seconds": ("time of the act", clock),
    "tokens_per_second": ("tokens a second", "{:,.0f}".format),
    "memory_gb": ("peak memory", "{:.2f} GB".format),
}


def _rows(each: Sequence[Mapping[str, Any]], part: str, shown: Shown) -> list[tuple[str, Cells]]:
    """The rows of one part of the runs, those left out that no run has."""
    rows = []
    for name, (what, show) in shown.items():
        values = [_at(one[part], name) for one in each]
        if any(value is not None for value in values):
            rows.append((what, [NOTHING if value is None else show(value) for value in values]))
    return rows


def _at(tree: Any, name: str) -> Any:
    """The value under a dotted name, in which the last part may hold dots itself; None where there is none."""
    if not isinstance(tree, Mapping):
        return None
    head, _, rest = name.partition(".")
    return tree[name] if name in tree else _at(tree.get(head), rest) if rest else None


def _arms(each: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Cells]]:
    arms = dict.fromkeys(arm for one in each if one["proof"] for arm in one["proof"]["arms"])
    for arm in arms:
        yield arm, [_share(_at(one["proof"], f"arms.{arm}"), gate.ALL) for one in each]


def _graders(each: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Cells]]:
    ours = [_at(one["proof"], f"arms.{gate.OURS}") or {} for one in each]
    graders = dict.fromkeys(grader for figures in ours for grader in figures.get("intervals", {}))
    for grader in graders:
        if grader != gate.ALL:
            yield grader_name(grader), [_share(figures, grader) for figures in ours]


def _costs(each: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Cells]]:
    ours = [_at(one["proof"], f"arms.{gate.OURS}") for one in each]
    if any(ours):
        yield "tokens an answer", [f"{f['tokens_per_case']:,.0f}" if f else NOTHING for f in ours]
        yield "time for 1,000", [clock(1000 * f["seconds_per_case"]) if f else NOTHING for f in ours]
        yield "price of 1,000", [page.dollars(f["dollars_per_1000"]) if f else NOTHING for f in ours]


def _share(figures: Mapping[str, Any] | None, grader: str) -> str:
    """`72.5 % (68.0 to 76.7)`."""
    if not figures or grader not in figures:
        return NOTHING
    interval = figures["intervals"][grader]
    if interval["low"] is None:
        return page.percent(figures[grader])
    return f"{page.percent(figures[grader])} ({interval['low'] * 100:.1f} to {interval['high'] * 100:.1f})"


def _value(value: Any) -> str:
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
