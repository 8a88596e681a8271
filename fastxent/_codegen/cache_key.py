"""Names the file of a kernel after everything that its machine code depends on.

The sources are hashed without comments and docstrings, so an edit of those compiles nothing again.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import re
from contextlib import suppress
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pkgutil import iter_modules
from types import CodeType
from typing import Any

import llvmlite
from llvmlite import binding

from fastxent._abi.tasks import TASKS
from fastxent._abi.variant import BUILTINS, Variant
from fastxent._codegen.disk_cache import SUFFIX

PACKAGE = __package__.partition(".")[0]
# The sources of a kernel: the rooms of jitted code, what they share, and the compiler. Of the losses, only its own count.
ROOMS = "_abi", "_simd", "_kernels", "_codegen.compiler"
LOSSES = f"{PACKAGE}._kernels.losses"
FRONT_END = "_fastpath.front_end", "_runtime.plan"  # the sources of ``BUILTINS`` besides; ``_fastpath`` may be missing

_LITERAL_OR_COMMENT = re.compile(rb"""("{3}.*?"{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|\#[^\n]*""", re.DOTALL)
_DOCSTRING = re.compile(rb'(:\n)\s*[rR]?"{3}.*?"{3}\n', re.DOTALL)  # the first statement after a colon


def file_name(name: str, variant: Variant) -> str:
    """Return the file name of kernel ``name``: its name, and a hash of everything that its code depends on."""
    key = hashlib.sha256(repr((build_id(name), name, tuple(variant), _host())).encode()).hexdigest()[:32]
    return f"{name}-{key}{SUFFIX}"


@cache
def build_id(kernel: str) -> str:
    """Return a hash of a kernel's sources and of Numba's version."""
    return _hash_of(sources(kernel), _numba())[:16]


@lru_cache(maxsize=1)
def source_id() -> str:
    """Return a hash of the sources of all kernels."""
    return _hash_of(_modules(ROOMS + FRONT_END))


def _hash_of(modules: list[str], more: bytes = b"") -> str:
    return hashlib.sha256(b"".join(name.encode() + _source(name) for name in modules) + more).hexdigest()


@lru_cache(maxsize=1)
def _host() -> tuple[str | None, ...]:
    """Return what identifies the processor that Numba compiles for, and llvmlite's version."""
    chosen = (os.environ.get(f"NUMBA_{name}") for name in ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX"))
    return (*chosen, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), llvmlite.__version__)


@lru_cache(maxsize=1)
def _numba() -> bytes:
    """Return the source of ``numba._version``, which identifies Numba's version, without importing Numba."""
    package = find_spec("numba")
    return b"" if package is None else _content(PathFinder.find_spec("numba._version", package.submodule_search_locations))


def sources(kernel: str) -> list[str]:
    """Return the names of the modules that a kernel, or a function of ``BUILTINS``, is made of."""
    own = {f"{LOSSES}.{loss}" for loss in TASKS[kernel].losses} if kernel in TASKS else set()
    names = _modules(ROOMS + FRONT_END if kernel in BUILTINS else ROOMS)
    return [name for name in names if not name.startswith(f"{LOSSES}.") or name in own]


@lru_cache(maxsize=2)
def _modules(rooms: tuple[str, ...]) -> list[str]:
    """Return the names of all modules of rooms, listed from their folders; only the rooms' parents are imported."""
    found = [f"{PACKAGE}.{room}" for room in rooms if find_spec(f"{PACKAGE}.{room.partition('.')[0]}") is not None]
    for name in found:  # the list grows while it is walked, as subpackages are found
        spec = find_spec(name)
        places = spec.submodule_search_locations if spec is not None else None
        found += sorted(f"{name}.{module.name}" for module in iter_modules(places or []))
    return found


@cache
def _source(name: str) -> bytes:
    """Return the content of module ``name``."""
    return _content(find_spec(name))


def _content(spec: ModuleSpec | None) -> bytes:
    """Return the source of a module, from a folder or a zip archive, or its marshalled code where there is no source."""
    if spec is None:
        return b""
    loader: Any = spec.loader
    if str(spec.origin).endswith(".py"):
        with suppress(AttributeError, OSError):
            return without_comments(loader.get_data(spec.origin))
    return marshal.dumps(_meaning(loader.get_code(spec.name)), 2)


def without_comments(source: bytes) -> bytes:
    """Return a source without comments, docstrings and empty lines.

    The regular expressions take 10 ms for all modules; Python's parser would take 100 ms.
    """
    lines = _LITERAL_OR_COMMENT.sub(rb"\1", source).split(b"\n")
    code = b":\n" + b"\n".join(filter(None, map(bytes.rstrip, lines))) + b"\n"  # the colon lets it match the module's too
    return _DOCSTRING.sub(rb"\1", code)[2:]


def _meaning(part: Any) -> Any:
    """Return a module's code without file names and line numbers, so that all copies of it are equal."""
    if isinstance(part, CodeType):
        shape = part.co_argcount, part.co_kwonlyargcount, part.co_flags, part.co_name, part.co_code
        names = part.co_names, part.co_varnames, part.co_freevars, part.co_cellvars
        return shape, names, _meaning(part.co_consts)
    if isinstance(part, tuple):
        return tuple(map(_meaning, part))
    return sorted(map(repr, part)) if isinstance(part, frozenset) else part
