"""Calls that come again: recognised, and run, without the checks and the planning of a first call.

``callcache`` knows NumPy's calls; ``table`` and ``family`` hold what the machine-code front end ``fastcall`` reads. It
looks into objects of CPython and NumPy, after ``table`` has checked on real ones that all is where it is expected, and
does without otherwise. No result depends on this room. All rooms below may be imported here. Begin with ``callcache``.
"""
