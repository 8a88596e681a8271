"""The implementation of the command line.

``parser`` defines the options, ``commands`` what each command does, ``output`` how results are shown. ``evaluate``, with
``files``, which reads its input, and ``head``, which multiplies it, ``demo`` and ``language_model``, which
``language_model_plot`` draws, compute. Modules here may import the public functions, and of other rooms only ``_runtime``,
``_abi.dtypes`` and ``_codegen.patience``. Only ``fastxent bench`` imports the benchmarks, which import nothing of the command
line. Begin with ``parser``.
"""
