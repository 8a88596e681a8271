"""What the compiling process of the tests runs (see conftest.py); it imports nothing else of theirs."""

from fastxent import _compile
from fastxent._plan import Variant


def compile_into_cache(name: str, variant: Variant) -> None:
    _compile.compile_task(name, variant)
