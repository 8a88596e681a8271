"""The disk cache of kernels: in which folders it may lie, who may write to them, and its files.

The files are native code, which is run as it is found. So a folder, or a file, that another user could have written to is
refused, by the rules that OpenSSH has for its keys (see .github/SECURITY.md); and a folder whose path is not absolute is
whichever folder the process happens to be in. Windows keeps users apart by other means: there, only the path is looked at.

Nothing ever changes in a file: its name says all that its code depends on. So processes that compile at once write the same
file, and each may read the other's. A file is a checksum, then the code. Where a folder has more than ``LIMIT`` bytes of them,
whoever writes there removes those of other builds of fastxent, which are no longer asked for: the ones read last stay longest.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import ClassVar, NamedTuple


class Folder(NamedTuple):
    path: str
    mode: int  # that it is made with
    limit: str | None = None  # of the folders above it, the first that is not looked at
    owner: int | None = None  # beside root and this user, who else may own it


SUFFIX = ".fastxent"
LIMIT = 200_000_000  # bytes: some ten thousand kernels


class _State:
    warned: ClassVar[set[str]] = set()


# ----------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------


def folders() -> list[Folder]:
    """Where code may lie, the best place first; of each place that is refused there is a warning."""
    trusted = []
    for folder, fault in judged():
        if fault is None:
            trusted.append(folder)
        else:
            _warn_of(folder.path, fault)
    return trusted


def judged() -> Iterator[tuple[Folder, str | None]]:
    """The folders, and what speaks against each."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        if Path(chosen).is_absolute():
            folder = _folder(chosen, 0o755)
            fault = _fault_of(folder)
        else:
            folder, fault = Folder(chosen, 0o755), "its path is not absolute"
        yield folder, fault
        if fault is None:
            return
    for place in (_beside_the_package(), _of_the_user()):
        if place is not None:
            yield place, _fault_of(place)


def _beside_the_package() -> Folder | None:
    """Trusted are those, too, who can change the package: they need no cache to run code as this user."""
    file = globals().get("__file__", "")
    if not Path(file).is_absolute() or getattr(sys, "frozen", False):  # a frozen program may unpack itself anew each time
        return None
    package = os.path.realpath(os.path.dirname(os.path.dirname(file)))
    owner = os.stat(package).st_uid if os.path.isdir(package) else None  # else it is in a zip archive
    return Folder(os.path.realpath(os.path.join(package, "__pycache__")), 0o755, package, owner)


def _of_the_user() -> Folder | None:
    if sys.platform == "win32":
        chosen, default = os.environ.get("LOCALAPPDATA", ""), "~/AppData/Local"
    elif sys.platform == "darwin":
        chosen, default = "", "~/Library/Caches"
    else:
        chosen, default = os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"
    for users in (chosen, os.path.expanduser(default)):
        if Path(users).is_absolute():  # others are to be ignored, says XDG's specification; and there may be no home
            return _folder(os.path.join(users, "fastxent"), 0o700)
    return None


def _folder(path: str, mode: int) -> Folder:
    """As OpenSSH does, trust what is above the user's home."""
    path, home = os.path.realpath(path), os.path.expanduser("~")
    home = os.path.realpath(home) if Path(home).is_absolute() else path
    return Folder(path, mode, os.path.dirname(home) if path.startswith(home + os.sep) else None)


def cache_folder() -> str:
    """Where new code is written."""
    for folder, fault in judged():
        path = Path(folder.path)
        there = next((str(f) for f in (path, *path.parents) if os.path.exists(f)), "")
        if fault is None and os.path.isdir(there) and os.access(there, os.W_OK):
            return folder.path
    return "none: no folder can be written to"


# ----------------------------------------------------------------------------------------------------
# Who may write there
# ----------------------------------------------------------------------------------------------------


def _fault_of(folder: Folder) -> str | None:
    """Could others put files into a folder, or another folder in its place? What is not there yet is made by this user."""
    path = Path(folder.path)
    for at in (path, *path.parents):
        if str(at) == folder.limit:
            break
        with suppress(OSError):
            fault = _fault(os.lstat(at), folder, above=at != path)
            if fault is not None:
                return fault if at == path else f"{at}: {fault}"
    return None


def _fault(state: os.stat_result, folder: Folder, above: bool = False) -> str | None:
    """Who else may write to a file or folder? In a sticky one ``above``, all may, but not touch what belongs to others."""
    if not hasattr(os, "geteuid"):
        return None
    if state.st_uid not in (0, os.geteuid(), folder.owner):
        return f"user {state.st_uid} owns it"
    if above and state.st_mode & stat.S_ISVTX:
        return None
    if state.st_mode & stat.S_IWOTH:
        return "all users can write to it"
    if state.st_mode & stat.S_IWGRP and not _is_private(state.st_gid):
        return f"group {state.st_gid} can write to it"
    return None


def _is_private(group: int) -> bool:
    """Has the group no member but this user? Where each has such a group, its folders are writable to it as a rule."""
    import grp
    import pwd

    with suppress(KeyError):  # a user, or group, without a name
        user, members = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
        own = user.pw_uid != 0 and group == user.pw_gid and members.gr_name == user.pw_name
        return own and set(members.gr_mem) <= {user.pw_name}
    return False


def _warn_of(path: str, fault: str) -> None:
    if path not in _State.warned:
        _State.warned.add(path)
        warnings.warn(f"fastxent does not use compiled kernels in {path}: {fault}", RuntimeWarning, stacklevel=2)


# ----------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------


def read(name: str) -> bytes | None:
    """The code in the file of this name."""
    for folder in folders():
        path = os.path.join(folder.path, name)
        with suppress(OSError), open(path, "rb", opener=_open_itself) as file:
            state = os.fstat(file.fileno())
            fault = _fault(state, folder) if stat.S_ISREG(state.st_mode) else "it is no file"
            if fault is not None:
                _warn_of(path, fault)  # and it will be replaced
                continue
            content = file.read()
            code = content[32:]
            if hashlib.sha256(code).digest() == content[:32]:  # else it is damaged, and will be replaced
                return code
    return None


def _open_itself(path: str, flags: int) -> int:
    """Not what a link leads to: that lies in a folder which nobody has looked at. And without waiting, as for a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def write(name: str, code: bytes) -> None:
    """Keep code in the first folder where that is possible."""
    reasons = []
    for folder in folders():
        temporary = os.path.join(folder.path, f"{name}.{token_hex(8)}")
        try:
            _make(folder.path, folder.mode)
            try:
                with open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, 0o644)) as file:
                    file.write(hashlib.sha256(code).digest() + code)
                os.replace(temporary, os.path.join(folder.path, name))
            finally:
                with suppress(OSError):
                    os.unlink(temporary)
            with suppress(OSError):  # a folder may be written to, but not listed
                _remove_other_builds(folder.path, name)
            return
        except OSError as reason:
            reasons.append(str(reason))
    why = "; ".join(reasons) or "there is no folder for them"
    warnings.warn(f"fastxent keeps no compiled kernels: {why}", RuntimeWarning, stacklevel=2)


def _make(folder: str, mode: int) -> None:
    """A folder and those above it, which others cannot write to whatever the umask."""
    if not os.path.isdir(folder):
        _make(os.path.dirname(folder), mode)
        with suppress(FileExistsError):
            os.mkdir(folder, mode)


def _remove_other_builds(folder: str, name: str) -> None:
    """Until no more than ``LIMIT`` is left, files of this user of another build than that of file ``name``."""
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    total, others = 0, []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another process may have removed it
                state = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX) and stat.S_ISREG(state.st_mode):
                    total += state.st_size
                    if _build_of(entry.name) != _build_of(name) and state.st_uid == user:
                        others.append((state.st_atime, state.st_size, entry.path))
    for _, size, path in sorted(others):
        if total <= LIMIT:
            break
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)
            total -= size


def _build_of(name: str) -> str:
    """``cache_key.file_name`` puts it between the name of the kernel and the rest."""
    return name.rpartition("-")[0].rpartition("-")[2]
