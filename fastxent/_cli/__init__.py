"""The implementation of the command line.

``parser`` defines the options, ``commands`` what each command does, ``output`` how results are shown. ``evaluate`` computes,
with ``files`` and ``zarr_folder``, which read its input, ``head``, which multiplies it, ``totals``, which adds up, and
``cluster``, where other processes do so. ``demo`` and ``language_model``, which ``language_model_plot`` draws, compute too.
Modules here may import the public functions, and of other rooms only ``_runtime``, ``_abi.dtypes`` and ``_codegen.patience``.
Only ``fastxent bench`` imports the benchmarks, which import nothing of the command line. Begin with ``parser``.
"""
