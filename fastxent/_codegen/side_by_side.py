"""Makes calls side by side, each in one of several processes that do nothing else: kernels compile so.

``multiprocessing`` would import the caller's program in each process, which runs it again unless it guards against that.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

CALLS_A_PROCESS = 25  # compiling a kernel leaves some 20 MB behind

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # pickled by the names of the function and its module

_SERVE = "import sys; sys.path[:] = sys.argv[1:]; from fastxent._codegen import side_by_side; side_by_side.serve()"


def possible() -> bool:
    """Return whether this process knows a Python: in a packaged program, ``sys.executable`` is that program."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def results(calls: Sequence[Call], n_processes: int, begin: Call | None = None) -> Generator[Any, None, None]:
    """Yield what the calls return, in their order; each process makes the call ``begin`` first."""
    idle: SimpleQueue[_Process] = SimpleQueue()
    processes = [_Process(begin) for _ in range(min(n_processes, len(calls)))]
    for process in processes:
        idle.put(process)

    def result(call: Call) -> Any:
        process = idle.get()
        try:
            return process.make(call)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(max(1, len(processes)))
    try:
        yield from threads.map(result, calls)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.end()
        threads.shutdown()


class _Process:
    """A Python that reads calls from its standard input and writes their results, and is replaced from time to time."""

    def __init__(self, begin: Call | None) -> None:
        self._begin = begin
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-c", _SERVE, *sys.path]
        self._python = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._calls = 0

    def make(self, call: Call) -> Any:
        if self._calls == CALLS_A_PROCESS:
            self.end()
            self._start()
        if self._calls == 0 and self._begin is not None:
            self._answer(self._begin)
        self._calls += 1
        return self._answer(call)

    def _answer(self, call: Call) -> Any:
        assert self._python.stdin is not None and self._python.stdout is not None
        try:
            pickle.dump(call, self._python.stdin)
            self._python.stdin.flush()
            answer = pickle.load(self._python.stdout)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"a process that compiles ended with exit status {self._python.wait()}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        self._python.kill()
        self._python.wait()
        for pipe in (self._python.stdin, self._python.stdout):
            with suppress(OSError):  # what was not written yet has no reader
                pipe and pipe.close()


def serve() -> None:
    """Make the calls that come by standard input until it ends. An interrupt is for the process that waits for them."""
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a call prints is no result
    with suppress(EOFError):
        while True:
            function, arguments = pickle.load(sys.stdin.buffer)
            try:
                answer = function(*arguments)
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
