"""Checks the arguments of a call, plans the call, and runs it.

``arguments`` checks what a caller passes, or raises an error that names the argument. ``options`` is the table of options:
their defaults, their checks, and the fields of the argument block that they set. ``plan`` decides how a kernel walks over the
rows, ``blocks`` how many rows of logits a linear layer holds at a time. ``run`` packs the argument block and runs the kernel on
the OpenMP pool, on a thread pool, or serially. ``linear_layer`` runs one on each block of a layer's logits, ``linear_loss``
on each tile, with the products of ``linear_products``, for which ``blas`` finds functions of NumPy's BLAS; ``bfloat16`` decides
how PyTorch multiplies. ``threads`` counts the threads and finds the OpenMP runtime. ``buffers`` recycles the memory of
gradients. ``config`` reports what is installed and set, and compiles kernels ahead. ``fastpath`` decides whether repeated calls
take the optional fast path. Modules here may import all rooms but ``_fastpath``, and no public module. Begin with ``plan``.
"""
