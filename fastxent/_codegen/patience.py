"""Logs once per process that calls are compiling kernels, after they have compiled for two seconds in all."""

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
    """Wait until a compilation has ended, at most for what is left of ``SECONDS``; then log the message."""
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
    """Suppress the message within this context, in which the user knows that kernels are compiled."""
    before, _State.quiet = _State.quiet, True
    try:
        yield
    finally:
        _State.quiet = before
