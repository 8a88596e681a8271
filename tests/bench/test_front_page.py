"""The README and the texts that it leads to: their tables are made from committed results, and what they name exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fastxent
from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TEXTS = [README, *(ROOT / "benchmarks").glob("*.md"), *(ROOT / ".github").glob("*.md"), ROOT / "CHANGELOG.md"]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a text."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_it_is_short():
    assert len(README.read_text().splitlines()) < 250


@pytest.mark.parametrize("text", [README, ROOT / "benchmarks" / "README.md"], ids=lambda path: path.parent.name)
def test_tables_are_made_from_the_results_that_they_name(text):
    written = text.read_text()
    (source,) = set(re.findall(r"^Measured on .*: `(benchmarks/results/.+\.json)`\.$", written, flags=re.MULTILINE))
    blocks = report.tables(json.loads((ROOT / source).read_text()), source)
    assert report.rewrite(written, blocks) == written


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!https?://)(.+?)\)", text.read_text()):
        path, _, anchor = target.partition("#")
        file = text.parent / path if path else text
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_comments_name_sections_of_the_log():
    sections = anchors((ROOT / "benchmarks" / "LOG.md").read_text())
    assert "channels-first" in sections
    for file in (ROOT / "fastxent").rglob("*.py"):
        assert set(re.findall(r"LOG\.md#([\w-]+)", file.read_text())) <= sections, file


def test_tests_that_hold_a_promise_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", README.read_text()))
    assert len(named) > 10 and named <= {file.name for file in (ROOT / "tests").rglob("test_*.py")}


def test_every_public_function_is_listed():
    listed = set(re.findall(r"`(\w+)\(", README.read_text()))
    functions = {name for name in fastxent.__all__ if name[0].islower() and callable(getattr(fastxent, name))}
    assert functions <= listed
