"""The command line's insides: ``parser`` knows the options, ``commands`` what each command does, ``output`` how it is shown.

``evaluate``, the ``files`` that it reads, and ``demo`` compute. The public functions may be imported here, and no other room's
insides but ``_runtime``, ``_abi.dtypes`` and ``_codegen.patience``; the benchmarks by ``fastxent bench`` alone, and they import
nothing of the command line. Begin with ``parser``.
"""
