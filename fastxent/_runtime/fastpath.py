"""Is there a fast path for calls that come again? The room ``_fastpath`` is optional, and this is the one place that decides.

FASTXENT_FASTPATH=0 in the environment, looked at when fastxent is imported, turns it off. Results are the same without it.
"""

import os
from importlib.util import find_spec
from typing import Any

ENABLED = os.environ.get("FASTXENT_FASTPATH") != "0" and find_spec("fastxent._fastpath") is not None


def lookup(*call: Any, **named: Any) -> None:
    """Where there is no fast path, no call is known."""


def store(*call: Any, **named: Any) -> None:
    """And none is kept."""
