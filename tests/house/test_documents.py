"""Documents say what the code does: guarantees and their tests match one to one, named files exist, examples run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = re.compile(r"^- \*\*([A-Z]\d+)\*\* (.+?\.) \(`(test_\w+)`\)$")


def documented() -> list[tuple[str, str]]:
    """(id, test name) of every guarantee in docs/semantics.md; every bullet must have the form."""
    found = []
    for line in (ROOT / "docs" / "semantics.md").read_text().splitlines():
        if line.startswith("- "):
            match = SENTENCE.match(line)
            assert match, f"not of the form '- **ID** Sentence. (`test_name`)': {line}"
            found.append((match[1], match[3]))
    return found


def marked() -> list[tuple[str, str]]:
    """(id, test name) of every test that carries ``@pytest.mark.guarantee``."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.guarantee":
                    found += [(ast.literal_eval(argument), node.name) for argument in decorator.args]
    return found


def test_each_guarantee_has_exactly_one_test_and_each_marked_test_its_sentence() -> None:
    assert sorted(documented()) == sorted(marked())


def test_no_guarantee_id_is_used_twice() -> None:
    assert [name for name, count in Counter(i for i, _ in documented()).items() if count > 1] == []


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_named_in_documents_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:bus|topology|kernels|actors|tools|tests|docs|examples|chipbus)/[\w./]*\w)`", text))
    links = {link for link in re.findall(r"\]\(([\w./-]+)\)", text) if not link.startswith("http")}

    assert [name for name in sorted(named | links) if not (ROOT / name).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(example: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
