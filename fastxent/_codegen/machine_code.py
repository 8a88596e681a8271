"""Loads the machine code of a kernel from the disk cache, takes the one of the package, or compiles it now.

Only compiling needs Numba, whose import takes half a second. Numba is imported, and compiles, in threads of ``uninterrupted``:
an interrupt would leave a half-imported package behind.
"""

from __future__ import annotations

from llvmlite import binding

from fastxent._abi.variant import SYMBOL, Variant
from fastxent._codegen import disk_cache, prebuilt
from fastxent._codegen.cache_key import file_name

COMPILED = "compiled"


def found(name: str, variant: Variant) -> tuple[bytes | None, str]:
    """Return the code of a kernel that need not be compiled, or None, and where it comes from.

    The disk cache goes first: what lies there was compiled for this very processor.
    """
    code = disk_cache.read(file_name(name, variant))
    if code is not None:
        return code, "disk cache"
    ahead = prebuilt.read(name, variant)
    return (None, COMPILED) if ahead is None else (ahead[0], f"prebuilt for {ahead[1]}")


def loaded(name: str, variant: Variant) -> tuple[int, object, str] | None:
    """Return the address of a kernel, what keeps its code alive, and where it comes from; None: it must be compiled."""
    code, origin = found(name, variant)
    return None if code is None else (*link(code), origin)


def made(name: str, variant: Variant) -> tuple[int, object, str]:
    """Compile a kernel, write it to the disk cache, and return what `loaded` does."""
    return kept(name, variant, compiled(name, variant))


def kept(name: str, variant: Variant, code: bytes) -> tuple[int, object, str]:
    """Write the code of a kernel to the disk cache, and return what `loaded` does."""
    disk_cache.write(file_name(name, variant), code)
    return *link(code), COMPILED


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
