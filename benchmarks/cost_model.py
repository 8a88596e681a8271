"""What a call with its classes sharded over processes costs, by formulas, against what it takes.

    python -m benchmarks.cost_model                             1 to 4 processes, 1 and 2 threads each
    python -m benchmarks.cost_model --ranks 2 --threads 1

The machine's constants are measured in the same processes at the same time, so the table tells whether the formulas are right,
not whether cores and memory scale. Constants and times are the least of seven samples. N rows, V classes, D features,
R processes, b bytes a logit:

    logits          c + N r + N V / R (max(b / B, e) + max(2 b / B, e)) + messages
    linear layer    the same + 2 k N D V / (R F), and one message more, of 4 N D bytes
    messages        an all-reduce of n bytes takes l + n / C; those of a forward have 8 N and 16 N bytes

B: bytes that are read or written a second; e: seconds of a logit in the cache, most of it an exponential; F: flops a second
of a product; l, C: latency and bytes a second of an all-reduce; c, r: seconds a call and a row, for what each process does in
Python and in float64 whatever its shard. k: products, 3 if the logits of all rows are one block, else 4.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import fastxent.torch as ft
from benchmarks.distributed import LINEAR, LOGITS, OURS, of_linear, of_logits, run_in_processes, time_step
from benchmarks.measure import set_threads
from fastxent._runtime.blocks import rows_per_block

ROUNDS = 7
FEW, MANY = 64, 16384  # rows of 16 classes a shard, which cost nothing: the slope is the time of a row


class Machine(NamedTuple):
    """The constants, in seconds, bytes and flops."""

    bandwidth: float
    logit: float
    flops: float
    latency: float
    capacity: float
    call: float
    row: float

    def messages(self, *sizes: float) -> float:
        return sum(self.latency + nbytes / self.capacity for nbytes in sizes)

    def of_logits(self, n: int, v: int, n_ranks: int, b: int = 4) -> float:
        trips = max(b / self.bandwidth, self.logit) + max(2 * b / self.bandwidth, self.logit)
        return self.call + n * self.row + n * v / n_ranks * trips + self.messages(8 * n, 16 * n)

    def of_linear(self, n: int, d: int, v: int, n_ranks: int, b: int = 4) -> float:
        n_products = 3 if rows_per_block(n, d, v // n_ranks, b, b) >= n else 4
        products = 2 * n_products * n * d * v / n_ranks / self.flops
        return self.of_logits(n, v, n_ranks, b) + products + self.messages(4 * n * d)


def machine(n_threads: int) -> Machine:
    """Measure the constants, in all processes at once."""

    def seconds(step: Callable[[], Any]) -> float:
        step()
        return min(time_step(step, n_threads) for _ in range(ROUNDS))

    n_ranks = dist.get_world_size()
    x, y = torch.ones(2, 32_000_000).unbind()  # in memory: zeros would be one page
    a, b = torch.randn(512, 512), torch.randn(512, 8192)
    small, large = torch.zeros(128, dtype=torch.float64), torch.zeros(1_000_000, dtype=torch.float64)
    latency = seconds(lambda: dist.all_reduce(small))
    capacity = large.nbytes / max(seconds(lambda: dist.all_reduce(large)) - latency, 1e-9)  # one process sends nothing
    few, many = (seconds(of_logits(n_rows, 16 * n_ranks)[OURS]) for n_rows in (FEW, MANY))
    cached, target = torch.randn(64, 8192), torch.zeros(64, dtype=torch.int64)
    # Logits are read twice and their gradient is written once: a third is reading, two thirds are a copy.
    reading, copying = seconds(x.amax), seconds(lambda: y.copy_(x))
    return Machine(
        bandwidth=3 * x.nbytes / (reading + copying),
        logit=seconds(lambda: [ft.cross_entropy(cached, target) for _ in range(20)]) / 20 / cached.numel(),
        flops=2 * 512 * 512 * 8192 / seconds(lambda: torch.mm(a, b)),
        latency=latency,
        capacity=capacity,
        call=max(few - 2 * latency, 0.0),
        row=max((many - few) / (MANY - FEW) - 24 / capacity, 0.0),
    )


def compare(n_threads: int, logits: list[tuple[int, int]], linear: list[tuple[int, int, int]]) -> None:
    """Print constants, predictions and measurements."""
    set_threads(n_threads)
    n_ranks, of = dist.get_world_size(), machine(n_threads)
    cases = [(f"logits {shape}", of.of_logits(*shape, n_ranks), of_logits(*shape)[OURS]) for shape in logits]
    cases += [(f"linear layer {shape}", of.of_linear(*shape, n_ranks), of_linear(*shape)[OURS]) for shape in linear]
    lines = []
    for title, predicted, step in cases:
        step()
        measured = min(time_step(step, n_threads) for _ in range(ROUNDS))
        lines.append(f"{title:32}{1e3 * predicted:10.1f}{1e3 * measured:10.1f}{measured / predicted:8.2f}")
    if dist.get_rank() == 0:
        print(
            f"\n{n_ranks} processes, {n_threads} threads each: {of.bandwidth / 1e9:.1f} GB/s, {1e12 * of.logit:.0f} ps a logit",
            end=", ",
        )
        print(f"{of.flops / 1e9:.0f} GFLOP/s", end=", ")
        print(f"all-reduce {1e6 * of.latency:.0f} us and {of.capacity / 1e9:.2f} GB/s", end=", ")
        print(f"{1e6 * of.call:.0f} us a call, {1e9 * of.row:.0f} ns a row")
        print(f"{'':32}{'predicted':>10}{'ms':>10}{'/':>8}", *lines, sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    for n_ranks in arguments.ranks:
        for n_threads in arguments.threads:
            run_in_processes(compare, n_ranks, n_threads, LOGITS, LINEAR)


if __name__ == "__main__":
    main()
