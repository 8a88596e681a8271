"""What the machine code of a kernel depends on, and the name that its file gets from that.

The sources count without comments and docstrings: whoever explains a kernel better does not compile it again.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import re
from contextlib import suppress
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pkgutil import iter_modules
from types import CodeType
from typing import Any

import llvmlite
from llvmlite import binding

from fastxent._abi.variant import Variant
from fastxent._codegen.disk_cache import SUFFIX

PACKAGE = __package__.partition(".")[0]
# What a kernel is made of: rooms of jitted code and of what they share, and who compiles them. ``_fastpath`` may be missing.
ROOMS = "_abi", "_simd", "_kernels", "_fastpath.front_end", "_runtime.plan", "_codegen.compiler"

_LITERAL_OR_COMMENT = re.compile(rb"""("{3}.*?"{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|\#[^\n]*""", re.DOTALL)
_DOCSTRING = re.compile(rb'(:\n)\s*[rR]?"{3}.*?"{3}\n', re.DOTALL)  # the first statement of a class or function


def file_name(name: str, variant: Variant) -> str:
    """Of the file with kernel ``name``: all that its code depends on, and in the middle the build that it is a part of."""
    key = hashlib.sha256(repr((build_id(), name, tuple(variant), _host())).encode()).hexdigest()[:32]
    return f"{name}-{build_id()}-{key}{SUFFIX}"


@lru_cache(maxsize=1)
def build_id() -> str:
    """Hash of the sources, and of Numba's version."""
    parts = (name.encode() + _source(name) for name in sources())
    return hashlib.sha256(b"".join(parts) + _numba()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _host() -> tuple[str | None, ...]:
    """The processor that Numba compiles for, and the compiler."""
    chosen = (os.environ.get(f"NUMBA_{name}") for name in ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX"))
    return (*chosen, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), llvmlite.__version__)


def _numba() -> bytes:
    """What tells one version of Numba from another: it is not imported for that."""
    package = find_spec("numba")
    return b"" if package is None else _content(PathFinder.find_spec("numba._version", package.submodule_search_locations))


def sources() -> list[str]:
    """The modules in these rooms, found where the rooms are; nothing is imported but the rooms' parents."""
    found = [f"{PACKAGE}.{room}" for room in ROOMS if find_spec(f"{PACKAGE}.{room.partition('.')[0]}") is not None]
    for name in found:  # grows as rooms within rooms are found
        spec = find_spec(name)
        places = spec.submodule_search_locations if spec is not None else None
        found += sorted(f"{name}.{module.name}" for module in iter_modules(places or []))
    return found


def _source(name: str) -> bytes:
    """What a module is made from."""
    return _content(find_spec(name))


def _content(spec: ModuleSpec | None) -> bytes:
    """The source of a module, in a folder or in a zip archive; where there is none, what its code does."""
    if spec is None:
        return b""
    loader: Any = spec.loader
    if str(spec.origin).endswith(".py"):
        with suppress(AttributeError, OSError):
            return without_comments(loader.get_data(spec.origin))
    return marshal.dumps(_meaning(loader.get_code(spec.name)), 2)


def without_comments(source: bytes) -> bytes:
    """A module's source without comments, docstrings and empty lines: in 10 ms for all, where Python's parser takes 100."""
    lines = _LITERAL_OR_COMMENT.sub(rb"\1", source).split(b"\n")
    code = b":\n" + b"\n".join(filter(None, map(bytes.rstrip, lines))) + b"\n"  # a module begins as a function does
    return _DOCSTRING.sub(rb"\1", code)[2:]


def _meaning(part: Any) -> Any:
    """A module's code without its place: neither files nor lines. The same for all copies."""
    if isinstance(part, CodeType):
        shape = part.co_argcount, part.co_kwonlyargcount, part.co_flags, part.co_name, part.co_code
        names = part.co_names, part.co_varnames, part.co_freevars, part.co_cellvars
        return shape, names, _meaning(part.co_consts)
    if isinstance(part, tuple):
        return tuple(map(_meaning, part))
    return sorted(map(repr, part)) if isinstance(part, frozenset) else part
