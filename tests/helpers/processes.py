"""Processes of their own: a Python that runs a piece of code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]  # of the repository

has_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


def run_script(code: str, *arguments: str, timeout: float = 300, **environment: str) -> str:
    """What `code` prints, run by a Python of its own; an assertion that shows its errors if it fails or crashes."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout.strip()
