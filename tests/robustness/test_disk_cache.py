"""The disk cache: whatever lies in it, and whoever else writes to it, the kernel that runs is the right one.

Where it may lie is the matter of ``test_cache_folders``.
"""

from __future__ import annotations

import ast
import compileall
import marshal
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from modulefinder import ModuleFinder
from pathlib import Path
from textwrap import dedent
from types import FunctionType

import pytest

import fastxent
from fastxent._abi.tasks import TASKS
from fastxent._abi.variant import Schedule
from fastxent._codegen import cache_key, disk_cache
from tests.helpers.processes import run_script

PACKAGE = Path(fastxent.__file__).parent
LOSS = "0.126928"  # log(1 + exp(-2))

# The kernel of the binary loss is the quickest to compile. Numba is there only if there was something to compile.
BINARY = """
import sys, warnings
sys.path[:0] = sys.argv[1:]  # another fastxent than that of the tests
{before}
import numpy as np, fastxent as fx
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss = fx.binary_cross_entropy_with_logits(np.full(5, 2, {dtype!r}), np.ones(5, {dtype!r}))
print(f"{{loss:.6f}}", "compiled" if "numba" in sys.modules else "loaded", *(w.category.__name__ for w in caught))
"""
COMPILED, LOADED = f"{LOSS} compiled", f"{LOSS} loaded"


def binary(cache: Path | str, *paths: str, dtype: str = "f4", before: str = "", **environment: str) -> str:
    """The loss, where its kernel came from, and what was warned about, in a process that uses this cache."""
    code = BINARY.format(dtype=dtype, before=dedent(before))
    return run_script(code, *paths, NUMBA_CACHE_DIR=str(cache), **environment)


def files(cache: Path) -> list[Path]:
    return sorted(f for f in cache.rglob("*") if f.is_file())


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of fastxent to be maltreated; its parent goes to the front of sys.path."""
    skip = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "site" / "fastxent", ignore=skip))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    assert binary(cache) == COMPILED
    return cache


@pytest.mark.core
def test_a_kernel_is_compiled_once_and_loaded_without_numba(compiled_once):
    assert binary(compiled_once) == LOADED


@pytest.mark.thorough
def test_processes_that_compile_at_once_do_not_swap_their_kernels(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BINARY.format(dtype=d, before="")], env=environment, stdout=subprocess.PIPE, text=True
        )
        for d in ("f4", "f4", "f8")
    ]
    assert {process.communicate(timeout=200)[0].strip() for process in started} == {COMPILED}
    assert [f.name.partition("-")[0] for f in files(tmp_path)] == ["binary", "binary", "launch"]  # nothing half written is left
    assert [binary(tmp_path, dtype=dtype) for dtype in ("f8", "f4")] == [LOADED, LOADED]


def test_a_damaged_file_is_replaced(compiled_once, tmp_path, monkeypatch):
    """Not only survived: else every later process would compile again."""
    shutil.copytree(compiled_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (file,) = (f for f in files(tmp_path) if "binary" in f.name)
    good = file.read_bytes()
    assert disk_cache.read(file.name) == good[32:]
    middle = len(good) // 2
    for bad in (b"", good[:20], good[:middle], good[:-1], good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]):
        file.write_bytes(bad)
        assert disk_cache.read(file.name) is None
    assert [binary(tmp_path), binary(tmp_path)] == [COMPILED, LOADED]


@pytest.mark.thorough
def test_the_place_is_chosen_or_beside_the_package_or_the_users(package, tmp_path):
    home = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA")}
    assert binary("", str(package.parent), **home) == COMPILED
    beside = package / "__pycache__"
    assert [f for f in files(beside) if f.suffix == ".fastxent"]
    assert not (tmp_path / "home").exists()
    shutil.rmtree(beside)
    beside.write_text("")  # as if it could not be written to: root may write to any folder
    assert [binary("", str(package.parent), **home) for _ in "ab"] == [COMPILED, LOADED]
    assert files(tmp_path / "home")


def test_nothing_can_be_written_anywhere(package):
    """A read-only install and home: files stand where folders would have to be made (root may write to any folder).

    Two warnings, for two kernels: that of the loss, and the one that starts it.
    """
    (package / "__pycache__").write_text("")
    home = {name: str(package / "__init__.py") for name in ("HOME", "XDG_CACHE_HOME")}
    assert binary("", str(package.parent), **home) == f"{COMPILED} RuntimeWarning RuntimeWarning"


def test_an_upgrade_that_changes_only_a_helper(tmp_path, package):
    """Also where the time of its file says nothing."""
    assert binary(tmp_path / "cache", str(package.parent)) == COMPILED
    file, before = package / "_simd" / "logarithm.py", (package / "_simd" / "logarithm.py").stat()
    source = file.read_text()
    assert source.count("return e - fma(s") == 1
    file.write_text(source.replace("return e - fma(s", "return e + fma(s"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    loss, how = binary(tmp_path / "cache", str(package.parent)).split()
    assert how == "compiled" and loss != LOSS


def test_every_source_of_a_kernel_counts(monkeypatch):
    modules = run_script(
        "import sys, fastxent._codegen.compiler\nprint(*(m for m in sys.modules if m.startswith('fastxent.')))"
    ).split()
    apart = ("machine_code", "cache_key", "disk_cache")
    own = {m for m in modules if not m.endswith(apart)}
    kernels = [*TASKS, "run_arrays"]
    assert own - set().union(*map(cache_key.sources, kernels)) == {"fastxent._codegen"}
    assert {"fastxent._fastpath.front_end.arrays", "fastxent._runtime.plan"} <= set(cache_key.sources("run_arrays"))
    read = cache_key._source
    for kernel in kernels:
        monkeypatch.setattr(cache_key, "_source", read)
        ids = {cache_key.build_id(kernel)}
        for changed in cache_key.sources(kernel):
            monkeypatch.setattr(cache_key, "_source", lambda name, changed=changed: read(name) + b" " * (name == changed))
            ids.add(cache_key.build_id.__wrapped__(kernel))
        assert len(ids) == 1 + len(cache_key.sources(kernel))


def test_of_the_losses_a_kernel_is_made_of_those_that_count():
    """Found by what is compiled for it: the modules of its functions, and of theirs."""
    from fastxent._kernels import tasks
    from fastxent._simd.task import callees, names_in

    def modules(function: FunctionType) -> set[str]:
        values = [function.__globals__.get(name) for name in names_in(function.__code__)[1]]
        values += [cell.cell_contents for cell in function.__closure__ or ()]
        found = (modules(callee) for value in values for callee in callees(value))
        return {function.__module__}.union(*found)

    for kernel, task in TASKS.items():
        found = set().union(*(modules(tasks.work_of(kernel, schedule).py_func) for schedule in Schedule))
        losses = {name.rpartition(".")[2] for name in found if name.startswith(cache_key.LOSSES)}
        assert losses == set(task.losses), kernel
        others = {f"{cache_key.LOSSES}.{other}" for t in TASKS.values() for other in t.losses if other not in losses}
        assert not others & set(cache_key.sources(kernel))


def test_the_code_around_the_kernels_does_not_count():
    for name in ("fastxent._runtime.plan", "fastxent._runtime.run", "fastxent._fastpath.front_end.arrays"):
        assert name not in cache_key.sources("value_and_grad")


def syntax(source: bytes) -> ast.Module:
    """What Python's own parser makes of it, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def test_a_source_counts_but_for_comments_and_docstrings():
    for name in cache_key.sources("run_tensors"):
        spec = find_spec(name)
        source = Path(spec.origin).read_bytes()
        code = cache_key.without_comments(source)
        assert ast.dump(ast.parse(code)) == ast.dump(syntax(source)), name
        assert cache_key._source(name) == code


BUILD_ID = "import sys\nsys.path[:0] = sys.argv[1:]\nfrom fastxent._codegen.cache_key import build_id\nprint(build_id('value'))"


def test_whoever_edits_a_comment_or_a_docstring_compiles_nothing_again(package):
    ids = [run_script(BUILD_ID, str(package.parent))]
    file = package / "_kernels" / "schedules.py"
    text = file.read_text()
    for old, new in (
        (':\n    """', ':\n    """Of late: # no comment. '),
        ("\n\n\ndef ", '\n\n\n# A comment with half a "quotation.\n\ndef '),
        ("\n    return ", "  # well\n\n    return "),
        ("+ 1", "+ 2"),
    ):
        assert old in text
        text = text.replace(old, new)
        file.write_text(text)
        ids.append(run_script(BUILD_ID, str(package.parent)))
    assert len(set(ids[:4])) == 1 and ids[4] != ids[0]


def test_what_was_read_longest_ago_makes_room(tmp_path, monkeypatch):
    """But nothing that is not a file of fastxent's, nor what is written now."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(disk_cache, "LIMIT", 3000)
    for nth, letter in enumerate("abc"):
        disk_cache.write(f"value-{letter}.fastxent", b"x" * 400)
        os.utime(tmp_path / f"value-{letter}.fastxent", (nth, 0))
    (tmp_path / "folder-a.fastxent").mkdir()
    (tmp_path / "link-a.fastxent").symlink_to(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").write_text("y" * 5000)
    before = {f.name for f in tmp_path.iterdir()}
    disk_cache.write("value-d.fastxent", b"x" * 1600)  # 3 * 432 + 1632 bytes
    assert {f.name for f in tmp_path.iterdir()} == before | {"value-d.fastxent"}
    disk_cache.write("value-e.fastxent", b"x" * 700)  # 660 too many
    assert {f.name for f in tmp_path.iterdir()} == before - {"value-a.fastxent", "value-b.fastxent"} | {
        "value-d.fastxent", "value-e.fastxent"
    }  # fmt: skip
    disk_cache.write("value-f.fastxent", b"x" * 4000)
    assert {f.name for f in tmp_path.glob("value-*")} == {"value-f.fastxent"}
    assert (tmp_path / "link-a.fastxent").is_symlink()


def test_who_removes_what_another_removes_finds_nothing_amiss(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(disk_cache, "LIMIT", 1000)

    def write(build: int) -> None:
        for nth in range(50):
            disk_cache.write(f"value-{build}-{nth}.fastxent", b"x" * 300)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(list(tmp_path.iterdir())) <= 50  # of one build, and no temporary ones


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_files_of_other_users_are_theirs_to_remove(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(disk_cache, "LIMIT", 1000)
    disk_cache.write("value-2222-a.fastxent", b"x" * 2000)
    os.chown(tmp_path / "value-2222-a.fastxent", 12345, -1)
    disk_cache.write("value-1111-a.fastxent", b"x")
    assert len(files(tmp_path)) == 2


def test_from_a_zip_archive(tmp_path, package):
    archive = shutil.make_archive(str(tmp_path / "fastxent"), "zip", package.parent)
    assert binary(tmp_path / "cache", archive) == COMPILED


def test_without_sources(tmp_path, package):
    """In a folder, in a zip archive, and in a packed program, whose importer has no files at all: one cache serves them all."""
    compileall.compile_dir(package, quiet=2, legacy=True)
    for source in package.rglob("*.py"):
        source.unlink()
    assert binary(tmp_path / "cache", str(package.parent)) == COMPILED
    archive = shutil.make_archive(str(tmp_path / "fastxent"), "zip", package.parent)
    assert binary(tmp_path / "cache", archive) == LOADED
    packed = f"""
        from zipimport import zipimporter
        class Packed(zipimporter):
            def get_data(self, path):
                raise OSError(path)
            def get_source(self, name):
                raise ImportError(name)
        sys.path_hooks.insert(0, Packed)
        sys.path.insert(0, {archive!r})
        """
    assert binary(tmp_path / "cache", before=packed) == LOADED


def test_whoever_packs_a_program_finds_all_modules(tmp_path):
    """They look for import statements; those of other packages are looked at by their own authors."""
    others = [module.name for module in pkgutil.iter_modules() if module.name != "fastxent"]
    finder = ModuleFinder([str(PACKAGE.parent)], excludes=others)
    (tmp_path / "program.py").write_text("import fastxent")
    finder.run_script(str(tmp_path / "program.py"))
    files = [file.relative_to(PACKAGE.parent).with_suffix("") for file in PACKAGE.rglob("*.py")]
    needed = {".".join(file.parts).removesuffix(".__init__") for file in files}
    apart = ("fastxent.torch", "fastxent._cli", "fastxent.cli", "fastxent.__main__")  # PyTorch's users import it; commands
    apart += ("fastxent.dask", "fastxent.distributed", "fastxent.objectives")  # whoever needs one of them imports it
    apart += ("fastxent._runtime.strategies",)  # people and tests read that table
    apart += ("fastxent._codegen.cross",)  # for the command that compiles the kernels of wheels
    assert {name for name in needed if not name.startswith(apart)} <= set(finder.modules)


def identity(source: str) -> bytes:
    return marshal.dumps(cache_key._meaning(compile(source, "a.py", "exec")), 2)


def test_code_without_a_source_is_told_apart_by_what_it_does():
    source = "def f(x, y=1.0):\n    return x + 1 if x in {'a', 'b'} else (x, -0.0)\n"
    assert identity(source) == identity("# a comment\n\n" + source)
    other = (("1 if", "2 if"), ("-0.0", "0.0"), ("'b'", "'c'"), ("x + 1", "x - 1"), ("y=1.0", "z=1.0"), ("y=1.0", "y=1"))
    assert len({identity(source.replace(*change)) for change in other} | {identity(source)}) == 1 + len(other)


def test_the_version_of_numba_counts(monkeypatch):
    import numba

    assert numba.__version__.encode() in cache_key._numba()
    before = cache_key.build_id("value")
    monkeypatch.setattr(cache_key, "_numba", lambda: b"another")
    assert cache_key.build_id.__wrapped__("value") != before


X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.thorough
@pytest.mark.skipif(not X86, reason="names of x86 processors")
def test_two_kinds_of_processor_share_a_home(tmp_path):
    """Neither runs the other's machine code, and neither throws it away."""
    kinds = [dict(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") for name in ("x86-64", "x86-64-v2")]
    assert [binary(tmp_path, **kind) for kind in (*kinds, *kinds)] == [COMPILED] * 2 + [LOADED] * 2
