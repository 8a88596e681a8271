"""Emits the LLVM IR of a function whose types are known. Numba says what instructions an operation is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir as llvm
from numba.core import cgutils, ir, types

from fastxent._simd.typed import Body, Operand, Statement, Types

# Returns the declaration of an inlined function for these types of arguments.
FunctionFor = Callable[[Any, tuple[types.Type, ...]], llvm.Function]


class Emission:
    """Emits one function.

    A variable that blocks share has a slot of memory for each type that it has on entry to a block; LLVM turns slots into
    registers. While a block is emitted, ``values`` are those of the variables that it has read or written, ``types`` their
    types, and ``held`` the types of the slots that hold a variable's value already.
    """

    def __init__(self, context: Any, function_for: FunctionFor, body: Body, function: llvm.Function) -> None:
        self.context, self.function_for, self.body, self.function = context, function_for, body, function
        self.builder = llvm.IRBuilder(function.append_basic_block("entry"))
        self.starts = {label: function.append_basic_block() for label in body.blocks}
        self.slots: dict[tuple[str, types.Type], Any] = {}
        self.types: Types = {}
        self.values: dict[str, Any] = {}
        self.held: dict[str, set[types.Type]] = {}

    def emit(self) -> None:
        self.builder.branch(self.starts[min(self.starts)])
        for label, block in self.body.blocks.items():
            self.builder.position_at_end(self.starts[label])
            self.types, self.values = dict(block.live), {}
            self.held = {name: {t} for name, t in block.live.items()}
            for statement in block.statements:
                value = self.value_of(statement)
                self.values[statement.target], self.types[statement.target] = value, statement.type
                self.held[statement.target] = set()
            self.end(block.end)

    def end(self, last: Any) -> None:
        """Leave a block."""
        if isinstance(last, ir.Return):
            self.builder.ret(self.cast(Operand(last.value.name), self.body.type))
            return
        for label in last.get_targets():
            for name, t in self.body.blocks[label].live.items():
                if name in self.types and t not in self.held[name]:
                    self.builder.store(self.cast(Operand(name), t), self.slot(name, t))
                    self.held[name].add(t)
        if isinstance(last, ir.Jump):
            self.builder.branch(self.starts[last.target])
        else:
            condition = self.cast(Operand(last.cond.name), types.boolean)
            self.builder.cbranch(condition, self.starts[last.truebr], self.starts[last.falsebr])

    def slot(self, name: str, t: types.Type) -> Any:
        if (name, t) not in self.slots:
            self.slots[name, t] = cgutils.alloca_once(self.builder, self.context.get_value_type(t))
        return self.slots[name, t]

    def read(self, name: str) -> Any:
        if name not in self.values:
            self.values[name] = self.builder.load(self.slot(name, self.types[name]))
        return self.values[name]

    def cast(self, operand: Operand, to: types.Type) -> Any:
        value, t = self.read(operand.name), self.types[operand.name]
        if operand.item is not None:
            value, t = self.builder.extract_value(value, operand.item), t[operand.item]  # type: ignore[index]
        return self.context.cast(self.builder, value, t, to)

    def value_of(self, statement: Statement) -> Any:
        context, builder, value, t = self.context, self.builder, statement.value, statement.type
        if statement.call is not None:
            return self.called(statement)
        if isinstance(value, ir.Arg):
            return self.function.args[value.index]
        if isinstance(value, ir.Const | ir.Global | ir.FreeVar):
            if hasattr(t, "inlined_for"):
                return context.get_dummy_value()
            return context.get_constant_generic(builder, t, value.value)
        if isinstance(value, ir.Var):
            return self.read(value.name)
        if value.op == "build_tuple":
            items = [self.cast(Operand(item.name), to) for item, to in zip(value.items, t, strict=True)]
            return context.make_tuple(builder, t, items)
        source, of = self.read(value.value.name), self.types[value.value.name]
        if value.op == "getattr":
            read = context.get_getattr(of, value.attr)
            return context.get_dummy_value() if read is None else read(context, builder, of, source, value.attr)
        if value.op in ("static_getitem", "getitem"):
            return self.cast(statement.operands[0], t)
        if value.op == "pair_first":
            return context.pair_first(builder, source, of)
        if value.op == "pair_second":
            return context.pair_second(builder, source, of)
        return source  # of "cast" and "exhaust_iter"

    def called(self, statement: Statement) -> Any:
        context, call = self.context, statement.call
        assert call is not None
        if isinstance(call.return_type, types.Phantom):
            return context.get_dummy_value()
        *_, last = call.args or (None,)
        n_given = len(call.args) - 1 if isinstance(last, types.StarArgTuple | types.StarArgUniTuple) else len(call.args)
        arguments = [self.cast(*both) for both in zip(statement.operands[:n_given], call.args[:n_given], strict=True)]
        if n_given < len(call.args):  # the last parameter is a tuple of the other arguments
            others = [self.cast(*both) for both in zip(statement.operands[n_given:], last, strict=True)]
            arguments.append(cgutils.make_anonymous_struct(self.builder, others))
        if hasattr(statement.callee, "inlined_for"):
            callee = self.function_for(statement.callee.inlined_for(call.args), call.args)
            return self.builder.call(callee, arguments)
        result = context.get_function(statement.callee, call)(self.builder, arguments)
        return context.get_dummy_value() if result is None else result
