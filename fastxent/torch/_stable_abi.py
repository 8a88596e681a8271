"""Where a tensor's memory is, by PyTorch's C interface, which machine code can ask: a thirtieth of what Python takes.

That interface (``torch/csrc/inductor/aoti_torch/c/shim.h``, "LibTorch Stable ABI") is kept stable. Its handle of a tensor is
the address of the word that `Tensor._cdata` shows, which is in the tensor's Python object; where, is looked up in a real one.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

_FUNCTIONS = tuple(
    f"aoti_torch_get_{what}" for what in ("data_ptr", "storage_size", "storage_offset", "dim", "sizes", "strides")
)


@lru_cache
def c_interface() -> tuple[int, ...] | None:
    """Bytes from a tensor's object to its handle, addresses of the functions that tell its address, its memory's size in bytes,
    its offset there in elements, number of axes, and where extents and strides are; None: PyTorch has to be asked by Python."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        functions = [getattr(library, name) for name in _FUNCTIONS]
    except (OSError, AttributeError):  # Windows looks for no function of libraries that a library needs
        return None
    t = torch.zeros(3, 2, device="cpu")[1:]
    n_words = Tensor.__basicsize__ // 8
    words = (ctypes.c_int64 * n_words).from_address(id(t))[:]
    if words.count(t._cdata) != 1:
        return None
    handle = 8 * words.index(t._cdata)
    found = ctypes.c_int64()
    told = [found.value for f in functions if f(ctypes.c_void_p(id(t) + handle), ctypes.byref(found)) == 0]
    *plain, sizes, strides = told if len(told) == len(_FUNCTIONS) else (0, 0)
    if plain != [t.data_ptr(), t.untyped_storage().nbytes(), t.storage_offset(), t.dim()]:
        return None
    if [tuple((ctypes.c_int64 * 2).from_address(at)) for at in (sizes, strides)] != [t.shape, t.stride()]:
        return None
    return handle, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)
