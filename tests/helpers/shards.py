"""Processes that hold a shard of the classes each; they are spawned, and import this module only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastxent.distributed import cross_entropy, linear_cross_entropy


class Job(NamedTuple):
    """One call: whole logits and weights, and how many classes each rank has. ``wrong`` replaces arguments of the last rank."""

    logits: Tensor
    target: Tensor
    sizes: tuple[int, ...]
    options: dict[str, Any]
    wrong: dict[str, Any] | None = None


class LinearJob(NamedTuple):
    """The same of a linear layer; its loss is multiplied by numbers from 1 to 2 before the backward."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    sizes: tuple[int, ...]
    options: dict[str, Any]
    wrong: dict[str, Any] | None = None


class Outcome(NamedTuple):
    loss: Tensor | None
    grad: Tensor | None  # of a linear layer's weight
    error: str = ""
    n_messages: int = 0  # of forward and backward
    input_grad: Tensor | None = None
    bias_grad: Tensor | None = None


def shard(job: Job | LinearJob, rank: int) -> dict[str, Any]:
    """The arguments of a rank."""
    start = sum(job.sizes[:rank])
    size = job.sizes[rank]

    def leaf(whole: Tensor, axis: int) -> Tensor:
        return whole.narrow(axis, start, size).clone(memory_format=torch.preserve_format).requires_grad_()

    arguments = {"target": job.target} | job.options
    if isinstance(job, Job):
        arguments["local_logits"] = leaf(job.logits, min(1, job.logits.dim() - 1))
    else:
        arguments["input"] = job.input.clone().requires_grad_()
        arguments["local_linear_weight"] = leaf(job.linear_weight, 0)
        arguments["local_linear_bias"] = None if job.linear_bias is None else leaf(job.linear_bias, 0)
    if "weight" in arguments:
        arguments["weight"] = arguments["weight"][start : start + size]
    if arguments.pop("tell_start", False):
        arguments["vocab_start"] = start
    return arguments | (job.wrong or {} if rank == len(job.sizes) - 1 else {})


def call(job: Job | LinearJob, arguments: dict[str, Any]) -> Outcome:
    arguments = arguments.copy()
    target = arguments.pop("target")
    if isinstance(job, Job):
        x = arguments.pop("local_logits")
        loss = cross_entropy(x, target, **arguments)
        loss.sum().backward()
        return Outcome(loss.detach(), x.grad)
    x, w, b = arguments.pop("input"), arguments.pop("local_linear_weight"), arguments["local_linear_bias"]
    loss = linear_cross_entropy(x, w, target, **arguments)
    factors = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * factors).sum().backward()
    return Outcome(loss.detach(), w.grad, input_grad=x.grad, bias_grad=None if b is None else b.grad)


def outcome(job: Job | LinearJob, rank: int) -> Outcome:
    n_messages = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal n_messages
        n_messages += 1
        return all_reduce(*args, **options)

    all_reduce, dist.all_reduce = dist.all_reduce, counted
    try:
        return call(job, shard(job, rank))._replace(n_messages=n_messages)
    except Exception as error:
        return Outcome(None, None, f"{type(error).__name__}: {error}", n_messages)
    finally:
        dist.all_reduce = all_reduce


def start(rank: int, n_ranks: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)


def work(rank: int, n_ranks: int, folder: Path, jobs: list[Job | LinearJob]) -> None:
    start(rank, n_ranks, folder)
    torch.save([tuple(outcome(job, rank)) for job in jobs], folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_jobs(jobs: list[Any], n_ranks: int, folder: Path, seconds: float = 240.0) -> list[list[Outcome]]:
    """Return, for each job, the outcome on each rank; processes that wait for each other for ever fail the test."""
    context = mp.spawn(work, (n_ranks, folder, jobs), nprocs=n_ranks, join=False)
    stop = time.monotonic() + seconds
    while not context.join(timeout=1.0):
        if time.monotonic() > stop:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{n_ranks} processes are not done after {seconds:.0f} s")
    by_rank = [[Outcome(*o) for o in torch.load(folder / f"{rank}.pt")] for rank in range(n_ranks)]
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]
