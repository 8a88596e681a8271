"""`lookup` and `store` of calls with tensors, if there is a fast path: see ``_runtime.fastpath``."""

from fastxent._runtime import fastpath

if fastpath.ENABLED:
    from fastxent.torch._callcache import lookup, store
else:
    from fastxent._runtime.fastpath import lookup, store

__all__ = ["lookup", "store"]
