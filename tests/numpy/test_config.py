"""Compiling ahead of the first call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent._codegen import registry


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_calls_after_a_warmup_compile_nothing(dtype, monkeypatch):
    warmed: set[Any] = set()
    used: set[Any] = set()
    kernel = registry.kernel

    def noting(name: str, variant: Any = registry._ANY) -> Any:
        used.add((name, variant))
        return kernel(name, variant)

    monkeypatch.setattr(registry, "kernel", lambda name, variant=registry._ANY: warmed.add((name, variant)))
    fx.warmup([dtype])
    monkeypatch.setattr(registry, "kernel", noting)
    for shape in ((7, 3), (40, 100), (40, 1000), (200, 32000)):
        for _ in range(2):
            fx.cross_entropy_value_and_grad(np.zeros(shape, dtype), np.zeros(shape[0], int))
    for images in ((2, 21, 40, 40), (2, 130, 130, 130)):
        fx.cross_entropy(np.zeros(images, dtype), np.zeros((images[0], *images[2:]), int), axis=1)
    assert len(used) >= 6 and used <= warmed, used - warmed
