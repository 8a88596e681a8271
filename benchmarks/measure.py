"""Interleaved timing: every provider of a group once a round, in an order that rotates and turns round, for many rounds.

So a machine that slows down for a while slows all of them, and the ratio of two within a round hardly notices. Before each
sample, untimed: a pause, in which the worker threads of other libraries stop spinning; the call's ``prepare`` (inputs that
were overwritten are restored); and for a short call as many runs as the sample will have: they wake its threads, and bring back
to the caches what the calls of others have pushed out. A short call is repeated within a sample; a call in place then works on
the gradient of the gradient, which takes the same time.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import fastxent as fx
from benchmarks.cases import LOSS, Case, Inputs, WrongResult, check
from benchmarks.providers import BY_NAME, PROVIDERS, Call, Provider

PAUSE = 0.01  # seconds; libgomp's threads spin for some 3 ms after a loop, sklearn's on the cores that PyTorch's need
SHORT = 0.02  # seconds; a shorter call is run before it is timed
SAMPLE = 0.002  # seconds that a sample should last

Group = dict[str, Any]  # what is written as JSON: see `run_group`


class Progress(Protocol):
    """Told what is done now, and which share of the rounds is over."""

    def __call__(self, text: str, share: float = 0.0) -> object: ...


class Effort(NamedTuple):
    """Rounds for a group: as many as fit the budget, within limits."""

    least: int
    most: int
    seconds: float


QUICK, NORMAL, THOROUGH = Effort(3, 5, 0.5), Effort(5, 40, 2.5), Effort(7, 80, 12.0)


# ----------------------------------------------------------------------------------------------------
# Threads
# ----------------------------------------------------------------------------------------------------


def set_threads(n: int) -> None:
    """Say it again to everyone who can be told."""
    fx.set_num_threads(n)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)


def check_threads(n: int, name: str) -> None:
    """A provider that changes the number of threads would be compared with others that have more or fewer."""
    found = {"fastxent": fx.get_num_threads()}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].get_num_threads()
    if any(count != n for count in found.values()):
        raise RuntimeError(f"after {name} the threads are {found}, not {n}")


@contextmanager
def threads(n: int) -> Iterator[None]:
    """All with n threads; what PyTorch had before is put back."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        set_threads(n)
        yield
    finally:
        fx.set_num_threads(None)
        if before is not None:
            sys.modules["torch"].set_num_threads(before)


# ----------------------------------------------------------------------------------------------------
# Timing
# ----------------------------------------------------------------------------------------------------


def time_call(call: Call, number: int) -> float:
    """Seconds a run, over ``number`` of them."""
    run = call.run
    call.prepare()
    start = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - start) / number


def estimate(call: Call) -> float:
    """Seconds a run, at best: of five, or of as many as fit a tenth of a second, but of two at least: one may compile."""
    times = [time_call(call, 1)]
    while len(times) < 2 or (len(times) < 5 and sum(times) < 0.1):
        times.append(time_call(call, 1))
    return min(times)


Timed = dict[str, tuple[int, list[float]]]  # of each name: runs a sample, and the samples


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after some rounds: here is what was timed."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed


def time_interleaved(calls: Mapping[str, Call], n_threads: int, effort: Effort, progress: Progress) -> Timed:
    """Runs a sample, and the samples: one a round, so that those of two calls pair up."""
    estimates = {name: estimate(call) for name, call in calls.items()}
    numbers = {name: max(1, min(1000, round(SAMPLE / t))) for name, t in estimates.items()}
    a_round = sum(PAUSE + t * numbers[name] * (1 + (t < SHORT)) for name, t in estimates.items())
    rounds = max(effort.least, min(effort.most, int(effort.seconds / a_round)))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            progress(f"round {k + 1} of {rounds}", k / rounds)
            for name in in_order(names, k):
                set_threads(n_threads)
                time.sleep(PAUSE)
                if estimates[name] < SHORT:
                    time_call(calls[name], numbers[name])
                samples[name].append(time_call(calls[name], numbers[name]))
                check_threads(n_threads, name)
    except KeyboardInterrupt:
        whole_rounds = min(map(len, samples.values()))
        if not whole_rounds:
            raise
        raise Interrupted({name: (numbers[name], samples[name][:whole_rounds]) for name in names}) from None
    finally:
        gc.enable()
    return {name: (numbers[name], samples[name]) for name in names}


def in_order(names: Sequence[str], k: int) -> list[str]:
    """Round k: each name comes to each place, and its neighbours change sides."""
    turned = [*names[k // 2 % len(names) :], *names[: k // 2 % len(names)]]
    return turned[::-1] if k % 2 else turned


# ----------------------------------------------------------------------------------------------------
# Groups
# ----------------------------------------------------------------------------------------------------


def group(key: str, title: str, reason: str, entries: list[dict[str, Any]], missing: Mapping[str, str]) -> Group:
    """What belongs in one table: its entries were interleaved."""
    return {"key": key, "title": title, "reason": reason, "entries": entries, "missing": dict(missing)}


def entry(
    name: str, kind: str, samples: Sequence[float], *, unit: str = "s", number: int = 1, nbytes: int = 0, floor: str = ""
) -> dict[str, Any]:
    """One line of a table: ``samples`` are seconds a run, or whatever ``unit`` says."""
    return {
        "name": name, "kind": kind, "unit": unit, "number": number, "bytes": nbytes, "floor": floor, "samples": list(samples),
    }  # fmt: skip


def run_group(
    case: Case,
    n_threads: int,
    effort: Effort,
    *,
    beside: Sequence[tuple[str, Case]] = (),
    only: Collection[str] | None = None,
    leave_out: Mapping[str, str] | None = None,
    progress: Progress = lambda text, share=0.0: None,
) -> Group:
    """Check and time the providers of a case; ``beside`` names providers of other cases that are interleaved with them.

    ``only`` names the providers to take, beside the floors. One that is not installed, fails or is wrong is not timed;
    ``missing`` says why. After Ctrl-C the group holds the rounds until then, and says so.
    """
    progress("inputs")
    inputs = {case: Inputs(case)}
    chosen = [p for p in PROVIDERS if only is None or p.name in only or p.kind == "floor"]
    wanted = [(provider.name, provider, case) for provider in chosen if provider.answers(case)]
    for name, other in beside:
        inputs.setdefault(other, Inputs(other))
        wanted.append((beside_name(name, other), BY_NAME[name], other))

    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, provider, its_case in wanted:
        reason = (leave_out or {}).get(provider.name) or provider.missing(n_threads)
        if reason is None:
            progress(f"checking {name}")
            made = make_checked(provider, inputs[its_case], n_threads)
            if isinstance(made, Call):
                calls[name] = made
            else:
                reason = made
        if reason is not None:
            missing[name] = reason
    interrupted = False
    try:
        timed = time_interleaved(calls, n_threads, effort, progress)
    except Interrupted as stop:
        timed, interrupted = stop.timed, True
    entries = [
        entry(
            name, provider.kind, timed[name][1],
            number=timed[name][0], nbytes=its_case.bytes_moved, floor=floor_of(provider, its_case) if its_case is case else "",
        )
        for name, provider, its_case in wanted
        if name in timed
    ]  # fmt: skip
    title = f"{case.shape}, {case.dtype}, {case.option}, {case.mode}"
    return group(case.key, title, case.reason, entries, missing) | {"case": asdict(case), "interrupted": interrupted}


def floor_of(provider: Provider, case: Case) -> str:
    """The name of the floor that a provider's memory traffic is held against; "" for a floor."""
    if provider.kind == "floor":
        return ""
    return provider.floor or ("floor read" if case.mode == LOSS else "floor out=")


def beside_name(name: str, case: Case) -> str:
    """How a provider of another case is called in a group."""
    return f"{name} ({case.option} {case.dtype})"


def make_checked(provider: Provider, inputs: Inputs, n_threads: int) -> Call | str:
    """The call, run once and found right; or why there is none."""
    set_threads(n_threads)
    try:
        call = provider.make(inputs.case, inputs, n_threads)
        call.prepare()
        loss, gradient = call.result(call.run())
        if provider.kind != "floor":
            check(inputs, loss, gradient)
    except WrongResult as error:
        return f"WRONG: {error}"
    except Exception as error:  # a peer that fails is no reason not to time the others
        first = (str(error).splitlines() or [""])[0]
        return f"failed: {type(error).__name__}: {first}"
    return call


# ----------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    ordered = sorted(samples)
    return Spread(*(_quantile(ordered, q) for q in (0.5, 0.25, 0.75)))


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Of a to b, pair by pair."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    below = math.floor(at)
    return ordered[below] + (at - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])
