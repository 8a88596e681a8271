"""Finds the types of a function's variables, given those of its arguments.

Numba finds them by iterating over a network of constraints. But in kernels the type of a statement follows from those of the
statements before it. So types flow forward through the blocks; where several blocks lead to one, a variable has the type into
which all of its values can be cast. A loop is walked through until nothing changes.

Numba says what types an operation has, as it does for its own compiler.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import cache
from heapq import heappop, heappush
from typing import Any, NamedTuple

from numba.core import ir, types
from numba.core.bytecode import ByteCode, FunctionIdentity
from numba.core.errors import TypingError
from numba.core.interpreter import Interpreter
from numba.core.registry import cpu_target
from numba.core.typing.templates import Signature

from fastxent._simd.known_branches import decided

Types = dict[str, types.Type]  # of variables


class Operand(NamedTuple):
    """A variable, or an item of one that is a tuple."""

    name: str
    item: int | None = None


class Statement(NamedTuple):
    """An assignment. For one that calls something: what, with which operands, and with which signature."""

    target: str
    value: Any
    type: types.Type
    callee: Any = None
    operands: tuple[Operand, ...] = ()
    call: Signature | None = None


class Block(NamedTuple):
    """Statements that are executed one after the other."""

    live: Types  # the variables that they read and do not write before, or that later blocks read so
    statements: list[Statement]
    end: Any  # a Jump, Branch or Return


class Body(NamedTuple):
    """A function for certain types of its arguments."""

    blocks: dict[int, Block]  # by label; the function begins with the smallest one
    type: types.Type  # of the result


def typed(function: Callable[..., Any], arguments: tuple[types.Type, ...]) -> Body:
    """Return what a function does if its arguments have these types."""
    function_ir = _interpreted(function)
    if function_ir.arg_count != len(arguments):
        raise TypingError(f"{function.__qualname__} takes {function_ir.arg_count} arguments, not {len(arguments)}")
    blocks = decided(function_ir, arguments)
    live = _live(blocks)
    first = min(blocks)
    starts: dict[int, Types] = {first: {}}
    done: dict[int, Block] = {}
    results: dict[int, types.Type] = {}
    waiting = [first]  # a heap: what comes first in the source is done first, so that a loop is walked through at most twice
    while waiting:
        label = heappop(waiting)
        known = dict(starts[label])
        *assignments, end = blocks[label].body
        statements = [_statement(assignment, known, arguments) for assignment in assignments]
        done[label] = Block(starts[label], statements, end)
        if isinstance(end, ir.Return):
            results[label] = known[end.value.name]
        for following in end.get_targets():
            before = starts.get(following)
            after = _merged(before or {}, {name: known[name] for name in live[following] if name in known})
            if after != before:
                starts[following] = after
                if following not in waiting:
                    heappush(waiting, following)
    return Body(dict(sorted(done.items())), _common(f"the result of {function.__qualname__}", list(results.values())))


@cache
def _interpreted(function: Callable[..., Any]) -> ir.FunctionIR:
    identity = FunctionIdentity.from_function(function)
    return Interpreter(identity).interpret(ByteCode(identity))


def _merged(a: Types, b: Types) -> Types:
    """Return the types of variables that come from several blocks; a type of which nothing is known is any."""
    return {name: _common(name, [t[name] for t in (a, b) if name in t]) for name in {**a, **b}}


def _common(name: str, found: list[types.Type]) -> types.Type:
    """Return the type into which the values of a variable can be cast, of all of these types."""
    first, *rest = map(_without_literals, found)
    for other in rest:
        if other != first:
            common = cpu_target.typing_context.unify_types(first, other)
            if common is None:
                raise TypingError(f"{name} is {first} on one way and {other} on another")
            first = common
    return first


def _without_literals(t: types.Type) -> types.Type:
    if isinstance(t, types.Tuple | types.UniTuple):
        return types.BaseTuple.from_types([_without_literals(item) for item in t])
    return types.unliteral(t)


# ----------------------------------------------------------------------------------------------------
# Which variables are live
# ----------------------------------------------------------------------------------------------------


def _live(blocks: dict[int, ir.Block]) -> dict[int, set[str]]:
    """Return, for each block, the variables whose values on entry are read there or later."""
    read: dict[int, set[str]] = {}
    written: dict[int, set[str]] = {}
    for label, block in blocks.items():
        read[label], written[label] = set(), set()
        for statement in block.body:
            read[label].update(name for name in _names_read(statement) if name not in written[label])
            if isinstance(statement, ir.Assign):
                written[label].add(statement.target.name)
    live = dict(read)
    changed = True
    while changed:
        changed = False
        for label in sorted(blocks, reverse=True):
            after = set().union(*(live[following] for following in blocks[label].terminator.get_targets()))
            before = read[label] | (after - written[label])
            changed |= before != live[label]
            live[label] = before
    return live


def _names_read(statement: Any) -> Iterator[str]:
    if isinstance(statement, ir.Return):
        yield statement.value.name
    elif isinstance(statement, ir.Branch):
        yield statement.cond.name
    elif isinstance(statement, ir.Assign):
        value = statement.value
        if isinstance(value, ir.Var):
            yield value.name
        elif isinstance(value, ir.Expr):
            if value.op == "call":
                yield value.func.name
            yield from (operand.name for operand in _operands(value))


_OF_ONE_VARIABLE = {
    "cast", "exhaust_iter", "getattr", "getiter", "iternext", "pair_first", "pair_second", "static_getitem", "unary",
}  # fmt: skip


def _operands(value: ir.Expr) -> list[ir.Var]:
    """Return the variables that an expression reads, but for the function that it calls."""
    if value.op == "call":
        return [*value.args, *([value.vararg] if value.vararg else ())]
    if value.op in ("binop", "inplace_binop"):
        return [value.lhs, value.rhs]
    if value.op == "build_tuple":
        return list(value.items)
    if value.op == "getitem":
        return [value.value, value.index]
    if value.op in _OF_ONE_VARIABLE:
        return [value.value]
    raise TypingError(f"kernels know no expression like {value}", loc=value.loc)


# ----------------------------------------------------------------------------------------------------
# The types of one statement
# ----------------------------------------------------------------------------------------------------


def _statement(assignment: Any, known: Types, arguments: tuple[types.Type, ...]) -> Statement:
    """Return an assignment with its types, and note that of the variable."""
    if not isinstance(assignment, ir.Assign):
        raise TypingError(f"kernels know no statement like {assignment}", loc=assignment.loc)
    target, value = assignment.target.name, assignment.value
    try:
        result = _typed_statement(target, value, known, arguments)
    except TypingError as error:
        if error.loc is None:
            error.add_context(f"at {assignment.loc}")
        raise
    known[target] = result.type
    return result


def _typed_statement(target: str, value: Any, known: Types, arguments: tuple[types.Type, ...]) -> Statement:
    context = cpu_target.typing_context
    if isinstance(value, ir.Arg):
        return Statement(target, value, arguments[value.index])
    if isinstance(value, ir.Const | ir.Global | ir.FreeVar):
        return Statement(target, value, _type_of_constant(value.value))
    if isinstance(value, ir.Var):
        return Statement(target, value, known[value.name])
    operands = [Operand(v.name) for v in _operands(value)]
    of = [known[v.name] for v in operands]
    t: Any = of[0] if of else None
    if value.op in ("cast", "exhaust_iter"):
        if value.op == "exhaust_iter" and not (isinstance(t, types.BaseTuple) and len(t) == value.count):
            raise TypingError(f"{t} has not {value.count} items")
        return Statement(target, value, t)
    if value.op in ("pair_first", "pair_second"):
        return Statement(target, value, t.first_type if value.op == "pair_first" else t.second_type)
    if value.op == "build_tuple":
        return Statement(target, value, types.BaseTuple.from_types(of))
    if value.op == "getattr":
        found = context.resolve_getattr(t, value.attr)
        if found is None:
            raise TypingError(f"{t} has no attribute {value.attr}")
        return Statement(target, value, found)
    if value.op in ("static_getitem", "getitem") and isinstance(t, types.BaseTuple):
        index = value.index if value.op == "static_getitem" else getattr(of[1], "literal_value", None)
        if index is not None:
            item = Operand(value.value.name, range(len(t))[index])
            return Statement(target, value, t[item.item], operands=(item,))
    if value.op == "static_getitem":
        raise TypingError(f"{t} has no items")
    if value.op == "call":
        if value.kws:
            raise TypingError("kernels pass arguments by position")
        callee = known[value.func.name]
        if value.vararg is not None:
            last = operands.pop()
            operands += [Operand(last.name, i) for i in range(len(of[-1]))]
            of[-1:] = list(of[-1])
    else:
        callee = _FUNCTION_OF.get(value.op) or context.resolve_value_type(
            value.immutable_fn if value.op == "inplace_binop" else operator.getitem if value.op == "getitem" else value.fn
        )
    call = _resolved(callee, tuple(of))
    return Statement(target, value, call.return_type, callee, tuple(operands), call)


_FUNCTION_OF = {"getiter": "getiter", "iternext": "iternext"}
SUBSTITUTES: dict[Any, types.Type] = {}  # the types of what stands for Python's functions


def _type_of_constant(constant: Any) -> types.Type:
    if isinstance(constant, Callable) and constant in SUBSTITUTES:  # type: ignore[arg-type]
        return SUBSTITUTES[constant]
    resolve = cpu_target.typing_context.resolve_value_type
    try:
        return types.maybe_literal(constant) or resolve(constant)
    except ValueError:  # an intrinsic of which Numba has not yet heard
        cpu_target.typing_context.refresh()
        return resolve(constant)


@cache
def _resolved(callee: Any, arguments: tuple[types.Type, ...]) -> Signature:
    """Return the signature of what is called with arguments of these types."""
    call = cpu_target.typing_context.resolve_function_type(callee, arguments, {})
    if call is None:
        raise TypingError(f"{callee} takes no arguments of types {', '.join(map(str, arguments))}")
    return call
