"""Fused softmax cross-entropy for the CPU. Nothing heavy is imported until a function is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "functional": (
        "CrossEntropyStats",
        "cross_entropy",
        "cross_entropy_grad_hess",
        "cross_entropy_stats",
        "cross_entropy_value_and_grad",
        "nll_loss",
    ),
    "special": ("entropy", "kl_div", "log_softmax", "logsumexp", "softmax"),
    "binary": ("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits_value_and_grad"),
    "_parallel": ("get_num_threads", "set_num_threads"),
    "_config": ("show_config", "warmup"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_MODULES = ("functional", "reference", "torch")

__all__ = [*sorted(_MODULE_OF), "functional", "reference"]

if TYPE_CHECKING:
    from fastxent import functional, reference
    from fastxent._config import show_config, warmup
    from fastxent._parallel import get_num_threads, set_num_threads
    from fastxent.binary import (
        binary_cross_entropy_with_logits,
        binary_cross_entropy_with_logits_value_and_grad,
    )
    from fastxent.functional import (
        CrossEntropyStats,
        cross_entropy,
        cross_entropy_grad_hess,
        cross_entropy_stats,
        cross_entropy_value_and_grad,
        nll_loss,
    )
    from fastxent.special import entropy, kl_div, log_softmax, logsumexp, softmax


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"fastxent.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"fastxent.{name}")
    raise AttributeError(f"module 'fastxent' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
