"""What the compiling process of the tests runs (see conftest.py); it imports nothing else of theirs."""

from fastxent._codegen.compiler import object_code

__all__ = ["object_code"]
