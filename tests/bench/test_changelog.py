"""CHANGELOG.md has the form of Keep a Changelog, and an entry for this version."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

import fastxent

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # in this order


def parts(text: str, mark: str) -> list[tuple[str, str]]:
    """Headings that begin with ``mark``, and what stands under each."""
    pieces = re.split(rf"^{mark} (.+)$", text, flags=re.MULTILINE)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def check_headings(text: str) -> None:
    """Unreleased, then versions with the day of their release, the newest first."""
    first, *headings = (heading for heading, _ in parts(text, "##"))
    assert first == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings]
    assert released and all(released), f"not all of {headings} are [version] - date"
    versions = [tuple(map(int, match.groups()[:3])) for match in released if match]
    days = [date.fromisoformat(match[4]) for match in released if match]
    assert versions == sorted(set(versions), reverse=True) and days == sorted(days, reverse=True), "the newest is not first"


def check_sections(text: str) -> None:
    """Each section is one of the six kinds, comes once and in order, and lists something."""
    for version, body in parts(text, "##"):
        sections = parts(body, "###")
        kinds = [kind for kind, _ in sections]
        assert kinds == [kind for kind in SECTIONS if kind in kinds], f"{version}: sections {kinds}"
        assert all(entries.lstrip().startswith("- ") for _, entries in sections), f"{version}: a section lists nothing"


def check_links(text: str) -> None:
    """A definition of a link belongs to a version; a link to a file finds it."""
    versions = {version.partition("]")[0] + "]" for version, _ in parts(text, "##")}
    assert set(re.findall(r"^(\[.+?\]): ", text, flags=re.MULTILINE)) <= versions
    files = [target for target in re.findall(r"\]\((.+?)\)", text) if "://" not in target]
    assert all((ROOT / file).exists() for file in files), files


CHECKS = [check_headings, check_sections, check_links]


@pytest.mark.parametrize("check", CHECKS)
def test_form(check):
    check(CHANGELOG)


def test_this_version_has_an_entry():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version and version[1] == fastxent.__version__
    assert any(heading.startswith(f"[{fastxent.__version__}] - ") for heading, _ in parts(CHANGELOG, "##"))


RIGHT = """# Changelog

## [Unreleased]

## [1.10.0] - 2026-02-01

### Fixed

- a

## [1.9.0] - 2026-01-31

### Added

- b
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## [Unreleased]\n", ""),
        ("[1.9.0]", "[1.11.0]"),
        ("[1.9.0]", "[1.10.0]"),
        ("2026-02-01", "2026-01-01"),
        ("2026-02-01", "2026-02-30"),
        ("2026-02-01", "1 February 2026"),
        ("2026-02-01\n\n### Fixed\n\n- a\n\n## [1.9.0] - 2026-01-31", "2026-02-01\n\n## [1.10.0] - 2026-02-01"),
        ("### Fixed", "### Improved"),
        ("- a\n", "- a\n\n### Added\n\n- c\n"),
        ("- a\n", "- a\n\n### Fixed\n\n- c\n"),
        ("- a\n", ""),
        ("- b\n", "- b\n\n[2.0.0]: https://example.org\n"),
        ("- b\n", "- [b](no-such-file)\n"),
    ],
)
def test_what_is_wrong_is_found(old, new):
    assert RIGHT.count(old) >= 1
    for check in CHECKS:
        check(RIGHT)
    with pytest.raises((AssertionError, ValueError)):
        for check in CHECKS:
            check(RIGHT.replace(old, new, 1))
