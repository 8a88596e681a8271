"""Does somebody look at the operators that are called? Then ours have to be called as operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included, _is_tracing, _len_torch_dispatch_stack
from torch.compiler import is_compiling

PRE_DISPATCH = DispatchKey.PreDispatch


def is_watched() -> bool:
    """By a compiler, a dispatch mode (as those of fake tensors, proxies and functionalisation) or ``torch.jit.trace``.

    Tensors that stand for others are another matter, and so are the transforms of ``torch.func``.
    """
    return is_compiling() or is_seen_by_a_mode()  # in that order: Dynamo must not look at the other


def is_seen_by_a_mode() -> bool:
    """Or ``torch.jit.trace``."""
    return (
        _len_torch_dispatch_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)  # modes there are on a stack of their own
        or _is_tracing()
    )


def is_traced() -> bool:
    """By ``torch.jit.trace``: what TorchScript keeps must run where we are not."""
    return not is_compiling() and _is_tracing()


def stands_for_another(t: Tensor) -> bool:
    """Has it no memory of its own?"""
    return (
        type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or t._is_zerotensor()
        or torch._is_functional_tensor(t)
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )
