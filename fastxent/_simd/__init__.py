"""The vector type of the kernels: 16 lanes, whatever the width of the processor's registers.

``vector`` defines it as a Numba type over LLVM's <16 x float>, ``lanes`` works across its lanes, ``memory`` loads and
stores it, ``transpose`` turns 16 rows into 16 columns, ``half`` widens and rounds float16 and bfloat16, ``elementary``
has exp, log and tanh with their derivations. ``host`` says what the processor can do. ``numba_backend`` compiles a function
and all its callees to LLVM IR: it is the only file that uses Numba's own pipeline. Only ``_abi`` may be imported here. Begin
with ``vector``, then ``elementary``.
"""
