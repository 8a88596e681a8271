"""From a kernel's name and variant to its machine code.

``registry`` holds what this process has; ``machine_code`` gets it from the disk or from the compiler, and links it;
``cache_key`` names a kernel's file after all that its code depends on; ``disk_cache`` says in which folders such files may
lie, who may write there, and when they are removed; ``compiler`` makes an object file with Numba, and is imported for that
only. ``uninterrupted`` keeps Ctrl-C from cutting an import or a compilation in two, and ``patience`` tells the user that it
takes long. ``_abi``, ``_simd`` and ``_kernels`` may be imported here. Begin
with ``registry``.
"""
