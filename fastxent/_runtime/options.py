"""The options of the losses, one row each.

A new option needs a row here, a line in ``fields_of`` or ``flags_of``, a parameter of the functions that take it, and kernels
that read its fields. The schema of ``torch.ops.fastxent`` and the checks of the NumPy functions follow from the row; tests
compare every signature, and what the two functions give, with it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastxent._runtime.threads import check_threads

REDUCTIONS = ("none", "mean", "sum")


def check_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:  # an int that float64 does not hold
        return math.inf if value > 0 else -math.inf


def check_fraction(value: float, name: str) -> float:
    number = check_number(value, name)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} = {value} is outside [0, 1]")
    return number


def check_positive(value: float, name: str) -> float:
    number = check_number(value, name)
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name} = {value} is not above 0 and finite")
    return number


def check_finite(value: float, name: str) -> float:
    number = check_number(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} = {value} is not finite")
    return number


def check_at_least_0(value: float, name: str) -> float:
    number = check_finite(value, name)
    if number < 0.0:
        raise ValueError(f"{name} = {value} is negative")
    return number


def check_softcap(value: float | None, name: str) -> float | None:
    return None if value is None else check_positive(value, name)


def check_integer(value: object, name: str) -> int:
    if isinstance(value, (bool, np.bool_, np.ma.MaskedArray)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        number = int(value.__index__())
    except TypeError:  # it is an array of several numbers, or of floats
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} = {number} does not fit 64 bits")
    return number


def check_n_threads(value: object, name: str) -> int | None:
    return None if value is None else check_threads(value, name)


def check_memory_limit(value: object, name: str) -> int | None:
    if value is None:
        return None
    number = check_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} = {number} is less than 1")
    return number


def check_reduction(reduction: str, name: str = "reduction", allowed: tuple[str, ...] = REDUCTIONS) -> str:
    if not isinstance(reduction, str) or reduction not in allowed:
        raise ValueError(f"{name} = {reduction!r} is not one of {', '.join(map(repr, allowed))}")
    return reduction


class Option(NamedTuple):
    name: str
    default: Any
    schema: str = ""  # its type in the schema of PyTorch's operators
    check: Any = None  # (value, name) -> value, for the NumPy functions; ``arguments`` checks arrays, PyTorch its own options
    fields: tuple[str, ...] = ()  # the fields of the argument block that it sets
    flag: str = ""  # the flag of the variant that it sets


OPTIONS = (
    Option("axis", -1, check=check_integer),  # the plan takes it, not the argument block
    Option("weight", None, "Tensor?", fields=("w", "weighted")),
    Option("sample_weight", None, "Tensor?", fields=("u", "sampled")),
    Option("reduction", "mean", "int", check_reduction, ("loss", "store_loss", "average")),
    Option("ignore_index", -100, "int", check_integer, ("ignore",)),
    Option("label_smoothing", 0.0, "float", check_fraction, ("confidence", "uniform"), "smooth"),
    Option("z_loss", 0.0, "float", check_finite, ("z",)),
    Option("temperature", 1.0, "float", check_positive, ("temperature", "factor"), "tempered"),
    Option("gamma", 2.0, "float", check_at_least_0, ("gamma",)),
    Option("softcap", None, "float", check_softcap, ("cap",), "capped"),
    Option("memory_limit", None, "int?", check_memory_limit),  # decides the blocks, see ``blocks``; no kernel reads it
    Option("n_threads", None, check=check_n_threads, fields=("team",)),
)
_CHECKS = {option.name: option.check for option in OPTIONS if option.check is not None}
_SCHEMA = {option.name: option.schema for option in OPTIONS}


def checked(name: str, value: Any) -> Any:
    """Return the checked value of an option, or raise an error that names it."""
    return _CHECKS[name](value, name)


def schema(*names: str) -> str:
    """Return options as arguments in the schema of a PyTorch operator."""
    return ", ".join(f"{_SCHEMA[name]} {name}" for name in names)


def fields_of(
    n_classes: int, ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float = 0.0
) -> dict[str, float]:
    """Return the fields of the argument block that the options set."""
    return {
        "ignore": ignore_index, "confidence": 1.0 - label_smoothing, "uniform": label_smoothing / n_classes,
        "z": z_loss, "cap": softcap,
    }  # fmt: skip


def flags_of(
    labelled: bool, ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float = 0.0
) -> dict[str, bool]:
    """Return the flags of the plan that the options set; ``labelled``: the target holds class indices."""
    return {"labelled": labelled, "smooth": labelled and label_smoothing > 0, "capped": softcap != 0}
