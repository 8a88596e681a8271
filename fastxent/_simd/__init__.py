"""The vector type of the kernels: 16 lanes, whatever the width of the processor's registers.

``vector`` defines it as a Numba type over LLVM's <16 x float>, ``lanes`` works across its lanes, ``memory`` loads and stores
it, ``transpose`` turns 16 rows into 16 columns, ``half`` widens and rounds float16 and bfloat16, ``elementary`` has exp and
tanh and ``logarithm`` log, with their derivations. ``host`` says what the processor can do. ``numba_backend``, ``typed``,
``emitted`` and ``parts`` compile a function and all its callees to LLVM IR: no other file depends on how Numba works inside.
Only ``_abi`` may be imported here. Begin with ``vector``, then ``elementary``.
"""
