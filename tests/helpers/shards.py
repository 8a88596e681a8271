"""Processes that hold a shard of the classes each; they are spawned, and import this module only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastxent.distributed import cross_entropy


class Job(NamedTuple):
    """One call: whole logits and weights, and how many classes each rank has. ``wrong`` replaces arguments of the last rank."""

    logits: Tensor
    target: Tensor
    sizes: tuple[int, ...]
    options: dict[str, Any]
    wrong: dict[str, Any] | None = None


class Outcome(NamedTuple):
    loss: Tensor | None
    grad: Tensor | None
    error: str = ""
    n_messages: int = 0  # of forward and backward


def shard(job: Job, rank: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    start = sum(job.sizes[:rank])
    classes = slice(start, start + job.sizes[rank])
    axis = min(1, job.logits.dim() - 1)
    options = job.options.copy()
    if "weight" in options:
        options["weight"] = options["weight"][classes]
    if options.pop("tell_start", False):
        options["vocab_start"] = start
    target = job.target
    if rank == len(job.sizes) - 1 and (wrong := dict(job.wrong or {})):
        target, options = wrong.pop("target", target), options | wrong
    x = job.logits.narrow(axis, start, job.sizes[rank])
    return x.clone(memory_format=torch.preserve_format).requires_grad_(), target, options


def outcome(job: Job, rank: int) -> Outcome:
    x, target, options = shard(job, rank)
    n_messages = 0

    def counted(*args: Any) -> Any:
        nonlocal n_messages
        n_messages += 1
        return all_reduce(*args)

    all_reduce, dist.all_reduce = dist.all_reduce, counted
    try:
        loss = cross_entropy(x, target, **options)
        loss.sum().backward()
        return Outcome(loss.detach(), x.grad, n_messages=n_messages)
    except Exception as error:
        return Outcome(None, None, f"{type(error).__name__}: {error}", n_messages)
    finally:
        dist.all_reduce = all_reduce


def start(rank: int, n_ranks: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)


def work(rank: int, n_ranks: int, folder: Path, jobs: list[Job]) -> None:
    start(rank, n_ranks, folder)
    torch.save([tuple(outcome(job, rank)) for job in jobs], folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_jobs(jobs: list[Job], n_ranks: int, folder: Path) -> list[list[Outcome]]:
    """Return, for each job, the outcome on each rank."""
    mp.spawn(work, (n_ranks, folder, jobs), nprocs=n_ranks)
    by_rank = [[Outcome(*o) for o in torch.load(folder / f"{rank}.pt")] for rank in range(n_ranks)]
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]
