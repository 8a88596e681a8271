"""The type of an argument block, and what of it a function reads.

Kernels differ in the constants that they are compiled for, and a function reads few of them. It is compiled for a `Task`
that is narrowed to what it and its callees read, so kernels share all functions for which their tasks agree.
"""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from numba import types


class Task(types.Type):
    """Address of a kernel's arguments: 8-byte slots, named by ``fields``, and constants known to the compiler.

    fields    : tuple of (name, slot, "int" | "float" | (storage, kind))
    constants : tuple of (name, bool): a branch on one of them costs nothing, and the code not taken is not compiled
    """

    def __init__(self, fields: tuple[Any, ...], constants: tuple[tuple[str, bool], ...]) -> None:
        self.fields, self.constants = fields, constants
        # The name is part of the symbols of all functions that take the task, so it has to be short.
        super().__init__(name="Task" + hashlib.sha256(repr((fields, constants)).encode()).hexdigest()[:16])

    @cache  # noqa: B019  # types live as long as the process
    def narrowed(self, names: frozenset[str]) -> Task:
        """Return the type with those fields and constants only that ``names`` has."""
        fields, constants = (tuple(part for part in parts if part[0] in names) for parts in (self.fields, self.constants))
        return Task(fields, constants)


def narrowed(argument: types.Type, names: frozenset[str]) -> types.Type:
    """Return the type of an argument of a function that reads ``names``."""
    return argument.narrowed(names) if isinstance(argument, Task) else argument


def names_in_types(arguments: tuple[types.Type, ...]) -> frozenset[str]:
    """Return the names that functions read which are themselves arguments, or are in tuples that are."""
    found: frozenset[str] = frozenset()
    for argument in arguments:
        if hasattr(argument, "function"):
            found |= names_read(argument.function.py_func)
        elif isinstance(argument, types.BaseTuple):
            found |= names_in_types(tuple(argument))
    return found


@cache
def names_read(function: FunctionType) -> frozenset[str]:
    """Return the names of all attributes that a function and its callees read: those of tasks, and others that do no harm."""
    attributes, names = names_in(function.__code__)
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    values += [cell.cell_contents for cell in function.__closure__ or ()]
    return attributes.union(*(names_read(callee) for value in values for callee in callees(value)))


def names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the attributes and of the globals that a function's code reads."""
    read: dict[str, set[str]] = {"LOAD_ATTR": set(), "LOAD_METHOD": set(), "LOAD_GLOBAL": set()}
    for instruction in dis.get_instructions(code):
        if instruction.opname in read:
            read[instruction.opname].add(instruction.argval)
    return frozenset(read["LOAD_ATTR"] | read["LOAD_METHOD"]), frozenset(read["LOAD_GLOBAL"])


def callees(value: Any) -> Iterator[FunctionType]:
    """Yield the compiled function that a value is, or those that are in a tuple."""
    if hasattr(value, "py_func"):
        yield value.py_func
    elif isinstance(value, tuple):
        for part in value:
            yield from callees(part)
