"""How the tests run: compiling in a process of its own, the longest tests first. What they share is in `tests.helpers`."""

from __future__ import annotations

import os

# Test workers share the cores: a thread that waits must not spin on one that another worker could use. libgomp reads this
# when it is loaded, so it stands before PyTorch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import multiprocessing
import re
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.helpers")

from fastxent._codegen import machine_code
from fastxent._codegen.compiler import object_code
from tests.helpers.missing import missing, paths_without

MISSING = missing()
collect_ignore = ["helpers", *map(str, paths_without(MISSING))]


def pytest_report_header() -> str:
    return f"not here, nor who imports them: {', '.join(sorted(MISSING)) or 'nothing'}"


def pytest_addoption(parser: pytest.Parser) -> None:
    if "pytest_benchmark" in MISSING:
        parser.addoption("--benchmark-disable", action="store_true", help="understood where there is no pytest-benchmark")


# Compiling a kernel leaves some 20 MB behind in LLVM, and the tests compile hundreds: a process of its own does it, and is
# replaced from time to time.
_compiler = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=50)


def _compiled_elsewhere(name: str, variant: Any) -> bytes:
    # A compiler that dies leaves its task unanswered: hence the limit, far above the seconds that a kernel takes.
    return _compiler.apply_async(object_code, (name, variant)).get(timeout=300)


machine_code.compiled = _compiled_elsewhere


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is thorough, and put the longest tests first: one that began last would be waited for by all but one worker.

    A dtype has kernels of its own, and compiling them is most of a test's time. So of what is parametrised over dtypes float32
    is for README's command, and the others are thorough, but those that are marked ``core``.
    """
    for item in items:
        parameters = item.name.partition("[")[2]
        if re.search("float16|float64", parameters) and item.get_closest_marker("core") is None:
            item.add_marker("thorough")
    items.sort(key=lambda item: item.path.name not in ("test_fuzz.py", "test_guard_pages.py"))


def pytest_unconfigure() -> None:
    _compiler.terminate()
    _compiler.join()


if "hypothesis" not in MISSING:
    from hypothesis import settings

    # The first call of a kernel compiles it, so one example may take seconds.
    settings.register_profile("fastxent", deadline=None, max_examples=40, derandomize=True)
    settings.load_profile("fastxent")
