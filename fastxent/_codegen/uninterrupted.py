"""Work that no signal cuts in two: the imports and the compiling of a first call.

Ctrl-C in the midst of an import leaves half a package behind: NumPy and Numba cannot be imported again by that process, and
Numba's tables of functions, half filled, stay so. Signal handlers run in the main thread. So a thread of its own does such work
while the caller waits: Ctrl-C ends the wait at once, the work goes on, and the next call finds it done. A process that ends
meanwhile waits for the thread, as Python does for any: LLVM must not be torn down while it compiles.
"""

from __future__ import annotations

import logging  # noqa: F401  # before the lock: see there
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")

lock = threading.RLock()  # held by who is at work

if hasattr(os, "register_at_fork"):
    # A child that is forked in the midst of compiling, or of importing Numba, would find both locked, and for ever: the fork
    # waits. What is registered last is done first: logging, which Numba imports, must not have locked itself by then.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

STACK = 16 << 20  # bytes: the compiler recurses deeply, and a program may have asked for small stacks


class _State:
    worker: int | None = None  # the thread at work


def imported(name: str) -> Any:
    """A module that may have to be imported first, with whatever it imports."""
    if name not in sys.modules:
        uninterrupted(import_module, name)
    return import_module(name)  # waits for another thread that is at it


def uninterrupted(
    work: Callable[..., T], *arguments: object, meanwhile: Callable[[Callable[[float], bool]], None] | None = None
) -> T:
    """What ``work`` returns or raises, in a thread of its own; work of other calls comes first.

    ``meanwhile`` is called with a function that waits for at most so many seconds, and says whether the work has ended.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Lock()
    ended.acquire()

    def do() -> None:
        try:
            with lock:
                before, _State.worker = _State.worker, threading.get_ident()
                try:
                    results.append(work(*arguments))
                finally:
                    _State.worker = before
        except BaseException as error:
            errors.append(error)
        finally:
            ended.release()

    def has_ended(seconds: float) -> bool:
        if not ended.acquire(timeout=seconds):
            return False
        ended.release()
        return True

    # Work that needs other work, as a destructor may that is run in the midst of it, would wait for itself.
    thread = None if _State.worker == threading.get_ident() else _start(do)
    if thread is None:
        do()
    elif meanwhile is not None:
        meanwhile(has_ended)
    ended.acquire()
    if thread is not None:
        thread.join()
    try:
        if errors:
            raise errors[0]
        return results[0]
    finally:
        errors.clear()  # an error refers to its frames, and they to it


def _start(do: Callable[[], None]) -> threading.Thread | None:
    """A thread that runs ``do``; None where there are no more: at a system's limit, or when the interpreter is ending."""
    thread = threading.Thread(target=do, name="fastxent", daemon=False)
    with lock:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        except RuntimeError:
            return None
        finally:
            threading.stack_size(before)
    return thread
