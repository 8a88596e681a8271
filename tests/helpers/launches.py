"""Which kernels ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from fastxent._fastpath.cache import calls
from fastxent._runtime import run
from fastxent.torch import _calls


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels that run inside, in order."""
    names: list[str] = []
    run_task, ready = run.run, _calls._ready

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return run_task(name, *args, **kwargs)

    def counting_ready(task: run.PackedTask, *rest: Any) -> Any:
        known = ready(task, *rest)

        def call(*args: Any) -> Any:
            done = known(*args)
            if done >= 0:  # else no kernel ran
                names.append(task.name)
            return done

        return call

    with (
        patch.object(run, "run", counting),
        patch.object(_calls, "_ready", counting_ready),
    ):
        calls.clear()
        try:
            yield names
        finally:
            calls.clear()
