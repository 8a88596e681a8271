"""Cross-entropy whose classes are sharded over the processes of a ``torch.distributed`` group (vocabulary-parallel).

Each process goes through its shard's logits once and exchanges two messages: the rows' maxima, then their sums, which all merge
in float64 (``fastxent.torch._class_shards``). The backward goes through the shard once more. For logits it sends nothing; for a
linear layer it adds up the gradient of the input, which is one message.
"""

from __future__ import annotations

from typing import Any

try:
    import torch.distributed as dist
except ImportError as error:
    raise ImportError("fastxent.distributed needs PyTorch: pip install 'fastxent[distributed]'", name="torch") from error
from torch import Tensor, is_grad_enabled, nn

from fastxent._runtime.options import check_integer, checked
from fastxent.torch import _bridge
from fastxent.torch._bridge import INTEGERS, NONE, Options
from fastxent.torch._class_shards import CrossEntropy
from fastxent.torch._decomposition import loss_dtype
from fastxent.torch._dispatch import require_tensors
from fastxent.torch._linear import flat_layer, shape_of_logits
from fastxent.torch._linear_operators import check_layer, stand_in
from fastxent.torch._linear_shards import LinearCrossEntropy
from fastxent.torch._shard_messages import errors_in_all, group_of

__all__ = ["cross_entropy", "linear_cross_entropy"]


def cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax cross-entropy of logits of which each process of a group holds a shard of the classes.

    .. math::
        l_n = u_n \left[-\sum_c q_{nc} \log p_{nc} + z\, \mathrm{lse}_n^2\right], \qquad
        q_{nc} = w_c \left[(1 - \epsilon)\, [c = y_n] + \epsilon / C\right]

    over all C classes of the group: the sum over a row's classes is merged from those of the shards,

    .. math::
        \mathrm{lse}_n = M_n + \log \sum_r s_{nr}\, e^{m_{nr} - M_n}, \qquad M_n = \max_r m_{nr}

    with the maximum m and the sum s of exponentials of shard r. Every process of the group calls this function, with its own
    shard, and otherwise with the same arguments, and its backward. The forward sends two all-reduces, the backward none.

    Parameters
    ----------
    local_logits : Tensor, shape (C_r,), (N, C_r) or (N, C_r, d1, ...)
        This process's classes; float16, bfloat16, float32 or float64, any strides. Shards follow one another in the order of
        the ranks; they may differ in size, and be empty. Or a ``DTensor`` that is sharded on the class axis, which brings its
        group along; if it is sharded on rows too, the loss is that of this process's rows.
    target : Tensor of any integer dtype, shape (), (N,) or (N, d1, ...)
        Class indices y, counted over all shards.
    group : ProcessGroup, optional
        The processes that hold the shards; None: all.
    vocab_start : int, optional
        The number of the shard's first class. It follows from the sizes of the shards, and if given, it is compared with that.
    weight : Tensor, shape (C_r,), optional
        Class weights w of the shard's classes.
    sample_weight : Tensor, shape of ``target``, optional
        Sample weights u.
    ignore_index : int
        Rows with this class index are skipped: loss 0, gradient 0, not counted.
    label_smoothing : float in [0, 1]
        eps, spread over the classes of all shards.
    z_loss : float
        z, which pulls the log-normaliser lse to 0.
    reduction : {"mean", "sum", "none"}
        As in `fastxent.torch.cross_entropy`.

    Returns
    -------
    Tensor
        The loss of the whole rows, with the same bits in every process: a number, or with ``reduction="none"`` a tensor of the
        shape of ``target``. Its backward gives each process the gradient of its shard.

    Raises
    ------
    IndexError
        A class index is neither ``ignore_index`` nor that of a class. All processes raise it, even if it is in one of them.
    ValueError
        An argument that must be the same in all processes is not, ``vocab_start`` is not what the sizes say: all raise it.
    ValueError, TypeError, RuntimeError
        An argument does not fit, or a weight requires a gradient, which is not computed; the processes whose own arguments are
        right raise a RuntimeError then.

    Notes
    -----
    The first message also compares the processes' arguments, so that none waits for one that has raised an error. It has room
    for 1024 rows, or for as many as the group's largest call so far had; a call with more sends a third message, once.

    References
    ----------
    Shoeybi et al., *Megatron-LM*, arXiv:1909.08053, 3. Milakov, Gimelshein, arXiv:1805.02867.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from fastxent.distributed import cross_entropy
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([1, 3]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}")
    1.3863
    >>> logits.grad
    tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    >>> dist.destroy_process_group()
    """
    local_logits, group = _shard_and_group(local_logits, "local_logits", 1, group)
    with errors_in_all(group):
        target, weight, sample_weight = _local(target), _local(weight), _local(sample_weight)
        options, vocab_start = _options(reduction, ignore_index, label_smoothing, z_loss), _start(vocab_start)
        required = {"local_logits": local_logits, "target": target}
        require_tensors("cross_entropy", required, {"weight": weight, "sample_weight": sample_weight})
        _check_indices(target)
        _check_constants(weight, sample_weight)
        _bridge.check_operands(local_logits, target, weight, sample_weight)
    return CrossEntropy.apply(local_logits, weight, target, sample_weight, group, vocab_start, options)


def linear_cross_entropy(
    input: Tensor,
    local_linear_weight: Tensor,
    target: Tensor,
    *,
    local_linear_bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    memory_limit: int | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of a linear layer of which each process holds a shard of the classes, without the logits.

    .. math::
        l_n = \mathrm{cross\_entropy}(x_n, y_n), \qquad x_{nc} = W_c \cdot h_n + b_c

    over all C classes of the group, as in `cross_entropy`. Each process computes its logits block by block of rows, within
    ``memory_limit`` bytes, in the forward and again in the backward; no logit is sent. Rows that are ignored are dropped before
    the products. The gradient of the input is added up over the processes,

    .. math::
        \frac{\partial l}{\partial h_n} = \sum_r \sum_{c \in r} g_{nc} W_c

    so the layers below see all of it. The forward sends two all-reduces, and the backward one if ``input`` needs a gradient.

    Parameters
    ----------
    input : Tensor, shape (D,), (N, D) or (..., D)
        h, the same in all processes; float16, bfloat16, float32 or float64.
    local_linear_weight : Tensor, shape (C_r, D)
        This process's rows of W. Shards follow one another in the order of the ranks; they may differ in size, and be empty. Or
        a ``DTensor`` that is sharded on its first axis, which brings its group along.
    target : Tensor of any integer dtype, shape (...)
        Class indices y, counted over all shards.
    local_linear_bias : Tensor, shape (C_r,), optional
        b of the shard's classes.
    group, vocab_start, weight, sample_weight, ignore_index, label_smoothing, z_loss, reduction
        As in `cross_entropy`.
    memory_limit : int, optional
        As in `fastxent.torch.linear_cross_entropy`: most bytes that a process takes beside arguments and gradients.

    Returns
    -------
    Tensor
        As from `cross_entropy`. Its backward gives each process the gradients of its shard, and the whole one of the input.

    Raises
    ------
    IndexError, ValueError, TypeError, RuntimeError
        As in `cross_entropy`; also where the shapes of the layer do not fit, and for a memory limit that is not above 0.

    Notes
    -----
    Four products of the size of the shard, where one process alone needs three: the gradient needs the sums of all processes,
    so the logits are computed twice. If those of all rows are one block, they are kept for the backward, and it takes three. If
    the shards are not where they were in the group's last call with a shard of this size, the forward computes the logits once
    more. Half precision as in `fastxent.torch.linear_cross_entropy`.

    References
    ----------
    As of `cross_entropy`. Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, arXiv:2411.09009.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from fastxent.distributed import linear_cross_entropy
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
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
    >>> dist.destroy_process_group()
    """
    local_linear_weight, group = _shard_and_group(local_linear_weight, "local_linear_weight", 0, group)
    with errors_in_all(group):
        input, target, local_linear_bias = _local(input), _local(target), _local(local_linear_bias)
        weight, sample_weight = _local(weight), _local(sample_weight)
        options, vocab_start = _options(reduction, ignore_index, label_smoothing, z_loss), _start(vocab_start)
        memory_limit = checked("memory_limit", memory_limit)
        required = {"input": input, "local_linear_weight": local_linear_weight, "target": target}
        optional = {"local_linear_bias": local_linear_bias, "weight": weight, "sample_weight": sample_weight}
        require_tensors("linear_cross_entropy", required, optional)
        _check_indices(target)
        _check_constants(weight, sample_weight)
        rows = shape_of_logits(input, local_linear_weight, local_linear_bias)[:-1]
        for name, t in (("target", target), ("sample_weight", sample_weight)):
            if t is not None and t.shape != rows:
                raise RuntimeError(f"size mismatch (got rows: {list(rows)}, {name}: {list(t.shape)})")
        layer = flat_layer(input, local_linear_weight, local_linear_bias)
        check_layer(layer)
        flat, u = target.reshape(-1), None if sample_weight is None else sample_weight.reshape(-1)
        _bridge.check_operands(stand_in(layer), flat, weight, u)
    loss = LinearCrossEntropy.apply(*layer, weight, flat, u, group, vocab_start, options, memory_limit)
    return loss.reshape(rows if options.reduction == NONE else ()).to(loss_dtype(input, target, None))


# ----------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------


def _shard_and_group(shard: Any, name: str, axis: int, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.ProcessGroup]:
    """Return a shard as a tensor, and its group: of a DTensor, that over which its class axis is sharded.

    A DTensor has the same placements in all processes, so all of them raise this error without a message.
    """
    if not hasattr(shard, "to_local"):
        return shard, group_of(group)
    axis = min(axis, shard.dim() - 1)
    over = [dim for dim, placement in enumerate(shard.placements) if placement.is_shard(axis)]
    if len(over) != 1 or any(placement.is_partial() for placement in shard.placements):
        raise ValueError(f"{name} has placements {shard.placements}; one of them must shard the class axis, {axis}")
    return shard.to_local(), shard.device_mesh.get_group(over[0])


def _local(t: Any) -> Any:
    """Return a DTensor's local tensor, and anything else as it is."""
    if not hasattr(t, "to_local"):
        return t
    if any(placement.is_partial() for placement in t.placements):
        raise ValueError(f"a DTensor has placements {t.placements}; it must not be a partial sum")
    return t.to_local()


def _options(reduction: str, ignore_index: int, label_smoothing: float, z_loss: float) -> Options:
    return Options(
        nn._reduction.get_enum(reduction), checked("ignore_index", ignore_index),
        checked("label_smoothing", label_smoothing), checked("z_loss", z_loss), 0.0,
    )  # fmt: skip


def _start(vocab_start: int | None) -> int | None:
    if vocab_start is not None and check_integer(vocab_start, "vocab_start") < 0:
        raise ValueError(f"vocab_start = {vocab_start} is negative")
    return vocab_start


def _check_constants(weight: Tensor | None, sample_weight: Tensor | None) -> None:
    """Raise an error for weights that want a gradient, which would be lost."""
    for name, t in (("weight", weight), ("sample_weight", sample_weight)):
        if t is not None and t.requires_grad and is_grad_enabled():
            raise RuntimeError(f"{name} requires a gradient, which the sharded losses do not compute: pass {name}.detach()")


def _check_indices(target: Tensor) -> None:
    if target.dtype not in INTEGERS:
        raise TypeError(f"target has dtype {target.dtype}; a vocabulary-parallel cross_entropy takes class indices")
