"""The tables of dtypes and options: whatever else speaks of them says the same."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
import torch

import fastxent as fx
import fastxent.torch as fxt
from fastxent import reference
from fastxent._abi.argument_block import SLOT
from fastxent._abi.dtypes import ACC, DTYPES, ITEMSIZE, DType, precision
from fastxent._abi.variant import Variant
from fastxent._runtime.arguments import accumulator, storage
from fastxent._runtime.options import OPTIONS, checked, fields_of, flags_of, schema
from fastxent._simd import half
from fastxent.torch import _bridge

OF_LINEAR = {"z_loss", "softcap", "memory_limit"}  # NumPy's other functions lack them
PUBLIC = [getattr(module, name) for module in (fx, fxt, reference) for name in module.__all__]
# What has another default than the table says: of statistics all rows are wanted, and over all axes is SciPy's default.
OTHER_DEFAULTS = {
    ("cross_entropy_stats", "reduction"): "none",
    ("linear_cross_entropy_stats", "reduction"): "none",
    ("softmax", "axis"): None,
    ("log_softmax", "axis"): None,
    ("logsumexp", "axis"): None,
    # PyTorch's: -100 for class indices alone
    (fxt.linear_cross_entropy, "ignore_index"): None,
    (fxt.LinearCrossEntropyLoss, "ignore_index"): None,
}


@pytest.mark.parametrize("d", DTYPES, ids=lambda d: d.name)
def test_a_dtype_is_what_its_row_says(d: DType):
    numpy = np.dtype(ml_dtypes.bfloat16) if d.name == "bfloat16" else np.dtype(d.name)
    assert storage(numpy) == _bridge.STORAGE[getattr(torch, d.name)] == d.storage
    assert numpy.itemsize == getattr(torch, d.name).itemsize == np.dtype(d.numpy).itemsize == d.itemsize == ITEMSIZE[d.storage]
    assert half.ITEMSIZE[d.storage] == d.itemsize and Variant(d.storage).acc == d.acc == ACC[d.storage]
    assert accumulator(numpy).itemsize == ITEMSIZE[d.acc]
    logits = np.arange(6).reshape(2, 3).astype(numpy)
    loss, g = fx.cross_entropy_value_and_grad(logits, [2, 0])
    truth, dlogits = reference.cross_entropy_value_and_grad(logits.astype(np.float64), [2, 0])
    assert loss.dtype.itemsize == ITEMSIZE[d.acc] and g.dtype == numpy
    assert loss == pytest.approx(truth, rel=1e-6) and g.astype(float) == pytest.approx(dlogits, rel=1e-2)
    large = torch.zeros(1 << 21, 2, dtype=getattr(torch, d.name))
    assert _bridge.gradient_like(large).dtype == large.dtype  # in memory that NumPy gave


def test_one_float64_makes_float64_of_all():
    for a in DTYPES:
        assert precision(a.storage, None) == a.acc
        for b in DTYPES:
            assert precision(a.storage, b.storage) == ("f64" if "f64" in (a.storage, b.storage) else "f32")


@pytest.mark.parametrize("function", [f for f in PUBLIC if callable(f)], ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_signatures_have_the_defaults_of_the_table(function):
    defaults = {option.name: option.default for option in OPTIONS}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in defaults:
            others = [OTHER_DEFAULTS[key] for key in ((function.__name__, name), (function, name)) if key in OTHER_DEFAULTS]
            expected = others[0] if others else defaults[name]
            assert parameter.default == expected and type(parameter.default) is type(expected), name


def test_numpys_functions_check_each_option_of_theirs():
    """What no check of an option lets pass, no function does."""
    for option in OPTIONS:
        if option.check is not None:
            assert checked(option.name, option.default) == option.default
            with pytest.raises((TypeError, ValueError), match=option.name):
                checked(option.name, 2.5j)
            with pytest.raises((TypeError, ValueError), match=option.name):
                function = fx.linear_cross_entropy if option.name in OF_LINEAR else fx.cross_entropy
                function = {"temperature": fx.log_prob_and_entropy, "gamma": fx.focal_loss}.get(option.name, function)
                operands = [np.zeros((2, 3)), np.zeros((4, 3)), [0, 1]]
                function(*(operands if option.name in OF_LINEAR else operands[::2]), **{option.name: 2.5j})


def test_options_enter_the_argument_block_and_the_variant_where_the_table_says():
    numbers = [option for option in OPTIONS if option.name in _bridge.Options._fields]  # of cross-entropy
    assert _bridge.Options._fields == tuple(option.name for option in numbers)
    operators = torch.ops.fastxent.cross_entropy, torch.ops.fastxent.cross_entropy_value_and_grad
    for operator in operators:
        arguments = schema("weight", "sample_weight", *_bridge.Options._fields)
        assert f"(Tensor input, Tensor target, {arguments}) ->" in str(operator.default._schema)
    assert {field for option in OPTIONS for field in option.fields} <= set(SLOT)
    assert {option.flag for option in OPTIONS if option.flag} <= set(Variant._fields)
    assert list(inspect.signature(fields_of).parameters) == ["n_classes", *_bridge.Options._fields[1:]]
    assert list(inspect.signature(flags_of).parameters) == ["labelled", *_bridge.Options._fields[1:]]
    assert set(fields_of(4, *(0.25,) * (len(numbers) - 1))) == {field for option in numbers[1:] for field in option.fields}
    flags = flags_of(True, *(0.25,) * (len(numbers) - 1))
    assert set(flags) == {"labelled", *(option.flag for option in numbers if option.flag)} <= set(Variant._fields)
    assert all(flags.values()) and not flags_of(False, -100, 0.25)["smooth"]
    assert not any(flags_of(False, *(option.default or 0.0 for option in numbers[1:])).values())
