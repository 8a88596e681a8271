"""The folder list is the architecture: imports go down it, and each room introduces itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastxent

pytestmark = pytest.mark.core

PACKAGE = Path(fastxent.__file__).parent
# From the ground up. What is in none of them, the public modules, `fastxent.torch` and the command line, is above them all.
ROOMS = ["_abi", "_simd", "_kernels", "_codegen", "_runtime", "_fastpath"]
ABOVE = len(ROOMS)


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    return ROOMS.index(room) if room in ROOMS else ABOVE


def imports_of(file: Path) -> set[str]:
    """Modules of fastxent that a file imports, wherever in it, but for type checkers alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastxent.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastxent."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastxent":
            found |= {f"fastxent.{alias.name}" for alias in node.names if alias.name != "__version__"}
    return found


def graph() -> dict[str, set[str]]:
    """Who imports whom, by file."""
    files = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): f for name, f in files.items()}

    def module_of(name: str) -> str:
        while name not in modules:  # a name in a module
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module_of(i) for i in imports_of(f)} - {name, "fastxent"} for name, f in modules.items() if name != "fastxent"
    }


def test_imports_go_down():
    up = [(a, b) for a, imports in graph().items() for b in imports if floor_of(b) > floor_of(a)]
    assert not up


def test_imports_go_round_in_no_circle():
    """Within the rooms too; a public module is imported by whoever is asked for a name of it."""
    imports = {name: {b for b in others if floor_of(b) < ABOVE} for name, others in graph().items() if floor_of(name) < ABOVE}
    while leaves := {name for name, others in imports.items() if not others & set(imports)}:
        for name in leaves:
            del imports[name]
    assert not imports


def test_the_command_line_imports_the_benchmarks_and_not_they_the_command_line():
    files = list((PACKAGE.parent / "benchmarks").rglob("*.py"))
    assert files
    for file in files:
        assert not {name for name in imports_of(file) if name.startswith(("fastxent.cli", "fastxent._cli"))}, file


def test_every_folder_is_a_room_that_introduces_itself():
    folders = {f.parent for f in PACKAGE.rglob("*.py")} - {PACKAGE}
    assert {f.name for f in folders if f.parent == PACKAGE} == {*ROOMS, "_cli", "torch"}
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text, folder
