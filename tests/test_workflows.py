"""The workflow files are valid, and what they run is there; pre-commit runs the linters that .ci/run does."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def validate(*files: Path) -> subprocess.CompletedProcess[str]:
    """Against the schema of GitHub's workflows that comes with check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


def test_valid():
    assert {file.stem for file in WORKFLOWS} == {"tests", "benchmarks", "dashboard", "wheels"}
    done = validate(*WORKFLOWS)
    assert done.returncode == 0, done.stdout


def test_what_is_not_valid_is_refused(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "runs_on:"))
    assert validate(wrong).returncode == 1


def exists(module: str) -> bool:
    """Whether there is a module. All finders would be asked by `find_spec`: setuptools' turns itself off when asked for pip."""
    spec, name = None, ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, None if spec is None else spec.submodule_search_locations)
        if spec is None:
            return False
    return True


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_modules_files_and_extras_exist(file):
    text = file.read_text()
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert exists(module), module
    for path in re.findall(r"\bbenchmarks/[\w/]+\.\w+", text):
        assert (ROOT / path).is_file(), path
    extras = set(re.findall(r'(?:-e "\.|\.whl\))\[(\w+)\]"', text))
    assert extras and all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_pre_commit_runs_the_linters_of_ci():
    """Those of the environment: hooks that come with versions of their own would drift from what .ci/run calls."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    commands = [entry.removesuffix(" --force-exclude") for entry in re.findall(r"entry: (.+)", hooks)]
    assert commands == ["ruff check", "ruff format", "mypy"]
    assert re.findall(r"repo: (.+)", hooks) == ["local"] and hooks.count("language: system") == len(commands)
    steps = (ROOT / ".ci" / "run").read_text()
    assert all(f'step ".venv/bin/{command}' in steps for command in commands)
