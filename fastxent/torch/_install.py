"""fastxent in PyTorch's place, for the whole process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastxent import __version__
from fastxent.torch import _decomposition
from fastxent.torch._bridge import MEAN
from fastxent.torch._dispatch import route
from fastxent.torch._fastpath import lookup

_CACHE_TAG = f" fastxent {__version__}"  # Inductor's cache on disk must tell our code for F.cross_entropy from PyTorch's


def install() -> None:
    """Route every cross-entropy on the CPU in this process through fastxent; `uninstall` undoes it.

    It takes the place of ``aten::cross_entropy_loss`` in PyTorch's dispatcher, for CPU tensors. So it reaches
    ``nn.CrossEntropyLoss``, functions imported by name, other libraries, and code compiled from now on; other devices are
    untouched. The formula is that of `cross_entropy`.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> fastxent.torch.install()
    >>> print(f"{torch.nn.functional.cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item():.4f}")
    1.3863
    >>> fastxent.torch.uninstall()
    """
    if _decomposition.library is None:
        _decomposition.library = torch.library.Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU"):
            _decomposition.library.impl("cross_entropy_loss", _in_place_of_aten, key)
        torch.compiler.config.cache_key_tag += _CACHE_TAG
        _forget_compiled_code()


def uninstall() -> None:
    """Give PyTorch its own cross-entropy back.

    Examples
    --------
    >>> import fastxent.torch
    >>> fastxent.torch.uninstall()
    """
    if _decomposition.library is not None:
        _decomposition.library._destroy()
        _decomposition.library = None
        torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(_CACHE_TAG, "")
        _forget_compiled_code()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a ``with`` block; what was installed before stays so.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import installed
    >>> with installed():
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(1, 4), torch.tensor([2]))
    >>> print(f"{loss.item():.4f}")
    1.3863
    """
    before = _decomposition.library is not None
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _in_place_of_aten(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    options = (reduction, ignore_index, label_smoothing, 0.0, 0.0)
    loss = lookup(input, target, weight, options, False)
    return route(input, target, weight, None, options, False) if loss is None else loss


def _forget_compiled_code() -> None:
    """What torch.compile made of the other cross-entropy is compiled again when it is called."""
    torch.ops.aten.cross_entropy_loss.default._dispatch_cache.clear()  # which kernel a tracer takes
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
