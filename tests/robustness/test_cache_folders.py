"""Where machine code is looked for, and who could have put it there. Nothing is compiled: the files hold any bytes."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastxent
from fastxent._codegen import disk_cache

pytestmark = pytest.mark.core

CODE = b"machine code"
SOMEBODY = 12345
VARIABLES = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home of the user, who chooses no folder; the package lies in an archive, where nothing can be written."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(disk_cache, "__file__", str(tmp_path / "site.zip" / "fastxent" / "_codegen" / "disk_cache.py"))
    (tmp_path / "site.zip").touch()
    monkeypatch.setattr(disk_cache._State, "warned", set())
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


@pytest.fixture
def chosen(home, tmp_path, monkeypatch) -> Path:
    """A folder that the user has chosen, with code in it."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "chosen"))
    disk_cache.write("file", CODE)
    assert disk_cache.read("file") == CODE
    return tmp_path / "chosen"


def read() -> tuple[bytes | None, list[str]]:
    """What is read, and the warnings of two attempts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = disk_cache.read("file")
        assert disk_cache.read("file") == found
    assert {w.category for w in caught} <= {RuntimeWarning}
    return found, [str(w.message) for w in caught]


def of_somebody(monkeypatch, name: str, *paths: Path | str) -> None:
    """A function of ``os`` that says of these files and folders that they belong to somebody else."""
    stat, theirs = getattr(os, name), {os.stat(path).st_ino for path in paths}

    def changed(*arguments, **options):
        state = stat(*arguments, **options)
        if state.st_ino not in theirs:
            return state
        return SimpleNamespace(st_uid=SOMEBODY, st_mode=state.st_mode, st_ino=state.st_ino)

    monkeypatch.setattr(os, name, changed)


def trusted() -> list[str]:
    return [folder.path for folder, fault in disk_cache.judged() if fault is None]


# Paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [dict(NUMBA_CACHE_DIR=path) for path in (".", "cache", "./cache", "../cache", "~/cache")]
    + [dict(XDG_CACHE_HOME="cache"), dict(XDG_CACHE_HOME=""), dict(NUMBA_CACHE_DIR="")],
    ids=str,
)
def test_a_path_that_is_not_absolute_is_not_used(environment, home, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disk_cache.write("file", CODE)
        assert disk_cache.read("file") == CODE
    assert [f.parent for f in home.parent.rglob("file")] == [home / ".cache" / "fastxent"]
    about = environment.get("NUMBA_CACHE_DIR")
    expected = [f"fastxent does not use compiled kernels in {about}: its path is not absolute"] if about else []
    assert [str(w.message) for w in caught] == expected


@pytest.mark.parametrize("value", [None, "", ".", "home", "~"])
def test_there_is_no_home(value, home, monkeypatch):
    """In a container, a user may have neither the variable nor an entry in the system's table."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if value is not None:
        monkeypatch.setenv("HOME", value)
    assert all(os.path.isabs(path) and not path.startswith(os.getcwd()) for path in trusted())
    if value != "":  # then it is /
        with pytest.warns(RuntimeWarning, match="keeps no compiled kernels"):
            disk_cache.write("file", CODE)
    assert list(Path().iterdir()) == [] and disk_cache.cache_folder()


@pytest.mark.parametrize("file", [None, "fastxent/_codegen/disk_cache.py", "site.zip/fastxent/_codegen/disk_cache.pyc"])
def test_the_package_was_found_by_a_relative_path(file, home, monkeypatch):
    monkeypatch.delattr(disk_cache, "__file__") if file is None else monkeypatch.setattr(disk_cache, "__file__", file)
    assert trusted() == [str(home / ".cache" / "fastxent")]


def test_a_packed_program_does_not_write_beside_itself(home, monkeypatch):
    """It may unpack itself into a new folder each time."""
    beside = str(home.parent / "site.zip" / "fastxent" / "__pycache__")
    assert trusted() == [beside, str(home / ".cache" / "fastxent")]
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert trusted() == [str(home / ".cache" / "fastxent")]


def test_the_current_folder_is_gone(home):
    os.rmdir(os.getcwd())
    assert trusted()


# Who may write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(mode, chosen, home, monkeypatch):
    monkeypatch.setattr(disk_cache, "_is_private", lambda group: False)
    chosen.chmod(mode)
    found, (warning,) = read()
    assert found is None
    assert str(chosen) in warning and "can write to it" in warning
    disk_cache.write("file", b"ours")  # goes to the next
    assert (home / ".cache" / "fastxent" / "file").exists()
    assert disk_cache.read("file") == b"ours"
    assert f"refused: {chosen}" in fastxent.show_config()["cache"]


@pytest.mark.parametrize(("mode", "fine"), [(0o777, False), (0o1777, True), (0o755, True)])
def test_a_folder_further_up_that_others_can_write_to(mode, fine, home, tmp_path, monkeypatch):
    """They could put another in its place, but in a sticky one."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "open" / "a" / "b"))
    assert (str(tmp_path / "open" / "a" / "b") in trusted()) == fine
    (tmp_path / "link").symlink_to(tmp_path / "open")  # it is where it leads to that counts
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "link" / "a"))
    assert (str(tmp_path / "open" / "a") in trusted()) == fine


def test_above_the_home_nothing_is_looked_at(home, tmp_path):
    tmp_path.chmod(0o777)
    assert str(home / ".cache" / "fastxent") in trusted()
    home.chmod(0o777)
    assert str(home / ".cache" / "fastxent") not in trusted()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_somebody_else_is_refused(what, chosen, monkeypatch):
    path = str(chosen if what == "folder" else chosen / "file")
    for name in ("lstat", "fstat"):
        of_somebody(monkeypatch, name, path)
    found, (warning,) = read()
    assert found is None
    assert warning.endswith(f"{path}: user {SOMEBODY} owns it")


def test_a_file_that_others_can_write_to_is_replaced(chosen):
    (chosen / "file").chmod(0o666)
    found, (warning,) = read()
    assert found is None
    assert warning.endswith(f"{chosen / 'file'}: all users can write to it")
    disk_cache.write("file", CODE)
    assert read() == (CODE, [])


def test_a_link_is_not_followed(chosen, tmp_path):
    """Whatever may be said of the folder that it leads to."""
    (chosen / "file").rename(tmp_path / "elsewhere" / "file")
    (chosen / "file").symlink_to(tmp_path / "elsewhere" / "file")
    assert read() == (None, [])
    disk_cache.write("file", b"ours")
    assert read() == (b"ours", [])
    assert (tmp_path / "elsewhere" / "file").read_bytes().endswith(CODE)


def test_a_pipe_is_not_waited_for(chosen):
    (chosen / "file").unlink()
    os.mkfifo(chosen / "file")
    code, messages = read()
    assert code is None and "it is no file" in str(messages)
    disk_cache.write("file", b"ours")
    assert read()[0] == b"ours"


def test_the_packages_owner_is_trusted_beside_it(home, monkeypatch, tmp_path):
    """A colleague's installation: who owns it can run code as its users anyhow, but has no business elsewhere."""
    beside = tmp_path / "site" / "fastxent" / "__pycache__"
    (home / ".cache" / "fastxent").mkdir(parents=True)
    beside.mkdir(parents=True)
    monkeypatch.setattr(disk_cache, "__file__", str(beside.parent / "_codegen" / "disk_cache.py"))
    for name in ("stat", "lstat"):
        of_somebody(monkeypatch, name, beside, beside.parent, home / ".cache" / "fastxent")
    assert trusted() == [str(beside)]
    beside.chmod(0o777)
    assert trusted() == []


@pytest.mark.parametrize(
    ("uid", "gid", "name", "members", "private"),
    [
        (1000, 1000, "ann", [], True),
        (1000, 1000, "ann", ["ann"], True),
        (1000, 1000, "ann", ["bob"], False),
        (1000, 100, "users", [], False),
        (0, 0, "ann", [], False),
    ],
)
def test_a_group_of_one(uid, gid, name, members, private, monkeypatch):
    """Where every user has a group, as on Debian and Fedora, most folders may be written to by that group."""
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_uid=uid, pw_gid=1000 if uid else 0, pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    assert disk_cache._is_private(gid) is private


def test_on_windows_only_paths_are_looked_at(chosen, monkeypatch):
    monkeypatch.delattr(os, "geteuid")
    chosen.chmod(0o777)
    assert read() == (CODE, [])


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_what_is_made_others_can_read_but_not_write(umask, home, tmp_path, monkeypatch):
    """An administrator may compile for all; but the user's own cache is the user's."""
    before = os.umask(umask)
    try:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "a" / "b"))
        disk_cache.write("file", CODE)
        monkeypatch.delenv("NUMBA_CACHE_DIR")
        disk_cache.write("file", CODE)
    finally:
        os.umask(before)
    paths = {path: 0o755 for path in (tmp_path / "a", tmp_path / "a" / "b")}
    paths |= {path: 0o700 for path in (home / ".cache", home / ".cache" / "fastxent")}
    paths |= {path: 0o644 for path in (tmp_path / "a" / "b" / "file", home / ".cache" / "fastxent" / "file")}
    assert {path: path.stat().st_mode & 0o777 for path in paths} == {path: mode & ~umask for path, mode in paths.items()}


# A process --------------------------------------------------------------------------------------------

SEEN = """
import os, sys, warnings
import numpy, llvmlite, fastxent as fx
from fastxent._codegen import machine_code
seen = []
def hook(event, arguments):
    if event in ("open", "os.mkdir", "os.rename") and isinstance(arguments[0], str) and not os.path.isabs(arguments[0]):
        seen.append(arguments[0])
sys.addaudithook(hook)
warnings.simplefilter("ignore")
machine_code.compiled = lambda name, variant: b"no code"
machine_code.link = lambda code: (print(seen), os._exit(0))
fx.cross_entropy([[0.0, 1.0]], [0])
"""


@pytest.mark.parametrize("path", [".", "cache"])
def test_a_process_opens_nothing_in_the_current_folder(path, tmp_path):
    skip = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(Path(fastxent.__file__).parent, tmp_path / "site" / "fastxent", ignore=skip)
    (copy / "__pycache__").touch()  # nothing can be written there
    (tmp_path / "current").mkdir()
    paths = [str(tmp_path / "site"), *map(os.path.abspath, filter(None, sys.path))]
    environment = os.environ | {name: path for name in VARIABLES} | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SEEN]
    done = subprocess.run(command, cwd=tmp_path / "current", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert list((tmp_path / "current").iterdir()) == []
