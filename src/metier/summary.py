"""What came of an act, in the few lines a person wants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import progress, runs
from metier.errors import MetierError
from metier.models import tuned

if TYPE_CHECKING:
    from metier.acts import Outcome


def lines(outcome: Outcome) -> list[str]:
    """The figures of one act."""
    figures = outcome.figures
    if "counts" in figures:
        counts = figures["counts"]
        splits = ", ".join(f"{n} {s['rows']:,}" for n, s in figures["splits"].items())
        return [
            f"{counts['in']:,} rows in: {counts['used']:,} used, {counts['duplicate']:,} duplicate, "
            f"{counts['rejected']:,} rejected ({splits})",
            *(f"note: {f['what']}" for f in figures.get("findings", ())),
        ]
    if "tokens_per_second" in figures:
        speed, memory = figures["tokens_per_second"], figures["memory_gb"]
        return [
            f"{speed['measured']:,.0f} tokens/s, {memory['measured']:.1f} GB peak memory",
            *(f"note: not exact: {reason}" for reason in figures.get("inexact", ())),
        ]
    if "verdict" in figures:
        return [f"verdict: {figures['verdict']}", *(_claim(c) for c in figures["claims"])]
    if "seconds_expected" in figures:
        return [f"{figures['rows']:,} rows, about {progress.clock(figures['seconds_expected'])}"]
    return []


def closing(outcomes: list[Outcome]) -> list[str]:
    """Where the report is, and the three lines: how much better, at what cost, and where what was trained lies."""
    run = outcomes[0].run
    verdict = next((o.figures for o in outcomes if "verdict" in o.figures), None)
    if verdict is None:
        return []
    return [
        f"report    {run / 'proof' / 'report.html'}",
        f"better    {_best_of_prompts(verdict)}",
        f"cost      {_cost(run)}",
        _where(run, outcomes[-1].act == "ship"),
    ]


def _claim(claim: dict[str, Any]) -> str:
    if claim["estimate"] is None:
        return f"{claim['result']:<7} {claim['claim']:<18} not judged"
    if claim.get("against"):
        shown = f"{_points(claim['estimate'])} points [{_points(claim['low'])}, {_points(claim['high'])}]"
    else:
        shown = f"{100 * claim['estimate']:.1f} % [{100 * claim['low']:.1f}, {100 * claim['high']:.1f}]"
    needs = f", needs about {claim['needs']:,} cases" if claim["result"] == "unclear" else ""
    return f"{claim['result']:<7} {claim['claim']:<18} {shown}{needs}"


def _best_of_prompts(verdict: dict[str, Any]) -> str:
    """Tuned against the strongest prompted arm, with its interval."""
    beats = [c for c in verdict["claims"] if c.get("against") and c["estimate"] is not None]
    if not beats:
        return "no claim that compares arms was judged"
    hardest = min(beats, key=lambda c: c["estimate"])
    grader = hardest.get("grader", "all")
    arms = verdict["arms"]
    return (
        f"tuned {100 * arms['tuned'][grader]:.1f} % right, best prompt ({hardest['against']}) "
        f"{100 * arms[hardest['against']][grader]:.1f} %: {_points(hardest['estimate'])} points, "
        f"{100 * hardest['confidence']:.0f} % interval {_points(hardest['low'])} to {_points(hardest['high'])}"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _cost(run: Path) -> str:
    seconds, peak = 0.0, 0.0
    for act in runs.ACTS:
        try:
            manifest = runs.Run(run).manifest(act)
        except MetierError:
            manifest = None
        seconds += manifest["seconds"] if manifest else 0.0
    peak = runs.read_json(run / "train" / "plan.json")["memory_gb"]["measured"]
    return f"{seconds / 60:.1f} minutes for all acts, {peak:.1f} GB peak memory in training"


def _where(run: Path, released: bool) -> str:
    trained = tuned.folder(run / "train")
    return f"{trained.name:<9} {run / 'release' / trained.name if released else f'{trained} (not released)'}"
