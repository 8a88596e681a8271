"""The table under pytest-benchmark; see README.md in this folder.

    python -m pytest benchmarks/test_speed.py -m "not slow"                        right, not timed
    python -m pytest benchmarks/test_speed.py -n 0 --benchmark-enable -k 1024x1000

Every result is checked before it is timed. Cases that are large and torch.compile are marked slow, those that
`benchmarks.gate` judges are marked gate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

import fastxent as fx
from benchmarks import measure
from benchmarks.cases import CASES, Case, Inputs
from benchmarks.gate import LIMITS
from benchmarks.providers import PROVIDERS, Call, Provider
from benchmarks.report import COMPILED, EAGER

LARGE = 2**26  # bytes of logits


def params() -> list:
    """Those of a case side by side, so that what is compared is timed within seconds."""
    found = []
    for case in CASES:
        for provider in PROVIDERS:
            if provider.kind == "floor" or not provider.answers(case):
                continue
            slow = case.logit_bytes > LARGE or provider.name == COMPILED
            judged = provider.name in (EAGER, *LIMITS.get(case, ()))
            marks = [pytest.mark.slow] * slow + [pytest.mark.gate] * (judged and case in LIMITS)
            found.append(pytest.param(case, provider, id=f"{case.slug}-{provider.slug}", marks=marks))
    return found


@lru_cache(maxsize=1)
def inputs(case: Case) -> Inputs:
    return Inputs(case)


@pytest.mark.filterwarnings("ignore")  # of the compiler of torch.compile
@pytest.mark.parametrize(("case", "provider"), params())
def test_speed(case: Case, provider: Provider, benchmark: Any) -> None:
    n_threads = fx.get_num_threads()
    reason = provider.missing(n_threads)
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")
    with measure.threads(n_threads):
        call = measure.make_checked(provider, inputs(case), n_threads)
        assert isinstance(call, Call), call
        benchmark.group = case.shape
        benchmark.extra_info.update(case=case.key, provider=provider.name, bytes=case.bytes_moved, threads=n_threads)
        call.prepare()
        benchmark(call.run)
