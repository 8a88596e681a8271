"""The benchmarks of class shards: all methods give the same, messages are counted, the cost model is what its formulas say."""

from __future__ import annotations

import pytest

from benchmarks.cost_model import Machine
from benchmarks.distributed import compare, run_in_processes


def test_methods_agree_and_their_messages_are_counted(capfd):
    run_in_processes(compare, 2, [(20, 800)], [(20, 8, 800)], 1, 1)
    words = [line.split() for line in capfd.readouterr().out.splitlines()]
    logits, linear = (k for k, line in enumerate(words) if "processes," in line)
    messages = [{" ".join(line[:-4]): int(line[-2]) for line in words[k + 2 : k + 6]} for k in (logits, linear)]
    assert messages == [
        {"ours": 2, "loss_parallel": 3, "gathered, eager": 1, "gathered, fastxent": 1},
        {"ours": 3, "ours, the shard's logits whole": 3, "loss_parallel": 4, "gathered, eager": 2},
    ]


def test_the_cost_model_by_hand():
    machine = Machine(bandwidth=10.0, logit=0.5, flops=100.0, latency=1.0, capacity=8.0, call=3.0, row=0.25)
    messages = 1 + 4 * 8 / 8 + 1 + 4 * 16 / 8
    logits = 3 + 4 * 0.25 + 4 * 6 / 2 * (0.5 + 0.8) + messages  # reading waits for the exponentials, writing for the memory
    assert machine.of_logits(4, 6, 2) == pytest.approx(logits)
    assert machine.of_linear(4, 5, 6, 2) == pytest.approx(logits + 6 * 4 * 5 * 6 / 2 / 100 + 1 + 4 * 4 * 5 / 8)
