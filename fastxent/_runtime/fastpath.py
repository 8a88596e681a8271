"""Decides whether repeated calls take the fast path: the room ``_fastpath`` is optional, and this is the only place that asks.

FASTXENT_FASTPATH=0 in the environment, read when fastxent is imported, turns it off. Results are the same without it.
"""

import os
from importlib.util import find_spec
from typing import Any

ENABLED = os.environ.get("FASTXENT_FASTPATH") != "0" and find_spec("fastxent._fastpath") is not None


def lookup(*call: Any, **named: Any) -> None:
    """Return None: without the fast path no call is stored."""


def store(*call: Any, **named: Any) -> None:
    """Store nothing."""
