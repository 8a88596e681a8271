"""Says once a process, in its log, that calls compile, when they have done so for two seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 2.0

_logger = logging.getLogger("fastxent")


class _State:
    left = SECONDS
    quiet = False


def watch(ended: Callable[[float], bool]) -> None:
    """Wait for a compilation, with what is left of the patience."""
    if _State.quiet:
        return
    start = time.monotonic()
    if ended(max(0.0, _State.left)):
        _State.left -= time.monotonic() - start
        return
    _State.quiet = True
    _logger.warning(
        "fastxent is compiling: the first call of each kind does, for some seconds, and keeps the result on disk. "
        "The command `fastxent warmup` compiles the common kernels ahead; "
        "logging.getLogger('fastxent').setLevel('ERROR') silences this message."
    )


@contextmanager
def quietly() -> Iterator[None]:
    """In here it is known that kernels are compiled."""
    before, _State.quiet = _State.quiet, True
    try:
        yield
    finally:
        _State.quiet = before
