"""Tensors of all layouts, and objects that are no tensors, as arguments of calls that were met before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastxent.torch as ft

X, Y, WEIGHT, U = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(3), torch.ones(4)


OTHERS = "target", "probabilities", "weight", "sample_weight", "grad_output"


@pytest.mark.parametrize("argument", ["input", *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)])
def test_the_process_lives_and_does_as_pytorch(argument):
    program = Path(__file__).with_name("odd_tensors.py")
    result = subprocess.run([sys.executable, program, argument], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"


NO_TENSORS = {
    "NumPy": np.ones((4, 3), np.float32),
    "has dtype and shape": SimpleNamespace(dtype=torch.float32, shape=(4, 3), ndim=2, is_nested=False, is_cpu=True),
    "list": [[0.0, 1.0, 2.0]],
    "str": "logits",
    "number": 1.0,
    "None": None,
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("thing", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("argument", ["input", "target", "weight", "sample_weight"])
def test_what_is_no_tensor_is_named(argument, thing, warm):
    arguments = {"input": X, "target": Y, "weight": WEIGHT, "sample_weight": U}
    doors = [ft.cross_entropy]
    if argument != "sample_weight":
        del arguments["sample_weight"]
        doors.append(lambda input, target, weight: installed(input, target, weight))
        if argument != "weight":
            del arguments["weight"]
            doors += [ft.CrossEntropyLoss(), lambda input, target: installed(input, target)]
            doors[1] = doors[0]
    if thing is None and argument in ("weight", "sample_weight"):
        return
    for loss in doors:
        for _ in range(3 if warm else 0):
            loss(**arguments)
        with pytest.raises(TypeError, match=rf"argument '{argument}' .*must be Tensor, not ") as error:
            loss(**{**arguments, argument: thing})
        assert len(str(error.value)) < 120  # the array is not printed


def installed(*arguments):
    with ft.installed():
        return F.cross_entropy(*arguments)


@pytest.mark.parametrize("option", ["label_smoothing", "ignore_index", "z_loss", "softcap"])
def test_what_is_no_number_is_named(option):
    with pytest.raises(TypeError, match=rf"argument '{option}' .*must be (float|int), not str"):
        ft.cross_entropy(X, Y, **{option: "much"})


def test_weight_of_the_module_that_is_no_tensor():
    with pytest.raises(TypeError, match="weight"):
        ft.CrossEntropyLoss(weight=np.ones(3, np.float32))


def test_sample_weights_that_are_not_dense():
    with pytest.raises(ValueError, match="sample_weight must be dense"):
        ft.cross_entropy(X, Y, sample_weight=U.to_sparse())
