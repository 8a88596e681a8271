"""The losses, one file each, which begins with its derivation.

A loss of the softmax is a module with a row formula in two halves: ``put_loss`` (and ``put_zero_loss``, for ignored rows) turns
the sums of a row into its loss, ``coefficients`` into those of the gradient. ``cross_entropy`` and ``log_prob_entropy`` are
such. The others are kernels by themselves: ``softmax``, ``statistics``, ``hessian``; and what is no softmax of logits:
``pointwise`` (binary loss, KL divergence), ``sums`` (entropy, weighted sums of exponentials). A new one gets a line in
``_kernels.tasks`` and one in ``_abi.tasks``.
"""
