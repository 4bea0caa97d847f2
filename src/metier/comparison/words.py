"""A comparison in the terminal: one table with a column for each run, the differences, and what to mind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from metier.comparison import figures
from metier.release import page

STYLES = {"better": "green", "worse": "red", "unclear": "yellow"}
_PIPED_WIDTH = 160


def show(document: Mapping[str, Any]) -> None:
    """Prints the comparison on stdout."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    for part in _parts(document):
        console.print(part)
        console.print()


def _parts(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield _side_by_side(document)
    if document["differences"]:
        yield _differences(document)
    if document["notes"]:
        yield Text("\n").join(Text.assemble(("note  ", "yellow"), _plain(note)) for note in document["notes"])


def _side_by_side(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for run in document["runs"]:
        table.add_column(Text(_plain(run["run"]), style="bold"), justify="right", overflow="fold")
    for section in figures.sections(document):
        table.add_row(Text(section.title, style="bold"))
        for what, cells in section.rows:
            table.add_row(Text("  " + _plain(what)), *(Text(_plain(cell)) for cell in cells))
        table.add_section()
    return table


def _differences(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("specialists on the same cases", "", "difference", "interval", "p", "cases", ""):
        table.add_column(name, justify="left" if name in ("", "specialists on the same cases") else "right")
    before = ""
    for row in figures.differences(document):
        pair = "" if row["pair"] == before else row["pair"]
        cells = [_plain(text) for text in (pair, row["what"], row["estimate"], row["interval"], row["p"])]
        style = STYLES[row["result"]]
        table.add_row(*map(Text, cells), Text(row["cases"]), Text(row["result"], style=style))
        before = row["pair"]
    return table


def _plain(text: str) -> str:
    """Text whose control characters, which could steer a terminal, can be seen."""
    return text.translate(page.VISIBLE)
