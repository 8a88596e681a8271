"""Who answers the cases: fastxent in its ways, its peers, and the streaming floor.

A provider turns a case and its inputs into a `Call`. What ``Call.run`` does is timed; it returns what a user would hold in
the end, and its arrays are freed inside the timed region, as they are in a training loop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import fastxent as fx
from benchmarks.cases import ENTROPY_BONUS, GRAD, LOSS, OPTIONS, Z_LOSS, Array, Case, Inputs, numpy_dtype


class Call(NamedTuple):
    """One computation, ready to be run again and again."""

    run: Callable[[], Any]
    result: Callable[[Any], tuple[float, Array | None]]  # what run returned -> mean loss and gradient, to be checked
    prepare: Callable[[], object] = lambda: None  # before each run that is timed or checked; not timed


@dataclass(frozen=True)
class Provider:
    """Someone who answers cases."""

    name: str
    kind: str  # "ours", "peer" or "floor"
    make: Callable[[Case, Inputs, int], Call]  # the last is the number of threads
    missing: Callable[[int], str | None]  # why it cannot be used here, with so many threads
    floor: str = ""  # the provider that its memory traffic is held against; "": floor out=, or floor read for a loss
    modes: tuple[str, ...] = (LOSS, GRAD)
    options: tuple[str, ...] = tuple(OPTIONS)
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    any_layout: bool = True  # also more axes than (N, C)

    @property
    def slug(self) -> str:
        """The name as one word: for command lines and test names."""
        return self.name.lower().replace(" ", "-").replace(".", "-").replace("=", "")

    def answers(self, case: Case) -> bool:
        layout = self.any_layout or (len(case.extents) == 2 and case.axis == -1)
        return layout and case.mode in self.modes and case.option in self.options and case.dtype in self.dtypes


def _reason(needed: str) -> Callable[[int], str | None]:
    """Why a module cannot be imported; None if it can."""

    def missing(n_threads: int) -> str | None:
        try:
            import_module(needed)
        except Exception as error:  # whatever it is that keeps it from working is to be shown
            return f"import {needed}: {type(error).__name__}: {error}"
        return None

    return missing


def _as_is(result: tuple[Any, Array]) -> tuple[float, Array | None]:
    return float(result[0]), result[1]


def _loss_alone(result: Any) -> tuple[float, None]:
    return float(result), None


# ----------------------------------------------------------------------------------------------------
# NumPy
# ----------------------------------------------------------------------------------------------------


def _numpy_out(case: Case, inputs: Inputs, n_threads: int) -> Call:
    x, y, out, options = inputs.logits, inputs.target, inputs.out, inputs.options
    return Call(lambda: fx.cross_entropy_value_and_grad(x, y, out=out, **options), _as_is)


def _numpy_in_place(case: Case, inputs: Inputs, n_threads: int) -> Call:
    x, y, options = inputs.logits.copy(), inputs.target, inputs.options
    return Call(lambda: fx.cross_entropy_value_and_grad(x, y, out=x, **options), _as_is, lambda: np.copyto(x, inputs.logits))


def _numpy_loss(case: Case, inputs: Inputs, n_threads: int) -> Call:
    x, y, options = inputs.logits, inputs.target, inputs.options
    return Call(lambda: fx.cross_entropy(x, y, **options), _loss_alone)


def _sklearn(case: Case, inputs: Inputs, n_threads: int) -> Call:
    """Its kernel sums; the mean is taken when the result is checked, which flatters it."""
    from sklearn._loss.loss import HalfMultinomialLoss

    loss = HalfMultinomialLoss(n_classes=case.n_classes)
    x, n = inputs.logits, case.n_rows
    y, loss_out, out = inputs.target.astype(x.dtype), np.zeros(n, x.dtype), inputs.out
    if case.mode == LOSS:
        return Call(lambda: loss.loss(y, x, loss_out=loss_out, n_threads=n_threads), lambda rows: (float(rows.mean()), None))
    return Call(
        lambda: loss.loss_gradient(y, x, loss_out=loss_out, gradient_out=out, n_threads=n_threads),
        lambda result: (float(result[0].mean()), result[1] / n),
    )


def _scipy(case: Case, inputs: Inputs, n_threads: int) -> Call:
    from scipy.special import log_softmax

    x, y, rows = inputs.logits, inputs.target, np.arange(case.n_rows)

    def loss_alone() -> Any:
        return -log_softmax(x, axis=1)[rows, y].mean()

    def loss_and_gradient() -> tuple[Any, Array]:
        g = log_softmax(x, axis=1)
        loss = -g[rows, y].mean()
        np.exp(g, out=g)
        g[rows, y] -= 1
        g /= len(g)
        return loss, g

    return Call(loss_alone, _loss_alone) if case.mode == LOSS else Call(loss_and_gradient, _as_is)


def _jax(case: Case, inputs: Inputs, n_threads: int) -> Call:
    jax, jnp = import_module("jax"), import_module("jax.numpy")

    def mean_loss(x: Any, y: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], axis=1).mean()

    compiled = jax.jit(mean_loss if case.mode == LOSS else jax.value_and_grad(mean_loss))
    x, y = jnp.asarray(inputs.logits), jnp.asarray(inputs.target.astype(np.int32))
    as_arrays = _loss_alone if case.mode == LOSS else lambda result: (float(result[0]), np.asarray(result[1]))
    return Call(lambda: jax.block_until_ready(compiled(x, y)), as_arrays)


def _jax_missing(n_threads: int) -> str | None:
    if n_threads != fx.show_config()["cpu"]["cores available"]:
        return "its number of threads cannot be set in a running process"
    return _reason("jax")(n_threads)


# ----------------------------------------------------------------------------------------------------
# PyTorch
# ----------------------------------------------------------------------------------------------------


def _tensor(array: Array) -> Any:
    """A copy in PyTorch's own memory."""
    import torch

    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16)).clone().view(torch.bfloat16)
    return torch.from_numpy(array).clone()


def _array(tensor: Any) -> Array:
    """Its memory as NumPy sees it."""
    import torch

    if tensor.dtype == torch.bfloat16:
        view: Array = tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return view
    array: Array = tensor.numpy()
    return array


def _torch_call(case: Case, inputs: Inputs, cross_entropy: Callable[..., Any], in_place: bool = False) -> Call:
    """``cross_entropy(x, y)``, and its backward pass if the gradient is wanted."""
    import torch

    x, y = _tensor(inputs.logits), _tensor(inputs.target)
    if case.mode == LOSS:
        return Call(lambda: cross_entropy(x, y), _loss_alone)
    x.requires_grad_()
    logits = x.clone() if in_place else x  # what is overwritten must be computed, not a leaf

    def loss_and_gradient() -> tuple[Any, Any]:
        loss = cross_entropy(logits, y)
        return loss, torch.autograd.grad(loss, logits)[0]

    def restore() -> None:
        with torch.no_grad():
            logits.copy_(x)

    def as_arrays(result: tuple[Any, Any]) -> tuple[float, Array]:
        return float(result[0].detach()), _array(result[1])

    return Call(loss_and_gradient, as_arrays, restore) if in_place else Call(loss_and_gradient, as_arrays)


def _torch_options(inputs: Inputs) -> dict[str, Any]:
    weight = None if inputs.weight is None else _tensor(inputs.weight)
    return {"weight": weight, "label_smoothing": inputs.options["label_smoothing"]}


def _torch_ours(in_place: bool) -> Callable[[Case, Inputs, int], Call]:
    def make(case: Case, inputs: Inputs, n_threads: int) -> Call:
        from fastxent.torch import cross_entropy

        options = _torch_options(inputs)
        if case.option == "z-loss":
            options["z_loss"] = Z_LOSS
        if case.option == "policy":
            from fastxent.torch import log_prob_and_entropy  # here: older commits, which asv measures too, lack it

            return _torch_call(case, inputs, _policy_loss(log_prob_and_entropy))
        return _torch_call(case, inputs, lambda x, y: cross_entropy(x, y, inplace=in_place, **options), in_place)

    return make


def _policy_loss(log_prob_and_entropy: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
    def loss(x: Any, y: Any) -> Any:
        log_prob, entropy = log_prob_and_entropy(x, y)
        return -(log_prob + ENTROPY_BONUS * entropy).mean()

    return loss


def _log_prob_and_entropy(x: Any, y: Any) -> tuple[Any, Any]:
    """As reinforcement learning writes it by hand."""
    log_p = x.log_softmax(1)
    return log_p.gather(1, y.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(1)


def _stock(case: Case, inputs: Inputs) -> Callable[[Any, Any], Any]:
    """PyTorch's own function for the option."""
    import torch
    from torch.nn import functional as F

    options = _torch_options(inputs)
    if case.option == "z-loss":
        return lambda x, y: F.cross_entropy(x, y) + Z_LOSS * torch.logsumexp(x, 1).square().mean()
    if case.option == "policy":
        return _policy_loss(_log_prob_and_entropy)
    return lambda x, y: F.cross_entropy(x, y, **options)


def _eager(case: Case, inputs: Inputs, n_threads: int) -> Call:
    return _torch_call(case, inputs, _stock(case, inputs))


def _compiled(case: Case, inputs: Inputs, n_threads: int) -> Call:
    """Compiled in the first run, for this shape alone."""
    import torch

    torch._dynamo.reset()  # or the second shape would get code for any shape, and the ninth none
    return _torch_call(case, inputs, torch.compile(_stock(case, inputs), dynamic=False, fullgraph=True))


def _compiled_missing(n_threads: int) -> str | None:
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        return "no C++ compiler"
    return _reason("torch")(n_threads)


# ----------------------------------------------------------------------------------------------------
# The floor
# ----------------------------------------------------------------------------------------------------


def _nothing(result: Any) -> tuple[float, None]:
    """A floor computes no loss and is not checked here; tests/ look at what it moves."""
    return 0.0, None


def _floor(which: str) -> Callable[[Case, Inputs, int], Call]:
    def make(case: Case, inputs: Inputs, n_threads: int) -> Call:
        from benchmarks.floor import IN_PLACE, Floor

        floor = Floor(case, which, n_threads)
        return Call(floor.run, _nothing, floor.restore if which == IN_PLACE else lambda: None)

    return make


# ----------------------------------------------------------------------------------------------------
# All of them
# ----------------------------------------------------------------------------------------------------

BY_NUMPY = tuple(option for option in OPTIONS if option not in ("z-loss", "policy"))
IN_PLACE = tuple(option for option in OPTIONS if option != "policy")
FULL = ("float32", "float64")
_ours, _ours_torch, _torch = _reason("fastxent"), _reason("fastxent.torch"), _reason("torch")
_sklearn_there, _scipy_there = _reason("sklearn._loss.loss"), _reason("scipy.special")

PROVIDERS = (
    Provider("fastxent loss", "ours", _numpy_loss, _ours, modes=(LOSS,), options=BY_NUMPY),
    Provider("fastxent out=", "ours", _numpy_out, _ours, modes=(GRAD,), options=BY_NUMPY),
    Provider("fastxent in place", "ours", _numpy_in_place, _ours, "floor in place", modes=(GRAD,), options=BY_NUMPY),
    Provider("fastxent torch", "ours", _torch_ours(False), _ours_torch),
    Provider(
        "fastxent torch in place", "ours", _torch_ours(True), _ours_torch, "floor in place", modes=(GRAD,), options=IN_PLACE
    ),
    Provider("PyTorch eager", "peer", _eager, _torch),
    Provider("torch.compile", "peer", _compiled, _compiled_missing),
    Provider("scikit-learn", "peer", _sklearn, _sklearn_there, options=("plain",), dtypes=FULL, any_layout=False),
    Provider("SciPy", "peer", _scipy, _scipy_there, options=("plain",), dtypes=FULL, any_layout=False),
    Provider("JAX", "peer", _jax, _jax_missing, options=("plain",), dtypes=("float32",), any_layout=False),
    Provider("floor out=", "floor", _floor("out="), _ours, modes=(GRAD,)),
    Provider("floor in place", "floor", _floor("in place"), _ours, modes=(GRAD,)),
    Provider("floor read", "floor", _floor("read"), _ours, modes=(LOSS,)),
)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
