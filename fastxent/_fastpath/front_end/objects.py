"""All that is assumed of the objects of CPython, NumPy and PyTorch. Nothing else in the package knows how they lie in memory.

Tried with CPython 3.11 (with a GIL, 64 bits), NumPy 2.4 and PyTorch 2.13. Elsewhere it is looked up: before anything relies on
it, `arrays_are_as_expected` and `c_interface` look at a real array and a real tensor. Where these are not as expected there are
no builtins: calls that come again are then run by Python, with the same results.

A tensor's memory is asked for by PyTorch's C interface (``torch/csrc/inductor/aoti_torch/c/shim.h``, "LibTorch Stable ABI"),
which is kept stable and takes a thirtieth of what Python takes. Its handle of a tensor is the address of the word that
`Tensor._cdata` shows, which is in the tensor's Python object; where, is looked up in a real one.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from functools import lru_cache

import numpy as np

# CPython: the word of an object in which its type is; a builtin that takes an array of arguments and their number.
TYPE = 1
METH_FASTCALL = 0x80
# NumPy: the words of an array; bits of its flags.
DATA, NDIM, DIMS, DTYPE, FLAGS = 2, 3, 4, 7, 8
CONTIGUOUS_AND_ALIGNED, WRITEABLE = 0x101, 0x400
LOW_HALF = 0xFFFFFFFF  # of a word: a C int, as NDIM and FLAGS are
# PyTorch: functions that tell about a tensor.
_FUNCTIONS = tuple(
    f"aoti_torch_get_{what}" for what in ("data_ptr", "storage_size", "storage_offset", "dim", "sizes", "strides")
)


class MethodDef(ctypes.Structure):
    """What CPython is told of a builtin."""

    _fields_ = (("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


def arrays_are_as_expected() -> bool:
    """Are Python's and NumPy's objects as this file has them?"""
    has_gil = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
    if not has_gil or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    a = np.arange(6.0).reshape(2, 3)
    words = (ctypes.c_int64 * (FLAGS + 1)).from_address(id(a))
    found = words[TYPE], words[DATA], words[DTYPE], words[NDIM] & LOW_HALF, words[FLAGS] & LOW_HALF
    strides_behind_dims = words[DIMS + 1] == words[DIMS] + 8 * a.ndim  # before these are read
    if found != (id(np.ndarray), a.ctypes.data, id(a.dtype), a.ndim, a.flags.num) or not strides_behind_dims:
        return False
    return (ctypes.c_int64 * 2).from_address(words[DIMS])[:] == list(a.shape)


@lru_cache
def c_interface() -> tuple[int, ...] | None:
    """Bytes from a tensor's object to its handle, addresses of the functions that tell its address, its memory's size in bytes,
    its offset there in elements, number of axes, and where extents and strides are; None: PyTorch has to be asked by Python."""
    import torch

    try:
        library = ctypes.CDLL(torch._C.__file__)
        functions = [getattr(library, name) for name in _FUNCTIONS]
    except (OSError, AttributeError):  # Windows looks for no function of libraries that a library needs
        return None
    t = torch.zeros(3, 2, device="cpu")[1:]
    n_words = torch.Tensor.__basicsize__ // 8
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
