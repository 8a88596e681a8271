"""Calls that come again: looked up, and run, without the checks and the planning of a first call.

``cache`` is the one call cache, for NumPy and PyTorch: a key, a lookup, a store. ``array_calls`` are NumPy's keys and calls,
``fastxent.torch._callcache`` PyTorch's. What they run are ``tasks``, by functions of machine code (``front_end``) that
``builtins`` makes callable. The room is optional: without it, or with FASTXENT_FASTPATH=0 (see ``_runtime.fastpath``), each
call is checked and planned, with the same results. All rooms below may be imported here. Begin with ``cache``.
"""
