"""The sums over a block of rows, in float64, and what is computed from the sums over all blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastxent._cli.files import Array, InputError

BINS = 15  # bins of the calibration error


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Means are over the kept rows, those that are not ignored."""

    loss: float  # the mean, as of torch.nn.functional.cross_entropy
    perplexity: float  # exp(loss)
    top1_accuracy: float
    top5_accuracy: float
    entropy: float  # mean entropy of softmax(logits), nats
    calibration_error: float  # see Totals.calibration_error
    rows: int
    kept_rows: int
    nonfinite_rows: int  # kept rows whose loss is inf or nan
    classes: int
    dtype: str
    n_bytes: int  # of logits and targets
    seconds: float
    gb_per_s: float


@dataclass
class Totals:
    """Sums over rows, in float64."""

    loss: float = 0.0
    divisor: float = 0.0
    entropy: float = 0.0
    kept: int = 0
    nonfinite: int = 0
    top1: int = 0
    top5: int = 0
    surplus: Array = field(default_factory=lambda: np.zeros(BINS))  # (BINS,): sum of confidence - hit over the rows of a bin

    def __add__(self, other: Totals) -> Totals:
        mine, others = vars(self), vars(other)
        return Totals(**{name: mine[name] + others[name] for name in mine})

    @classmethod
    @np.errstate(all="ignore")  # inf - inf and the like are valid results here
    def of_block(cls, x: Array, t: Array, options: dict[str, Any]) -> Totals:
        """Return the sums over a block of logits `x` with targets `t`; the options are those of `cross_entropy_stats`."""
        from fastxent import cross_entropy_stats  # imported here, so that earlier faults are reported before Numba is loaded

        try:
            stats = cross_entropy_stats(x, t, **options)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise InputError(str(error)) from error
        axis, weight = options["axis"], options["weight"]
        keep = np.asarray(stats.target_rank) >= 0
        loss, lse, entropy, rank = (np.asarray(a)[keep] for a in (stats.loss, stats.lse, stats.entropy, stats.target_rank))
        chosen = np.take_along_axis(x, np.expand_dims(np.asarray(stats.prediction), axis), axis)
        confidence = np.exp(chosen.squeeze(axis)[keep].astype(np.float64) - lse)
        known = np.isfinite(lse)  # no logit is greater than nan, so the rank would be 0: such a row is no hit
        hit = known & (rank == 0)
        by_weight = weight is not None and t.ndim < x.ndim  # a mean of losses for class probabilities counts the rows
        # Bin m is (m / BINS, (m + 1) / BINS]; a confidence of nan falls in bin 0 and makes the result nan.
        which = np.clip(np.ceil(np.nan_to_num(confidence) * BINS).astype(np.intp) - 1, 0, BINS - 1)
        return cls(
            loss=loss.sum(dtype=np.float64),
            divisor=weight[t[keep]].sum(dtype=np.float64) if by_weight else len(loss),
            entropy=entropy.sum(dtype=np.float64),
            kept=len(loss),
            nonfinite=int(np.count_nonzero(~np.isfinite(loss))),
            top1=int(np.count_nonzero(hit)),
            top5=int(np.count_nonzero(known & (rank < 5))),
            surplus=np.bincount(which, weights=np.minimum(confidence, 1.0) - hit, minlength=BINS),
        )

    def calibration_error(self) -> float:
        """Return the expected calibration error: the mean of |accuracy - confidence| over the bins, weighted by their rows.

        Confidence is the probability of the prediction, in 15 bins of equal width. Guo, Pleiss, Sun and
        Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation 3.
        """
        return float(np.abs(self.surplus).sum() / self.kept) if self.kept else math.nan

    @np.errstate(all="ignore")
    def result(self, **facts: Any) -> Evaluation:
        """Return the means; without kept rows they are nan, as in PyTorch."""
        loss = np.float64(self.loss) / self.divisor
        top1, top5, entropy = np.array([self.top1, self.top5, self.entropy]) / self.kept
        return Evaluation(
            loss=float(loss),
            perplexity=float(np.exp(loss)),
            top1_accuracy=float(top1),
            top5_accuracy=float(top5),
            entropy=float(entropy),
            calibration_error=self.calibration_error(),
            kept_rows=self.kept,
            nonfinite_rows=self.nonfinite,
            **facts,
        )
