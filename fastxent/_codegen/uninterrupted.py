"""Runs work that no signal may interrupt: the imports and the compilation of a first call.

Ctrl-C during an import leaves a half-imported package behind: that process cannot import NumPy or Numba again, and Numba's
half-filled tables of functions stay so. Python runs signal handlers in the main thread. So a thread of its own does such work
while the caller waits: Ctrl-C ends the wait at once, the work goes on, and the next call finds it done. A process that exits
meanwhile waits for the thread, as Python does for any that is no daemon: LLVM must not be torn down while it compiles.
"""

from __future__ import annotations

import logging  # noqa: F401  # imported before the fork handlers are registered: see there
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")

lock = threading.RLock()  # held by the thread at work

if hasattr(os, "register_at_fork"):
    # A child that is forked while Numba is imported or compiles would inherit their locks, held for ever: so a fork waits.
    # The handler registered last runs first: logging, which Numba imports, must not hold its own lock while this one waits.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

STACK = 16 << 20  # bytes: the compiler recurses deeply, and a program may have set a small stack size


class _State:
    worker: int | None = None  # identifier of the thread at work


def imported(name: str) -> Any:
    """Return a module; import it, and whatever it imports, without interruption if that has not been done."""
    if name not in sys.modules:
        uninterrupted(import_module, name)
    return import_module(name)  # waits for another thread that is importing it


def uninterrupted(
    work: Callable[..., T], *arguments: object, meanwhile: Callable[[Callable[[float], bool]], None] | None = None
) -> T:
    """Run ``work`` in a thread of its own, one at a time, and return or raise what it does.

    ``meanwhile`` is called with a function that waits for at most the given seconds and returns whether the work has ended.
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

    # Work that is requested by other work, perhaps by a destructor that runs during it, would wait for itself: run it here.
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
        errors.clear()  # breaks the reference cycle of an error and its frames


def _start(do: Callable[[], None]) -> threading.Thread | None:
    """Start a thread that runs ``do``; return None if none can start: at the system's limit, or while Python exits."""
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
