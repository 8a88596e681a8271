"""The disk cache: whatever lies in it, and whoever else writes to it, the kernel that runs is the right one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch_cases import run_script

import fastxent

PACKAGE = Path(fastxent.__file__).parent
LOSS = "0.126928"  # log(1 + exp(-2))

# The kernel of the binary loss is the quickest to compile.
BINARY = """
import sys, warnings
sys.path[:0] = sys.argv[1:]  # another fastxent than that of the tests
import numpy as np, fastxent as fx
from numba.core import event
class Compiled(event.Listener):
    seen = False
    def on_start(self, event): self.seen = True
    def on_end(self, event): pass
compiled = Compiled()
with event.install_listener("numba:compile", compiled), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss = fx.binary_cross_entropy_with_logits(np.full(5, 2, {dtype!r}), np.ones(5, {dtype!r}))
print(f"{{loss:.6f}}", "compiled" if compiled.seen else "loaded", *(w.category.__name__ for w in caught))
"""
COMPILED, LOADED = f"{LOSS} compiled", f"{LOSS} loaded"


def binary(cache: Path | str, *paths: str, dtype: str = "f4", **environment: str) -> str:
    """The loss, where its kernel came from, and what was warned about, in a process that uses this cache."""
    return run_script(BINARY.format(dtype=dtype), *paths, NUMBA_CACHE_DIR=str(cache), **environment)


def files(cache: Path) -> list[Path]:
    return sorted(f for f in cache.rglob("*") if f.is_file())


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of fastxent to be maltreated; its parent goes to the front of sys.path."""
    skip = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "site" / "fastxent", ignore=skip))


def test_a_kernel_is_compiled_once(tmp_path):
    assert [binary(tmp_path), binary(tmp_path)] == [COMPILED, LOADED]


RACE = """
import sys, time
from pathlib import Path
from numba.core.caching import IndexDataCacheFile as File
import numpy as np, fastxent as fx
folder, me, other, dtype = Path(sys.argv[1]), *sys.argv[2:]
def wait_for(what):
    end = time.monotonic() + 120
    while not (folder / what).exists():
        assert time.monotonic() < end, what
        time.sleep(0.01)
save_index, save_data = File._save_index, File._save_data
def index(self, overloads):
    (folder / f"{me} has looked").touch()
    wait_for(f"{other} has looked")
    if me == "late":
        wait_for("early has an index")
    save_index(self, overloads)
    (folder / f"{me} has an index").touch()
def data(self, name, data):
    wait_for("late has an index")
    if me == "early":
        wait_for("late is done")
    save_data(self, name, data)
    (folder / f"{me} is done").touch()
File._save_index, File._save_data = index, data
fx.binary_cross_entropy_with_logits(np.zeros(5, dtype), np.ones(5, dtype))
"""


def test_two_processes_that_compile_at_once_do_not_swap_their_kernels(tmp_path):
    """Both look for a free number before either has taken one. Numba's index then names the other's file."""
    cache, signs = tmp_path / "cache", tmp_path / "signs"
    signs.mkdir()
    pair = [("early", "late", "f4"), ("late", "early", "f8")]
    started = [
        subprocess.Popen([sys.executable, "-c", RACE, str(signs), *names], env={**os.environ, "NUMBA_CACHE_DIR": str(cache)})
        for names in pair
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    assert [binary(cache, dtype=dtype) for dtype in ("f8", "f4")] == [LOADED, LOADED]


@pytest.mark.parametrize(("ending", "left"), [(".nbi", 0.0), (".nbi", 0.5), (".nbc", 0.99)])
def test_a_truncated_file_is_replaced(tmp_path, ending, left):
    """Not only survived: else every later process would compile again, and warn."""
    assert binary(tmp_path) == COMPILED
    (file,) = (f for f in files(tmp_path) if f.suffix == ending and "binary" in f.name)
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    assert [binary(tmp_path), binary(tmp_path)] == [COMPILED, LOADED]


def test_nothing_can_be_written_anywhere(package):
    """A read-only install and home: files stand where folders would have to be made (root may write to any folder).

    Two warnings, for two kernels: that of the loss, and the one that starts it.
    """
    (package / "__pycache__").write_text("")
    home = {name: str(package / "__init__.py") for name in ("HOME", "XDG_CACHE_HOME")}
    assert binary("", str(package.parent), **home) == f"{COMPILED} RuntimeWarning RuntimeWarning"


CHANGES = {
    "_simd.py": ("lane(x + _swap(x, 1), 0)", "lane(x + _swap(x, 2), 0)"),
    "_loadstore.py": ("I32(1), mask, _zeros(vector)", "I32(1), _zeros(mask.type), _zeros(vector)"),
    "_elementary.py": ("LN2_HIGH - (", "LN2_HIGH + ("),
    "_rows.py": ("LINE = 64", "LINE = 32"),
    "_maths.py": ("x * (task.factor / divisor)", "x * (divisor / task.factor)"),
    "_kernels.py": ("(negative * (", "(positive * ("),
}


@pytest.mark.parametrize("helper", CHANGES)
def test_an_upgrade_that_changes_only_a_helper(tmp_path, package, helper):
    """Numba looks at the file of the task alone, and not even at that where its time and size are the same."""
    assert binary(tmp_path / "cache", str(package.parent)) == COMPILED
    file, before = package / helper, (package / helper).stat()
    old, new = CHANGES[helper]
    source = file.read_text()
    assert source.count(old) == 1
    file.write_text(source.replace(old, new))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    loss, how = binary(tmp_path / "cache", str(package.parent)).split()
    assert how == "compiled"
    assert (loss == LOSS) == (helper in ("_rows.py", "_maths.py"))  # the binary loss uses neither


def test_from_a_zip_archive(tmp_path, package):
    archive = shutil.make_archive(str(tmp_path / "fastxent"), "zip", package.parent)
    assert binary(tmp_path / "cache", archive).startswith(COMPILED)


X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.skipif(not X86, reason="names of x86 processors")
def test_two_kinds_of_processor_share_a_home(tmp_path):
    """Neither runs the other's machine code, and neither throws it away."""
    kinds = [dict(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") for name in ("x86-64", "x86-64-v2")]
    assert [binary(tmp_path, **kind) for kind in (*kinds, *kinds)] == [COMPILED] * 2 + [LOADED] * 2
