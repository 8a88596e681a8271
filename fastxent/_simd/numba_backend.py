"""How a kernel and its helpers are compiled: to LLVM IR that is inlined into one function.

For every kernel, Numba would compile each of some seventy helpers to wrappers and machine code of its own. Without these, and
without the passes for features that no kernel uses, compiling a kernel takes 3.9 s instead of 6.
"""

from llvmlite import binding
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
from numba.core.untyped_passes import FixupArgs, ReconstructSSA, TranslateByteCode
from numba.extending import overload

from fastxent._simd.known_branches import DecideKnownBranches
from fastxent._simd.task import names_in_types, names_read, narrowed


def _optimize(module, machine):
    """Run LLVM's passes, without loop unrolling.

    The loops over vectors are unrolled in the source where that pays. Elsewhere two interleaved iterations need more registers
    than there are (AVX2: 16, and exp has 11 constants).
    """
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = False
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)


class _Part(CPUCodeLibrary):
    """IR that is linked into other IR, and is never loaded into the process."""

    def _optimize_final_module(self):
        _optimize(self._final_module, self._codegen._tm)

    def _finalize_final_module(self):
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _ToLLVM(NativeLowering):
    _name = "fastxent_to_llvm"

    def run_pass(self, state):
        state.flags.no_compile = True
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        super().run_pass(state)
        name = [].append  # Numba's key of this function: any builtin that is unique
        state.targetctx.insert_user_function(name, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=name)
        return True


class _Compiler(CompilerBase):
    def define_pipelines(self):
        passes = PassManager("inlined")
        for step in (
            TranslateByteCode, FixupArgs, DecideKnownBranches, ReconstructSSA, NopythonTypeInference, PreLowerStripPhis,
            _ToLLVM, NoPythonBackend,
        ):  # fmt: skip
            passes.add_pass(step, step.__name__)
        passes.finalize()
        return [passes]


INLINE = {
    "forceinline": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False,
}  # fmt: skip


class InlinedFunction(CPUDispatcher):
    """A function that is compiled once for all tasks that agree in what it reads."""

    def __init__(self, function, options=INLINE):
        super().__init__(function, targetoptions={"nopython": True, **options}, pipeline_class=_Compiler)

    def narrow(self, args):
        names = names_read(self.py_func) | names_in_types(args)
        return tuple(narrowed(argument, names) for argument in args)

    def get_call_template(self, args, kws):
        return super().get_call_template(self.narrow(args), kws)


def inlined(function):
    """Let kernels call a function, which is inlined there."""
    return InlinedFunction(function)


def by_types(stub):
    """Let a function of argument types say what a kernel's call of ``stub`` is compiled as."""
    return overload(stub, jit_options=INLINE | {"pipeline_class": _Compiler})


@global_compiler_lock
def c_function(function, signature):
    """Compile a function that C can call; return the library that holds its IR, with all callees inlined, and its symbol."""
    dispatcher = InlinedFunction(function, INLINE | {"no_cfunc_wrapper": False})
    dispatcher.compile(signature.return_type(*dispatcher.narrow(signature.args)))
    (result,) = dispatcher.overloads.values()
    result.library._ensure_finalized()
    return result.library, result.fndesc.llvm_cfunc_wrapper_name
