"""How the tests run: compiling in a process of its own, the longest tests first. What they share is in `tests.helpers`."""

from __future__ import annotations

import os

# Test workers share the cores: a thread that waits must not spin on one that another worker could use. libgomp reads this
# when it is loaded, so it stands before PyTorch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import multiprocessing
from typing import Any

import pytest
from hypothesis import settings

from fastxent._codegen import machine_code
from fastxent._codegen.compiler import object_code

pytest.register_assert_rewrite("tests.helpers")
collect_ignore = ["helpers"]

# Compiling a kernel leaves some 20 MB behind in LLVM, and the tests compile hundreds: a process of its own does it, and is
# replaced from time to time.
_compiler = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=25)


def _compiled_elsewhere(name: str, variant: Any) -> bytes:
    # A compiler that dies leaves its task unanswered: hence the limit, far above the seconds that a kernel takes.
    return _compiler.apply_async(object_code, (name, variant)).get(timeout=300)


machine_code.compiled = _compiled_elsewhere


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: one that began last would be waited for by all workers but one."""
    items.sort(key=lambda item: item.path.name not in ("test_fuzz.py", "test_guard_pages.py"))


def pytest_unconfigure() -> None:
    _compiler.terminate()
    _compiler.join()


# The first call of a kernel compiles it, so one example may take seconds.
settings.register_profile("fastxent", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("fastxent")
