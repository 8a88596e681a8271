"""Kernels that are compiled ahead for levels of processors: which there are, and that only the right one is taken."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent import cli
from fastxent._abi.variant import Layout, Schedule, Storage, Variant
from fastxent._cli import parser
from fastxent._codegen import levels
from fastxent._codegen.prebuilt import MANIFEST, kernel_name
from fastxent._runtime import common, run
from tests.helpers.processes import ROOT, run_script

PACKAGE = Path(fx.__file__).parent
HERE = [level for level in levels.of_this_cpu() if level.only == "*"]
WHOLE = [level for level in levels.LEVELS if level.only == "*"]
pytestmark = pytest.mark.skipif(not HERE, reason="no level is for this processor and system")

# The kernel of the binary loss is the quickest to compile; another one starts it.
SMALL = "binary-f32-f32", "launch-f32"
# How object files begin, and the number of the architecture in them: its format and place
ELF, MACH_O = b"\x7fELF", b"\xcf\xfa\xed\xfe"
CPU_AT = {ELF: ("<H", 18), MACH_O: ("<I", 4)}
FORMATS = {("linux", "x86_64"): (ELF, 62), ("linux", "aarch64"): (ELF, 183), ("darwin", "arm64"): (MACH_O, 0x0100000C)}


def build(folder: Path, *names: str, kernels: tuple[str, ...] = SMALL, jobs: int = 2) -> None:
    command = ["prebuild", "--into", str(folder), "--levels", *names, "--kernels", *kernels, "--jobs", str(jobs)]
    code = "import sys\nfrom fastxent import cli\nif __name__ == '__main__':\n    sys.exit(cli.main(sys.argv[1:]))"
    run_script(code, *command)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of every level, as this machine makes them."""
    folder = tmp_path_factory.mktemp("built") / "kernels"
    build(folder, *levels.NAMES)
    return folder


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Path:
    """A copy of fastxent that brings these kernels; its parent goes to the front of sys.path."""
    skip = shutil.ignore_patterns("__pycache__", "_prebuilt")
    copy = Path(shutil.copytree(PACKAGE, tmp_path / "site" / "fastxent", ignore=skip))
    shutil.copytree(built, copy / "_prebuilt")
    return copy


FOUND = """
import sys, warnings
sys.path[:0] = sys.argv[1:]
from fastxent._codegen import machine_code, prebuilt
from fastxent._abi.variant import Variant
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        origin = machine_code.found("binary", Variant("f32", "f32"))[1]
print(origin, prebuilt.available().why, *(w.category.__name__ for w in caught), sep="; ")
"""


def found(package: Path, cache: Path, **environment: str) -> list[str]:
    """Where a process would find the kernel of the binary loss, what it says of prebuilt ones, and its warnings."""
    return run_script(FOUND, str(package.parent), NUMBA_CACHE_DIR=str(cache), **environment).split("; ")


def test_a_call_runs_at_once_where_there_is_no_numba(package, tmp_path):
    code = """
        import sys
        sys.path[:0] = sys.argv[1:]
        sys.modules["numba"] = None  # whoever imports it gets an error
        import numpy as np, fastxent as fx
        loss = fx.binary_cross_entropy_with_logits(np.full(5, 2, "f4"), np.ones(5, "f4"))
        print(f"{loss:.6f}", fx.show_config()["kernels"])
        """
    loss, told = run_script(
        "\n".join(map(str.strip, code.splitlines())), str(package.parent), NUMBA_CACHE_DIR=str(tmp_path / "cache")
    ).split(" ", 1)
    assert loss == "0.126928"  # log(1 + exp(-2))
    best = HERE[0].name
    assert told == str({"prebuilt": f"2 for {best}", f"loaded: prebuilt for {best}": 2})
    assert not (tmp_path / "cache").exists()


def test_machine_code_of_each_level(built):
    manifest = json.loads((built / MANIFEST).read_text())
    assert set(manifest["levels"]) == {level.name for level in WHOLE} and {"numba", "llvmlite", "fastxent"} <= set(
        manifest["versions"]
    )
    codes = set()
    for level in WHOLE:
        files = manifest["levels"][level.name]
        assert set(files) == {f"{name}.o" for name in SMALL} == {f.name for f in (built / level.name).iterdir()}
        for name, told in files.items():
            code = (built / level.name / name).read_bytes()
            kind, place = CPU_AT[code[:4]]
            assert (code[:4], *struct.unpack_from(kind, code, place)) == FORMATS[level.system, level.machine]
            assert told["sha256"] == hashlib.sha256(code).hexdigest() and told["bytes"] == len(code)
            codes.add(code)
    assert len(codes) >= 6  # of the binary loss each level has its own


def test_two_builds_give_the_same_bytes(built, tmp_path):
    """With another number of processes, each of which hashes strings in its own way."""
    best = HERE[0].name
    build(tmp_path / "again", best, jobs=1)
    for name in SMALL:
        assert (tmp_path / "again" / best / f"{name}.o").read_bytes() == (built / best / f"{name}.o").read_bytes()
    first, second = (json.loads((folder / MANIFEST).read_text()) for folder in (built, tmp_path / "again"))
    assert second == first | {"levels": {best: first["levels"][best]}}


@pytest.mark.thorough
def test_compiled_across_is_compiled_here():
    """For this very processor, a process that compiles for a level writes what any process writes."""
    across = """
        from llvmlite import binding
        from fastxent._codegen import cross
        from fastxent._codegen.levels import Level
        triple = binding.get_process_triple()
        cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
        cross.use(Level("", triple.partition("-")[0], triple, cpu, features))
        """
    code = """
        import hashlib
        from fastxent._codegen import compiler
        from fastxent._abi.variant import Variant
        print(hashlib.sha256(compiler.object_code("binary", Variant("f32", "f32"))).hexdigest())
        """
    here, there = ("\n".join(map(str.strip, part.splitlines())) for part in (code, across + code))
    assert run_script(here) == run_script(there)


@pytest.mark.skipif(HERE[:1] != [] and HERE[0].machine != "x86_64", reason="x86-64 has several levels")
def test_a_level_that_this_processor_lacks_is_not_run(package, tmp_path):
    for level in HERE:
        assert found(package, tmp_path, NUMBA_CPU_FEATURES=level.features)[0] == f"prebuilt for {level.name}"
        for lacking in level.needs - (HERE[HERE.index(level) + 1].needs if level != HERE[-1] else set()):
            less = ",".join(level.needs - {lacking})
            assert [lev.name for lev in HERE[HERE.index(level) + 1 :]] == levels_with(less)
    origin, why = found(package, tmp_path, NUMBA_CPU_FEATURES="+sse3")
    assert (
        origin == "compiled" and why == f"none: this processor has none of {', '.join(sorted(level.name for level in WHOLE))}"
    )


def levels_with(features: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CPU_FEATURES", features)
        return [level.name for level in levels.of_this_cpu()]


@pytest.mark.skipif(bool(HERE) and HERE[0].machine != "x86_64", reason="x86-64 has several levels")
def test_a_level_for_some_kernels_leaves_the_others_to_the_next(package, tmp_path):
    """Files of any content: nothing is run."""
    folder = package / "_prebuilt"
    manifest = json.loads((folder / MANIFEST).read_text())
    some = next(level for level in levels.LEVELS if level.only != "*")
    (folder / some.name).mkdir()
    (folder / some.name / "binary-f32-f32.o").write_bytes(b"code")
    manifest["levels"][some.name] = {"binary-f32-f32.o": {"sha256": hashlib.sha256(b"code").hexdigest()}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    lower = [level for level in WHOLE if level.machine == some.machine][-1]
    told = found(package, tmp_path, NUMBA_CPU_FEATURES=some.features)
    assert told == [f"prebuilt for {some.name}", f"1 for {some.name}, 1 for {lower.name}"]
    assert found(package, tmp_path, NUMBA_CPU_FEATURES=lower.features)[0] == f"prebuilt for {lower.name}"


def test_other_machines_and_systems_have_levels_of_their_own(monkeypatch):
    for triple, names in (
        ("aarch64-unknown-linux-gnu", ["aarch64"]), ("arm64-apple-darwin25.1.0", ["apple-m1"]), ("x86_64-pc-windows-msvc", []),
        ("powerpc64le-unknown-linux-gnu", []),
    ):  # fmt: skip
        monkeypatch.setattr(levels.binding, "get_process_triple", lambda triple=triple: triple)
        assert [level.name for level in levels.of_this_cpu()] == names


def test_it_can_be_turned_off(package, tmp_path):
    assert found(package, tmp_path, FASTXENT_PREBUILT="0") == ["compiled", "none: FASTXENT_PREBUILT=0 turns them off"]
    shutil.rmtree(package / "_prebuilt")
    assert found(package, tmp_path) == ["compiled", "none: this package comes without"]


def test_what_was_compiled_for_this_processor_goes_first(package, tmp_path):
    code = """
import sys
sys.path[:0] = sys.argv[1:]
from fastxent._codegen import cache_key, disk_cache
from fastxent._abi.variant import Variant
disk_cache.write(cache_key.file_name("binary", Variant("f32", "f32")), b"code")
"""
    run_script(code, str(package.parent), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert found(package, tmp_path / "cache")[0] == "disk cache"


@pytest.mark.parametrize("how", ["changed", "shorter", "missing"])
def test_a_wrong_file_is_not_loaded_and_reported_once(package, tmp_path, how):
    file = package / "_prebuilt" / HERE[0].name / "binary-f32-f32.o"
    code = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(code[:-1] if how == "shorter" else code[:99] + bytes([code[99] ^ 1]) + code[100:])
    assert found(package, tmp_path) == ["compiled", f"2 for {HERE[0].name}", "RuntimeWarning"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sources": "', '{"sources": "a", "levels"'])
def test_a_damaged_manifest(package, tmp_path, text):
    (package / "_prebuilt" / MANIFEST).write_text(text)
    assert found(package, tmp_path) == ["compiled", "none: their manifest is damaged", "RuntimeWarning"]


def test_an_edit_of_the_sources_makes_them_old(package, tmp_path):
    file = package / "_simd" / "logarithm.py"
    text = file.read_text()
    file.write_text(text + "# a comment\n")
    assert found(package, tmp_path)[0] == f"prebuilt for {HERE[0].name}"
    file.write_text(text.replace("return e - fma(s", "return e + fma(s"))
    assert found(package, tmp_path) == ["compiled", "none: they are made of other sources than these"]


def test_from_a_zip_archive(package, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "fastxent"), "zip", package.parent)
    assert found(Path(archive) / "fastxent", tmp_path)[0] == f"prebuilt for {HERE[0].name}"


# The list of common kernels ---------------------------------------------------------------------------------


class Asked(Exception):
    """A call has asked for its kernels: it need not run."""


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", common.ALL, ids=str)
def test_calls_ask_for_kernels_of_the_list(shape, dtype, monkeypatch):
    """NumPy's memory that nobody touches costs none."""
    asked: list[tuple[str, Variant]] = []

    def note(name: str, variant: Variant) -> tuple[int, int]:
        asked.append((name, variant))
        raise Asked

    monkeypatch.setattr(run, "kernels_of", note)
    logits, target = np.empty(shape, dtype), np.empty((shape[0], *shape[2:]), np.int64)
    for function in (fx.cross_entropy, fx.cross_entropy_value_and_grad):
        with pytest.raises(Asked):
            function(logits, target, axis=1)
    assert len(asked) == 2 and set(asked) <= set(common.kernels())


def test_names_tell_kernels_apart():
    flags = [field for field, default in Variant("f32")._asdict().items() if default is False]
    storages = ("f16", "bf16", "f32", "f64")
    variants = [
        Variant(logits, target, layout=layout, schedule=schedule, storage=storage)
        for logits, target, layout, schedule, storage in itertools.product(
            storages, (None, *storages), Layout, Schedule, Storage
        )
    ]
    variants += [
        Variant("f32", **dict(zip(flags, on, strict=True))) for on in itertools.product((False, True), repeat=len(flags))
    ]
    names = {kernel_name(task, variant) for task in ("value", "value_and_grad") for variant in variants}
    assert len(names) == 2 * len(set(variants))
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


# The command ------------------------------------------------------------------------------------------------


def test_the_command_names_the_levels():
    assert parser.LEVELS == levels.NAMES


def test_the_build_hook_names_the_levels():
    """It runs before fastxent is installed, so it cannot import them; hatchling, which it imports, may be missing here."""
    tree = ast.parse((ROOT / ".ci" / "prebuild_hook.py").read_text())
    [written] = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS"]
    of_platform: dict[str, list[str]] = {}
    for level in levels.LEVELS:
        of_platform.setdefault(f"{level.system}_{level.machine}", []).append(level.name)
    assert ast.literal_eval(written) == of_platform


def test_what_is_no_folder_of_kernels_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    assert cli.main(["prebuild", "--levels", "aarch64", "--into", str(tmp_path)]) == 2
    assert "holds no prebuilt kernels" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_info_lists_where_each_kernel_comes_from(package, tmp_path):
    code = "import sys\nsys.path[:0] = sys.argv[1:2]\nfrom fastxent import cli\nsys.exit(cli.main(sys.argv[2:]))"
    told: dict[str, Any] = json.loads(
        run_script(code, str(package.parent), "info", "--json", "--kernels", NUMBA_CACHE_DIR=str(tmp_path))
    )
    kernels = told["common kernels"]
    assert {name for name, origin in kernels.items() if origin == f"prebuilt for {HERE[0].name}"} == set(SMALL)
    assert set(kernels.values()) == {"compiled", f"prebuilt for {HERE[0].name}"} and len(kernels) > 100
