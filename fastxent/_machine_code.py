"""The machine code of the kernels: from the disk, or compiled now. Numba, half a second of import, is needed to compile only.

A file holds one kernel, and is named after all that its code depends on; nothing ever changes in it. So processes that compile
at once write the same file, and each may read the other's. It is native code: see Security in README.md.
"""

from __future__ import annotations

import hashlib
import logging  # noqa: F401  # before the lock: see there
import os
import sys
import threading
import warnings
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

import llvmlite
from llvmlite import binding

from fastxent._plan import Variant

lock = threading.RLock()  # to be held by the caller of `kernel`

if hasattr(os, "register_at_fork"):
    # A child that is forked in the midst of compiling, or of importing Numba, would find both locked, and for ever: the fork
    # waits. What is registered last is done first: logging, which Numba imports, must not have locked itself by then.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

SYMBOL = "kernel"  # of the function in a file

# What a kernel is made of; ``_compile`` says how.
SOURCES = (
    "_inlined", "_simd", "_across", "_storage", "_loadstore", "_transpose", "_elementary", "_short_rows", "_strips", "_rows",
    "_maths", "_streaming", "_gradient", "_pipeline", "_statistics", "_segments", "_walk", "_kernels", "_several", "_direct",
    "_task", "_plan", "_compile",
)  # fmt: skip


def _source(name: str) -> bytes:
    """What a module is loaded from, in a folder or in a zip archive; nothing is imported."""
    spec: Any = find_spec(f"{__package__}.{name}")
    return bytes(spec.loader.get_data(spec.origin))


@lru_cache(maxsize=1)
def build_id() -> str:
    """Hash of the sources."""
    return hashlib.sha256(b"".join(map(_source, SOURCES))).hexdigest()[:16]


@lru_cache(maxsize=1)
def _host() -> tuple[str | None, ...]:
    """The processor that Numba compiles for, and the compiler."""
    chosen = (os.environ.get(f"NUMBA_{name}") for name in ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX"))
    return (*chosen, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), llvmlite.__version__)


def kernel(name: str, variant: Variant) -> tuple[int, object]:
    """The address of a kernel, and the owner of its code, which lives as long as that does."""
    key = hashlib.sha256(repr((build_id(), name, tuple(variant), _host())).encode()).hexdigest()[:32]
    file = f"{name}-{key}.fastxent"
    code = _read(file)
    if code is None:
        code = compiled(name, variant)
        _write(file, code)
    return link(code)


def compiled(name: str, variant: Variant) -> bytes:
    """An object file with the kernel as ``SYMBOL``."""
    from fastxent import _compile

    return _compile.object_code(name, variant)


def link(code: bytes) -> tuple[int, object]:
    """The address of an object file's ``SYMBOL``, and what keeps it alive."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine, use_lmm=True)  # see ``object_code``
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(SYMBOL), engine


# ----------------------------------------------------------------------------------------------------
# Files: a checksum, then the code
# ----------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """Where code may lie, the best place first."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(chosen)]
    if sys.platform == "win32":
        users = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        users = "~/Library/Caches"
    else:
        users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [Path(__file__).parent / "__pycache__", Path(os.path.expanduser(users), "fastxent")]


def _read(file: str) -> bytes | None:
    for folder in folders():
        with suppress(OSError):
            content = (folder / file).read_bytes()
            code = content[32:]
            if hashlib.sha256(code).digest() == content[:32]:  # else it is damaged, and will be replaced
                return code
    return None


def _write(file: str, code: bytes) -> None:
    reasons = []
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{file}.{token_hex(8)}"
            try:
                temporary.write_bytes(hashlib.sha256(code).digest() + code)
                os.replace(temporary, folder / file)
            finally:
                temporary.unlink(missing_ok=True)
            return
        except OSError as reason:
            reasons.append(str(reason))
    warnings.warn(f"fastxent keeps no compiled kernels: {'; '.join(reasons)}", RuntimeWarning, stacklevel=4)


def cache_folder() -> str:
    """Where new code is written."""
    for folder in folders():
        there = next(f for f in (folder, *folder.parents) if f.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            return str(folder)
    return "none: no folder can be written to"
