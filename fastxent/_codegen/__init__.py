"""Turns a kernel's name and variant into machine code.

``registry`` holds the compiled kernels of this process. ``machine_code`` loads a kernel from the disk cache, or the one that
came with the package, or has it compiled, and links it. ``cache_key`` names a kernel's file after everything that its code
depends on. ``disk_cache`` decides which folders may hold such files, who may write there, and when files are removed.
``prebuilt`` reads the kernels of a wheel, ``levels`` says for which processors there are such, and ``cross`` compiles for
these. ``compiler`` makes an object file with Numba, and is imported only for that; ``side_by_side`` lets several processes
compile. ``uninterrupted`` keeps Ctrl-C from interrupting an import or a compilation, and ``patience`` tells the user when
compiling takes long. Modules here may import ``_abi``, ``_simd`` and ``_kernels``. Begin with ``registry``.
"""
