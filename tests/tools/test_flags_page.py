"""docs/flags.md says what the code declares."""

from __future__ import annotations

from pathlib import Path

import attrs

from chipbus.actors.config import EngineConfig
from chipbus.actors.sampling import SamplingParams
from chipbus.tools.flags_page import page
from chipbus.tools.serve.config import ServerConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == page() + "\n", "run: python -m chipbus.tools.flags_page > docs/flags.md"


def test_the_page_explains_every_field() -> None:
    for field in (*attrs.fields(EngineConfig), *attrs.fields(ServerConfig)):
        assert f"`CHIPBUS_{field.name.upper()}`" in page()
    rows = [line.split("|") for line in page().splitlines() if line.startswith("| `--")]
    settings = len(attrs.fields(EngineConfig)) - 1 + len(attrs.fields(ServerConfig))
    assert len(rows) == settings + len(attrs.fields(SamplingParams))
    assert all(cell.strip() for row in rows for cell in row[1:-1])
