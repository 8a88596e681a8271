"""The kernels that come with a wheel, compiled for levels of processors (`levels`): they are found without Numba.

A folder of the package has a folder of object files for each level, and a manifest. That says of which sources the kernels are
made, by which versions, and each file's SHA-256. What the files are made from, and whom that asks to be trusted, stands in
benchmarks/README.md. FASTXENT_PREBUILT=0 in the environment, read by the first call, turns them off.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from contextlib import suppress
from enum import IntEnum
from functools import lru_cache
from pkgutil import get_data
from typing import ClassVar, NamedTuple

from fastxent._abi.variant import Variant
from fastxent._codegen import levels
from fastxent._codegen.cache_key import PACKAGE, source_id

FOLDER, MANIFEST, SUFFIX = "_prebuilt", "manifest.json", ".o"


class Available(NamedTuple):
    """What this process may load."""

    files: dict[str, tuple[str, str]]  # by name: the best level that has it, and its SHA-256
    why: str  # there are these, or none


class _State:
    warned: ClassVar[set[str]] = set()


def kernel_name(name: str, variant: Variant) -> str:
    """Return a name that tells a kernel from all others: its task's, then what of its variant differs from the defaults."""
    parts = [name, variant.logits]
    for field, value, default in zip(Variant._fields, variant, Variant(""), strict=True):
        if value != default and field != "logits":
            parts.append(value.name.lower() if isinstance(value, IntEnum) else field if value is True else str(value))
    return "-".join(parts)


def read(name: str, variant: Variant) -> tuple[bytes, str] | None:
    """Return the object file of a kernel for the best level of this processor that has one, and that level, or None."""
    files = available().files
    file = kernel_name(name, variant) + SUFFIX
    if file not in files:
        return None
    level, expected = files[file]
    code = _content(level, file)
    if code is not None and hashlib.sha256(code).hexdigest() == expected:
        return code, level
    _warn_of(f"{level}/{file}", "it is not there" if code is None else "its SHA-256 is not that of the manifest")
    return None


@lru_cache(maxsize=1)
def available() -> Available:
    """Return the package's kernels for the levels of this processor."""

    def none(why: str) -> Available:
        return Available({}, f"none: {why}")

    if os.environ.get("FASTXENT_PREBUILT") == "0":
        return none("FASTXENT_PREBUILT=0 turns them off")
    text = _content(MANIFEST)
    if text is None:
        return none("this package comes without")
    try:
        manifest = json.loads(text)
        sources, offered = manifest["sources"], manifest["levels"]
        here = [level.name for level in reversed(levels.of_this_cpu()) if level.name in offered]
        files = {file: (level, told["sha256"]) for level in here for file, told in offered[level].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        _warn_of(MANIFEST, "it is damaged")
        return none("their manifest is damaged")
    if sources != source_id():
        return none("they are made of other sources than these")
    if not files:
        return none(f"this processor has none of {', '.join(offered)}")
    counts = Counter(level for level, _ in files.values())
    return Available(files, ", ".join(f"{counts[level]} for {level}" for level in reversed(here) if counts[level]))


def _content(*path: str) -> bytes | None:
    """Return a file of the folder, which may be in a zip archive."""
    with suppress(OSError):
        return get_data(PACKAGE, "/".join((FOLDER, *path)))
    return None


def _warn_of(file: str, fault: str) -> None:
    if file not in _State.warned:
        _State.warned.add(file)
        warnings.warn(f"fastxent does not use the prebuilt kernels in {FOLDER}/{file}: {fault}", RuntimeWarning, stacklevel=2)
