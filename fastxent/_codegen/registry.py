"""The compiled kernels of this process."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from fastxent._abi.variant import Variant
from fastxent._codegen import patience
from fastxent._codegen.uninterrupted import imported, lock, uninterrupted

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Kernel(NamedTuple):
    """A compiled function of ``_kernels`` or ``BUILTINS``."""

    call: Callable[[object], None]  # valid for "launch" only, whose one argument is the argument block
    address: int
    owner: object  # keeps the machine code alive
    origin: str = ""  # where the machine code comes from


_kernels: dict[tuple[str, Variant], Kernel] = {}
_ANY = Variant("f32")  # for kernels that read no logits


def kernel(name: str, variant: Variant = _ANY) -> Kernel:
    """Return the compiled kernel ``name`` for ``variant``: from memory, the disk cache or the package, or compiled now."""
    try:
        return _kernels[name, variant]
    except KeyError:
        pass
    imported("fastxent._codegen.machine_code")  # imports llvmlite too, so only when a kernel is needed
    from fastxent._codegen import machine_code  # tools that package programs look for such statements

    with lock:
        _keep(name, variant, machine_code.loaded)
    if (name, variant) not in _kernels:
        uninterrupted(_keep, name, variant, machine_code.made, meanwhile=patience.watch)
    return _kernels[name, variant]


def kernels(wanted: Sequence[tuple[str, Variant]], n_processes: int) -> Iterator[tuple[str, Variant]]:
    """Get kernels as `kernel` does, and yield each before; ``n_processes`` compile those that must be compiled."""
    from fastxent._codegen import side_by_side  # imports more than a call may wait for

    absent: list[tuple[str, Variant]] = []
    machine_code = imported("fastxent._codegen.machine_code")
    if n_processes > 1 and side_by_side.possible():
        absent = [one for one in wanted if one not in _kernels and machine_code.found(*one)[0] is None]
    with closing(side_by_side.results([(machine_code.compiled, one) for one in absent], n_processes)) as codes:
        for one in wanted:
            yield one
            if one in absent:
                kept = partial(machine_code.kept, code=next(codes))
                with lock:
                    _keep(*one, kept)
            else:
                kernel(*one)


def origins() -> dict[str, int]:
    """Return how many kernels of this process come from where."""
    return dict(Counter(kernel.origin for kernel in list(_kernels.values())))


def _keep(name: str, variant: Variant, get: Callable[[str, Variant], tuple[int, object, str] | None]) -> None:
    """Get a kernel and register it, unless another thread has done so in the meantime."""
    found = None if (name, variant) in _kernels else get(name, variant)
    if found is not None:
        _kernels[name, variant] = Kernel(_FUNCTION(found[0]), *found)
