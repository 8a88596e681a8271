"""The adapter with every option against PyTorch, whose functions do what PyTorch's have no option for: the tests to run first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fastxent.torch as ft
from tests.helpers.cases import Case
from tests.helpers.opponent import at_least_float32, loss_and_grad, torch_loss
from tests.helpers.torch_cases import SOFTCAP, Z_LOSS, make_case

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_torch_thread")]

SHAPE = (33, 21)
# What is no option of ours alone: see test_module.py and test_inplace_memory.py.
OPTIONS: dict[str, dict[str, Any]] = {
}
