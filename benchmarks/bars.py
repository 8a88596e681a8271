"""The bars that the times are held against: one list, evaluated on the results of ``benchmarks.compare --all``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks import linear
from benchmarks.cases import GRAD, HEADLINE, LARGE, LOSS, OPTIONS, SCALING, SHAPES, SMALL_VARIANTS, VARIANTS, Case
from benchmarks.measure import Group, Spread, beside_name, ratio, spread

OUT, IN_PLACE, TORCH, TORCH_IN_PLACE = "fastxent out=", "fastxent in place", "fastxent torch", "fastxent torch in place"
TORCH_PEERS = ("PyTorch eager", "torch.compile")
NUMPY_PEERS = (*TORCH_PEERS, "scikit-learn", "SciPy")
# Groups of benchmarks.whole
THREADS, STEP, START, MEMORY = "threads", "training step", "start", "memory"


class NotMeasuredError(LookupError):
    """The results do not hold what a bar needs; says why."""


class Results:
    """Lookup in the groups of a run."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = {group["key"]: group for group in groups}

    def entry(self, key: str, name: str) -> Mapping[str, Any]:
        if key not in self.groups:
            raise NotMeasuredError("not run")
        found: list[Mapping[str, Any]] = [e for e in self.groups[key]["entries"] if e["name"] == name]
        if not found:
            raise NotMeasuredError(f"{name}: {self.groups[key]['missing'].get(name, 'not run')}")
        return found[0]

    def samples(self, key: str, name: str) -> list[float]:
        samples: list[float] = self.entry(key, name)["samples"]
        return samples

    def ratio(self, key: str, a: str, b: str) -> Spread:
        return ratio(self.samples(key, a), self.samples(key, b))

    def fastest(self, key: str, names: Sequence[str]) -> str:
        """Of those that were measured."""
        if key not in self.groups:
            raise NotMeasuredError("not run")
        medians = {e["name"]: spread(e["samples"]).median for e in self.groups[key]["entries"] if e["name"] in names}
        if not medians:
            raise NotMeasuredError(f"none of {', '.join(names)}")
        return min(medians, key=lambda name: medians[name])


class Finding(NamedTuple):
    """What a bar looks at, and against whom it came out so."""

    spread: Spread
    against: str = ""
    absent: tuple[str, ...] = ()  # peers that may be faster but were not measured: the bar may be missed, not reached


class Bar(NamedTuple):
    """A number that must be reached, and one to aim at; either may be None."""

    row: str  # of the list of bars
    what: str
    find: Callable[[Results], Finding]
    must: float | None
    aim: float | None
    at_least: bool = True  # else at most
    unit: str = "x"

    def reached(self, finding: Finding, bound: float | None) -> bool | None:
        if bound is None:
            return None
        value = finding.spread.median
        is_reached = value >= bound if self.at_least else value <= bound
        return None if is_reached and finding.absent else is_reached


class Verdict(NamedTuple):
    bar: Bar
    finding: Finding | None
    must: bool | None  # None: there is no such bound, or it is open
    aim: bool | None
    reason: str  # why there is no finding


def judge(groups: Sequence[Group]) -> list[Verdict]:
    """Every bar, in order."""
    results = Results(groups)
    verdicts = []
    for bar in BARS:
        try:
            finding = bar.find(results)
        except NotMeasuredError as error:
            verdicts.append(Verdict(bar, None, None, None, str(error)))
            continue
        verdicts.append(Verdict(bar, finding, bar.reached(finding, bar.must), bar.reached(finding, bar.aim), ""))
    return verdicts


# ----------------------------------------------------------------------------------------------------
# What is looked at
# ----------------------------------------------------------------------------------------------------


def speedup(key: str, ours: str, peers: Sequence[str]) -> Callable[[Results], Finding]:
    """Time of the fastest of the peers by ours."""

    def find(results: Results) -> Finding:
        best = results.fastest(key, peers)
        absent = tuple(peer for peer in peers if peer in results.groups[key]["missing"])
        return Finding(results.ratio(key, best, ours), best, absent)

    return find


def relative(key: str, ours: str, other: str) -> Callable[[Results], Finding]:
    """Time of ours by that of another."""
    return lambda results: Finding(results.ratio(key, ours, other), other)


def per_byte(key: str, ours: str, other: str) -> Callable[[Results], Finding]:
    """The same, each time by the bytes that it moved."""

    def find(results: Results) -> Finding:
        bytes_ratio = results.entry(key, ours)["bytes"] / results.entry(key, other)["bytes"]
        return Finding(Spread(*(r / bytes_ratio for r in results.ratio(key, ours, other))), f"{other}, a byte")

    return find


def value(key: str, name: str, factor: float = 1.0) -> Callable[[Results], Finding]:
    """The thing itself."""
    return lambda results: Finding(Spread(*(factor * v for v in spread(results.samples(key, name)))))


def share_falls(ours: str) -> Callable[[Results], Finding]:
    """The loss's share of a training step in PyTorch, by its share with ours; what is not loss is a step without one.

    Less than 1 % counts as 1 %: differences of steps are not finer than that.
    """

    def find(results: Results) -> Finding:
        stock = results.ratio(STEP, "step without loss", "step with PyTorch eager")
        fast = results.ratio(STEP, "step without loss", ours)
        share = [(1 - a) / max(0.01, 1 - b) for a, b in ((stock[0], fast[0]), (stock[2], fast[1]), (stock[1], fast[2]))]
        return Finding(Spread(*share), f"from {1 - stock.median:.1%} to {1 - fast.median:.1%}")

    return find


# ----------------------------------------------------------------------------------------------------
# The bars
# ----------------------------------------------------------------------------------------------------


def _bars() -> Iterator[Bar]:
    for case in LARGE:
        row = "large, against the floor"
        loss = replace(case, mode=LOSS).key
        yield Bar(row, f"NumPy out=, {case.shape}", relative(case.key, OUT, "floor out="), 1.35, 1.1, False)
        yield Bar(row, f"NumPy in place, {case.shape}", relative(case.key, IN_PLACE, "floor in place"), 1.3, 1.1, False)
        yield Bar(row, f"NumPy loss only, {case.shape}", relative(loss, "fastxent loss", "floor read"), 1.25, 1.1, False)
    for case in LARGE:
        row = "large, against the best peer"
        yield Bar(row, f"torch, {case.shape}", speedup(case.key, TORCH, TORCH_PEERS), 6, 9)
        yield Bar(row, f"torch in place, {case.shape}", speedup(case.key, TORCH_IN_PLACE, TORCH_PEERS), 9, 12)
    for row, must, aim, extents in (
        ("ten classes", 4, 8, ((65536, 10), (1_000_000, 10))),
        ("middle sizes", 3, 5, ((8192, 100), (1024, 1000))),
        ("few long rows", 3, 5, ((16, 262144), (1, 128256))),
    ):
        for case in (c for c in SHAPES if c.extents in extents):
            yield from _both(row, case, must, aim)
    for case in (c for c in SHAPES if c.extents in ((32, 10), (1, 10))):
        yield Bar("small", f"torch, {case.shape}", speedup(case.key, TORCH, ("PyTorch eager",)), 1, 1.5)
        if case.n_rows == 32:
            yield Bar("small", f"NumPy, {case.shape}", speedup(case.key, OUT, ("scikit-learn",)), 2, None)
            yield Bar("small", f"NumPy, {case.shape}, microseconds", value(case.key, OUT, 1e6), None, 4, False, "us")
    for case in SMALL_VARIANTS:
        what = case.dtype if case.option == "plain" else case.option
        yield Bar("small", f"torch, {case.shape}, {what}", speedup(case.key, TORCH, ("PyTorch eager",)), 1, None)
    for case in VARIANTS:
        yield from _variant(case)
    yield from _linear()
    segmentation = next(c for c in SHAPES if len(c.extents) == 4)
    yield from _both("segmentation, channels first", segmentation, 4, None)
    to_floor = relative(segmentation.key, OUT, "floor out=")
    yield Bar("segmentation, channels first", "NumPy out=, against the floor", to_floor, None, 1.1, False)
    yield Bar("threads", f"1 thread to 4, {SCALING.shape}", speedup(THREADS, "4 threads", ("1 thread",)), 3.2, 3.8)
    yield Bar("training step", "the loss's share", share_falls("step with fastxent torch"), 4, None)
    yield Bar("training step", "the loss's share, in place", share_falls("step with fastxent torch in place"), 4, None)
    yield Bar("start", "import fastxent, ms", value(START, "import fastxent", 1e3), 100, None, False, "ms")
    yield Bar("start", "first call after it, s", value(START, "first call"), 0.7, 0.3, False, "s")
    yield Bar("memory", "torch, extra bytes by those of the logits", value(MEMORY, TORCH), 1.02, None, False)
    yield Bar("memory", "torch in place, the same", value(MEMORY, TORCH_IN_PLACE), 0.02, None, False)


def _linear() -> Iterator[Bar]:
    """Against the products alone, and against what a user of PyTorch would use instead."""
    row, both, loss = "linear layer", linear.key_of(linear.SHAPE, "float32", GRAD), linear.key_of(linear.SHAPE, "float32", LOSS)
    for ours, floor in ((linear.NUMPY, linear.NUMPY_FLOOR), (linear.TORCH, linear.TORCH_FLOOR)):
        limited = ours + linear.LIMITED
        yield Bar(row, f"{ours}, against the three products", relative(both, ours, floor), 1.06, 1.03, False)
        yield Bar(row, f"{limited}, the same", relative(both, limited, floor), 1.15, 1.08, False)
        yield Bar(row, f"{ours}, loss only, against one product", relative(loss, ours, floor), 1.08, 1.04, False)
    yield Bar(row, "torch, within bounded memory", speedup(both, linear.TORCH, (linear.CHUNKED,)), 1.8, 3)
    yield Bar(row, "torch, against any peer", speedup(both, linear.TORCH, linear.PEERS), 0.98, 1.05)


def _both(row: str, case: Case, must: float, aim: float | None) -> Iterator[Bar]:
    """NumPy and PyTorch users, each against what they would use instead."""
    yield Bar(row, f"NumPy out=, {case.shape}", speedup(case.key, OUT, NUMPY_PEERS), must, aim)
    yield Bar(row, f"torch, {case.shape}", speedup(case.key, TORCH, TORCH_PEERS), must, aim)


def _variant(case: Case) -> Iterator[Bar]:
    if case.option == "policy":
        yield Bar("policy", f"torch, {case.shape}, {case.dtype}", speedup(case.key, TORCH, TORCH_PEERS), 4, None)
        return
    half = case.dtype != HEADLINE.dtype
    row = case.dtype if half else case.option
    ours = TORCH if case.option == "z-loss" else OUT
    plain = beside_name(ours, HEADLINE)
    if ours == OUT:
        yield from _both(row, case, 6 if half else 4, None)
    else:
        yield Bar(row, f"torch, {case.shape}", speedup(case.key, TORCH, TORCH_PEERS), 4, None)
    if half:
        yield Bar(row, "NumPy out=, time by float32's", relative(case.key, ours, plain), 1, 0.5, False)
    else:
        yield Bar(row, "time a byte by the plain case's", per_byte(case.key, ours, plain), None, 1.1, False)
    if case.option == "ignored":
        yield Bar(row, "time by the plain case's", relative(case.key, ours, plain), 1, None, False)


def beside(case: Case) -> list[tuple[str, Case]]:
    """Whom the bars compare a case with, other than the answers to the case itself."""
    if case.mode != GRAD or case not in VARIANTS or case.option == "policy":
        return []
    return [(TORCH if case.option == "z-loss" else OUT, HEADLINE)]


assert set(OPTIONS) - {"plain"} == {case.option for case in VARIANTS} - {"plain"}
BARS = tuple(_bars())
