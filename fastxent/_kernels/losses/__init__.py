"""Kernels that are no cross-entropy of logits: ``pointwise`` (binary loss, KL divergence), ``sums`` (entropy, weighted sums
of exponentials). Each file begins with its formulas.
"""
