"""What the processes and threads of the tests do. Other processes import it: it brings in nothing of the tests."""

from __future__ import annotations

import hashlib
import os
import time

import numpy as np

import fastxent as fx

rng = np.random.default_rng(7)
X = (4 * rng.standard_normal((1200, 150))).astype(np.float32)  # enough for several threads
Y = rng.integers(0, 150, 1200)


def result(number: object = None) -> str:
    """Loss and gradient, as a few letters; the same in every process and thread."""
    loss, gradient = fx.cross_entropy_value_and_grad(X, Y)
    return hashlib.sha256(loss.tobytes() + gradient.tobytes()).hexdigest()[:12]


def torch_result(number: object = None) -> str:
    import torch

    import fastxent.torch as fxt

    # No operator of PyTorch's own on arrays of this size: in a forked child they hang.
    x = torch.from_numpy(X).requires_grad_()
    loss = fxt.cross_entropy(x, torch.from_numpy(Y))
    (gradient,) = torch.autograd.grad(loss, x)
    return hashlib.sha256(loss.detach().numpy().tobytes() + gradient.numpy().tobytes()).hexdigest()[:12]


def both(number: object = None) -> tuple[str, str]:
    return result(), torch_result()


def in_a_fork(work: object = result, seconds: float = 60.0) -> object:
    """What ``work`` returns in a forked child, or "hangs", or how the child ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(work()).encode())  # type: ignore[operator]
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0.002)
    with os.fdopen(reader) as pipe:
        return pipe.read() or "died"


class Losses:
    """A dataset whose items are computed in the DataLoader's workers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> str:
        return torch_result()
