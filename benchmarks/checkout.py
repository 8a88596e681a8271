"""asv environment "checkout": the packages of the Python that runs asv, and the source folder of the commit.

Nothing is installed, so ``asv run -E checkout ...``, ``asv continuous -E checkout ...`` and the others need no network, and a
commit costs as long as it takes to check out (its kernels are compiled when they are first called, as everywhere).
"""

from __future__ import annotations

import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

from asv.environment import Environment


class Checkout(Environment):
    tool_name = "checkout"
    matches_python_fallback = False  # only where it is asked for by name

    def __init__(self, conf: Any, python: str, requirements: dict[str, str], tagged_env_vars: Any) -> None:
        """Of what asv.conf.json requires, the versions that are there go into the results."""
        self._requirements = {name: version(name) for name in requirements}
        super().__init__(conf, python, self._requirements, tagged_env_vars)

    def check_presence(self) -> bool:
        return Path(self._path, "pyvenv.cfg").is_file()

    def _setup(self) -> None:
        """A .pth file, since asv takes PYTHONPATH away (and ASV_PYTHONPATH too, in 0.6.6)."""
        venv.create(self._path, symlinks=True)
        here = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
        there = sysconfig.get_path("purelib", "venv", {"base": self._path})
        Path(there, "checkout.pth").write_text("\n".join(dict.fromkeys([self._build_root, *here.values()])))

    def install_project(self, conf: Any, repo: Any, commit_hash: str) -> None:
        self.checkout_project(repo, commit_hash)

    def run(self, args: list[str], **kwargs: Any) -> Any:
        return self.run_executable("python", args, **kwargs)
