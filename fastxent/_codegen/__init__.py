"""From a kernel's name and variant to its machine code.

``registry`` holds what this process has; ``machine_code`` names a kernel's file after all that its code depends on, and
links it; ``disk_cache`` says in which folders such files may lie, and who may write there; ``compiler`` makes an object
file with Numba, and is imported for that only. ``uninterrupted`` keeps Ctrl-C from cutting an import or a compilation in
two, and ``patience`` tells the user that it takes long. ``_abi``, ``_simd`` and ``_kernels`` may be imported here. Begin
with ``registry``.
"""
