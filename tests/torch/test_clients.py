"""Whole programs as people run them: with PyTorch's loss and with ours, from one seed, they do the same."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastxent.torch as fxt
from tests.helpers.launches import counted
from tests.helpers.processes import run_script

STEPS = 200
LOSSES = {"ours": fxt.CrossEntropyLoss, "in place": lambda: fxt.CrossEntropyLoss(inplace=True)}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def train(make_model: Callable[[], nn.Module], batches: Callable[[], Iterator[tuple[Tensor, Tensor]]], criterion: Any) -> tuple:
    """The model and the loss of each step."""
    torch.manual_seed(1)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    curve = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return model, np.array(curve)


# ----------------------------------------------------------------------------------------------------
# Digits
# ----------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))


def digit_batches(x: Tensor, y: Tensor) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(2)
        for _ in range(STEPS):
            rows = torch.tensor(rng.integers(0, 1400, 128))
            yield x[rows], y[rows]

    return batches


@pytest.mark.parametrize("criterion", LOSSES.values(), ids=LOSSES)
def test_digits(criterion):
    x, y = digits()
    results = []
    for make in (nn.CrossEntropyLoss, criterion):
        with counted() as kernels:
            model, curve = train(classifier, digit_batches(x, y), make())
        assert kernels.count("value_and_grad") == (0 if make is nn.CrossEntropyLoss else STEPS)
        results.append((curve, (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()))
    (stock, accuracy), (ours, our_accuracy) = results
    np.testing.assert_allclose(ours, stock, rtol=1e-5)
    assert our_accuracy == accuracy > 0.9 and ours[-1] < 0.3 * ours[0]


# ----------------------------------------------------------------------------------------------------
# Characters
# ----------------------------------------------------------------------------------------------------

TEXT = "".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
CODES = torch.tensor([ALPHABET.index(c) for c in TEXT[:100_000]])
CONTEXT = 16


class Characters(nn.Module):
    """The next character, at each place, from a window of the last eight; logits as (batch, classes, place).

    Smooth: with a relu here one ulp of noise on PyTorch's own gradients changed the curve by 1e-3, for one of 2,000,000
    activations lay on the kink.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(len(ALPHABET), 24), nn.Conv1d(24, 64, 8), nn.Linear(64, len(ALPHABET))

    def forward(self, codes: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(F.pad(self.embed(codes).transpose(1, 2), (7, 0))))
        return self.head(hidden.transpose(1, 2)).transpose(1, 2)


def character_batches() -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(3)
    for _ in range(STEPS):
        starts = rng.integers(0, len(CODES) - CONTEXT - 1, 32)
        windows = torch.stack([CODES[s : s + CONTEXT + 1] for s in starts])
        yield windows[:, :-1], windows[:, 1:]


@pytest.mark.parametrize("criterion", LOSSES.values(), ids=LOSSES)
def test_characters(criterion):
    results = []
    for make in (nn.CrossEntropyLoss, criterion):
        model, curve = train(Characters, character_batches, make())
        windows = CODES[-2001:-1].reshape(50, 40)
        guess = model(windows)[:, :, :-1].argmax(1)
        results.append((curve, (guess == windows[:, 1:]).float().mean().item()))
    (stock, accuracy), (ours, our_accuracy) = results
    np.testing.assert_allclose(ours, stock, rtol=1e-5)
    assert our_accuracy == accuracy > 0.2 and ours[-1] < 0.7 * ours[0]


# ----------------------------------------------------------------------------------------------------
# transformers
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt2_of_transformers(dtype):
    """A library that computes its own loss: reached by `installed`, counted, and the same to the last steps."""
    transformers = pytest.importorskip("transformers", reason="extra dev")
    size = dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=len(ALPHABET))
    config = transformers.GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    curves, counts = [], []
    for inside in (nullcontext, fxt.installed):
        torch.manual_seed(4)
        model = transformers.GPT2LMHeadModel(config).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        curve = []
        with inside(), counted() as kernels:
            for step in range(20):
                codes = CODES[step * 256 : step * 256 + 256].reshape(8, 32)
                labels = codes.clone()
                labels[::3, :5] = -100  # prompts
                loss = model(input_ids=codes, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        curves.append(curve)
        counts.append(kernels.count("value_and_grad"))
    assert counts == [0, 20]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5 if dtype == torch.float32 else 2e-2)
    assert curves[1][-1] < 0.95 * curves[1][0]


# ----------------------------------------------------------------------------------------------------
# Processes and threads
# ----------------------------------------------------------------------------------------------------


class Weighed(Dataset):
    """Digits with their loss under a fixed model, computed in the worker."""

    def __init__(self) -> None:
        self.x, self.y = digits()
        self.table = torch.linspace(-1, 1, 640).reshape(64, 10)

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(i, i + 200)
        return self.x[i], self.y[i], fxt.cross_entropy(self.x[rows] @ self.table, self.y[rows])


@pytest.mark.parametrize("installed", [False, True])
def test_data_loader_with_forked_workers(installed):
    """The parent's pool of threads has run before the fork, and runs while the children compute losses of their own."""
    data, model = Weighed(), classifier()
    large = torch.zeros(2000, 1000, requires_grad=True)
    fxt.cross_entropy(large, torch.zeros(2000, dtype=torch.long)).backward()  # the pool is up
    loader = DataLoader(data, batch_size=64, num_workers=2, multiprocessing_context="fork", timeout=60)
    with fxt.installed() if installed else nullcontext():
        criterion = nn.CrossEntropyLoss() if installed else fxt.CrossEntropyLoss()
        for _ in range(2):
            for batch, (x, y, loss) in enumerate(loader):
                criterion(model(x), y).backward()
                fxt.cross_entropy(large, torch.zeros(2000, dtype=torch.long)).backward()
                rows = slice(64 * batch, 64 * batch + 200)
                torch.testing.assert_close(loss[0], F.cross_entropy(data.x[rows] @ data.table, data.y[rows]))
            assert batch == 15


def test_training_in_other_threads():
    """Three trainings at once, one of them in the main thread, each as if it were alone."""
    x, y = digits()
    _, alone = train(classifier, digit_batches(x, y), fxt.CrossEntropyLoss())
    curves: dict[int, np.ndarray] = {}

    def work(k: int) -> None:
        torch.set_num_threads(2)
        model = copy.deepcopy(fixed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        curve = []
        for a, b in digit_batches(x, y)():
            optimizer.zero_grad()
            loss = fxt.cross_entropy(model(a), b)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves[k] = np.array(curve)

    torch.manual_seed(1)
    fixed = classifier()
    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for k in range(3):
        np.testing.assert_allclose(curves[k], alone, rtol=1e-6)


def test_calls_from_many_threads_at_once():
    """Kernels of one pool, asked for by 8 threads: each gets its own answer, with threads inside threads."""
    cases = [(torch.full((256, 300), 0.1 * k).cumsum(1), torch.arange(256)) for k in range(8)]
    want = [torch.func.grad(F.cross_entropy)(*case) for case in cases]

    def work(k: int) -> list[Tensor]:
        found = []
        for _ in range(10):
            x = cases[k][0].clone().requires_grad_()
            fxt.cross_entropy(x, cases[k][1]).backward()
            found.append(x.grad)
        return found

    with ThreadPoolExecutor(8) as pool:
        for k, grads in enumerate(pool.map(work, range(8))):
            for g in grads:
                torch.testing.assert_close(g, want[k])


DDP = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import fastxent.torch as fxt
rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
torch.manual_seed(0)
inputs, target = torch.randn(64, 20), torch.arange(64) % 10
mine = slice(rank * 32, rank * 32 + 32)
curves = {}
losses = {"stock": nn.CrossEntropyLoss(), "ours": fxt.CrossEntropyLoss(), "in place": fxt.CrossEntropyLoss(inplace=True)}
for name, criterion in losses.items():
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    curve = []
    for step in range(30):
        optimizer.zero_grad()
        loss = criterion(model(inputs[mine]), target[mine])
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        curve.append(whole.item() / 2)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(both[0], both[1]), "the ranks have drifted apart"
    curves[name] = curve
dist.destroy_process_group()
print(json.dumps(curves))
"""


@pytest.mark.thorough
def test_distributed_data_parallel(tmp_path):
    """Two processes, gloo over loopback: gradients are averaged while the backward runs, and the ranks stay equal."""
    loopback = dict(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run_script, DDP, str(rank), str(tmp_path / "store"), **loopback) for rank in range(2)]
        curves = [json.loads(job.result().splitlines()[-1]) for job in jobs]
    assert curves[0] == curves[1]
    for name in ("ours", "in place"):
        np.testing.assert_allclose(curves[0][name], curves[0]["stock"], rtol=1e-5)
    assert curves[0]["ours"][-1] < 0.8 * curves[0]["ours"][0]
