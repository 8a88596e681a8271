"""Test files that cannot be imported here, because a package is not installed or Python has a module on other systems only."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = "torch", "scipy", "sklearn", "ml_dtypes", "rich", "matplotlib", "asv", "pytest_benchmark", "selenium", "hypothesis"
POSIX = "fcntl", "grp", "pwd", "resource"


def is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


def missing() -> set[str]:
    return {module for module in (*PACKAGES, *POSIX) if is_missing(module)}


@cache
def _imports(file: Path) -> set[str]:
    """What a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def needs(file: Path) -> set[str]:
    """The packages that a file imports, by way of other files of the repository too."""
    found: set[str] = set()
    files = [file]
    for one in files:  # grows as they are found
        for name in _imports(one):
            found.add(name.partition(".")[0])
            path = ROOT.joinpath(*name.split("."))
            ours = (place for place in (path.with_suffix(".py"), path / "__init__.py") if place.is_file())
            files += [place for place in ours if place not in files]
    return found


def paths_without(modules: set[str]) -> list[Path]:
    """The files of the tests that need one of `modules`, and the folders whose conftest does."""
    found = [file for file in sorted((ROOT / "tests").rglob("*.py")) if needs(file) & modules] if modules else []
    return [file.parent if file.name == "conftest.py" else file for file in found]
