"""`linear_log_prob_and_entropy`: the log-probability and entropy of a linear layer's softmax, without an array of its logits.

As `log_prob_and_entropy` over the blocks of ``_linear_blocks``. The backward computes the logits a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastxent._runtime.options import check_integer, checked, flags_of, schema
from fastxent.torch import _bridge
from fastxent.torch._autograd import is_dual, stands_for_others
from fastxent.torch._bridge import NONE, Options, as_float64
from fastxent.torch._decomposition import differentiable_gradients, loss_dtype
from fastxent.torch._dispatch import require_tensors, takes
from fastxent.torch._linear import (
    flat_layer,
    needs_whole_logits,
    shape_of_logits,
    stand_in,
    takes_layer,
    whole_logits,
)
from fastxent.torch._linear_blocks import Gradients, Layer, blocks
from fastxent.torch._linear_operators import LAYER_SCHEMA, PLACES, Rows, check_layer, gradients_fake, layer_of, rows_of
from fastxent.torch._policy import decomposition, log_prob_and_entropy
from fastxent.torch._watched import is_traced


def linear_log_prob_and_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    memory_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of the target and entropy of each row's softmax, from hidden states, without an array of the logits.

    .. math::
        p_n = \mathrm{softmax}\left((W h_n + b) / T\right), \qquad \log p_{n y_n}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}

    The rows go through the layer block by block, as in `linear_cross_entropy`. One backward differentiates both results with
    respect to input, weight and bias; it computes the logits a second time.

    Parameters
    ----------
    input : Tensor, shape (D,), (N, D) or (..., D)
        h; float16, bfloat16, float32 or float64.
    linear_weight : Tensor, shape (C, D)
        W.
    target : Tensor of any integer dtype, shape (...)
        Class indices y.
    linear_bias : Tensor, shape (C,), optional
        b.
    temperature : float > 0
        T.
    ignore_index : int
        Rows with this class index are skipped: both results and the gradient are 0.
    memory_limit : int, optional
        As in `linear_cross_entropy`.

    Returns
    -------
    log_prob, entropy : Tensor of the shape of ``target``
        In nats, in the dtype of ``input``; under autocast in float32 at least.

    Raises
    ------
    IndexError, RuntimeError, TypeError, ValueError
        As in `log_prob_and_entropy`; also where the shapes of the layer do not fit, and for a memory limit that is not above 0.

    References
    ----------
    As of `log_prob_and_entropy` and `linear_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import linear_log_prob_and_entropy
    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    >>> log_prob, entropy = linear_log_prob_and_entropy(hidden, head, torch.tensor([0, 1]))
    >>> log_prob.detach(), entropy.detach()
    (tensor([-0.8620, -0.7586]), tensor([1.0174, 0.8854]))
    >>> (log_prob.sum() + 0.01 * entropy.sum()).backward()
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias):
        return handle_torch_function(
            linear_log_prob_and_entropy, (input, linear_weight, target, linear_bias), input, linear_weight, target,
            linear_bias=linear_bias, temperature=temperature, ignore_index=ignore_index, memory_limit=memory_limit,
        )  # fmt: skip
    required = {"input": input, "linear_weight": linear_weight, "target": target}
    require_tensors("linear_log_prob_and_entropy", required, {"linear_bias": linear_bias})
    temperature = checked("temperature", temperature)
    options = Options(NONE, check_integer(ignore_index, "ignore_index"), 0.0, 0.0, 0.0)
    memory_limit = checked("memory_limit", memory_limit)
    layer = Layer(input, linear_weight, linear_bias)
    fits = not is_traced() and target.shape == shape_of_logits(*layer)[:-1] and takes_layer(*layer)
    flat = target.reshape(-1) if fits and target.numel() > 0 else None
    if (
        flat is None
        or flat.is_floating_point()
        or not takes(stand_in(*layer), flat, None, None, options)
        or needs_whole_logits(layer, target)
    ):
        return log_prob_and_entropy(whole_logits(*layer), target, temperature=temperature, ignore_index=options.ignore_index)
    x, w, b = flat_layer(*layer)
    results = operator(x, w, flat, b, temperature, options.ignore_index, memory_limit)
    log_prob, entropy = (t.reshape(target.shape).to(loss_dtype(x, target, None)) for t in results)
    return log_prob, entropy


# ----------------------------------------------------------------------------------------------------
# The operators
# ----------------------------------------------------------------------------------------------------

_FLAGS = flags_of(labelled=True, ignore_index=0, label_smoothing=0.0)
_N_INPUTS = 7


def _checked(operands: Sequence[Any], temperature: float, ignore_index: int) -> tuple[Layer, Rows]:
    layer, target = layer_of(operands), operands[2]
    check_layer(layer)
    checked("temperature", temperature)
    if target.is_floating_point():
        raise RuntimeError(f"expected target of class indices, got {target.dtype}")
    return layer, rows_of([*operands, None, None], Options(NONE, ignore_index, 0.0, 0.0, 0.0))


def _value(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, temperature, ignore_index, memory_limit = arguments
    layer, rows = _checked(operands, temperature, ignore_index)
    log_prob, entropy = (torch.zeros(len(layer.input), dtype=layer.accumulated, device="cpu") for _ in range(2))
    for block in blocks(layer, rows.kept, memory_limit):
        call = _bridge.prepare(block.logits, rows.target[block.part], None, None)
        made = torch.empty(2, len(block.logits), dtype=layer.accumulated, device="cpu")
        _bridge.run_task(
            "log_prob_and_entropy", call, block.logits, _FLAGS, loss=made[0].data_ptr(), entropy=made[1].data_ptr(),
            ignore=ignore_index, temperature=temperature,
        )  # fmt: skip
        log_prob[block.rows], entropy[block.rows] = made
    return log_prob, entropy


def _gradient(of_log_prob: Tensor, of_entropy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; empty if not wanted."""
    *operands, temperature, ignore_index, memory_limit, wanted = arguments
    layer, rows = _checked(operands, temperature, ignore_index)
    if of_log_prob.shape != layer.input.shape[:1] or of_entropy.shape != of_log_prob.shape:
        found = [list(t.shape) for t in (layer.input, of_log_prob, of_entropy)]
        raise RuntimeError(f"size mismatch (got input and gradients of rows: {found})")
    _bridge.check_memory(of_log_prob, of_entropy)
    u, v = as_float64(of_log_prob), as_float64(of_entropy)
    gradients = Gradients(layer, wanted, rows.kept)
    for block in blocks(layer, rows.kept, memory_limit):
        call = _bridge.prepare(block.logits, rows.target[block.part], None, u[block.rows])
        of_rows = v[block.rows]
        _bridge.run_task(
            "log_prob_and_entropy_grad", call, block.logits, _FLAGS, v=of_rows.data_ptr(), factor=1.0 / temperature,
            ignore=ignore_index, temperature=temperature,
        )  # fmt: skip
        gradients.add(block)
    return gradients.held()


def _value_fake(input: Tensor, linear_weight: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    for other in (linear_weight, target):
        if other.device != input.device:
            raise RuntimeError(f"Expected all tensors to be on the same device, got {input.device} and {other.device}")
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(target.shape, dtype=dtype), input.new_empty(target.shape, dtype=dtype)


def _gradient_fake(of_log_prob: Tensor, of_entropy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_fake(layer_of(arguments), arguments[-1])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temperature, ctx.ignore_index, ctx.memory_limit = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    places = [at for at in PLACES if ctx.needs_input_grad[at]]
    rows = tuple(g if g.layout == torch.strided else g.to_dense() for g in gradients)
    made: Sequence[Tensor]
    if not is_compiling() and (torch.is_grad_enabled() or any(is_dual(g) or stands_for_others(g) for g in rows)):
        made = differentiable_gradients(
            lambda: decomposition(whole_logits(*layer_of(tensors)), tensors[2], ctx.temperature, ctx.ignore_index),
            [tensors[at] for at in places],
            rows,
        )
    else:
        wanted = [at in places for at in PLACES]
        all_made = backward_operator(*rows, *tensors, ctx.temperature, ctx.ignore_index, ctx.memory_limit, wanted)
        made = [gradient for gradient, at in zip(all_made, PLACES, strict=True) if at in places]
    results: list[Tensor | None] = [None] * _N_INPUTS
    for at, gradient in zip(places, made, strict=True):
        results[at] = gradient.to(tensors[at].dtype)
    return tuple(results)


_NAME, _BACKWARD = "fastxent::linear_log_prob_and_entropy", "fastxent::linear_log_prob_and_entropy_backward"
_ARGUMENTS = f"{LAYER_SCHEMA}, {schema('temperature', 'ignore_index', 'memory_limit')}"
torch.library.define(_NAME, f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD, f"(Tensor of_log_prob, Tensor of_entropy, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl(_NAME, "CPU", _value)
torch.library.impl(_BACKWARD, "CPU", _gradient)
torch.library.register_fake(_NAME, _value_fake)
torch.library.register_fake(_BACKWARD, _gradient_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_context)
operator = torch.ops.fastxent.linear_log_prob_and_entropy
backward_operator = torch.ops.fastxent.linear_log_prob_and_entropy_backward
