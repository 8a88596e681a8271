"""The machine code of the kernels: from the disk, or compiled now. Numba, half a second of import, is needed to compile only.

It is imported, and compiles, in threads of ``uninterrupted``: an interrupt would leave half a package behind.
"""

from __future__ import annotations

from llvmlite import binding

from fastxent._abi.variant import SYMBOL, Variant
from fastxent._codegen import disk_cache
from fastxent._codegen.cache_key import file_name


def loaded(name: str, variant: Variant) -> tuple[int, object] | None:
    """The address of a kernel, and the owner of its code, which lives as long as that does; None: it is not on the disk."""
    code = disk_cache.read(file_name(name, variant))
    return None if code is None else link(code)


def made(name: str, variant: Variant) -> tuple[int, object]:
    """The same of a kernel that is compiled now."""
    code = compiled(name, variant)
    disk_cache.write(file_name(name, variant), code)
    return link(code)


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
