"""Functions that kernels call, and Numba's types of them.

Numba says what types an operation on its types has, and what instructions it is made of; its compiler is not asked. That would
infer the types of each of some hundred functions by a network of constraints, and take 30 ms a function. Three modules do what
it does: ``typed`` finds the types of a function's variables, ``emitted`` emits its LLVM IR, ``parts`` makes a kernel of such
functions. What they use of Numba (the interpreter of bytecode, the typing and the target context) was tried with 0.68.
"""

from functools import cached_property

from numba.core import types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_constant
from numba.core.typing.templates import signature

from fastxent._simd.task import names_in_types, names_read, narrowed
from fastxent._simd.typed import SUBSTITUTES, typed


class InlinedFunction:
    """A function that kernels call. Its types are found once for all tasks that agree in what it reads."""

    def __init__(self, function):
        self.py_func, self.name, self.bodies = function, function.__name__.strip("<>"), {}

    @cached_property
    def _numba_type_(self):
        return InlinedType(self)

    def narrow(self, arguments):
        """Return types of arguments, with tasks narrowed to what the function and its callees read."""
        names = names_read(self.py_func) | names_in_types(arguments)
        return tuple(narrowed(types.unliteral(argument), names) for argument in arguments)

    def body(self, arguments):
        """Return what the function does for narrowed types of arguments."""
        if arguments not in self.bodies:
            self.bodies[arguments] = typed(self.py_func, arguments)
        return self.bodies[arguments]


class InlinedType(types.Callable, types.Opaque):
    """Numba's type of an inlined function."""

    def __init__(self, function):
        self.function = function
        super().__init__(f"{function.py_func.__qualname__} at {id(function)}")

    def get_call_type(self, context, args, kws):
        arguments = self.function.narrow(args)
        return signature(self.function.body(arguments).type, *arguments)

    def get_call_signatures(self):
        return (), False

    def get_impl_key(self, sig):
        return self

    def inlined_for(self, arguments):
        return self.function


class ByTypes(InlinedType):
    """Numba's type of a stub: which function it stands for depends on the types of its arguments."""

    def __init__(self, stub, choose):
        self.choose, self.chosen = choose, {}
        types.Opaque.__init__(self, f"{stub.__qualname__} at {id(stub)}")

    def inlined_for(self, arguments):
        if arguments not in self.chosen:
            self.chosen[arguments] = inlined(self.choose(*arguments))
        return self.chosen[arguments]

    def get_call_type(self, context, args, kws):
        arguments = tuple(types.unliteral(argument) for argument in args)
        return signature(self.inlined_for(arguments).body(arguments).type, *arguments)


for _type in (InlinedType, ByTypes):
    register_default(_type)(models.OpaqueModel)


@lower_constant(InlinedType)
def _no_value(context, builder, t, function):
    return context.get_dummy_value()


def inlined(function):
    """Let kernels call a function, which is inlined there."""
    return InlinedFunction(function)


def by_types(stub):
    """Let a function of argument types say what a kernel's call of ``stub`` is compiled as."""

    def register(choose):
        stub._numba_type_ = ByTypes(stub, choose)
        return choose

    return register


def _of_numbers(function, of_two):
    """Let kernels call Python's ``min`` or ``max`` of two or three numbers, which Numba would compile by its own compiler."""
    by_count = {2: of_two, 3: lambda a, b, c: function(function(a, b), c)}
    SUBSTITUTES[function] = ByTypes(function, lambda *arguments: by_count[len(arguments)])


_of_numbers(min, lambda a, b: a if a < b else b)
_of_numbers(max, lambda a, b: a if a > b else b)
