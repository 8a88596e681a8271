"""Tells whether a compiler, a tracer or a dispatch mode observes operators; if so, ours must be called as operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included, _is_tracing, _len_torch_dispatch_stack
from torch.compiler import is_compiling

PRE_DISPATCH = DispatchKey.PreDispatch


def is_watched() -> bool:
    """Return whether a compiler, a dispatch mode or ``torch.jit.trace`` observes operators.

    Dispatch modes include those of fake tensors, proxies and functionalisation. Wrapper tensors (see `stands_for_another`) and
    the transforms of ``torch.func`` do not count.
    """
    return is_compiling() or is_seen_by_a_mode()  # in that order: Dynamo must not trace the second


def is_seen_by_a_mode() -> bool:
    """Return whether a dispatch mode or ``torch.jit.trace`` observes operators."""
    return (
        _len_torch_dispatch_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)  # its modes have a stack of their own
        or _is_tracing()
    )


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` observes operators: what TorchScript saves must run without fastxent."""
    return not is_compiling() and _is_tracing()


def stands_for_another(t: Tensor) -> bool:
    """Return whether a tensor is a wrapper, or a zero tensor, without memory of its own."""
    return (
        type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or t._is_zerotensor()
        or torch._is_functional_tensor(t)
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )
