"""Without its optional packages fastxent says which extra to install, and what needs none of them works."""

from __future__ import annotations

import pytest

from tests.helpers.processes import run_script

pytestmark = pytest.mark.core

WITHOUT = """
import importlib, sys
class Absent:  # as if they were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "dask", "distributed", "zarr", "xgboost", "lightgbm", "sklearn", "rich"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize(
    ("module", "package", "message"),
    [
        ("torch", "torch", "fastxent.torch needs PyTorch: pip install 'fastxent[torch]'"),
        ("distributed", "torch", "fastxent.distributed needs PyTorch: pip install 'fastxent[distributed]'"),
        ("dask", "dask", "fastxent.dask needs Dask: pip install 'fastxent[dask]'"),
    ],
)
def test_the_extra_is_named(module, package, message):
    code = f"""{WITHOUT}
import fastxent
for use in (lambda: importlib.import_module("fastxent.{module}"), lambda: fastxent.{module}):
    try:
        use()
    except ImportError as error:
        print(error.name, error)
"""
    assert run_script(code).splitlines() == [f"{package} {message}"] * 2


def test_the_extra_of_a_command_is_named(tmp_path):
    """Those of the commands that need other packages are in tests/cli."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".zarray").write_text('{"shape": [2, 3]}')
    code = f"""{WITHOUT}
from fastxent import cli
sys.stderr = sys.stdout
folder = {str(tmp_path / "folder")!r}
for arguments in (["demo"], ["demo", "--language-model"], ["evaluate", folder, folder]):
    assert cli.main(arguments) == 2
"""
    assert run_script(code).splitlines() == [
        "fastxent demo: error: rich is missing: pip install 'fastxent[cli]'",
        "fastxent demo: error: rich is missing: pip install 'fastxent[cli]'",
        "fastxent evaluate: error: zarr is missing: pip install 'fastxent[dask]'",
    ]


def test_objectives_need_no_boosting_library():
    """The extras `xgboost` and `lightgbm` bring who calls them."""
    code = f"""{WITHOUT}
import numpy as np
from fastxent import objectives
labels, scores = np.array([1.0, 0.0]), np.zeros((2, 2), np.float32)
print(*objectives.xgboost_softprob(labels, scores)[0].ravel(), *objectives.lightgbm_multiclass(labels, scores)[1].ravel())
print(objectives.log_prior(labels, 2).round(3))
"""
    assert run_script(code).splitlines() == ["0.5 -0.5 -0.5 0.5 0.5 0.5 0.5 0.5", "[-0.693 -0.693]"]
