"""Makes a function that C can call, in which all functions that it calls are inlined.

Each of these is a part: LLVM optimises it on its own, with its callees inlined, and what calls it inlines the result. A part is
made once for all kernels that call it with the same types. Optimised all at once, a kernel is up to a tenth slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, ClassVar

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.callconv import BaseCallConv, NumpyErrorModel
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu import CPUContext
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.core.typing.templates import Signature

from fastxent._simd.emitted import Emission
from fastxent._simd.numba_backend import InlinedFunction

Key = tuple[InlinedFunction, tuple[types.Type, ...]]


class Part:
    """The LLVM IR of one function, with declarations of those that it calls."""

    made: ClassVar[dict[Key, tuple[binding.ModuleRef, str]]] = {}  # optimised parts, with the names of their functions
    numbers: ClassVar[Iterator[int]] = count()

    def __init__(self, context: Any) -> None:
        self.context = context
        self.llvm = context.codegen().create_library("part").create_ir_module("part")
        self.declared: dict[Key, ir.Function] = {}

    def function(self, callee: InlinedFunction, arguments: tuple[types.Type, ...]) -> ir.Function:
        key = callee, arguments
        if key not in self.declared:
            if key not in self.made:
                self.made[key] = self._part(callee, arguments)
            self.declared[key] = self._declaration(callee, arguments, self.made[key][1])
        return self.declared[key]

    def _part(self, callee: InlinedFunction, arguments: tuple[types.Type, ...]) -> tuple[binding.ModuleRef, str]:
        part, name = Part(self.context), f"{callee.name}.{next(self.numbers)}"
        function = part._declaration(callee, arguments, name)
        function.attributes.add("alwaysinline")
        Emission(self.context, part.function, callee.body(arguments), function).emit()
        return part.optimised(), name

    def _declaration(self, callee: InlinedFunction, arguments: tuple[types.Type, ...], name: str) -> ir.Function:
        of_type = self.context.get_value_type
        form = ir.FunctionType(of_type(callee.body(arguments).type), [of_type(t) for t in arguments])
        return ir.Function(self.llvm, form, name)

    def optimised(self) -> binding.ModuleRef:
        """Return the part with all of its callees inlined."""
        code = binding.parse_assembly(str(self.llvm))
        for key in self.declared:
            callee, name = self.made[key]
            code.link_in(callee, preserve=True)
            code.get_function(name).linkage = "internal"
        code.verify()
        _optimise(code, self.context.codegen()._tm)
        return code


@global_compiler_lock
def c_function(function: Callable[..., Any], call: Signature, symbol: str) -> binding.ModuleRef:
    """Return the LLVM module of a function that C can call, by the name of ``symbol``."""
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    context = cpu_target.target_context.subtarget(error_model=NumpyErrorModel(_NO_EXCEPTIONS))
    context.__class__ = _Context
    inlined = InlinedFunction(function)
    arguments = inlined.narrow(call.args)
    part = Part(context)
    with context.push_code_library(None):
        of_type = context.get_value_type
        returned = ir.VoidType() if call.return_type == types.void else of_type(call.return_type)
        outer = ir.Function(part.llvm, ir.FunctionType(returned, [of_type(t) for t in call.args]), symbol)
        builder = ir.IRBuilder(outer.append_basic_block())
        result = builder.call(part.function(inlined, arguments), outer.args)
        if call.return_type == types.void:
            builder.ret_void()
        else:
            builder.ret(context.cast(builder, result, inlined.body(arguments).type, call.return_type))
        return part.optimised()


def _optimise(module: binding.ModuleRef, machine: binding.TargetMachine) -> None:
    """Run LLVM's passes, without loop unrolling.

    The loops over vectors are unrolled in the source where that pays. Elsewhere two interleaved iterations need more registers
    than there are (AVX2: 16, and exp has 11 constants).
    """
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = False
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)


# ----------------------------------------------------------------------------------------------------
# What Numba's operations may not ask for
# ----------------------------------------------------------------------------------------------------


class _NoExceptions(BaseCallConv):
    """Where Numba would raise an exception, for a range of step 0 or an index beyond a tuple, the process ends."""

    def __init__(self) -> None:
        pass

    def return_user_exc(self, builder: Any, exc: Any, exc_args: Any = None, loc: Any = None, func_name: Any = None) -> None:
        trap = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, trap, "llvm.trap"), [])
        builder.unreachable()

    def get_function_type(self, restype: Any, argtypes: Any) -> Any:
        raise TypingError("kernels have no operations that Numba compiles as functions of their own")


_NO_EXCEPTIONS = _NoExceptions()


class _Context(CPUContext):
    call_conv = _NO_EXCEPTIONS
