"""A comparison as one page that a person can read, keep and send, in the style of the proof's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metier import plots
from metier.comparison import figures
from metier.release import gate, page

TEMPLATE = Path(__file__).with_name("page.html.j2")
# (most seconds, what they are counted in, how many seconds that is)
_CLOCKS = ((180, "seconds", 1), (3 * 3600, "minutes", 60), (float("inf"), "hours", 3600))
_FEW = 40


def comparison_page(document: Mapping[str, Any]) -> str:
    """The page of the document that `comparison.run.compare` returns."""
    runs = document["runs"]
    return page.render(
        TEMPLATE,
        {
            "runs": [_look(place, run) for place, run in enumerate(runs)],
            "sentence": _sentence(document),
            "sections": figures.sections(document),
            "plots": _plots(runs),
            "differences": _differences(document),
            "notes": document["notes"],
        },
    )


def _look(place: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """A run with the colour and dashes of its curves."""
    colour, dashes = plots.RUNS[place % len(plots.RUNS)]
    return {"name": run["run"], "folder": run["folder"], "acts": run["acts"], "colour": colour, "dashes": dashes}


def _sentence(document: Mapping[str, Any]) -> str:
    """What came of the comparison, in one sentence."""
    told = [row for row in document["differences"] if row["grader"] == gate.ALL]
    if not told:
        return "No two of these specialists answered the same sealed cases, so none is called better."
    return " ".join(_told(row) for row in told)


def _told(row: Mapping[str, Any]) -> str:
    points = f"{gate.signed_points(row['estimate'])} points ({_interval(row)} at {row['confidence'] * 100:g}\u00a0%)"
    said = {
        "better": f"{row['run']} gets more answers all right than {row['against']}",
        "worse": f"{row['run']} gets fewer answers all right than {row['against']}",
        "unclear": f"The cases do not tell {row['run']} from {row['against']}",
    }[figures.result(row)]
    return f"{said}: {points}."


def _interval(row: Mapping[str, Any]) -> str:
    return f"{gate.signed_points(row['low'])} to {gate.signed_points(row['high'])}"


def _plots(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Training and validation loss over steps and over time, of all runs that have them."""
    most = max((point[1] for run in runs for curve in run["curves"].values() for point in curve), default=0)
    unit, size = next((unit, size) for limit, unit, size in _CLOCKS if most <= limit)
    shown = []
    for name, title in (("loss", "Training loss, smoothed"), ("valid_loss", "Validation loss")):
        for column, axis, per in ((0, "step", 1), (1, unit, size)):
            drawn = [
                (place, [(point[column] / per, point[2]) for point in run["curves"][name]])
                for place, run in enumerate(runs)
            ]
            svg = plots.curves_plot(
                drawn,
                axis=axis,
                title=f"{title}, by {axis}",
                smoothed=name == "loss",
                marked=name == "valid_loss" and max(len(curve) for _, curve in drawn) <= _FEW,
            )
            shown += [{"title": title, "svg": svg}] if svg else []
    return shown


def _differences(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each paired difference with its drawing; those of one pair share a scale."""
    rows = document["differences"]
    texts = figures.differences(document)
    shown = []
    for row, text in zip(rows, texts, strict=True):
        mates = [r for r in rows if (r["run"], r["against"]) == (row["run"], row["against"])]
        low, high = min(0, *(100 * r["low"] for r in mates)), max(0, *(100 * r["high"] for r in mates))
        room = 0.06 * (high - low) or 1
        drawing = plots.whisker(
            *(100 * row[k] for k in ("estimate", "low", "high")),
            span=(low - room, high + room),
            threshold=0,
            asked=0,
            colour=KINDS[figures.result(row)],
            title=f"{text['what']}: {text['estimate']}, interval {text['interval']}",
        )
        shown.append(text | {"kind": KINDS[figures.result(row)], "whisker": drawing, "facts": _facts(row)})
    return shown


KINDS = {"better": "pass", "worse": "fail", "unclear": "unclear"}


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("interval", f"{_interval(row)} at {row['confidence'] * 100:g}\u00a0% confidence"),
        ("cases", f"{row['n']:,} in {row['clusters']:,} independent groups"),
        ("not judged", f"{row['missing']:,}"),
        ("test", row["test"]),
        ("p", page.p(row["p"])),
    ]
    if row["b"] is not None:
        facts.append((f"only {row['run']} right / only {row['against']}", f"{row['b']:,} / {row['c']:,}"))
    if row["smallest_detectable"] is not None:
        facts.append(("smallest difference found 4 times in 5", f"{row['smallest_detectable'] * 100:.1f} points"))
    return facts
