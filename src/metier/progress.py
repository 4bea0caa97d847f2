"""What people see while something takes long: a bar with rate and time left, on stderr, and never on stdout.

On a terminal it is a live bar; elsewhere it is a plain line now and then; with `quiet` (`--json`) it is nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

quiet = False
LINE_SECONDS = 15.0

Advance = Callable[..., None]


def note(text: str) -> None:
    """One line for the person watching."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(what: str, total: float, unit: str, done: float = 0) -> Iterator[Advance]:
    """Yields `advance(amount, text)`: moves the bar by `amount` units and shows `text` beside it."""
    if quiet:
        yield lambda amount=1, text="": None
    elif sys.stderr.isatty():
        with _live(what, total, unit, done) as advance:
            yield advance
    else:
        yield _plain(what, total, unit, done)


@contextlib.contextmanager
def _live(what: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[text]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(what, total=total, completed=round(done), text="")
        yield lambda amount=1, text="": progress.update(task, advance=amount, text=text)


def _plain(what: str, total: float, unit: str, done: float) -> Advance:
    start = said = time.monotonic()
    at = done

    def advance(amount: float = 1, text: str = "") -> None:
        nonlocal at, said
        at += amount
        now = time.monotonic()
        if now - said < LINE_SECONDS and at < total:
            return
        said = now
        rate = (at - done) / max(now - start, 1e-9)
        left = (total - at) / rate if rate else 0
        note(f"{what:<9} {at:,.0f}/{total:,.0f} {unit}  {rate:,.1f} {unit}/s  {text}  {clock(left)} left")

    return advance


def clock(seconds: float) -> str:
    """Seconds as people say them: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
