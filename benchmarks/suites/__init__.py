"""asv suites. asv imports every file of this folder, and nothing else: they must do with any commit's ``fastxent``.

``benchmarks`` (cases, providers, timing) is always today's, so that old commits are measured as new ones are.
"""

import importlib.util
import sys
from pathlib import Path

if "benchmarks" not in sys.modules:
    _file = Path(__file__).resolve().parents[1] / "__init__.py"
    _spec = importlib.util.spec_from_file_location("benchmarks", _file, submodule_search_locations=[str(_file.parent)])
    sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["benchmarks"])
