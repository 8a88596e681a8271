"""Loads the machine code of a kernel from the disk cache, or compiles it now.

Only compiling needs Numba, whose import takes half a second. Numba is imported, and compiles, in threads of ``uninterrupted``:
an interrupt would leave a half-imported package behind.
"""

from __future__ import annotations

from llvmlite import binding

from fastxent._abi.variant import SYMBOL, Variant
from fastxent._codegen import disk_cache
from fastxent._codegen.cache_key import file_name


def loaded(name: str, variant: Variant) -> tuple[int, object] | None:
    """Return the address of a kernel and the owner that keeps its code alive, or None if it is not on disk."""
    code = disk_cache.read(file_name(name, variant))
    return None if code is None else link(code)


def made(name: str, variant: Variant) -> tuple[int, object]:
    """Compile a kernel, write it to the disk cache, and return its address and owner as `loaded` does."""
    code = compiled(name, variant)
    disk_cache.write(file_name(name, variant), code)
    return link(code)


def compiled(name: str, variant: Variant) -> bytes:
    """Compile a kernel and return the object file that defines it as ``SYMBOL``."""
    from fastxent._codegen import compiler

    return compiler.object_code(name, variant)


def link(code: bytes) -> tuple[int, object]:
    """Return the address of an object file's ``SYMBOL``, and the engine that keeps its code alive."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    # use_lmm: one contiguous region for all sections of a file, as ``compiler.object_code`` assumes.
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(SYMBOL), engine
