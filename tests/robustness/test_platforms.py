"""Other processors and smaller installations. macOS and Windows are untested; .ci/arm runs kernels on an emulated Arm."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastxent._runtime import config
from tests.helpers.processes import ROOT, run_script

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
PROCESSORS = {
    "SSE2": dict(NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=""),
    "AVX2": dict(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma,+f16c,+bmi,+bmi2"),
}

NUMERICS = """
import itertools
import ml_dtypes, numpy as np
import fastxent as fx
from fastxent import reference as ref
rng = np.random.default_rng(0)
for dtype, classes in itertools.product({dtypes}, {classes}):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x = rng.standard_normal((35, classes)).astype(dtype)
    x[1, 1], x[2, :3], x[3] = -np.inf, 3e4, 0
    y = rng.integers(0, classes, 35)
    ours, truth = fx.cross_entropy_value_and_grad(x, y), ref.cross_entropy_value_and_grad(x.astype("f8"), y)
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(ours[0], truth[0], rtol=4 * min(eps, 1e-7))
    np.testing.assert_allclose(ours[1].astype("f8"), truth[1], rtol=4 * eps, atol=eps / 35)
    one = fx.cross_entropy_value_and_grad(x, y, n_threads=1)
    assert one[0] == ours[0] and one[1].tobytes() == ours[1].tobytes()
print("well")
"""


@pytest.mark.thorough
@x86
@pytest.mark.parametrize(
    ("processor", "dtypes"),
    [("AVX2", ["float16", "bfloat16"]), ("SSE2", ["bfloat16", "float32"]), ("SSE2", ["float16"])],  # no F16C there
    ids=str,
)
def test_numerics_on_older_processors(processor, dtypes, tmp_path):
    code = NUMERICS.format(dtypes=dtypes, classes=[100])
    assert run_script(code, **PROCESSORS[processor], NUMBA_CACHE_DIR=str(tmp_path)) == "well"


@pytest.mark.thorough
def test_numerics_with_registers_of_the_other_width(tmp_path):
    """What this host's kernels do without, those for 32 registers of 16 lanes or those for fewer, computes the same here."""
    code = "from fastxent._simd import vector\nvector.WIDE = not vector.WIDE\n" + NUMERICS
    assert run_script(code.format(dtypes=["float32"], classes=[3, 100, 300]), NUMBA_CACHE_DIR=str(tmp_path)) == "well"


@x86
@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_numerical_tests_on_older_processors(processor, tmp_path):
    files = ["test_simd.py", "test_cross_entropy.py", "test_stats_and_hessian.py", "test_binary.py", "test_softmax_family.py"]
    environment = os.environ | PROCESSORS[processor] | dict(NUMBA_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", *(f"tests/numpy/{file}" for file in files)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:]


BARE = """
import ctypes, os, sys
class Absent:  # as if it were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ml_dtypes", "scipy", "sklearn", "rich"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
load = ctypes.CDLL.__init__
def no_libgomp(self, name, *arguments, **options):
    if name and "gomp" in str(name):
        raise OSError("no libgomp here")
    load(self, name, *arguments, **options)
ctypes.CDLL.__init__ = no_libgomp
import fastxent as fx
from tests.helpers import child
from fastxent._runtime import run
from fastxent._runtime import threads
assert threads._openmp() is None and fx.get_num_threads() >= 1
fx.set_num_threads(3)
three = child.result()
assert run._State.jobs is not None  # it was threads of our own
fx.set_num_threads(1)
assert child.result() == three
assert fx.show_config()["threads"]["pool"] == "thread pool"
print(three)
"""


def test_without_libgomp_and_torch_there_are_threads_and_the_same_bits():
    path = os.pathsep.join(sys.path)
    same = run_script("from tests.helpers import child; print(child.result())", PYTHONPATH=path)
    assert run_script(BARE, PYTHONPATH=path) == same
    assert run_script(BARE, PYTHONPATH=path, OMP_NUM_THREADS="2") == same


def test_threads_with_small_stacks():
    """musl gives a thread 128 KiB, and a server may give it less."""
    code = """
import threading
from tests.helpers import child
before = child.result()
threading.stack_size(64 * 1024)
results = []
thread = threading.Thread(target=lambda: results.append(child.result()))
thread.start()
thread.join()
assert results == [before]
print("well")
"""
    assert run_script(code, PYTHONPATH=os.pathsep.join(sys.path)) == "well"


@pytest.mark.parametrize(
    "machine, features, name, bits",
    [
        ("x86_64", {"sse2", "avx", "avx2", "avx512f"}, "AVX-512", 512),
        ("x86_64", {"sse2", "avx", "avx2"}, "AVX2", 256),
        ("x86_64", {"sse2"}, "SSE", 128),
        ("aarch64", {"sve", "neon"}, "SVE, of which NEON is used", 128),
        ("arm64", {"neon"}, "NEON", 128),
    ],
)
def test_info_names_the_vector_instructions(machine, features, name, bits, monkeypatch):
    found = SimpleNamespace(get_host_cpu_features=lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(config, "_binding", lambda: found)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    vectors = config.show_config()["vectors"]
    assert vectors["instruction set"] == name and vectors["widest register, bits"] == bits
