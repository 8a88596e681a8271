"""Decides branches on what is known before types are inferred; the code not taken is left out.

Known are the constants of a `Task` (``task.double``) and of a module (``WIDE``). Most of the time that a kernel takes to
compile goes into typing and lowering its functions, so a function that only a branch not taken calls should never be seen. And
as types are inferred for the code that is left, the two sides of such a branch may return different types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import not_
from typing import Any

from numba.core import ir, types

Known = dict[str, Any]  # the values of the variables that have one value, whenever this point of the function is reached


def decided(function_ir: ir.FunctionIR, arguments: Sequence[types.Type]) -> dict[int, ir.Block]:
    """Return the blocks of a function that can be reached, given the types of its arguments, without the known branches.

    Constants are propagated along the branches that can be taken (Wegman, Zadeck 1991), before variables have types.
    """
    named = zip(function_ir.arg_names, arguments, strict=True)
    constants = {name: dict(t.constants) for name, t in named if hasattr(t, "constants")}
    blocks = {}
    for label, known in sorted(reached(function_ir.blocks, constants).items()):
        block = function_ir.blocks[label]
        target = decision(block, known)
        if target is not None:
            last = block.terminator
            block = block.copy()
            block.body[-1] = ir.Jump(target, last.loc)
        blocks[label] = block
    return blocks


def reached(blocks: Mapping[int, ir.Block], constants: Mapping[str, Known]) -> dict[int, Known]:
    """Return the blocks that can be reached, with what is known at the end of each."""
    starts: dict[int, Known] = {min(blocks): {}}
    ends: dict[int, Known] = {}
    waiting = [min(blocks)]
    while waiting:
        label = waiting.pop()
        block = blocks[label]
        known = ends[label] = dict(starts[label])
        for statement in block.body:
            if isinstance(statement, ir.Assign):
                value = value_of(statement.value, known, constants)
                if value is None:
                    known.pop(statement.target.name, None)
                else:
                    known[statement.target.name] = value
        target = decision(block, known)
        for following in block.terminator.get_targets() if target is None else [target]:
            before = starts.get(following)
            merged = known if before is None else {k: v for k, v in before.items() if k in known and known[k] is v}
            if before is None or len(merged) < len(before):
                starts[following] = dict(merged)
                waiting.append(following)
    return ends


def decision(block: ir.Block, known: Known) -> int | None:
    """Return where a block's branch always goes, or None."""
    last = block.terminator
    if not isinstance(last, ir.Branch) or last.cond.name not in known:
        return None
    return int(last.truebr if known[last.cond.name] else last.falsebr)


def value_of(value: Any, known: Known, constants: Mapping[str, Known]) -> bool | type | None:
    """Return the value of the right-hand side of an assignment, a bool or the function ``bool``, or None if it is not known."""
    if isinstance(value, ir.Global | ir.FreeVar | ir.Const):
        return value.value if isinstance(value.value, bool) or value.value is bool else None
    if isinstance(value, ir.Var):
        return known.get(value.name)
    if isinstance(value, ir.Expr):
        if value.op == "getattr":
            return constants.get(value.value.name, {}).get(value.attr)
        if value.op == "unary" and value.fn is not_ and value.value.name in known:
            return not known[value.value.name]
        if value.op == "call" and known.get(value.func.name) is bool:
            return known.get(value.args[0].name)
    return None
