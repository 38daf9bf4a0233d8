"""What all pages have in common: where their templates are, and how figures are written."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Of a longer text, the rest is folded.
SHOWN_CHARACTERS = 420

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Fill a template: text of the data is escaped, a missing value is an error.

    Args:
        template: Name of a file in `templates/`, without its endings.
        **values: What it shows; its filters are the functions below.

    Returns:
        HTML.
    """
    return _environment().get_template(f"{template}.html.j2").render(**values)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(count=count, percent=percent, points=points, head_and_rest=head_and_rest)
    return environment


def count(number: float) -> str:
    """Return a whole number with thousands separated."""
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """Return a share from 0 to 1 in percent."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def head_and_rest(text: str) -> tuple[str, str]:
    """Cut a long text in two, between words where there are any: what is shown, and what a click unfolds."""
    if len(text) <= SHOWN_CHARACTERS * 5 // 4:
        return text, ""
    cut = text.rfind(" ", SHOWN_CHARACTERS // 2, SHOWN_CHARACTERS)
    cut = SHOWN_CHARACTERS if cut < 0 else cut
    return text[:cut], text[cut:]
