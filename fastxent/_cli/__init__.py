"""The implementation of the command line.

``parser`` defines the options, ``commands`` what each command does, ``output`` how results are shown. ``evaluate``, with
``files``, which reads its input, and ``head``, which multiplies it, and ``demo`` compute. Modules here may import the public
functions, and of other rooms only ``_runtime``, ``_abi.dtypes`` and ``_codegen.patience``. Only ``fastxent bench`` imports the
benchmarks, which import nothing of the command line. Begin with ``parser``.
"""
