"""Machine code from the arguments of a Python call to its result.

Python takes microseconds to see that arrays look like those of an earlier call, and to hand their addresses on; the work on 32
rows of 10 takes one, that on a row of 128,256 a dozen. So here are two functions that CPython calls as builtins of its own
(``METH_FASTCALL``): ``arrays.run_arrays`` and ``tensors.run_tensors``. Python has looked up which call is meant; they confirm
that the operands are like those of that call, but for their extents, make its argument block ready for these (``strategy``),
and run it (``launch``). All addresses are numbers here, and memory is counted in words of 8 bytes (``memory``): ``words`` says
what is where in what is ours, and ``objects`` in what is CPython's, NumPy's and PyTorch's. Begin with ``words``.
"""
