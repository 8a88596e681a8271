"""Cross-entropy with classes sharded over processes: ours, PyTorch's `loss_parallel`, and logits that are gathered.

    python -m benchmarks.distributed                                        2 and 4 processes on gloo, one thread each
    python -m benchmarks.distributed --ranks 2 --logits 512,32000 --linear 512,512,32000 --rounds 15

Forward and backward are timed. A shape is rows, classes of all processes; of a linear layer rows, features, classes. All
methods run in the same processes, once a round, in an order that rotates; a sample is that of the slowest process. Ratios are
medians of the ratios within a round. Messages and bytes are those that one process hands to its collectives.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastxent.torch as ft
from benchmarks.measure import PAUSE, in_order, set_threads
from fastxent.distributed import cross_entropy, linear_cross_entropy

OURS = "ours"
LOGITS = ((512, 32000), (2048, 32000))
LINEAR = ((1024, 256, 32000),)
Step = Callable[[], tuple[Tensor, ...]]  # the loss, and this process's gradients


# ----------------------------------------------------------------------------------------------------
# The methods
# ----------------------------------------------------------------------------------------------------


def of_logits(n_rows: int, n_classes: int) -> dict[str, Step]:
    """The steps of this process, whose shard is drawn from its rank."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    size = n_classes // n_ranks
    mesh = init_device_mesh("cpu", (n_ranks,))
    x = 3 * torch.randn(n_rows, size, generator=torch.Generator().manual_seed(rank))
    y = torch.randint(size * n_ranks, (n_rows,), generator=torch.Generator().manual_seed(0))
    leaf, sharded = x.requires_grad_(), DTensor.from_local(x.detach(), mesh, [Shard(1)]).requires_grad_()

    def ours() -> tuple[Tensor, ...]:
        loss = cross_entropy(leaf, y)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    def parallel() -> tuple[Tensor, ...]:
        with loss_parallel():
            loss = F.cross_entropy(sharded, y)
            (grad,) = torch.autograd.grad(loss, sharded)
        return loss.to_local().detach(), grad.to_local()

    def by_gathering(loss_of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        whole = gathered(x.detach()).requires_grad_()
        loss = loss_of(whole, y)
        (grad,) = torch.autograd.grad(loss, whole)
        return loss.detach(), grad[:, rank * size : (rank + 1) * size]

    return {
        OURS: ours, "loss_parallel": parallel, "gathered, eager": partial(by_gathering, F.cross_entropy),
        "gathered, fastxent": partial(by_gathering, ft.cross_entropy),
    }  # fmt: skip


def of_linear(n_rows: int, n_features: int, n_classes: int) -> dict[str, Step]:
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    size = n_classes // n_ranks
    mesh = init_device_mesh("cpu", (n_ranks,))
    h = torch.randn(n_rows, n_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = (torch.randn(size, n_features, generator=torch.Generator().manual_seed(rank)) / n_features**0.5).requires_grad_()
    y = torch.randint(size * n_ranks, (n_rows,), generator=torch.Generator().manual_seed(0))
    h_of_all = DTensor.from_local(h.detach(), mesh, [Replicate()]).requires_grad_()
    w_sharded = DTensor.from_local(w.detach(), mesh, [Shard(0)]).requires_grad_()

    def ours(loss_of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = loss_of(h, w, y)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    def whole_shard() -> tuple[Tensor, ...]:
        loss = cross_entropy(F.linear(h, w), y)
        dh, dw = torch.autograd.grad(loss, (h, w))
        dist.all_reduce(dh)
        return loss.detach(), dh, dw

    def parallel() -> tuple[Tensor, ...]:
        with loss_parallel():
            loss = F.cross_entropy(F.linear(h_of_all, w_sharded), y)
            dh, dw = torch.autograd.grad(loss, (h_of_all, w_sharded))
        return loss.to_local().detach(), dh.redistribute(mesh, [Replicate()]).to_local(), dw.to_local()

    def by_gathering() -> tuple[Tensor, ...]:
        logits = F.linear(h, w)
        whole = gathered(logits.detach()).requires_grad_()
        loss = F.cross_entropy(whole, y)
        (grad,) = torch.autograd.grad(loss, whole)
        dh, dw = torch.autograd.grad(logits, (h, w), grad[:, rank * size : (rank + 1) * size])
        dist.all_reduce(dh)
        return loss.detach(), dh, dw

    return {
        OURS: partial(ours, linear_cross_entropy), "ours, the shard's logits whole": whole_shard, "loss_parallel": parallel,
        "gathered, eager": by_gathering,
    }  # fmt: skip


def gathered(x: Tensor) -> Tensor:
    """Return the logits of all processes."""
    n_ranks = dist.get_world_size()
    shards = [torch.empty_like(x) for _ in range(n_ranks)]
    dist.all_gather(shards, x)
    return torch.cat(shards, 1)


# ----------------------------------------------------------------------------------------------------
# What is measured
# ----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that this process hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if DTensor in types:  # it first becomes operators on tensors, and collectives
            return NotImplemented
        if op.namespace in ("c10d", "_c10d_functional") and ("reduce" in op.name() or "gather" in op.name()):
            handed = args[1] if "allgather" in op.name() else args[0]  # of a gathering c10d names the result first
            tensors = handed if isinstance(handed, (list, tuple)) else [handed]
            self.messages += 1
            self.bytes += sum(t.numel() * t.itemsize for t in tensors)
        return op(*args, **(kwargs or {}))


class Result(NamedTuple):
    samples: list[float]
    messages: int
    bytes: int


def measure(steps: dict[str, Step], n_threads: int, rounds: int, tolerance: float = 1e-4) -> dict[str, Result]:
    """Check that all methods give what ours gives, and time them; each process returns the same samples."""
    want, traffic = steps[OURS](), {}
    for name, step in steps.items():
        with Traffic() as traffic[name]:
            got = step()
        for a, b in zip(want, got, strict=True):
            error = float((a - b).abs().max() / b.abs().max())
            if not error <= tolerance:
                raise ArithmeticError(f"{name}: differs from ours by {error:.1e}")
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds):
        for name in in_order(list(steps), k):
            samples[name].append(time_step(steps[name], n_threads))
    return {name: Result(samples[name], traffic[name].messages, traffic[name].bytes) for name in steps}


def time_step(step: Callable[[], Any], n_threads: int) -> float:
    """Seconds from when all processes have begun to when the slowest of them is done."""
    set_threads(n_threads)
    time.sleep(PAUSE)
    dist.barrier()
    start = time.perf_counter()
    step()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def report(title: str, results: dict[str, Result]) -> None:
    print(f"\n{title}, {len(results[OURS].samples)} rounds")
    print(f"{'':32}{'ms':>9}{'ours /':>9}{'messages':>10}{'kB':>10}")
    for name, (samples, messages, nbytes) in results.items():
        ours = median(a / b for a, b in zip(results[OURS].samples, samples, strict=True))
        print(f"{name:32}{1e3 * median(samples):9.1f}{ours:9.3f}{messages:10}{nbytes / 1e3:10.1f}", flush=True)


# ----------------------------------------------------------------------------------------------------
# The processes
# ----------------------------------------------------------------------------------------------------


def run_in_processes(work: Callable[..., None], n_ranks: int, *arguments: Any) -> None:
    """Run ``work(*arguments)`` in so many processes, which are a group on gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (n_ranks, folder, work, arguments), nprocs=n_ranks)


def _process(rank: int, n_ranks: int, folder: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=n_ranks)
    work(*arguments)
    dist.destroy_process_group()


def compare(logits: list[tuple[int, ...]], linear: list[tuple[int, ...]], n_threads: int, rounds: int) -> None:
    """Time all shapes in this process, and print what came out in the first one."""
    set_threads(n_threads)
    for kind, make, shapes in (("logits", of_logits, logits), ("linear layer", of_linear, linear)):
        for shape in shapes:
            results = measure(make(*shape), n_threads, rounds)
            if dist.get_rank() == 0:
                report(f"{kind} {shape}, {dist.get_world_size()} processes, {n_threads} threads each", results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--logits", nargs="*", type=shape_of, default=LOGITS)
    parser.add_argument("--linear", nargs="*", type=shape_of, default=LINEAR)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for n_ranks in arguments.ranks:
        run_in_processes(compare, n_ranks, arguments.logits, arguments.linear, arguments.threads, arguments.rounds)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
