"""The status page as one file: as the server serves it, and with one moment written into it, for later.

Owns: nothing. ``page.html`` beside this module is the page; it draws what ``/state.json`` says, or what is embedded.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ...actors.guest import Guest
from ...actors.report import EngineReport
from ...actors.run_files import read_recorded
from ...errors import ConfigError, EngineDead

__all__ = ["embedded_page", "live_page", "page", "policy"]

_EMPTY = '<script type="application/json" id="embedded">null</script>'
_ENDED = "Recorded: this is how a run ended that was closed in order. Nothing here is being updated."
_LATEST = (
    "Recorded: this is the latest report of a run that had not been closed when it was read: it goes on, or was cut"
    " short. Nothing here is being updated."
)
_LOOK = (
    "A look from outside: this is one moment of a running engine, and nothing here is being updated. A guest is told of"
    " its processes only; requests, pages, chip time and events are missing."
)


@cache
def live_page() -> str:
    """The page that polls the server it came from. HTML, without a byte from anywhere else."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


@cache
def policy(connects: str = "'self'") -> str:
    """The Content-Security-Policy under which the page works: its own style and script, by hash, and nothing more.

    connects: what its script may connect to
    """
    text = live_page()
    script, style = (_hash(text, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src {connects};"
        " base-uri 'none'; form-action 'none'"
    )


def _hash(text: str, tag: str) -> str:
    [found] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()}'"


def embedded_page(report: EngineReport | dict[str, Any], note: str) -> str:
    """The page of one moment, for a file: it asks nobody for anything, and says ``note`` at the top."""
    data = msgspec.json.encode({"report": report, "note": note}).decode()
    data = data.replace("<", r"\u003c")  # so that no text can end the element it is in
    text = live_page().replace(_EMPTY, _EMPTY.replace("null", data))
    return text.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{_policy_element()}', 1)


def _policy_element() -> str:
    content = policy("'none'")
    return f'<meta http-equiv="Content-Security-Policy" content="{content}">'


def page(source: Path, out: Path | None) -> Path:
    """Write the page of a record, or of the engine that runs in a run directory; returns where.

    Raises ``ConfigError`` if ``source`` is neither or ``out`` cannot be written, ``LedgerCorrupt`` if it is broken.
    """
    text = _text_of(source)
    target = out or Path(f"{source.resolve().name}.html")
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the page cannot be written to {target}: {error.strerror}") from None
    return target


def _text_of(source: Path) -> str:
    if (source / "run.json").exists():
        report = read_recorded(source)
        return embedded_page(report, _ENDED if report.is_closed else _LATEST)
    try:
        with Guest(source.absolute()) as guest:
            tree = guest.report()
    except (ConfigError, EngineDead) as error:
        raise ConfigError(f"{source} is no record (it has no run.json), and no engine: {error}") from None
    look = {"at_unix_s": time.time(), "run_dir": str(source.absolute()), "processes": tree.processes}
    return embedded_page(look, _LOOK)
