"""Hatch's build hook: with FASTXENT_PREBUILD=1 a wheel brings compiled kernels; without it nothing changes.

FASTXENT_PREBUILD_LEVELS names the levels of processors, all of one platform (default: all of this machine's), and
FASTXENT_PREBUILD_KERNELS patterns of the kernels' names (default: all). See "Prebuilt kernels" in benchmarks/README.md.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The levels of a platform, as in fastxent/_codegen/levels.py, which is not installed yet
LEVELS = {
    "linux_x86_64": ["x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"],
    "linux_aarch64": ["aarch64"],
    "darwin_arm64": ["apple-m1"],
}
# The kernels call nothing but memset or bzero of the C library, so the oldest tags are true.
OLDEST = {"linux": "manylinux_2_17", "darwin": "macosx_11_0"}
HERE = f"{platform.system().lower()}_{platform.machine()}"


class PrebuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("FASTXENT_PREBUILD") != "1" or version == "editable":
            return
        chosen = os.environ.get("FASTXENT_PREBUILD_LEVELS", "").split() or LEVELS.get(HERE, [])
        platforms = {name for name, levels in LEVELS.items() for level in chosen if level in levels}
        if len(platforms) != 1:
            raise ValueError(f"a wheel is for one platform; the levels {chosen} are of {sorted(platforms) or 'none'}")
        self.scratch = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "fastxent", "prebuild", "--into", self.scratch.name, "--levels", *chosen]
        command += ["--kernels", *(os.environ.get("FASTXENT_PREBUILD_KERNELS", "").split() or "*")]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": self.root})
        build_data["force_include"][self.scratch.name] = "fastxent/_prebuilt"
        build_data["pure_python"] = False
        system, _, machine = platforms.pop().partition("_")
        build_data["tag"] = f"py3-none-{OLDEST[system]}_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "scratch"):
            self.scratch.cleanup()

    def dependencies(self) -> list[str]:
        """Compiling needs what fastxent itself needs."""
        return self.metadata.core.dependencies if os.environ.get("FASTXENT_PREBUILD") == "1" else []
