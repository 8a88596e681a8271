"""The recipes of .github/RECIPES.md do what they say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tests.helpers.processes import run_script

TEXT = (Path(__file__).parents[1] / ".github" / "RECIPES.md").read_text()
NAMES = re.findall(r"^## (.+)$", TEXT, flags=re.MULTILINE)
CODE = re.findall(r"^```python\n(.+?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
LIBRARIES = {"XGBoost": ["xgboost", "sklearn"], "LightGBM": ["lightgbm", "sklearn"], "Dask": ["dask.array"]}


def test_each_recipe_has_one_piece_of_code():
    assert len(NAMES) == len(CODE) and set(LIBRARIES) < set(NAMES)


@pytest.mark.parametrize("name", LIBRARIES)
def test_recipe(name):
    for library in LIBRARIES[name]:
        pytest.importorskip(library)
    test = doctest.DocTestParser().get_doctest(CODE[NAMES.index(name)], {}, name, "RECIPES.md", 0)
    assert test.examples
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


def test_vocabulary_parallel(tmp_path):
    pytest.importorskip("torch")
    (script := tmp_path / "script.py").write_text(CODE[-1])
    arguments = ["torchrun", "--standalone", "--nproc-per-node=2", str(script)]
    code = f"import sys; sys.argv = {arguments!r}; from torch.distributed.run import main; main()"
    losses = run_script(code, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1").splitlines()
    assert losses[-2] == losses[-1] and float(losses[-1]) < 2
