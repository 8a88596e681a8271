"""The disk cache of kernels: which folders may hold it, who may write to them, and its files.

The files are native code that runs as it is found. So a folder or file that another user could have written to is refused, by
the rules that OpenSSH has for its keys (see .github/SECURITY.md). A folder whose path is relative is refused too, since it
depends on the process's working directory. Windows separates users by other means: there, only the path is checked.

A file never changes, since its name says everything that its code depends on. So processes that compile at the same time write
the same file, and each may read the other's. A file is a checksum followed by the code. When a folder holds more than ``LIMIT``
bytes of files, the next process that writes there removes the least recently read ones.
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
    mode: int  # the permissions that it is created with
    limit: str | None = None  # the first of its parent folders that is not checked
    owner: int | None = None  # a user who may own it, besides root and this user


SUFFIX = ".fastxent"
LIMIT = 200_000_000  # bytes: about ten thousand kernels


class _State:
    warned: ClassVar[set[str]] = set()


# ----------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------


def folders() -> list[Folder]:
    """Return the folders that may hold code, the best first, and warn of each folder that is refused."""
    trusted = []
    for folder, fault in judged():
        if fault is None:
            trusted.append(folder)
        else:
            _warn_of(folder.path, fault)
    return trusted


def judged() -> Iterator[tuple[Folder, str | None]]:
    """Yield each candidate folder with the reason why it is refused, or None."""
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
    """Return the folder inside the package. Who can change the package is trusted: they need no cache to run code."""
    file = globals().get("__file__", "")
    if not Path(file).is_absolute() or getattr(sys, "frozen", False):  # it may unpack itself anew on each start
        return None
    package = os.path.realpath(os.path.dirname(os.path.dirname(file)))
    owner = os.stat(package).st_uid if os.path.isdir(package) else None  # None: the package is in a zip archive
    return Folder(os.path.realpath(os.path.join(package, "__pycache__")), 0o755, package, owner)


def _of_the_user() -> Folder | None:
    if sys.platform == "win32":
        chosen, default = os.environ.get("LOCALAPPDATA", ""), "~/AppData/Local"
    elif sys.platform == "darwin":
        chosen, default = "", "~/Library/Caches"
    else:
        chosen, default = os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"
    for users in (chosen, os.path.expanduser(default)):
        if Path(users).is_absolute():  # XDG's specification ignores relative paths, and a home may be missing
            return _folder(os.path.join(users, "fastxent"), 0o700)
    return None


def _folder(path: str, mode: int) -> Folder:
    """Return a `Folder` that is checked up to the user's home; as in OpenSSH, the folders above the home are trusted."""
    path, home = os.path.realpath(path), os.path.expanduser("~")
    home = os.path.realpath(home) if Path(home).is_absolute() else path
    return Folder(path, mode, os.path.dirname(home) if path.startswith(home + os.sep) else None)


def cache_folder() -> str:
    """Return the folder that new code is written to, or a text that says that there is none."""
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
    """Return why others could write to a folder, or replace it, or None. This user will create what does not exist yet."""
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
    """Return who else may write to a file or folder, or None.

    In a sticky folder ``above``, anyone may write, but may not replace what belongs to others.
    """
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
    """Return whether this user is the group's only member: where each user has such a group, folders let it write."""
    import grp
    import pwd

    with suppress(KeyError):  # the user or the group has no name
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
    """Return the code in the file of this name, or None if no folder has an intact one."""
    for folder in folders():
        path = os.path.join(folder.path, name)
        with suppress(OSError), open(path, "rb", opener=_open_itself) as file:
            state = os.fstat(file.fileno())
            fault = _fault(state, folder) if stat.S_ISREG(state.st_mode) else "it is no file"
            if fault is not None:
                _warn_of(path, fault)  # `write` will replace it
                continue
            content = file.read()
            code = content[32:]
            if hashlib.sha256(code).digest() == content[:32]:  # a damaged file is skipped, and `write` will replace it
                return code
    return None


def _open_itself(path: str, flags: int) -> int:
    """Open a file, without following a link to a folder that was not checked, and without blocking, as on a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def write(name: str, code: bytes) -> None:
    """Write code to the first folder where that is possible."""
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
            with suppress(OSError):  # a folder may be writable and not readable
                _make_room(folder.path, name)
            return
        except OSError as reason:
            reasons.append(str(reason))
    why = "; ".join(reasons) or "there is no folder for them"
    warnings.warn(f"fastxent keeps no compiled kernels: {why}", RuntimeWarning, stacklevel=2)


def _make(folder: str, mode: int) -> None:
    """Create a folder and its parents; whatever the umask, others cannot write to them."""
    if not os.path.isdir(folder):
        _make(os.path.dirname(folder), mode)
        with suppress(FileExistsError):
            os.mkdir(folder, mode)


def _make_room(folder: str, written: str) -> None:
    """Remove this user's files but ``written``, least recently read first, down to ``LIMIT`` bytes."""
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    total, others = 0, []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another process may have removed the file
                state = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX) and stat.S_ISREG(state.st_mode):
                    total += state.st_size
                    if entry.name != written and state.st_uid == user:
                        others.append((state.st_atime, state.st_size, entry.path))
    for _, size, path in sorted(others):
        if total <= LIMIT:
            break
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)
            total -= size
