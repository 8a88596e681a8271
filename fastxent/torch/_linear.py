"""`linear_cross_entropy`: checks a call, and sends it to the operators, or to the loss of whole logits.

The operators (``_linear_operators``) go through the rows block by block (``_linear_blocks``). Whole logits serve what the
operators do not take, which may be an error, and what must be differentiated further: see ``_decomposition``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastxent._runtime.options import check_integer, check_number, checked
from fastxent.torch._autograd import is_dual
from fastxent.torch._bridge import NONE, Options
from fastxent.torch._decomposition import loss_dtype
from fastxent.torch._dispatch import needs_decomposition, require_tensors, route, takes
from fastxent.torch._linear_blocks import Layer
from fastxent.torch._linear_operators import value_and_grad_op, value_op
from fastxent.torch._watched import is_traced, is_watched, stands_for_another


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_limit: int | None = None,
) -> Tensor:
    r"""``torch.nn.functional.linear_cross_entropy``: the cross-entropy of a linear layer, without an array of its logits.

    .. math::
        l_n = \mathrm{cross\_entropy}(x_n, \text{target}_n), \qquad x_n = W h_n + b

    The rows go through the layer block by block: a block of logits becomes its gradient in place, two more products use it, and
    the next block overwrites it. Rows that are ignored are dropped before the products, and what needs no gradient takes none.

    Parameters
    ----------
    input : Tensor, shape (D,), (N, D) or (..., D)
        h; float16, bfloat16, float32 or float64.
    linear_weight : Tensor, shape (C, D)
        W. Also (C, d1, ..., D), for a loss in several dimensions; its logits are held as a whole.
    target : Tensor
        Class indices (any integer dtype), shape (...); or class probabilities, shape (..., C).
    linear_bias : Tensor, shape (C,), optional
        b.
    weight, reduction, label_smoothing, sample_weight, z_loss, softcap
        As in `cross_entropy`.
    ignore_index : int, optional
        As in `cross_entropy`; None means -100 for class indices. Class probabilities go with None only.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Accepted for calls that are written for PyTorch. It has no effect: ``memory_limit`` decides the blocks.
    memory_limit : int, optional
        Most bytes to take beside the arguments and the gradients: the larger of 64 MB and the bytes of ``linear_weight`` by
        default. The results depend on it by rounding errors only.

    Returns
    -------
    Tensor
        A number, or with ``reduction="none"`` a tensor of shape (...); dtype as PyTorch's, under autocast float32 at least.

    Raises
    ------
    IndexError, RuntimeError, TypeError, ValueError
        As in `cross_entropy`; also where the shapes of the layer do not fit, and for a memory limit that is not above 0.

    Notes
    -----
    For "mean" and "sum" the forward makes the gradients and the backward multiplies them by grad_output. For "none" the
    backward makes them, and computes the logits a second time. Gradients of half precision add up in a float32 array of the
    size of ``linear_weight``, unless all rows are one block. Those of float16 are held in float32 until the backward, for they
    may be too small for float16 before grad_output scales them; those of bfloat16 are rounded by the forward, and once more if
    grad_output is no power of 2. Products of bfloat16 are computed as such if the processor has instructions for them, else
    half precision is multiplied in float32.
    Double backward, forward-mode AD and ``torch.func`` hold the logits as a whole.

    References
    ----------
    ``torch.nn.functional.linear_cross_entropy``. Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*,
    arXiv:2411.09009. Hsu et al., *Liger Kernel*, arXiv:2410.10989.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import linear_cross_entropy
    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    >>> loss = linear_cross_entropy(hidden, head, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}")
    0.8103
    >>> head.grad
    tensor([[-0.2888,  0.0634],
            [ 0.0777, -0.5317],
            [ 0.2112,  0.4683]])
    """
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
            sample_weight=sample_weight, z_loss=z_loss, softcap=softcap, memory_limit=memory_limit,
        )  # fmt: skip
    required = {"input": input, "linear_weight": linear_weight, "target": target}
    optional = {"linear_bias": linear_bias, "weight": weight, "sample_weight": sample_weight}
    require_tensors("linear_cross_entropy", required, optional)
    values = Options(
        nn._reduction.get_enum(reduction),
        -100 if ignore_index is None else check_integer(ignore_index, "ignore_index"),
        check_number(label_smoothing, "label_smoothing"),
        check_number(z_loss, "z_loss"),
        0.0 if softcap is None else check_number(softcap, "softcap"),
    )
    if values.label_smoothing < 0.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    memory_limit = checked("memory_limit", memory_limit)
    layer = Layer(input, linear_weight, linear_bias)
    if is_traced():  # sizes are tensors, which must not be compared
        return _by_whole_logits(layer, target, weight, sample_weight, values)
    logits_shape = shape_of_logits(*layer)
    rows, soft = logits_shape[:-1], target.shape == logits_shape
    if soft and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    fits = (soft or target.shape == rows) and (sample_weight is None or sample_weight.shape == rows)
    if not (fits and takes_layer(*layer)):
        return _by_whole_logits(layer, target, weight, sample_weight, values)
    like_logits = stand_in(*layer)
    flat = target.reshape(like_logits.shape[: 1 + soft])
    u = None if sample_weight is None else sample_weight.reshape(like_logits.shape[0])
    if not takes(like_logits, flat, weight, u, values) or needs_whole_logits(layer, target, weight, sample_weight):
        return _by_whole_logits(layer, target, weight, sample_weight, values)
    x, w, b = flat_layer(*layer)
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in layer]
    if any(wanted) and values.reduction != NONE:
        loss, *_ = value_and_grad_op(x, w, flat, b, weight, u, *values, memory_limit, wanted)
    else:
        loss = value_op(x, w, flat, b, weight, u, *values, memory_limit)
    return loss.reshape(rows if values.reduction == NONE else ()).to(loss_dtype(x, target, weight))


def shape_of_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[int, ...]:
    """Return the shape of the logits, or raise an error if the layer does not fit the input."""
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality at least 1, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    n_outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != n_outputs:
        raise RuntimeError(f"expected linear_bias shape {n_outputs}, got {tuple(linear_bias.shape)}")
    if len(n_outputs) > 1 and input.dim() != 2:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got input with shape {tuple(input.shape)}"
        )
    return (*input.shape[:-1], *n_outputs)


def takes_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> bool:
    """Return whether the operators take this layer."""
    layer = [t for t in (input, linear_weight, linear_bias) if t is not None]
    if linear_weight.dim() != 2 or not all(t.is_cpu and t.layout == torch.strided and not t.is_nested for t in layer):
        return False
    if not is_watched() and any(stands_for_another(t) for t in layer):
        return False
    return len({_precision(t) for t in layer}) == 1


def _precision(t: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer takes a tensor: under autocast, all but float64 are rounded."""
    autocast = torch.is_autocast_enabled("cpu") and t.is_floating_point() and t.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if autocast else t.dtype


def needs_whole_logits(layer: Layer, *others: Tensor | None) -> bool:
    """Return whether more than a first derivative with respect to the layer is asked for."""
    return needs_decomposition(layer.input, *others) or any(t is not None and is_dual(t) for t in layer)


def stand_in(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """Return a tensor with the shape of the rows' logits, the dtype that the loss takes, and the memory of one logit."""
    dtype = torch.promote_types(input.dtype, torch.float32) if torch.is_autocast_enabled("cpu") else input.dtype
    return input.new_empty((), dtype=dtype).expand(math.prod(input.shape[:-1]), linear_weight.shape[0])


def flat_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Layer:
    """Return the layer with all rows on one axis, in the dtype of autocast if that is on."""
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    bias = None if linear_bias is None else linear_bias.to(_precision(linear_bias))
    return Layer(rows.to(_precision(rows)), linear_weight.to(_precision(linear_weight)), bias)


def _by_whole_logits(
    layer: Layer, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options
) -> Tensor:
    logits = whole_logits(*layer)
    if layer.input.dim() > 2 and target.dim() == logits.dim():  # probabilities lie as the logits lie
        target = target.movedim(-1, 1)
    return route(logits, target, weight, sample_weight, options, False)


def whole_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """Return the logits, with the classes on the axis of `cross_entropy`."""
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(-1, input.shape[-1]), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return logits.movedim(-1, 1) if input.dim() > 2 else logits


class LinearCrossEntropyLoss(nn.Module):
    """``torch.nn.LinearCrossEntropyLoss`` through fastxent: a linear layer and its cross-entropy.

    Formula, shapes, errors and sources as in `linear_cross_entropy`. The layer is the attribute ``linear``; to tie it to an
    embedding, assign the embedding's weight to ``linear.weight``.

    Parameters
    ----------
    in_features, num_classes, out_features, bias, device, dtype
        Of the layer, as in PyTorch.
    reduction, weight, ignore_index, label_smoothing, options, z_loss, softcap, memory_limit
        As in `linear_cross_entropy`.

    Raises
    ------
    IndexError, RuntimeError, TypeError, ValueError
        As in `linear_cross_entropy`; also if ``weight`` has not one number a class.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import LinearCrossEntropyLoss
    >>> loss = LinearCrossEntropyLoss(4, 10)
    >>> loss(torch.zeros(2, 4), torch.tensor([3, 7])).item() > 0
    True
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features, self.reduction, self.ignore_index = (
            num_classes,
            out_features,
            reduction,
            ignore_index,
        )
        self.label_smoothing, self.options, self.z_loss = label_smoothing, options, z_loss
        self.softcap, self.memory_limit = softcap, memory_limit
        n_outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, n_outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = self.num_classes, *self.out_features
        bias = None if self.linear.bias is None else self.linear.bias.reshape(shape)
        return linear_cross_entropy(
            input, self.linear.weight.reshape(*shape, self.linear.in_features), target, linear_bias=bias, weight=self.weight,
            reduction=self.reduction, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            options=self.options, z_loss=self.z_loss, softcap=self.softcap, memory_limit=self.memory_limit,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )
