"""``torch.ops.fastxent.linear_cross_entropy``: what runs the blocks, and its backward. Eager mode calls the operators too.

For mean and sum the forward makes the gradients of input, weight and bias, and the backward multiplies them by grad_output. For
none the backward makes them, since only then each row's grad_output is known: it computes the logits a second time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.compiler import is_compiling
from torch.nn import functional as F

from fastxent._runtime.options import flags_of, schema
from fastxent.torch import _bridge
from fastxent.torch._autograd import is_dual, stands_for_others
from fastxent.torch._bridge import MEAN, NONE, STORAGE, SUM, Options, as_float64, as_int64, out_of_bounds
from fastxent.torch._decomposition import decomposition, differentiable_gradients, loss_dtype
from fastxent.torch._linear_blocks import Block, Gradients, Layer, blocks
from fastxent.torch._operators import value_fake
from fastxent.torch._watched import is_seen_by_a_mode

# input, linear_weight, target, linear_bias, weight, sample_weight
Tensors = Sequence[Any]
_N_TENSORS = 6
_N_ARGUMENTS = _N_TENSORS + len(Options._fields)
PLACES = 0, 1, 3  # of what has a gradient
LAYER_SCHEMA = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias"
_ARGUMENTS = f"{LAYER_SCHEMA}, {schema('weight', 'sample_weight', *Options._fields, 'memory_limit')}"


def layer_of(tensors: Tensors) -> Layer:
    return Layer(*(tensors[at] for at in PLACES))


def _parts(arguments: Tensors) -> tuple[Tensors, Options, int | None]:
    """Return an operator's tensors, options and memory limit."""
    return arguments[:_N_TENSORS], Options(*arguments[_N_TENSORS:_N_ARGUMENTS]), arguments[_N_ARGUMENTS]


# ----------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------


def check_layer(layer: Layer) -> None:
    """Check the operands of products: a traced graph or a hook on saved tensors may pass anything."""
    x, w, b = layer
    for name, t in layer._asdict().items():
        if t is not None and not (t.is_cpu and t.layout == torch.strided and not t.is_nested):
            raise RuntimeError(f"Expected {name} to be a dense tensor on the CPU, got one of {t.layout} on {t.device}")
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or (b is not None and b.shape != w.shape[:1]):
        found = f"input: {list(x.shape)}, linear_weight: {list(w.shape)}, linear_bias: {None if b is None else list(b.shape)}"
        raise RuntimeError(f"size mismatch (got {found})")
    if x.dtype not in STORAGE or w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
        raise RuntimeError(f"expected floating point numbers of one dtype, got {[t.dtype for t in layer if t is not None]}")
    _bridge.check_memory(*layer)


def stand_in(layer: Layer) -> Tensor:
    """Return a tensor with the shape of the logits, and the memory of one of them."""
    return layer.input.new_empty(()).expand(layer.input.shape[0], layer.linear_weight.shape[0])


class Rows(NamedTuple):
    """The targets of the rows that are computed."""

    kept: Tensor | None  # their numbers; None: all rows
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    divisor: float  # of the loss


def rows_of(tensors: Tensors, options: Options) -> Rows:
    """Check the targets, and drop the rows that are ignored."""
    target, weight, sample_weight = tensors[2], tensors[4], tensors[5]
    _bridge.check_operands(stand_in(layer_of(tensors)), target, weight, sample_weight)
    _bridge.check_memory(target, weight, sample_weight)
    u = None if sample_weight is None else as_float64(sample_weight)
    average = options.reduction == MEAN
    if target.dtype in STORAGE:
        divisor = float(len(target) if u is None else u.sum()) if average else 1.0
        return Rows(None, target, weight, u, divisor)
    n_classes = len(tensors[1])
    y, kept = as_int64(target), None
    is_kept = y != options.ignore_index
    if not is_kept.all():
        kept = is_kept.nonzero().squeeze(1)
        y, u = y[kept], None if u is None else u[kept]
    if ((y < 0) | (y >= n_classes)).any():
        raise out_of_bounds(target, n_classes, options.ignore_index)
    divisor = 1.0
    if average and weight is not None:
        counted = as_float64(weight)[y]
        divisor = float((counted if u is None else counted * u).sum())
    elif average:
        divisor = float(len(y) if u is None else u.sum())
    return Rows(kept, y, weight, u, divisor)


# ----------------------------------------------------------------------------------------------------
# Block by block
# ----------------------------------------------------------------------------------------------------


def _run(name: str, block: Block, rows: Rows, options: Options, losses: Tensor | None) -> float:
    """Run a task over the logits of a block, return its sum and write its losses; a gradient overwrites the logits."""
    u = None if rows.sample_weight is None else rows.sample_weight[block.part]
    call = _bridge.prepare(block.logits, rows.target[block.part], rows.weight, u)
    made = None if losses is None else losses.new_empty(len(block.logits))
    total, _ = _bridge.run_task(
        name, call, block.logits, flags_of(call.y is not None, *options[1:]), loss=_bridge.address(made),
        divisor=rows.divisor, **_bridge.fields(options, block.logits.shape[1]),
    )  # fmt: skip
    if losses is not None and made is not None:
        losses[block.rows] = made
    return total


def _accumulated(tensors: Tensors) -> torch.dtype:
    """Return the dtype of the losses, before they are rounded."""
    return torch.promote_types(loss_dtype(tensors[0], tensors[2], tensors[4]), torch.float32)


def _by_whole_logits(tensors: Tensors, options: Options) -> Tensor:
    """Return the loss as an expression of differentiable operators."""
    _, _, target, _, weight, sample_weight = tensors
    return decomposition(F.linear(*layer_of(tensors)), target, weight, sample_weight, options)


def _value(*arguments: Any) -> Tensor:
    tensors, options, memory_limit = _parts(arguments)
    layer = layer_of(tensors)
    check_layer(layer)
    rows, acc = rows_of(tensors, options), _accumulated(tensors)
    if stand_in(layer).numel() == 0:
        return _by_whole_logits(tensors, options).to(acc)
    losses = torch.zeros(len(layer.input), dtype=acc, device="cpu") if options.reduction == NONE else None
    totals = [_run("value", block, rows, options, losses) for block in blocks(layer, rows.kept, memory_limit)]
    return _bridge.scalar(_sum(totals) / (rows.divisor or math.nan), acc) if losses is None else losses


def _value_and_grad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, reduced, and the gradients of input, weight and bias."""
    tensors, options, memory_limit = _parts(arguments)
    layer = layer_of(tensors)
    check_layer(layer)
    rows = rows_of(tensors, options)
    gradients = Gradients(layer, arguments[-1], rows.kept)
    if stand_in(layer).numel() == 0:
        return _by_whole_logits(tensors, options).to(_accumulated(tensors)), *gradients.held()
    totals = []
    for block in blocks(layer, rows.kept, memory_limit):
        totals.append(_run("value_and_grad", block, rows, options, None))
        gradients.add(block)
    loss = _bridge.scalar(_sum(totals) / (rows.divisor or math.nan), _accumulated(tensors))
    return loss, *gradients.held()


def _sum(totals: list[float]) -> float:
    """Return the sum of the blocks' totals, rounded once."""
    try:
        return math.fsum(totals)
    except (ValueError, OverflowError):  # infinities, of which fsum makes an error
        return sum(totals)


# ----------------------------------------------------------------------------------------------------
# The backward
# ----------------------------------------------------------------------------------------------------


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    """Save what the backward of either operator needs; the second one has made the gradients already."""
    gradients = output[1:] if isinstance(output, tuple) else ()
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # or zeros would be made for the gradients, which are outputs too
    _, ctx.options, ctx.memory_limit = _parts(inputs)
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(*inputs[:_N_TENSORS], *gradients)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = [None] * ctx.n_inputs
    if grad_output is not None:
        saved = ctx.saved_tensors  # looked at once: a checkpoint computes them anew each time
        tensors, made = saved[:_N_TENSORS], saved[_N_TENSORS:]
        places = [at for at in PLACES if ctx.needs_input_grad[at]]
        gradients = _gradients(ctx, tensors, made, places, grad_output)
        for at, gradient in zip(places, gradients, strict=True):
            results[at] = gradient.to(tensors[at].dtype)
    return tuple(results)


def _gradients(
    ctx: Any, tensors: Tensors, made: Sequence[Tensor], places: Sequence[int], grad_output: Tensor
) -> Sequence[Tensor]:
    """Return the gradients of the tensors at ``places``, times ``grad_output``."""
    if grad_output.layout != torch.strided:
        grad_output = grad_output.to_dense()
    options = ctx.options
    stands = not is_compiling() and (stands_for_others(grad_output) or is_dual(grad_output))
    if not is_compiling() and (torch.is_grad_enabled() or (stands and options.reduction == NONE)):
        return differentiable_gradients(
            lambda: [_by_whole_logits(tensors, options)], [tensors[at] for at in places], [grad_output]
        )
    if options.reduction == NONE or not made:
        sample_weight = tensors[5]
        if options.reduction == NONE:
            sample_weight = grad_output if sample_weight is None else grad_output * sample_weight
            options = options._replace(reduction=SUM)
        wanted = [at in places for at in PLACES]
        _, *made = value_and_grad_op(*tensors[:5], sample_weight, *options, ctx.memory_limit, wanted)
    made = [gradient for gradient, at in zip(made, PLACES, strict=True) if at in places]
    return made if ctx.options.reduction == NONE else _times(made, grad_output, stands)


def _times(gradients: Sequence[Tensor], grad_output: Tensor, stands: bool) -> Sequence[Tensor]:
    if stands or is_compiling() or is_seen_by_a_mode() or type(grad_output) is not Tensor:
        return [gradient * grad_output for gradient in gradients]  # its value must not be read
    factor = grad_output.item()
    if _get_current_graph_task_keep_graph():  # another backward needs them
        return [gradient * factor for gradient in gradients]
    return gradients if factor == 1.0 else [gradient.mul_(factor) for gradient in gradients]


# ----------------------------------------------------------------------------------------------------
# The operators
# ----------------------------------------------------------------------------------------------------


def _value_fake(*arguments: Any) -> Tensor:
    tensors, options, _ = _parts(arguments)
    layer = layer_of(tensors)
    for other in layer[1:]:
        if other is not None and other.device != layer.input.device:
            raise RuntimeError(f"Expected all tensors to be on the same device, got {layer.input.device} and {other.device}")
    return value_fake(stand_in(layer), tensors[2], *tensors[4:], options.reduction)


def _value_and_grad_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _value_fake(*arguments), *gradients_fake(layer_of(arguments), arguments[-1])


def gradients_fake(layer: Layer, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    x, w, b = (
        layer.input.new_empty(t.shape if t is not None and is_wanted else (0,), dtype=layer.held)
        for t, is_wanted in zip(layer, wanted, strict=True)
    )
    return x, w, b


_NAME, _WITH_GRADIENTS = "fastxent::linear_cross_entropy", "fastxent::linear_cross_entropy_value_and_grad"
torch.library.define(_NAME, f"({_ARGUMENTS}) -> Tensor")
torch.library.define(_WITH_GRADIENTS, f"({_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.impl(_NAME, "CPU", _value)
torch.library.impl(_WITH_GRADIENTS, "CPU", _value_and_grad)
torch.library.register_fake(_NAME, _value_fake)
torch.library.register_fake(_WITH_GRADIENTS, _value_and_grad_fake)
for _operator in (_NAME, _WITH_GRADIENTS):
    torch.library.register_autograd(_operator, _backward, setup_context=_context)
value_op = torch.ops.fastxent.linear_cross_entropy
value_and_grad_op = torch.ops.fastxent.linear_cross_entropy_value_and_grad
