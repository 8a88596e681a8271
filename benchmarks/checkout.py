"""asv environment "checkout": the Python that runs asv, with the commit's source folder in front of its path.

Nothing is installed, so ``asv run -E checkout ...``, ``asv continuous -E checkout ...`` and the others need no network, and a
commit costs as long as it takes to check out (its kernels are compiled when they are first called, as everywhere).
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

from asv.environment import Environment


class Checkout(Environment):  # type: ignore[misc]
    tool_name = "checkout"
    matches_python_fallback = False  # only where it is asked for by name

    def __init__(self, conf: Any, python: str, requirements: dict[str, str], tagged_env_vars: Any) -> None:
        """Of what asv.conf.json requires, the versions that are there go into the results."""
        self._requirements = {name: version(name) for name in requirements}
        super().__init__(conf, python, self._requirements, tagged_env_vars)

    def check_presence(self) -> bool:
        return os.path.isdir(self._path)

    def _setup(self) -> None:
        os.makedirs(self._path)

    def install_project(self, conf: Any, repo: Any, commit_hash: str) -> None:
        self.checkout_project(repo, commit_hash)

    def find_executable(self, executable: str) -> str:
        return sys.executable

    def run(self, args: list[str], **kwargs: Any) -> Any:
        env = dict(kwargs.pop("env", os.environ), ASV_PYTHONPATH=self._build_root)
        return self.run_executable(sys.executable, args, env=env, **kwargs)
