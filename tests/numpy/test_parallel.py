"""One task, three ways to run it: same bits; and what it must leave alone in the process around it."""

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import fastxent as fx
from fastxent._abi.variant import MOST_STORED, TILE
from fastxent._runtime import run, threads
from tests.helpers.processes import has_fork

rng = np.random.default_rng(1)
X = (rng.standard_normal((700, 301)) * 4).astype(np.float32)  # enough for several chunks and every thread
Y = rng.integers(0, 301, 700)


def in_a_new_process(code, **environment):
    """Run code in a process of its own; its output, or the test fails with its error."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def bits(result):
    loss, gradient = result
    return np.asarray(loss).tobytes() + gradient.tobytes()


@pytest.mark.core
def test_openmp_threads_and_serial_give_the_same_bits(monkeypatch):
    serial = bits(fx.cross_entropy_value_and_grad(X, Y, n_threads=1))
    for n in (2, 3, 4, 7):
        assert bits(fx.cross_entropy_value_and_grad(X, Y, n_threads=n)) == serial
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    for n in (2, 4):
        assert bits(fx.cross_entropy_value_and_grad(X, Y, n_threads=n)) == serial


def test_split_rows_give_the_same_bits():
    x = rng.standard_normal((3, 100_000)).astype(np.float32)
    y = [0, 50_000, 99_999]
    assert len({bits(fx.cross_entropy_value_and_grad(x, y, n_threads=n)) for n in (1, 2, 3, 4)}) == 1


@pytest.mark.core
def test_several_python_threads_at_once():
    expected = bits(fx.cross_entropy_value_and_grad(X, Y))
    wrong = []

    def work():
        for _ in range(20):
            if bits(fx.cross_entropy_value_and_grad(X, Y)) != expected:
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert not run._State.calls


@has_fork
def test_a_forked_child_works_serially():
    out = in_a_new_process(
        """
        import os, numpy as np, fastxent as fx
        x = np.random.default_rng(0).standard_normal((4000, 100)).astype(np.float32)
        y = np.zeros(4000, int)
        before = fx.cross_entropy(x, y)
        child = os.fork()
        if child == 0:
            os._exit(0 if fx.cross_entropy(x, y) == before else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert out == "0"


@pytest.mark.core
def test_import_brings_in_neither_numba_nor_torch():
    out = in_a_new_process(
        """
        import sys, fastxent
        print([m for m in ("numba", "torch", "llvmlite", "scipy") if m in sys.modules])
        """
    )
    assert out == "[]"


@pytest.mark.thorough
def test_kernels_from_the_disk_need_nothing_of_numba(tmp_path):
    """Zeros, as for ignored rows, may be written by the C library's memset: it must be found where Numba never was."""
    code = """
        import sys, numpy as np, fastxent as fx
        for shape, axis in (((40, 5), 1), ((40, 300), 1), ((2, 20, 8, 8), 1)):
            x, y = np.ones(shape, np.float32), np.full(shape[:axis] + shape[axis + 1 :], -100)
            out = np.ones_like(x)
            loss, _ = fx.cross_entropy_value_and_grad(x, y, axis=axis, reduction="sum", out=out)
            print(float(loss), np.count_nonzero(out))
        print("numba" in sys.modules)
        """
    zeros = ["0.0 0"] * 3
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines() == [*zeros, "True"]  # compiled
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines() == [*zeros, "False"]


def test_torch_keeps_its_threads_and_shares_its_pool():
    out = in_a_new_process(
        """
        import os, numpy as np, fastxent as fx
        x, y = np.zeros((4000, 100), np.float32), np.zeros(4000, int)
        fx.cross_entropy(x, y)
        import torch
        torch.set_num_threads(3)
        fx.cross_entropy(x, y)
        print(torch.get_num_threads(), fx.get_num_threads() <= 3)
        maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
        from fastxent._runtime import run
        from fastxent._runtime import threads
        print({os.path.realpath(threads.openmp_path())} == maps)
        """
    )
    assert out.splitlines() == ["3 True", "True"]


@pytest.mark.thorough
def test_a_cache_that_cannot_be_written_or_read_is_no_error(tmp_path):
    code = """
        import warnings, fastxent as fx
        warnings.simplefilter("ignore", RuntimeWarning)
        print(f"{fx.cross_entropy([[0.0, 0.0]], [1]):.6f}")
        """
    file = tmp_path / "a file, not a folder"
    file.write_text("")
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(file / "cache")) == "0.693147"
    cache = tmp_path / "cache"
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(cache)) == "0.693147"
    files = [f for f in cache.rglob("*") if f.is_file()]
    assert files
    for f in files:
        f.write_bytes(f.read_bytes()[:20])
    assert in_a_new_process(code, NUMBA_CACHE_DIR=str(cache)) == "0.693147"


@pytest.mark.core
def test_set_num_threads():
    before = fx.get_num_threads()
    fx.set_num_threads(1)
    assert fx.get_num_threads() == 1
    fx.set_num_threads(None)
    assert fx.get_num_threads() == before
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="n"):
            fx.set_num_threads(wrong)


@pytest.mark.thorough
def test_a_thread_stays_in_its_tile():
    """It keeps exponentials there, or rows transposed: not on its stack, which may be small."""
    run._State.tiles.clear()
    memory, at = run._take_tiles()
    memory[:] = 0xA5
    run._State.tiles.append((memory, at))
    for dtype in (np.float32, np.float64):
        for shape in ((20, 256), (40, 10), (64, 16 * MOST_STORED)):  # fewer rows would be split
            x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
            fx.cross_entropy_value_and_grad(x, np.zeros(len(x), int), n_threads=1)
            fx.softmax(x)
    first = at - memory.ctypes.data
    assert (memory[first : first + TILE] != 0xA5).mean() > 0.5
    assert (memory[:first] == 0xA5).all() and (memory[first + TILE :] == 0xA5).all()
