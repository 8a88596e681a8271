"""A call's arguments, its plan, and its run.

``arguments`` checks what a caller gives, or raises an error that names it; ``options`` is the table of options: their
defaults, checks, and what they put into the argument block; ``plan`` decides how a kernel walks over the
call; ``run`` packs the argument block and runs the kernel on the OpenMP pool, on threads, or alone; ``threads`` counts and
finds these; ``buffers`` recycles the memory of gradients; ``config`` says what is installed and set, and warms up. All
but ``_fastpath`` and the public modules may be imported here. Begin with ``plan``.
"""
