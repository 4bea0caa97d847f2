"""Figures as SVG text: small, deterministic, at home in light, dark and print.

A figure names its colours, and the page around it says what they are: `var(--ink, #1c2430)` and so on. A figure saved
as a file of its own shows the second value. Text stays text, in the reader's own font; labels that come from settings
or models are written as they are, never as markup or mathematics.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from metier.errors import needs_extra

# name in the page's style sheet -> colour outside of it
COLOURS = {
    "ink": "#1c2430",
    "quiet": "#5d6675",
    "rule": "#d9dde3",
    "faint": "#bcc3cd",
    "page": "#ffffff",
    "wash": "#e6f2ec",
    "pass": "#1c7a4d",
    "fail": "#b3322b",
    "unclear": "#9a6a00",
    "base": "#7b8494",
    "prompt": "#b8700c",
    "few-shot": "#8a4fb5",
    "rag": "#0f7f86",
    "tuned": "#1f5fd0",
    "tuned-rag": "#0b3c8c",
}
# matplotlib's name and the same shape as a character, for legends in text
SHAPES = {
    "base": ("^", "▲"),
    "prompt": ("s", "■"),
    "few-shot": ("D", "◆"),
    "rag": ("v", "▼"),
    "tuned": ("o", "●"),
    "tuned-rag": ("P", "✚"),
}
# How runs that are compared are told apart: colour, and dashes in lengths of ink and gap.
RUNS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("tuned", ()),
    ("prompt", (5, 2)),
    ("few-shot", (1.5, 1.5)),
    ("rag", (6, 2, 1.5, 2)),
    ("base", (9, 3)),
)
# Stand-ins that matplotlib understands, exchanged for `var(--name, colour)` in the finished text.
_PAINT = {name: f"#0000{place:02x}" for place, name in enumerate(COLOURS, 1)}
_SMALL = 12


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step: every training step faint, their moving average, and validation, from lines of `metrics.jsonl`.

    Of several stages each has its own average, and a line with its name where it begins.
    """
    training, validation = _curves(metrics)
    borders = _borders(metrics)
    if not training and not validation:
        return ""
    with _style():
        figure = _figure(440, 250)
        axes = _axes(figure, left=48, right=14, top=34, bottom=40)
        values = [y for _, y in training + validation]
        if min(values) > 0 and max(values) / min(values) > 10:
            _log(axes)
        axes.grid(axis="y", color=_PAINT["rule"], linewidth=0.8)
        axes.set_axisbelow(True)
        entries = []
        if training:
            for part in _parted(training, [at for at, _ in borders]):
                steps, losses = zip(*part, strict=True)
                axes.plot(steps, losses, color=_PAINT["faint"], linewidth=1)
                axes.plot(steps, _smooth(losses), color=_PAINT["base"], linewidth=1.8)
            entries.append(("base", "training, smoothed"))
        if validation:
            for part in _parted(validation, [at for at, _ in borders]):
                steps, losses = zip(*part, strict=True)
                axes.plot(steps, losses, color=_PAINT["tuned"], linewidth=1.8, marker="o", markersize=6)
            entries.append(("tuned", "validation"))
        axes.margins(x=0.02)
        for at, stage in borders if len(borders) > 1 else ():
            axes.axvline(at, color=_PAINT["rule"], linewidth=0.8)
            axes.text(at, 1, f" {stage}", color=_PAINT["quiet"], transform=axes.get_xaxis_transform(), va="bottom")
        _integer_ticks(axes.xaxis)
        axes.set_xlabel("step", color=_PAINT["quiet"])
        _inline_legend(figure, entries)
        return _svg(figure, "Loss by training step")


def rate_plot(points: Sequence[Mapping[str, float]], suggestion: float) -> str:
    """Loss against a growing learning rate, from the points of `lr.json`, with a line at what is suggested."""
    with _style():
        from matplotlib.ticker import FuncFormatter

        figure = _figure(440, 250)
        axes = _axes(figure, left=48, right=14, top=34, bottom=40)
        rates = [point["lr"] for point in points]
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.tick_params(which="minor", length=0)
        axes.grid(axis="y", color=_PAINT["rule"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.plot(rates, [point["loss"] for point in points], color=_PAINT["faint"], linewidth=1)
        axes.plot(rates, [point["smoothed"] for point in points], color=_PAINT["base"], linewidth=1.8)
        axes.axvline(suggestion, color=_PAINT["tuned"], linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_xlabel("learning rate", color=_PAINT["quiet"])
        _inline_legend(figure, [("base", "loss, smoothed"), ("tuned", f"suggested {suggestion:g}")])
        return _svg(figure, "Loss by learning rate")


def curves_plot(
    drawn: Sequence[tuple[int, Sequence[tuple[float, float]]]], *, axis: str, title: str, smoothed: bool, marked: bool
) -> str:
    """The curves (x, y) of several runs over one axis, each in the look of its run's place.

    `smoothed` draws their moving averages, `marked` shows every point.
    """
    if not any(curve for _, curve in drawn):
        return ""
    with _style():
        figure = _figure(440, 230)
        axes = _axes(figure, left=48, right=14, top=12, bottom=40)
        values = [y for _, curve in drawn for _, y in curve]
        if min(values) > 0 and max(values) / min(values) > 10:
            _log(axes)
        axes.grid(axis="y", color=_PAINT["rule"], linewidth=0.8)
        axes.set_axisbelow(True)
        for place, curve in drawn:
            colour, dashes = RUNS[place % len(RUNS)]
            style: Any = (0, dashes) if dashes else "solid"
            marker = SHAPES[colour][0] if marked else ""
            heights = [y for _, y in curve]
            heights = _smooth(heights) if smoothed else heights
            axes.plot(
                [x for x, _ in curve],
                heights,
                color=_PAINT[colour],
                linewidth=1.8,
                linestyle=style,
                marker=marker,
                markersize=6,
            )
        axes.margins(x=0.02)
        _integer_ticks(axes.xaxis)
        axes.set_xlabel(axis, color=_PAINT["quiet"])
        return _svg(figure, title)


def whisker(
    estimate: float,
    low: float,
    high: float,
    *,
    span: tuple[float, float],
    threshold: float,
    asked: float,
    colour: str,
    title: str,
) -> str:
    """One estimate with its interval, in percent, on a line from `span[0]` to `span[1]`.

    The good side of `threshold` is washed, and a dashed line stands where the estimate is `asked` to be.
    """
    with _style():
        figure = _figure(300, 54)
        axes = _axes(figure, left=8, right=8, top=4, bottom=20)
        axes.set_xlim(*span)
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.axvspan(max(threshold, span[0]), span[1], color=_PAINT["wash"], linewidth=0)
        axes.axvline(threshold, color=_PAINT["quiet"], linewidth=1)
        axes.axvline(asked, color=_PAINT["quiet"], linewidth=1, linestyle=(0, (3, 3)))
        axes.plot([low, high], [0, 0], color=_PAINT[colour], linewidth=3, solid_capstyle="round")
        axes.plot([estimate], [0], "o", color=_PAINT[colour], markeredgecolor=_PAINT["page"], markersize=10)
        axes.spines["bottom"].set_visible(False)
        _few_ticks(axes.xaxis, 4)
        return _svg(figure, title)


def arms_plot(rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], arms: Sequence[str]) -> str:
    """Share of right answers, in percent: a row for each label, in it (mean, low, high) of each arm."""
    if not rows or not arms:
        return ""
    step = 12 * len(arms) + 16
    with _style():
        figure = _figure(440, step * len(rows) + 34)
        axes = _axes(figure, left=118, right=14, top=4, bottom=30)
        axes.set_xlim(-2, 102)
        axes.set_ylim(step * len(rows), 0)
        axes.grid(axis="x", color=_PAINT["rule"], linewidth=0.8)
        axes.set_axisbelow(True)
        for place, (_, values) in enumerate(rows):
            if place:
                axes.axhline(place * step, color=_PAINT["rule"], linewidth=0.8)
            for offset, arm in enumerate(arms):
                if arm in values:
                    _arm_mark(axes, arm, values[arm], place * step + 14 + 12 * offset)
        axes.set_yticks([(place + 0.5) * step for place in range(len(rows))], [_short(label) for label, _ in rows])
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.spines["bottom"].set_visible(False)
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
            label.set_color(_PAINT["ink"])
        return _svg(figure, "Share of right answers of each system, with intervals")


def colour_of(arm: str) -> str:
    """The colour's name for an arm."""
    name = arm.replace("+", "-")
    return name if name in SHAPES else "base"


def _arm_mark(axes: Any, arm: str, values: tuple[float, float, float], y: float) -> None:
    mean, low, high = values
    name = colour_of(arm)
    axes.plot([low, high], [y, y], color=_PAINT[name], linewidth=2, solid_capstyle="round")
    axes.plot([mean], [y], SHAPES[name][0], color=_PAINT[name], markeredgecolor=_PAINT["page"], markersize=8.5)


def _curves(metrics: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(step, loss) of training and of validation."""
    training: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    for step, line in _placed(metrics):
        for key, points in (("loss", training), ("valid_loss", validation)):
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key]):
                points.append((step, float(line[key])))
    return training, validation


def _borders(metrics: Iterable[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """(step, name) of each stage's beginning, half a step before its first."""
    first: dict[str, float] = {}
    for step, line in _placed(metrics):
        if "loss" in line:
            first.setdefault(str(line.get("stage", "")), step - 0.5)
    return [(at, name) for name, at in first.items()]


def _parted(points: Sequence[tuple[float, float]], borders: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The points of each stage; stages without one are left out."""
    parts: dict[int, list[tuple[float, float]]] = {}
    for step, value in points:
        parts.setdefault(sum(step > at for at in borders), []).append((step, value))
    return list(parts.values())


def _placed(metrics: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each line with its step; a stage whose steps begin again goes on where the last one ended."""
    start = last = 0.0
    stage = None
    for line in metrics:
        step = float(line.get("step", last))
        if line.get("stage", stage) != stage:
            stage, start = line.get("stage"), last if start + step < last else start
        last = start + step
        yield last, line


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the values around each one, about a tenth of them all, evenly to both sides so that it never lags."""
    reach, last = len(values) // 20, len(values) - 1
    out = []
    for place in range(len(values)):
        near = min(reach, place, last - place)
        window = values[place - near : place + near + 1]
        out.append(math.fsum(window) / len(window))
    return out


def _style() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise needs_extra("matplotlib", "report") from error
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "metier",
            "font.family": "DejaVu Sans",
            "font.size": _SMALL,
            "text.parse_math": False,
            "axes.unicode_minus": True,
            "axes.labelsize": _SMALL,
            "xtick.labelsize": _SMALL,
            "ytick.labelsize": _SMALL,
            "path.simplify": True,
        }
    )


def _figure(width: int, height: int) -> Any:
    """A figure of so many CSS pixels, drawn without a display and without matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def _axes(figure: Any, *, left: int, right: int, top: int, bottom: int) -> Any:
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height), facecolor="none"
    )
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_PAINT["rule"])
    axes.tick_params(length=0, pad=6, colors=_PAINT["quiet"])
    return axes


def _log(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _integer_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True))


def _few_ticks(axis: Any, most: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def _inline_legend(figure: Any, entries: Sequence[tuple[str, str]]) -> None:
    """Names of the curves above the axes, each in its curve's colour."""
    width, height = figure.get_size_inches() * 72
    x = 48.0
    for colour, text in entries:
        figure.text(x / width, 1 - 18 / height, text, color=_PAINT[colour], weight="bold", fontsize=_SMALL)
        x += 8.2 * len(text) + 18


def _short(label: str, most: int = 15) -> str:
    label = " ".join(label.split())
    return label if len(label) <= most else label[: most - 1] + "…"


def _svg(figure: Any, title: str) -> str:
    """The figure as one `<svg>` element without size, dates or names of its parts."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The reader's font draws the text, so a glyph that matplotlib's font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :].rstrip() + "\n"
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r"<style type=\"text/css\">[^<]*</style>", "", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r" transform=\"rotate\(-0 [^)]*\)\"", "", text)
    for name, paint in _PAINT.items():
        text = text.replace(paint, f"var(--{name}, {COLOURS[name]})")
    size = re.compile(r'width="([\d.]+)pt" height="([\d.]+)pt" ')
    label = html.escape(title, quote=True)
    return size.sub(lambda _: f'role="img" aria-label="{label}" ', text, count=1)
