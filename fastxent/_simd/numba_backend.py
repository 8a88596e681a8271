"""How a kernel and its helpers are compiled: as LLVM IR, which is inlined into one function, and no further.

Numba would give each of some seventy helpers, for each kernel anew, its wrappers and machine code of its own. Without them, and
without the passes that look for what no kernel has, a kernel takes 3.9 s where it took 6.
"""

from llvmlite import binding
from numba import njit, types
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import IRLegalization, NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode
from numba.extending import overload


def _optimize(module, machine):
    """LLVM's passes. No loop is unrolled: the loops over vectors have their rounds written out where that pays. Elsewhere two
    rounds beside each other need more registers than there are (AVX2: 16, and exp has 11 constants)."""
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = False
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)


class _Part(CPUCodeLibrary):
    """IR that is linked into other IR, and never into the process."""

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
        name = [].append  # what the dispatcher knows a function by: any of C, and no two the same
        state.targetctx.insert_user_function(name, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=name)
        return True


class _Compiler(CompilerBase):
    def define_pipelines(self):
        passes = PassManager("inlined")
        for step in (
            TranslateByteCode, FixupArgs, IRProcessing, ReconstructSSA, NopythonTypeInference, PreLowerStripPhis,
            IRLegalization, _ToLLVM, NoPythonBackend,
        ):  # fmt: skip
            passes.add_pass(step, step.__name__)
        passes.finalize()
        return [passes]


INLINE = {
    "forceinline": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False,
    "pipeline_class": _Compiler,
}  # fmt: skip


@global_compiler_lock
def c_function(function, signature):
    """A function for C: the library that holds its IR, all that it calls inlined, and its symbol there."""
    dispatcher = njit(**INLINE | {"no_cfunc_wrapper": False})(function)
    dispatcher.compile(signature)
    (result,) = dispatcher.overloads.values()
    result.library._ensure_finalized()
    return result.library, result.fndesc.llvm_cfunc_wrapper_name


# ----------------------------------------------------------------------------------------------------
# Functions of kernels with code for what is there only
# ----------------------------------------------------------------------------------------------------


def by_kind(none, **named):
    """A function of kernels that is ``none`` where its second argument is None: no code is made for what is not there.
    ``named``: what it is where that is a named tuple of this name."""

    def decorate(function):
        def choose(task, second, *more):
            if isinstance(second, types.NoneType):
                return none
            return named.get(second.instance_class.__name__, function) if isinstance(second, types.BaseNamedTuple) else function

        overload(function, jit_options=INLINE, strict=False)(choose)
        return function

    return decorate


def as_needed(choose):
    """A function of kernels that is what ``choose`` says, given the task's constants; types may differ."""
    overload(choose, jit_options=INLINE, strict=False)(lambda task, *more: choose(dict(task.constants)))
    return choose
