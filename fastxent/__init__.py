"""Fused softmax cross-entropy for the CPU. Nothing heavy is imported until a function is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyStats",
    "LinearGradients",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_value_and_grad",
    "cross_entropy",
    "cross_entropy_grad_hess",
    "cross_entropy_stats",
    "cross_entropy_value_and_grad",
    "entropy",
    "focal_loss",
    "focal_loss_value_and_grad",
    "functional",
    "get_num_threads",
    "kl_div",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_cross_entropy_value_and_grad",
    "linear_log_prob_and_entropy",
    "log_prob_and_entropy",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "reference",
    "release_buffers",
    "set_buffer_limit",
    "set_num_threads",
    "show_config",
    "softmax",
    "warmup",
]

if TYPE_CHECKING:
    from fastxent import functional, reference
    from fastxent._runtime.buffers import release_buffers, set_buffer_limit
    from fastxent._runtime.config import show_config, warmup
    from fastxent._runtime.threads import get_num_threads, set_num_threads
    from fastxent.binary import (
        binary_cross_entropy_with_logits,
        binary_cross_entropy_with_logits_value_and_grad,
    )
    from fastxent.focal import focal_loss, focal_loss_value_and_grad
    from fastxent.functional import (
        CrossEntropyStats,
        cross_entropy,
        cross_entropy_grad_hess,
        cross_entropy_stats,
        cross_entropy_value_and_grad,
        nll_loss,
    )
    from fastxent.linear import (
        LinearGradients,
        linear_cross_entropy,
        linear_cross_entropy_stats,
        linear_cross_entropy_value_and_grad,
        linear_log_prob_and_entropy,
    )
    from fastxent.policy import log_prob_and_entropy
    from fastxent.special import entropy, kl_div, log_softmax, logsumexp, softmax


_HOME = {
    "_runtime.config": ("show_config", "warmup"),
    "_runtime.buffers": ("release_buffers", "set_buffer_limit"),
    "_runtime.threads": ("get_num_threads", "set_num_threads"),
    "binary": ("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits_value_and_grad"),
    "linear": (
        "LinearGradients",
        "linear_cross_entropy",
        "linear_cross_entropy_stats",
        "linear_cross_entropy_value_and_grad",
        "linear_log_prob_and_entropy",
    ),
    "focal": ("focal_loss", "focal_loss_value_and_grad"),
    "policy": ("log_prob_and_entropy",),
    "special": ("entropy", "kl_div", "log_softmax", "logsumexp", "softmax"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public module or function when its name is first used (PEP 562)."""
    modules = (
        "binary", "dask", "distributed", "focal", "functional", "linear", "objectives", "policy", "reference", "special",
        "torch",
    )  # fmt: skip
    if name not in (*__all__, *modules):
        raise AttributeError(f"module 'fastxent' has no attribute {name!r}")
    import_module("fastxent._codegen.uninterrupted").imported("numpy")  # if half imported, it could not be imported again
    if name in modules:
        return import_module(f"fastxent.{name}")
    value = getattr(import_module(f"fastxent.{_MODULE_OF.get(name, 'functional')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
