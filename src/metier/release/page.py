"""What Metier's pages share: how they are put together, and how they show numbers.

A page reaches for nothing outside itself and runs no script. What documents, settings and models wrote is shown as
text, and characters that could disguise a text are made visible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# C0 and C1 controls, and the marks that reorder or hide text, as characters that can be seen.
_DISGUISES = (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0xFEFF)
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)} | dict.fromkeys(_DISGUISES, "\ufffd")


def render(template: Path, context: Mapping[str, Any]) -> str:
    """The page that a template makes of a context; the style sheet is that of this folder."""

    def seen(value: Any) -> Any:
        return value if isinstance(value, Markup) or not isinstance(value, str) else value.translate(VISIBLE)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(context)
    # No style sheet imports anything; a text that quotes one must not look, to a scanner, as if ours did.
    return page.replace("@import", "&#64;import")


def percent(share: float) -> str:
    return f"{share * 100:.1f}\u00a0%"


def dollars(amount: float) -> str:
    """Cents where there are any, else two digits that count."""
    if amount >= 0.1 or amount <= 0:
        return f"${amount:,.2f}" if amount else "$0"
    return f"${amount:.{1 - math.floor(math.log10(amount))}f}"


def p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
