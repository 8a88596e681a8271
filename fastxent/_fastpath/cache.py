"""The call cache. Checks, plan and packing of a small call cost more than its work, so that they are kept for the next one.

A key says all that these depend on, or so much that the call which is found can confirm the rest by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any


class CallCache:
    """Calls by their keys, at most so many: the oldest goes first. Threads may look up and store at once, and so may signal
    handlers: each step is one that Python does not interrupt."""

    def __init__(self, most: int = 1024) -> None:
        self.most = most  # a call has two or three keys, and families of 130 KB: together they take some 100 MB at most
        self._calls: OrderedDict[Hashable, Any] = OrderedDict()
        # The call with this key, or None; a TypeError for a key that has no hash. Without a frame of its own: it takes 50 ns.
        self.lookup: Callable[[Hashable], Any] = self._calls.get

    def store(self, key: Hashable, call: object) -> None:
        self._calls[key] = call
        while len(self._calls) > self.most:
            with suppress(KeyError):  # others were quicker
                self._calls.popitem(last=False)

    def clear(self) -> None:
        self._calls.clear()

    def __len__(self) -> int:
        return len(self._calls)

    def keys(self) -> list[Hashable]:
        """From the oldest to the newest."""
        return list(self._calls)


calls = CallCache()  # of this process
