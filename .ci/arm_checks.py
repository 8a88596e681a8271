"""All functions on an emulated 64-bit Arm: values against the reference, memory around every array, threads.

    python arm_checks.py DTYPE SOCKET

DTYPE is float32 or bfloat16; SOCKET is that of arm_compiler.py. There is no Numba here. What is there is `.ci/arm`'s doing.
"""

import logging
import platform
import sys
import time
from multiprocessing.connection import Client
from unittest.mock import patch

import ml_dtypes
import numpy as np

import fastxent as fx
from fastxent import reference as ref
from fastxent._codegen import machine_code, registry
from fastxent._runtime import threads
from tests.helpers.guarded import Rooms

DTYPE = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[sys.argv[1]]
# Relative, and to the largest of the result: float32 arithmetic, and what is stored in half precision.
TOLERANCE = 2e-6 if DTYPE == np.float32 else 2**-8
# Rows in row lanes, two units at a time and one; whole vectors of classes and some left over; planes.
SHAPES = (3, 7), (35, 10), (17, 130), (3, 100), (5, 1000), (2, 9, 5, 4)


def compiled(name: str, variant: object) -> bytes:
    with Client(sys.argv[2], "AF_UNIX") as server:
        server.send((name, variant))
        return server.recv_bytes()


machine_code.compiled = compiled
logging.getLogger("fastxent").setLevel("ERROR")  # it would say that it compiles


def calls(rng, rooms, shape):
    """Yield each function's name and its arguments, the class axis being the second."""
    x = rooms.copy(rng.normal(size=shape, scale=3).astype(DTYPE))
    y = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    y.flat[::5] = -100
    y = rooms.copy(y)
    e = np.exp(rng.normal(size=shape))
    p = rooms.copy((e / e.sum(1, keepdims=True)).astype(DTYPE))
    weight = rooms.copy(rng.uniform(0.5, 2, shape[1]))
    for name in ("cross_entropy", "cross_entropy_value_and_grad"):
        yield name, (x, y), {"axis": 1}
        yield name, (x, y), {"axis": 1, "weight": weight, "reduction": "sum", "label_smoothing": 0.1}
        yield name, (x, p), {"axis": 1}
    for name in ("cross_entropy_stats", "cross_entropy_grad_hess", "log_prob_and_entropy"):
        yield name, (x, y), {"axis": 1}
    for name in ("softmax", "log_softmax", "logsumexp"):
        yield name, (x,), {"axis": 1}
    yield "entropy", (p,), {"axis": 1}
    yield "kl_div", (x, p), {}
    for name in ("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits_value_and_grad"):
        yield name, (x, p), {}


def numbers(result):
    """Return a result's arrays: some are tuples, some hold whole numbers or nothing."""
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,)) if part is not None]


def check(label, result, expected):
    for ours, truth in zip(numbers(result), numbers(expected), strict=True):
        ours, truth = ours.astype("f8"), truth.astype("f8")
        scale = np.abs(truth[np.isfinite(truth)]).max(initial=1e-3)
        error = np.abs(ours - truth)[np.isfinite(truth)].max(initial=0) / scale
        assert ours.shape == truth.shape and error <= TOLERANCE, f"{label}: error {error:.1e}"


def values():
    n = 0
    for at_end in (True, False):
        for shape in SHAPES:
            rooms = Rooms(at_end)
            for name, arguments, options in calls(np.random.default_rng(0), rooms, shape):
                with rooms.everywhere():
                    result = getattr(fx, name)(*arguments, **options)
                expected = getattr(ref, name)(*(a.astype("f8") if a.dtype == DTYPE else a for a in arguments), **options)
                check(f"{name}{shape} {options}", result, expected)
                n += 1
            rooms.check(str(shape))
    return n


def bits():
    """The same bits by any number of threads, of OpenMP's pool and of our own."""
    assert threads._openmp() is not None, "libgomp was not found"
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(700, 100)).astype(DTYPE), rng.integers(0, 100, 700)
    results = set()
    for pool in (threads._openmp(), None):
        with patch.object(threads, "_openmp", lambda pool=pool: pool):
            for n_threads in (1, 2, 3, 5) * 3:
                loss, gradient = fx.cross_entropy_value_and_grad(x, y, n_threads=n_threads)
                results.add((float(loss), gradient.tobytes()))
    assert len(results) == 1


if __name__ == "__main__":
    assert platform.machine() == "aarch64"
    start = time.perf_counter()
    n = values()
    bits()
    assert "numba" not in sys.modules
    print(
        f"{DTYPE.name}: {n} calls, {sum(registry.origins().values())} kernels, {time.perf_counter() - start:.0f} s: all right"
    )
