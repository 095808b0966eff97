"""The table of requirements names tests that exist, each line once."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REASON = "not built: "


def table() -> dict[str, list[str] | str]:
    """What each line of requirements is proven by, or why it is not there."""
    sections = tomllib.loads((TESTS / "l3_requirements.toml").read_text(encoding="utf-8"))
    return {line: proof for lines in sections.values() for line, proof in lines.items()}


def existing() -> set[str]:
    """Every test function of the project."""
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        found.update(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return found


def test_every_requirement_has_tests_that_exist_or_a_reason() -> None:
    known = existing()
    unproven = {
        line: proof
        for line, proof in table().items()
        if not (
            proof.startswith(REASON) and len(proof) > len(REASON) + 20
            if isinstance(proof, str)
            else proof and known.issuperset(proof)
        )
    }

    assert unproven == {}


def test_every_requirement_has_an_id_of_its_own() -> None:
    ids = Counter(line.split(" ", 1)[0] for line in table())

    assert [name for name, count in ids.items() if count > 1] == []
    assert {f"14.{number}" for number in range(1, 19)} <= ids.keys()
    assert {name.split(".", 1)[0] for name in ids} == {str(section) for section in range(2, 16)}
