"""A program: tensors of every layout as one argument of a call that was met before. The process must live, and do as PyTorch.

    python odd_tensors.py {input,target,probabilities,weight,sample_weight,grad_output}

It prints what was otherwise than with `torch.nn.functional.cross_entropy`: another exception, type, shape, dtype or value; of
sample weights, which that has not, what is otherwise than in a new call.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastxent.torch as ft
from fastxent._fastpath.cache import calls

ROWS, CLASSES = 6, 4
Make = Callable[[Tensor], Tensor]


class Marked(Tensor):
    """A subclass that overrides nothing."""


def nested(layout: torch.layout) -> Make:
    return lambda t: torch.nested.nested_tensor([t[: len(t) // 2], t[len(t) // 2 :]], layout=layout)


def out_of_its_transform(t: Tensor) -> Tensor:
    leaked = []
    torch.vmap(lambda a: (leaked.append(a), a)[1])(torch.stack([t, t]))
    return leaked[0]


def lazy(t: Tensor) -> Tensor:
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    globals()["lazy"] = lambda t: t.to("lazy")
    return t.to("lazy")


KINDS: dict[str, Make] = {
    "nested": nested(torch.strided),
    "jagged": nested(torch.jagged),
    "COO": lambda t: t.to_sparse(),
    "CSR": lambda t: t.to_sparse_csr(),
    "CSC": lambda t: t.to_sparse_csc(),
    "BSR": lambda t: t.to_sparse_bsr((2, 2)),
    "BSC": lambda t: t.to_sparse_bsc((2, 2)),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "meta": lambda t: t.to("meta"),
    "lazy": lambda t: lazy(t),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "quantized by channel": lambda t: torch.quantize_per_channel(
        t.float(), torch.ones(len(t)), torch.zeros(len(t)), 0, torch.qint8
    ),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "functional": torch._to_functional_tensor,
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "negative": torch._neg_view,
    "imaginary part": lambda t: torch.complex(t.float(), t.float()).conj().imag,
    "out of its transform": out_of_its_transform,
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones(t.shape).bool()),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "two": lambda t: TwoTensor(t, t.clone()),
    "marked": lambda t: t.as_subclass(Marked),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def outcome(loss: Callable[..., Tensor], arguments: dict[str, Any], reduction: str, differentiate: bool) -> Any:
    """Loss and gradient, or the type of the exception."""
    given = dict(arguments)
    target, weight, upstream = (given.pop(name) for name in ("target", "weight", "grad_output"))
    x = given.pop("input")
    try:
        x = x.requires_grad_() if differentiate else x
        made = loss(x, target, weight, reduction=reduction, **given)
        if not differentiate:
            return [made]
        return [made, *torch.autograd.grad(made if upstream is not None else made.sum(), x, upstream)]
    except Exception as error:
        return type(error)


def plain(t: Tensor) -> Tensor:
    """As dense numbers; of a tensor without any, zeros."""
    if t.is_meta or isinstance(t, FakeTensor):
        return torch.zeros(t.shape, dtype=t.dtype)
    t = t.a if isinstance(t, TwoTensor) else t.get_data() if hasattr(t, "get_data") else t
    t = torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t
    return t.detach().cpu().to_dense().resolve_neg()


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, type) or isinstance(theirs, type):
        return ours is theirs
    return all(
        (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape)
        and torch.allclose(plain(a), plain(b), 1e-4, 1e-5, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def usual() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(ROWS, CLASSES, generator=g), torch.tensor([0, 1, 2, 3, 0, 1])
    return {"input": x, "target": y, "weight": None, "grad_output": None}


def check(kind: str, argument: str, reduction: str, differentiate: bool) -> list[str]:
    """What is not as with PyTorch."""
    met = usual()
    name = "target" if argument == "probabilities" else argument
    if argument == "probabilities":
        met["target"] = torch.softmax(torch.ones(ROWS, CLASSES), 1)
    elif argument == "weight":
        met["weight"] = torch.linspace(0.5, 2, CLASSES)
    elif argument == "sample_weight":
        met["sample_weight"] = torch.linspace(0.5, 2, ROWS)
    elif argument == "grad_output":
        met["grad_output"] = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(2.0)
    try:
        odd = [{**met, "input": met["input"].clone(), name: KINDS[kind](met[name].clone())} for _ in range(7)]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return []  # there is no such tensor of this shape and dtype
    how = reduction, differentiate
    theirs = None if argument == "sample_weight" else outcome(F.cross_entropy, odd.pop(), *how)
    wrong = []
    for door in ("cross_entropy", "install")[: 1 if theirs is None else 2]:
        with ft.installed():
            ours = F.cross_entropy if door == "install" else ft.cross_entropy
            calls.clear()
            results = {"new": outcome(ours, odd.pop(), *how)}
            for _ in range(4):
                outcome(ours, {**met, "input": met["input"].clone()}, *how)
            results |= {"met before": outcome(ours, odd.pop(), *how), "again": outcome(ours, odd.pop(), *how)}
        for when, result in results.items():
            want = results["new"] if theirs is None else theirs
            if argument == "grad_output" and isinstance(want, type) and not isinstance(result, type):
                continue  # PyTorch has no backward for such a tensor, and ours has
            if not same(result, want):
                wrong.append(f"{argument}, {kind}, {reduction}, {differentiate=}, {door}, {when}: {result}, not {want}")
    return wrong


def main(argument: str) -> int:
    wrong = []
    for kind, reduction, differentiate in itertools.product(KINDS, ("mean", "none"), (False, True)):
        if (argument, kind) == ("weight", "lazy"):  # PyTorch's own function ends the process
            continue
        if differentiate or argument != "grad_output":
            print(kind, flush=True)  # of an abort one wants to know where
            wrong += check(kind, argument, reduction, differentiate)
    print(*wrong, sep="\n")
    return len(wrong)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1]) > 0)
