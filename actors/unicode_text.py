"""What may be called text: Unicode that has an encoding. Owns nothing."""

from __future__ import annotations

from ..errors import RequestInvalid

__all__ = ["check_unicode"]


def check_unicode(text: str, what: str, *, param: str = "") -> None:
    """Raise ``RequestInvalid`` if half a surrogate pair is in ``text``: it has no bytes, so it cannot even travel."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestInvalid(f"{what} is not valid Unicode at character {error.start}", param=param) from error
