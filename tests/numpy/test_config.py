"""Compiling ahead of the first call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastxent as fx
from fastxent._codegen import registry
from fastxent._runtime import bfloat16


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


@pytest.mark.parametrize(
    ("features", "way"),
    [
        ({"avx512f": True}, "converted to float32: the processor has none of AVX512_BF16, AMX"),
        ({"avx512bf16": True, "amx-bf16": False}, "native: the processor has AVX512_BF16"),
        ({"avx512bf16": True, "amx-bf16": True}, "native: the processor has AVX512_BF16 and AMX"),
    ],
    ids=["neither", "one", "both"],
)
def test_the_way_of_bfloat16_products_is_told_with_its_reason(features, way, monkeypatch):
    monkeypatch.setattr(bfloat16, "imported", lambda _: SimpleNamespace(get_host_cpu_features=lambda: features))
    bfloat16.found.cache_clear()
    try:
        assert fx.show_config()["products"]["of bfloat16, by PyTorch"] == way
        assert bfloat16.multiplies_bfloat16() == way.startswith("native")
    finally:
        bfloat16.found.cache_clear()


def test_pytorch_agrees_on_bfloat16():
    """Its questions are private functions, which nothing but this test asks."""
    questions = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if None in questions:
        pytest.skip("this PyTorch has other functions")
    assert bfloat16.multiplies_bfloat16() == any(question() for question in questions)
