"""A small language model, trained twice: with PyTorch's loss of whole logits, and with fastxent's loss of the linear layer.

The model is the neural probabilistic language model of Bengio et al. (JMLR 3, 2003). It predicts a word from those before it,

    h = tanh(A [e_1, ..., e_k] + a),   e_i the embedding of the i-th word of the context
    z = W h + b,                       one logit for each word, which cross_entropy takes

and its text is real: the sources of Python's standard library. Both trainings begin with the same weights and see the same
batches, so their losses differ by rounding errors only, as long as the gradients are the same.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxent._codegen.patience import quietly
from fastxent.torch import linear_cross_entropy

LIMIT = 1e-5  # of the relative difference of two losses, in float32
PLAIN, OURS = "PyTorch", "fastxent"
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
OTHERS = {"site-packages", "dist-packages", "test", "tests"}  # folders in there that depend on what else is installed

Text = npt.NDArray[np.int64]  # the words by their numbers, most frequent first
Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]  # of the head, its input and the target


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model and of its training."""

    steps: int = 200
    tokens: int = 1024  # that a step predicts
    words: int = 32000  # classes of the head
    context: int = 4  # words from which one is predicted
    features: int = 64  # of an embedding, and of the head's input


@dataclass
class Training:
    """What one of the trainings has shown so far."""

    name: str
    losses: list[float] = field(default_factory=list)  # of each step
    seconds: list[float] = field(default_factory=list)  # likewise
    peak_memory: float = math.nan  # of its process, in bytes; nan where the system does not tell

    @property
    def step_seconds(self) -> float:
        return float(np.median(self.seconds[1:]))  # the first step loads libraries


@dataclass(frozen=True)
class Result:
    """The results of the demo."""

    sizes: Sizes
    plain: Training
    ours: Training

    @property
    def difference(self) -> float:
        """The largest relative difference of two losses of one step."""
        return float(np.max(np.abs(np.divide(self.ours.losses, self.plain.losses) - 1.0)))

    @property
    def passed(self) -> bool:
        return self.difference <= LIMIT  # False for nan


def plain_loss(head: nn.Linear, hidden: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), target)


def our_loss(head: nn.Linear, hidden: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias)


LOSSES: dict[str, Loss] = {PLAIN: plain_loss, OURS: our_loss}


def run(
    sizes: Sizes,
    losses: Mapping[str, Loss] = LOSSES,
    folder: Path = STANDARD_LIBRARY,
    progress: Callable[..., None] | None = None,
) -> Result:
    """Train once with each loss, in processes of their own that take their steps in turn.

    The losses, named ``PLAIN`` and ``OURS``, are functions at the top of a module, where other processes find them. The text is
    that of all Python sources in a folder. ``progress(steps_done, steps_total)`` is called after each step. An EOFError means
    that a training has ended early.
    """
    text = read(folder, sizes.words)
    with _process(losses[OURS], text, sizes) as pipe:  # compiles the kernels, or loads them: whoever does holds more memory
        _step(pipe, Training(OURS))
    result = Result(sizes, Training(PLAIN), Training(OURS))
    with ExitStack() as stack:
        trainings = [(stack.enter_context(_process(losses[t.name], text, sizes)), t) for t in (result.plain, result.ours)]
        for done in range(sizes.steps):
            for pipe, training in trainings:  # in turn: what else the machine does slows both
                _step(pipe, training)
            if progress is not None:
                progress(done + 1, sizes.steps)
    return result


def read(folder: Path, n_words: int) -> Text:
    """Return the words of all sources in a folder. Number ``n_words - 1`` stands for all but the most frequent ones."""
    files = sorted(file for file in folder.rglob("*.py") if not OTHERS & set(file.relative_to(folder).parts))
    words = [word for file in files for word in re.findall(r"\w+|[^\w\s]", file.read_text("utf-8", errors="replace"))]
    numbers = {word: number for number, (word, _) in enumerate(Counter(words).most_common(n_words - 1))}
    return np.fromiter((numbers.get(word, n_words - 1) for word in words), np.int64, len(words))


class Model(nn.Module):  # all layers but the head
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.words, sizes.features)
        self.hidden = nn.Linear(sizes.context * sizes.features, sizes.features)
        self.head = nn.Linear(sizes.features, sizes.words)

    def forward(self, context: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.embedding(context).flatten(1)))


def train(loss: Loss, text: Text, sizes: Sizes) -> Iterator[float]:
    """Yield the loss of each step. The weights to begin with, and the batches, are the same in every call."""
    torch.manual_seed(0)
    words, model = torch.from_numpy(text), Model(sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    while True:
        first = torch.randint(len(words) - sizes.context, (sizes.tokens, 1))
        context = words[first + torch.arange(sizes.context)]
        optimizer.zero_grad()
        value = loss(model.head, model(context), words[first[:, 0] + sizes.context])
        value.backward()
        optimizer.step()
        yield value.item()


@contextmanager
def _process(*arguments: Any) -> Iterator[Connection]:
    """Run `_answer` in a process of its own; yield the connection with it."""
    context = get_context("spawn")  # a fork would begin with the memory of this process
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, *arguments), daemon=True)
    process.start()
    there.close()  # then `here` ends with the process
    try:
        yield here
    finally:
        process.terminate()
        process.join()


def _answer(pipe: Connection, loss: Loss, text: Text, sizes: Sizes) -> None:
    """Take a training step for each message."""
    signal(SIGINT, SIG_IGN)  # Ctrl-C is for the process that started this one, and will end it
    losses = train(loss, text, sizes)
    with quietly():
        while True:
            pipe.recv()
            start = perf_counter()
            value = next(losses)
            pipe.send((value, perf_counter() - start, _peak_memory()))


def _step(pipe: Connection, training: Training) -> None:
    pipe.send(None)
    loss, seconds, training.peak_memory = pipe.recv()
    training.losses.append(loss)
    training.seconds.append(seconds)


def _peak_memory() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # only Linux tells
        return math.nan
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
