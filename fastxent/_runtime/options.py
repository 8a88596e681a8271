"""The options of the losses: a row each.

Another one needs a row here, a parameter of the functions that take it, and kernels that read its fields. The operators of
``torch.ops.fastxent`` and the checks of NumPy's functions follow from the row; tests hold every signature against it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastxent._runtime.threads import check_threads

REDUCTIONS = ("none", "mean", "sum")


def check_fraction(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} = {value} is outside [0, 1]")
    return float(value)


def check_positive(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} = {value} is not above 0 and finite")
    return float(value)


def check_integer(value: object, name: str) -> int:
    if isinstance(value, (bool, np.bool_, np.ma.MaskedArray)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        number = int(value.__index__())
    except TypeError:  # an array of several numbers, or of floats
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} = {number} does not fit 64 bits")
    return number


def check_n_threads(value: object, name: str) -> int | None:
    return None if value is None else check_threads(value, name)


def check_reduction(reduction: str, name: str = "reduction", allowed: tuple[str, ...] = REDUCTIONS) -> str:
    if reduction not in allowed:
        raise ValueError(f"{name} = {reduction!r} is not one of {', '.join(map(repr, allowed))}")
    return reduction


class Option(NamedTuple):
    name: str
    default: Any
    schema: str = ""  # its type as an argument of PyTorch's operators
    check: Any = None  # (value, name) -> value, of NumPy's functions; ``arguments`` checks arrays, and PyTorch what is its own
    fields: tuple[str, ...] = ()  # of the argument block, that it sets
    flag: str = ""  # of the variant, that it sets


OPTIONS = (
    Option("axis", -1, check=check_integer),  # the plan walks along it
    Option("weight", None, "Tensor?", fields=("w", "weighted")),
    Option("sample_weight", None, "Tensor?", fields=("u", "sampled")),
    Option("reduction", "mean", "int", check_reduction, ("loss", "store_loss", "average")),
    Option("ignore_index", -100, "int", check_integer, ("ignore",)),
    Option("label_smoothing", 0.0, "float", check_fraction, ("confidence", "uniform"), "smooth"),
    Option("z_loss", 0.0, "float", fields=("z",)),
    Option("temperature", 1.0, "float", check_positive, ("temperature", "factor"), "tempered"),
    Option("softcap", None, "float", fields=("cap",), flag="capped"),
    Option("n_threads", None, check=check_n_threads, fields=("team",)),
)
_CHECKS = {option.name: option.check for option in OPTIONS}
_SCHEMA = {option.name: option.schema for option in OPTIONS}


def checked(name: str, value: Any) -> Any:
    """The value of an option, or an error that names it."""
    return _CHECKS[name](value, name)


def schema(*names: str) -> str:
    """Options as arguments of an operator of PyTorch's."""
    return ", ".join(f"{_SCHEMA[name]} {name}" for name in names)


def fields_of(
    n_classes: int, ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float = 0.0
) -> dict[str, float]:
    """What options put into the argument block."""
    return {
        "ignore": ignore_index, "confidence": 1.0 - label_smoothing, "uniform": label_smoothing / n_classes,
        "z": z_loss, "cap": softcap,
    }  # fmt: skip


def flags_of(
    labelled: bool, ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float = 0.0
) -> dict[str, bool]:
    """What they say to the plan, of class indices or of probabilities."""
    return {"labelled": labelled, "smooth": labelled and label_smoothing > 0, "capped": softcap != 0}
