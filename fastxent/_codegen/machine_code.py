"""The machine code of the kernels: from the disk, or compiled now. Numba, half a second of import, is needed to compile only.

It is imported, and compiles, in threads of ``uninterrupted``: an interrupt would leave half a package behind.
"""

from __future__ import annotations

import hashlib
import marshal
import os
from contextlib import suppress
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pkgutil import iter_modules
from types import CodeType
from typing import Any

import llvmlite
from llvmlite import binding

from fastxent._abi.variant import SYMBOL, Variant
from fastxent._codegen import disk_cache

PACKAGE = __package__.partition(".")[0]
# What a kernel is made of: rooms of jitted code and of what they share, and who compiles them. ``_fastpath`` may be missing.
ROOMS = "_abi", "_simd", "_kernels", "_fastpath.front_end", "_runtime.plan", "_codegen.compiler"


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
            return bytes(loader.get_data(spec.origin))
    return marshal.dumps(_meaning(loader.get_code(spec.name)), 2)


def _meaning(part: Any) -> Any:
    """A module's code without its place: neither files nor lines. The same for all copies."""
    if isinstance(part, CodeType):
        shape = part.co_argcount, part.co_kwonlyargcount, part.co_flags, part.co_name, part.co_code
        names = part.co_names, part.co_varnames, part.co_freevars, part.co_cellvars
        return shape, names, _meaning(part.co_consts)
    if isinstance(part, tuple):
        return tuple(map(_meaning, part))
    return sorted(map(repr, part)) if isinstance(part, frozenset) else part


def _numba() -> bytes:
    """What tells one version of Numba from another: it is not imported for that."""
    package = find_spec("numba")
    return b"" if package is None else _content(PathFinder.find_spec("numba._version", package.submodule_search_locations))


@lru_cache(maxsize=1)
def build_id() -> str:
    """Hash of the sources, and of Numba's version."""
    return hashlib.sha256(b"".join(map(_source, sources())) + _numba()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _host() -> tuple[str | None, ...]:
    """The processor that Numba compiles for, and the compiler."""
    chosen = (os.environ.get(f"NUMBA_{name}") for name in ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX"))
    return (*chosen, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), llvmlite.__version__)


def loaded(name: str, variant: Variant) -> tuple[int, object] | None:
    """The address of a kernel, and the owner of its code, which lives as long as that does; None: it is not on the disk."""
    code = disk_cache.read(_file(name, variant))
    return None if code is None else link(code)


def made(name: str, variant: Variant) -> tuple[int, object]:
    """The same of a kernel that is compiled now."""
    code = compiled(name, variant)
    disk_cache.write(_file(name, variant), code)
    return link(code)


def _file(name: str, variant: Variant) -> str:
    """Named after all that the code depends on."""
    key = hashlib.sha256(repr((build_id(), name, tuple(variant), _host())).encode()).hexdigest()[:32]
    return f"{name}-{key}.fastxent"


def compiled(name: str, variant: Variant) -> bytes:
    """An object file with the kernel as ``SYMBOL``."""
    from fastxent._codegen import compiler

    return compiler.object_code(name, variant)


def link(code: bytes) -> tuple[int, object]:
    """The address of an object file's ``SYMBOL``, and what keeps it alive."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine, use_lmm=True)  # see ``object_code``
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(SYMBOL), engine
