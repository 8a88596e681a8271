"""Compiles the common kernels for levels of processors into a folder, as `_codegen.prebuilt` reads it.

The kernels of a level are compiled by processes that do nothing else: what a kernel is compiled for is settled when its modules
are imported (`_codegen.cross`). The files do not depend on the machine, the time, or the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from fnmatch import filter as fnfilter
from pathlib import Path
from typing import Any

import fastxent
from fastxent._abi.variant import Variant
from fastxent._cli.output import CommandError
from fastxent._codegen import levels
from fastxent._codegen.cache_key import source_id
from fastxent._codegen.prebuilt import FOLDER, MANIFEST, SUFFIX, kernel_name
from fastxent._codegen.side_by_side import results

PLACE = Path(fastxent.__file__).parent / FOLDER  # where fastxent looks for them

Progress = Callable[[int, int, str], None]


def prebuild(
    names: Sequence[str], folder: Path, jobs: int, patterns: Sequence[str] = ("*",), progress: Progress | None = None
) -> int:
    """Compile the kernels whose names match one of ``patterns`` for the levels of these names; return how many there are."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise CommandError(f"{folder} is not empty, and holds no prebuilt kernels")
        shutil.rmtree(folder)
    manifest: dict[str, Any] = {"sources": source_id(), "versions": _versions(), "levels": {}}
    for level in levels.LEVELS:
        if level.name in names:
            files = _compile_level(level, folder / level.name, jobs, patterns, progress)
            manifest["levels"] |= {level.name: files} if files else {}
    if not manifest["levels"]:
        raise CommandError(f"no kernel matches {' or '.join(patterns)}")
    # The manifest comes last: a build that ended early left none.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return sum(map(len, manifest["levels"].values()))


def _compile_level(
    level: levels.Level, folder: Path, jobs: int, patterns: Sequence[str], progress: Progress | None
) -> dict[str, Any]:
    """Write the files of a level, and return what the manifest says of each."""
    files: dict[str, Any] = {}
    begin = _begin, (level,)
    [listed] = results([(_common_kernels, ())], 1, begin)
    common = {kernel_name(*kernel): kernel for kernel in listed}
    chosen = {name for pattern in patterns for name in fnfilter(common, pattern)} & set(fnfilter(common, level.only))
    kernels = [kernel for name, kernel in common.items() if name in chosen]
    if kernels:
        folder.mkdir(parents=True)
    with closing(results([(_compile, kernel) for kernel in kernels], jobs, begin)) as codes:
        for done, kernel in enumerate(kernels):
            file = kernel_name(*kernel) + SUFFIX
            if progress is not None:
                progress(done, len(kernels), f"{level.name} {kernel_name(*kernel)}")
            code = next(codes)
            (folder / file).write_bytes(code)
            files[file] = {
                "sha256": hashlib.sha256(code).hexdigest(), "bytes": len(code), "kernel": kernel[0],
                "variant": {field: getattr(value, "name", value) for field, value in kernel[1]._asdict().items() if value},
            }  # fmt: skip
    return files


def _begin(level: levels.Level) -> None:
    from fastxent._codegen import cross

    cross.use(level)


def _common_kernels() -> list[tuple[str, Variant]]:
    from fastxent._runtime import common

    return common.kernels()


def _compile(name: str, variant: Variant) -> bytes:
    from fastxent._codegen import compiler

    return compiler.object_code(name, variant)


def _versions() -> dict[str, str]:
    import llvmlite
    import numba
    from llvmlite import binding

    llvm = ".".join(map(str, binding.llvm_version_info))
    return {"fastxent": fastxent.__version__, "numba": numba.__version__, "llvmlite": llvmlite.__version__, "llvm": llvm}
