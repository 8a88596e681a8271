"""PyTorch's cross-entropy on the CPU, through fastxent: replace one import, or call `install`.

    from fastxent.torch import cross_entropy        # instead of torch.nn.functional's

This package is an adapter: shapes, dtypes and autograd are PyTorch's, the maths is in ``fastxent._kernels.losses``. The public
functions are in this module; read ``_dispatch`` next. The other modules:

* ``_callcache`` looks up stored calls by the keys of ``_keys`` and runs them (``_calls``). ``_fastpath`` skips the call cache
  where it is turned off.
* ``_dispatch`` routes the calls. It passes on what the kernels take; everything else (other devices, odd dtypes, wrong shapes)
  goes to PyTorch itself, whose result or error the caller then gets.
* ``_watched`` tells whether a compiler, a tracer or a dispatch mode observes operators: then ours are called as operators.
* ``_bridge`` turns tensors into addresses and runs the kernels.
* ``_autograd`` is the autograd node of eager mode. For mean and sum, the forward computes the gradient and the backward
  returns it. For none, the backward computes it, since only then each row's grad_output, a sample weight, is known.
* ``_operators`` defines ``torch.ops.fastxent``, which ``torch.compile``, ``torch.export`` and dispatch modes see.
* ``_decomposition`` computes the loss with PyTorch's operators. It serves what must be differentiated further: double backward,
  forward-mode AD, ``torch.func``, probabilities that require a gradient.
* ``_policy`` is `log_prob_and_entropy`, from the operator to the backward.
* ``_linear`` is `linear_cross_entropy`, which ``_linear_operators`` runs block by block (``_linear_blocks``);
  ``_linear_policy`` is `linear_log_prob_and_entropy`.
* ``_class_shards``, ``_linear_shards`` and ``_shard_messages`` are for ``fastxent.distributed``, which imports them.
* ``_install`` replaces PyTorch's cross-entropy in the whole process.
"""

from __future__ import annotations

import struct

try:
    import torch
except ImportError as error:
    raise ImportError("fastxent.torch needs PyTorch: pip install 'fastxent[torch]'", name="torch") from error
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastxent.torch._dispatch import route
from fastxent.torch._fastpath import lookup
from fastxent.torch._install import install, installed, uninstall
from fastxent.torch._linear import LinearCrossEntropyLoss, linear_cross_entropy
from fastxent.torch._linear_policy import linear_log_prob_and_entropy
from fastxent.torch._policy import log_prob_and_entropy

__all__ = [
    "CrossEntropyLoss", "LinearCrossEntropyLoss", "cross_entropy", "install", "installed", "linear_cross_entropy",
    "linear_log_prob_and_entropy", "log_prob_and_entropy", "uninstall",
]  # fmt: skip


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace: bool = False,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""``torch.nn.functional.cross_entropy``, with some additional options.

    .. math::
        l_n = u_n \left[-\sum_c q_{nc} \log p_{nc} + z\, \mathrm{lse}_n^2\right], \qquad
        q_{nc} = w_c \left[(1 - \epsilon)\, t_{nc} + \epsilon / C\right], \qquad
        p_n = \mathrm{softmax}(x_n)

    Parameters
    ----------
    input : Tensor, shape (C,), (N, C) or (N, C, d1, ...)
        Logits x; float16, bfloat16, float32 or float64, any strides.
    target : Tensor
        Class indices (any integer dtype), shape (), (N,) or (N, d1, ...); or class probabilities t, the shape of ``input``.
    weight, ignore_index, reduction, label_smoothing, size_average, reduce
        As in PyTorch.
    inplace : bool
        Permission for the gradient, when one is needed, to overwrite the logits: no second array of their size is allocated.
        Their version counter is incremented, so autograd raises where they are needed elsewhere. ``torch.compile`` does not use
        the permission.
    sample_weight : Tensor, shape of the rows, optional
        Sample weights u. For "mean" the divisor is the sum of u w_y (class indices) or of u (class probabilities).
    z_loss : float
        z, which pulls the log-normaliser lse to 0; not multiplied by ``weight``.
    softcap : float, optional
        Use softcap * tanh(x / softcap) in place of x.

    Returns
    -------
    Tensor
        A number, or with ``reduction="none"`` a tensor of the shape of the rows; dtype as PyTorch's, under autocast float32 at
        least.

    Raises
    ------
    IndexError, RuntimeError, TypeError, ValueError
        Where PyTorch raises them, with its messages; also for ``label_smoothing < 0``, for sample weights that are not dense.

    References
    ----------
    ``torch.nn.functional.cross_entropy``. z-loss: Chowdhery et al., *PaLM*, arXiv:2204.02311, 5. Soft cap: Gemma Team,
    *Gemma 2*, arXiv:2408.00118, 2.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import cross_entropy
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([1, 3]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}")
    1.3863
    >>> logits.grad
    tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    """
    if has_torch_function_variadic(input, target, weight, sample_weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight, sample_weight), input, target, weight, size_average, ignore_index,
            reduce, reduction, label_smoothing, inplace=inplace, sample_weight=sample_weight, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    number = nn._reduction.get_enum(reduction)
    options = (number, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    try:
        if sample_weight is None and (loss := lookup(input, target, weight, options, inplace)) is not None:
            return loss
        return route(input, target, weight, sample_weight, options, inplace)
    except (AttributeError, TypeError, struct.error):
        # If an argument that PyTorch has too is of a wrong type, PyTorch's parser raises an error that names it.
        torch._C._nn.cross_entropy_loss(input, target, weight, number, ignore_index, label_smoothing)  # type: ignore[arg-type]
        for name, option in {"z_loss": z_loss, "softcap": softcap or 0.0}.items():
            if not hasattr(option, "__float__"):
                raise TypeError(f"cross_entropy(): argument '{name}' must be float, not {type(option).__name__}") from None
        raise


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` through fastxent; formula, shapes, errors and sources as in `cross_entropy`.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in PyTorch.
    inplace, z_loss, softcap
        As in `cross_entropy`.

    Raises
    ------
    IndexError, RuntimeError, TypeError, ValueError
        As in `cross_entropy`.
    NotImplementedError
        In ``torch.jit.script``, with z_loss or softcap. A scripted or traced module consists of PyTorch's operators.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import CrossEntropyLoss
    >>> loss = CrossEntropyLoss(label_smoothing=0.1)
    >>> print(f"{loss(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])).item():.4f}")
    0.5137
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace: bool = False,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace, self.z_loss, self.softcap = inplace, z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # what TorchScript saves must run without fastxent
            capped = False
            if self.softcap is not None:
                capped = self.softcap != 0.0
            if self.z_loss != 0.0 or capped:
                raise NotImplementedError("CrossEntropyLoss: TorchScript has no z_loss and no softcap")
            return nn.functional.cross_entropy(
                input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )  # fmt: skip
        else:
            return cross_entropy(
                input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
                label_smoothing=self.label_smoothing, inplace=self.inplace, z_loss=self.z_loss, softcap=self.softcap,
            )  # fmt: skip
