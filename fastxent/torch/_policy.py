"""``log_prob_and_entropy`` of tensors: an operator, its backward, and its decomposition into PyTorch's operators.

A call goes to ``torch.ops.fastxent.log_prob_and_entropy``, which eager mode, compilers and dispatch modes all see. The
decomposition, `decomposition`, computes what must be differentiated further, and what the kernels do not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastxent._runtime.options import checked, flags_of, schema
from fastxent.torch import _bridge
from fastxent.torch._autograd import is_dual
from fastxent.torch._bridge import INTEGERS, NONE, Options, as_float64, as_int64
from fastxent.torch._decomposition import aten_cross_entropy, differentiable_gradient, loss_dtype
from fastxent.torch._dispatch import needs_decomposition, require_tensors, takes
from fastxent.torch._watched import is_traced


def log_prob_and_entropy(
    input: Tensor, target: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    r"""Log-probability of the target class and entropy of each row; both can be differentiated, in one backward.

    .. math::
        p_n = \mathrm{softmax}(x_n / T), \qquad \log p_{n y_n}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}

    .. math::
        \frac{\partial \log p_y}{\partial x_c} = \frac{[c = y] - p_c}{T}, \qquad
        \frac{\partial H}{\partial x_c} = -\frac{p_c (\log p_c + H)}{T}

    It replaces ``log_softmax``, ``gather``, and a sum over ``exp`` times ``log_softmax``, and allocates none of their arrays of
    the size of the logits; the backward allocates one, the gradient.

    Parameters
    ----------
    input : Tensor, shape (C,), (N, C) or (N, C, d1, ...)
        Logits x; float16, bfloat16, float32 or float64, any strides. May hold -inf, which adds 0 to the entropy.
    target : Tensor of any integer dtype, shape (), (N,) or (N, d1, ...)
        Class indices y.
    temperature : float > 0
        T.
    ignore_index : int
        Rows with this class index are skipped: both results and the gradient are 0.

    Returns
    -------
    log_prob, entropy : Tensor of the shape of ``target``
        In nats, in the dtype of ``input``; under autocast in float32 at least.

    Raises
    ------
    IndexError, RuntimeError, TypeError, ValueError
        As in `cross_entropy`; also for a temperature that is not above 0, and for class probabilities.

    References
    ----------
    Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement learning*, Machine Learning 8
    (1992). Entropy as a bonus: Mnih et al., arXiv:1602.01783.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import log_prob_and_entropy
    >>> logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], requires_grad=True)
    >>> log_prob, entropy = log_prob_and_entropy(logits, torch.tensor([1, 2]))
    >>> log_prob.detach(), entropy.detach()
    (tensor([-0.1698, -1.4076]), tensor([0.5243, 0.8324]))
    >>> (log_prob.sum() + 0.01 * entropy.sum()).backward()
    >>> logits.grad
    tensor([[-0.0409,  0.1532, -0.1123],
            [-0.6681, -0.0886,  0.7567]])
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            log_prob_and_entropy, (input, target), input, target, temperature=temperature, ignore_index=ignore_index
        )
    require_tensors("log_prob_and_entropy", {"input": input, "target": target}, {})
    temperature = checked("temperature", temperature)
    if target.is_floating_point():
        raise TypeError("log_prob_and_entropy(): target holds class probabilities; it takes class indices")
    options = Options(NONE, ignore_index, 0.0, 0.0, 0.0)
    taken = not is_traced() and takes(input, target, None, None, options)
    if not taken:  # raises what PyTorch's cross_entropy raises
        with torch.no_grad():
            aten_cross_entropy(input, as_int64(target) if target.dtype in INTEGERS else target, None, options)
        if target.dim() != max(input.dim() - 1, 0):  # for logits (C,), PyTorch takes a target (1,) too, but no gradient
            raise ValueError(f"Expected target size [], got {list(target.shape)}")
    if not taken or needs_decomposition(input, target):
        return decomposition(input, target, temperature, ignore_index)
    log_prob, entropy = operator(input, target, temperature, ignore_index)
    dtype = loss_dtype(input, target, None)
    return log_prob.to(dtype), entropy.to(dtype)


def decomposition(input: Tensor, target: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return both as expressions of differentiable operators, in float32 at least."""
    dim = 0 if input.dim() == 1 else 1
    y = as_int64(target)
    kept = y != ignore_index
    x = input.to(torch.promote_types(input.dtype, torch.float32)) / temperature
    x = torch.where(kept.unsqueeze(dim), x, 0.0)  # an ignored row's nan or inf must not reach its gradient
    log_p = torch.log_softmax(x, dim)
    log_prob = -torch.nn.functional.nll_loss(log_p, y, reduction="none", ignore_index=ignore_index)
    terms = log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)
    dtype = loss_dtype(input, target, None)
    return torch.where(kept, log_prob, 0.0).to(dtype), torch.where(kept, -terms.sum(dim), 0.0).to(dtype)


# ----------------------------------------------------------------------------------------------------
# The operators
# ----------------------------------------------------------------------------------------------------


Arguments = tuple[Tensor, Tensor, float, int]  # input, target, temperature, ignore_index


_FLAGS = flags_of(labelled=True, ignore_index=0, label_smoothing=0.0)


def _check(input: Tensor, target: Tensor, temperature: float, rows: Tensor | None = None) -> None:
    """Check the operands of a call that `log_prob_and_entropy` has not seen; ``rows``: a gradient for each row."""
    _bridge.check_operands(input, target, None, rows)
    if target.dtype not in INTEGERS:
        raise RuntimeError(f"expected target of class indices, got {target.dtype}")
    _bridge.check_memory(rows)
    checked("temperature", temperature)


def _value(input: Tensor, target: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    _check(input, target, temperature)
    call = _bridge.prepare(input, target, None, None)
    log_prob, entropy = (torch.zeros(call.rows, dtype=call.acc, device="cpu") for _ in range(2))
    if input.numel() > 0:
        _bridge.run_task(
            "log_prob_and_entropy", call, call.x, _FLAGS, loss=log_prob.data_ptr(), entropy=entropy.data_ptr(),
            ignore=ignore_index, temperature=temperature,
        )  # fmt: skip
    return log_prob, entropy


def _gradient(
    of_log_prob: Tensor, of_entropy: Tensor, input: Tensor, target: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    """Return the gradient with respect to the input, given the gradients with respect to both results."""
    for rows in (of_log_prob, of_entropy):
        _check(input, target, temperature, rows)
    result = _bridge.gradient_like(input)
    if input.numel() == 0:
        return result
    call, v = _bridge.prepare(input, target, None, of_log_prob), as_float64(of_entropy)
    g = result if _bridge.lies_well(result, call.x, call.axis) else torch.empty_like(call.x)
    _bridge.run_task(
        "log_prob_and_entropy_grad", call, g, _FLAGS, v=v.data_ptr(), factor=1.0 / temperature, ignore=ignore_index,
        temperature=temperature,
    )  # fmt: skip
    return result if g is result else result.copy_(g)


def _value_fake(input: Tensor, target: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    if target.device != input.device:
        raise RuntimeError(f"Expected all tensors to be on the same device, got {input.device} and {target.device}")
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(target.shape, dtype=dtype), input.new_empty(target.shape, dtype=dtype)


def _gradient_fake(of_log_prob: Tensor, of_entropy: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def _context(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    input, target, *ctx.options = inputs
    ctx.save_for_backward(input, target)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    input, target = ctx.saved_tensors
    none = (None,) * 3
    gradients = tuple(g if g.layout == torch.strided else g.to_dense() for g in gradients)
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or any(is_dual(g) for g in gradients)):
        return differentiable_gradient(lambda: decomposition(input, target, *ctx.options), input, gradients), *none
    return backward_operator(*gradients, input, target, *ctx.options), *none


_NAME, _BACKWARD = "fastxent::log_prob_and_entropy", "fastxent::log_prob_and_entropy_backward"
_ARGUMENTS = f"Tensor input, Tensor target, {schema('temperature', 'ignore_index')}"
torch.library.define(_NAME, f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(_BACKWARD, f"(Tensor of_log_prob, Tensor of_entropy, {_ARGUMENTS}) -> Tensor")
torch.library.impl(_NAME, "CPU", _value)
torch.library.impl(_BACKWARD, "CPU", _gradient)
torch.library.register_fake(_NAME, _value_fake)
torch.library.register_fake(_BACKWARD, _gradient_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_context)
operator = torch.ops.fastxent.log_prob_and_entropy
backward_operator = torch.ops.fastxent.log_prob_and_entropy_backward
