"""The little SVG the pictures of this package are made of. Self-contained: no script, no font, nothing loaded.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["FONT", "INK", "MUTED", "document", "element", "text"]

INK = "#1f2328"
MUTED = "#656d76"
FONT = "font-family:ui-sans-serif,system-ui,'DejaVu Sans',sans-serif"


def element(name: str, *children: str, **attributes: object) -> str:
    """One element; ``stroke_width=2`` becomes ``stroke-width="2"``. Children are markup already."""
    shown = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(_number(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{shown}>{''.join(children)}</{name}>" if children else f"<{name}{shown}/>"


def text(content: str, x: float, y: float, **attributes: object) -> str:
    """A line of text whose baseline begins, or with ``text_anchor`` ends or is centred, at (x, y)."""
    return element("text", escape(content), x=x, y=y, **{"fill": INK, "font_size": 12, **attributes})


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """The whole picture on white, ``title`` for those who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        f' viewBox="0 0 {width:.0f} {height:.0f}" role="img" style="{FONT}">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
