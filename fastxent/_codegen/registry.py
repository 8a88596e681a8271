"""The compiled kernels of this process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

from fastxent._abi.variant import Variant
from fastxent._codegen import patience
from fastxent._codegen.uninterrupted import imported, lock, uninterrupted

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Kernel(NamedTuple):
    """A compiled function of ``steps_per_plane``."""

    call: Callable[[object], None]  # of "launch", which takes nothing but the argument block
    address: int
    owner: object  # of the machine code, which lives as long as this does


_kernels: dict[tuple[str, Variant], Kernel] = {}
_ANY = Variant("f32")  # for those that read no logits


def kernel(name: str, variant: Variant = _ANY) -> Kernel:
    """The compiled kernel ``name`` for ``variant``: from memory, from the disk cache, or compiled now."""
    try:
        return _kernels[name, variant]
    except KeyError:
        pass
    imported("fastxent._codegen.machine_code")  # with llvmlite: only for those who compute
    from fastxent._codegen import machine_code  # whoever packs a program looks for such statements

    with lock:
        _keep(name, variant, machine_code.loaded)
    if (name, variant) not in _kernels:
        uninterrupted(_keep, name, variant, machine_code.made, meanwhile=patience.watch)
    return _kernels[name, variant]


def _keep(name: str, variant: Variant, get: Callable[[str, Variant], tuple[int, object] | None]) -> None:
    """Get a kernel, unless another thread has done so by now."""
    found = None if (name, variant) in _kernels else get(name, variant)
    if found is not None:
        _kernels[name, variant] = Kernel(_FUNCTION(found[0]), *found)
