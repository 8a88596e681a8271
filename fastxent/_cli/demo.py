"""Softmax regression on handwritten digits, real data that ships with scikit-learn, trained with fastxent.

With logits z_n = W x_n + b, the objective is scikit-learn's ``LogisticRegression(C=C)`` divided by C N,

    f(W, b)   = 1/N sum_n cross_entropy(z_n, y_n) + 1/(2 N C) ||W||^2          b is not penalised
    df/dW     = dz^T X + W / (N C)        df/db = sum_n dz_n                   dz = df/dz, (N, classes)

so both must find the same W. They find b only up to a constant: adding one to all the logits of a row changes no
probability, and no penalty on b selects one of the solutions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from fastxent import cross_entropy_value_and_grad
from fastxent._cli.evaluate import Evaluation, evaluate

C = 1.0  # inverse strength of the penalty

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One iteration of L-BFGS."""

    iteration: int
    loss: float  # the objective
    train_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class Check:
    """A difference from scikit-learn and the most that it may be."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit  # False for nan


@dataclass(frozen=True)
class Result:
    """The results of the demo."""

    steps: list[Step]
    loss: float
    sklearn_loss: float
    checks: list[Check]
    evaluation: Evaluation


@threadpool_limits.wrap(limits=1, user_api="blas")  # for so small a product, threaded BLAS takes 10 x as long on a busy machine
def run(folder: Path, on_step: Callable[[Step], None] = lambda step: None) -> Result:
    """Train, compare with scikit-learn, write ``logits.npy`` and ``targets.npy`` to `folder`, evaluate them.

    Parameters
    ----------
    folder : Path
        An existing folder for the two files.
    on_step : callable, optional
        Called after each iteration.

    Returns
    -------
    Result
    """
    pixels, digits = load_digits(return_X_y=True)  # (1797, 64), 0 to 16; (1797,)
    x, x_test, y, y_test = train_test_split(pixels / 16, digits, test_size=0.25, stratify=digits, random_state=0)
    (n, n_pixels), n_classes = x.shape, 10
    dz = np.empty((n, n_classes))

    def unpack(params: Array) -> tuple[Array, Array]:
        return params[:-n_classes].reshape(n_classes, n_pixels), params[-n_classes:]

    def objective(params: Array) -> tuple[float, Array]:
        w, b = unpack(params)
        loss, _ = cross_entropy_value_and_grad(x @ w.T + b, y, out=dz)
        gradient = np.concatenate([(dz.T @ x + w / (n * C)).ravel(), dz.sum(axis=0)])
        return float(loss + (w * w).sum() / (2 * n * C)), gradient

    steps: list[Step] = []

    def after_iteration(params: Array) -> None:
        w, b = unpack(params)
        accuracy, accuracy_test = (
            float(np.mean((a @ w.T + b).argmax(axis=1) == labels)) for a, labels in ((x, y), (x_test, y_test))
        )
        steps.append(Step(len(steps) + 1, objective(params)[0], accuracy, accuracy_test))
        on_step(steps[-1])

    found = minimize(
        objective,
        np.zeros(n_classes * n_pixels + n_classes),
        jac=True,
        method="L-BFGS-B",
        callback=after_iteration,
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-8},
    )
    w, b = unpack(found.x)

    model = LogisticRegression(C=C, tol=1e-10, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its line search stops short of so small a tolerance, as expected
        model.fit(x, y)
    sklearn_loss = log_loss(y, model.predict_proba(x)) + (model.coef_**2).sum() / (2 * n * C)

    z_test = x_test @ w.T + b
    np.save(folder / "logits.npy", z_test)
    np.save(folder / "targets.npy", y_test)
    evaluation = evaluate(str(folder / "logits.npy"), str(folder / "targets.npy"))
    sklearn_test_loss = log_loss(y_test, softmax(z_test, axis=1))

    def centred(a: Array) -> Array:
        return a - a.mean()

    checks = [
        Check("coefficients", float(np.abs(w - model.coef_).max()), 1e-3),
        Check("intercepts, centred", float(np.abs(centred(b) - centred(model.intercept_)).max()), 1e-3),
        Check("training loss", float(abs(found.fun - sklearn_loss)), 1e-8),
        Check("test loss, from the files", float(abs(evaluation.loss - sklearn_test_loss)), 1e-8),
    ]
    return Result(steps, float(found.fun), float(sklearn_loss), checks, evaluation)
