"""Where the templates of a page are loaded, and how values look in it."""

from functools import cache
from typing import Any

from llmlabel.labelspace.show import printable


@cache
def environment() -> Any:
    """Made once, as templates are compiled."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("llmlabel", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
    )
    made.filters |= {
        "percent": percent,
        "decimals": lambda number, places: f"{number:.{places}f}",
        "count": lambda number: f"{number:,}",
    }
    return made


def percent(share: float) -> str:
    """With one decimal and a thin space."""
    return f"{100 * share:.1f}\u202f%"


def _clean(value: Any) -> Any:
    """Every value that enters the page; escaping follows. Markup is what a macro made of them."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value
