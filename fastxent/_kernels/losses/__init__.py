"""The losses, one file each, which begins with its derivation.

A loss of the softmax is a module with a row formula in two halves: ``put_loss`` (``put_zero_loss`` for ignored rows) turns the
sums of a row into its loss, and ``coefficients`` turns them into the coefficients of the gradient. ``cross_entropy``,
``focal`` and ``log_prob_entropy`` are such modules; ``class_shard`` has the first half and another kernel for the gradient. The
other files hold whole kernels: ``softmax``, ``statistics`` and ``hessian``, and two that take no softmax of logits:
``pointwise`` (binary loss, KL divergence) and ``sums`` (entropy, weighted sums of exponentials). A new loss gets a line in
``_kernels.tasks`` and one in ``_abi.tasks``.
"""
