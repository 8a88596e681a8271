"""Vocabulary-parallel cross-entropy on gloo: each process has a shard of the classes, and the result is that of whole rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastxent.distributed import cross_entropy
from tests.helpers.cases import FLOAT32, FLOAT64, Z_LOSS, Case, make_case
from tests.helpers.opponent import run_torch
from tests.helpers.processes import ROOT, run_script
from tests.helpers.shards import Job, Outcome, run_jobs
from tests.helpers.torch_cases import array, as_tensors
from tests.helpers.truth import Budget, make_truth

# By the number of processes: the classes of each. 16 rows at a time, and a row at a time; uneven shards, empty ones.
SIZES = {1: [(8,), (400,)], 2: [(5, 3), (400, 350), (0, 400)], 3: [(3, 0, 5), (400, 350, 330)]}
OPTIONS = [
    "index", "smoothing", "weight ignore", "weight ignore smoothing sample_weight", "ignore_class", "smoothing_one z_loss",
    "sample_weight z_loss",
]  # fmt: skip


def make_job(dtype: np.dtype, sizes: tuple[int, ...], words: str, reduction: str) -> tuple[Case, Job]:
    case = make_case(dtype, (20, sum(sizes)), words)
    if "z_loss" in words:
        case.options["z_loss"] = Z_LOSS
    tensors = as_tensors(case)
    return case, Job(tensors.logits, tensors.target, sizes, tensors.options | {"reduction": reduction})


def joined(outcomes: list[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss, which has the same bits on all ranks, and the whole gradient."""
    for o in outcomes:
        assert not o.error, o.error
        assert o.n_messages == 2
        assert array(o.loss).tobytes() == array(outcomes[0].loss).tobytes()
    return array(outcomes[0].loss), array(torch.cat([o.grad for o in outcomes], min(1, outcomes[0].grad.dim() - 1)))


@pytest.mark.parametrize("n_ranks", SIZES)
def test_it_is_the_loss_of_whole_rows(n_ranks, tmp_path):
    """Within the error budget of PyTorch's loss of whole rows."""
    cases, jobs = [], []
    for sizes in SIZES[n_ranks]:
        for words in OPTIONS:
            for reduction in ("mean", "sum", "none"):
                for dtype in [FLOAT32, FLOAT64] if words in ("index", OPTIONS[3]) else [FLOAT32]:
                    case, job = make_job(dtype, sizes, words, reduction)
                    cases.append((case, reduction, f"{sizes} {words} {reduction}"))
                    jobs.append(job)
    budgets = {(dtype, kind): Budget() for dtype in (FLOAT32, FLOAT64) for kind in ("loss", "grad")}
    for (case, reduction, label), outcomes in zip(cases, run_jobs(jobs, n_ranks, tmp_path), strict=True):
        loss, grad = joined(outcomes)
        truth, (torch_loss, torch_grad) = make_truth(case, reduction), run_torch(case, reduction)
        dtype = case.logits.dtype
        budgets[dtype, "loss"].add(loss, truth.loss, torch_loss, truth.loss_scale, f"loss {label}")
        budgets[dtype, "grad"].add(grad, truth.grad, torch_grad, truth.grad_scale, f"gradient {label}")
    for budget in budgets.values():
        budget.check()


def plain(x: torch.Tensor, target: int | list[int], sizes: tuple[int, ...], wrong: dict | None = None, **options) -> Job:
    return Job(x, torch.tensor(target), sizes, options, wrong or {})


EDGES = {
    "one shard underflows beside the other": [[0.0, 1.0, 500.0, 501.0], [500.0, 501.0, 0.0, 1.0]],
    "a shard of -inf": [[-np.inf, -np.inf, 0.0, 1.0], [0.0, 1.0, -np.inf, -np.inf]],
    "the target is -inf": [[0.0, -np.inf, 0.0, 1.0], [0.0, 1.0, -np.inf, -np.inf]],
    "all -inf": [[-np.inf] * 4, [0.0] * 4],
    "+inf": [[np.inf, 0.0, 0.0, 0.0], [0.0, 0.0, np.inf, 0.0]],
    "nan": [[np.nan, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, np.nan]],
}


def test_edge_values_layouts_and_errors(tmp_path):
    """One start of two processes for what needs no grid."""
    same = {name: plain(torch.tensor(rows), [1, 1], (2, 2), reduction="none") for name, rows in EDGES.items()}
    x = torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24).view(2, 3, 4) % 7
    same |= {
        "one row": plain(torch.arange(5.0), 3, (2, 3)),
        "axes": Job(x, y, (3, 4), {"label_smoothing": 0.1}),
        "classes last in memory": Job(x.movedim(1, -1).contiguous().movedim(-1, 1), y, (3, 4), {}),
        "int32, an ignored class": Job(x, y.int(), (3, 4), {"ignore_index": 2}),
        "no rows": Job(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (2, 2), {"reduction": "sum"}),
        "its start is told": Job(x, y, (3, 4), {"tell_start": True}),
    }
    good = plain(torch.zeros(3, 4), [0, 1, 2], (2, 2))
    wrong = {
        "IndexError: Target 4 is out of bounds.": {"target": torch.tensor([0, 1, 4])},
        "IndexError: Target -7 is out of bounds.": {"target": torch.tensor([0, -7, 1])},
        "RuntimeError: weight must be 2": {"weight": torch.ones(3)},
        "ValueError: label_smoothing = 2.0": {"label_smoothing": 2.0},
        "ValueError: vocab_start is [-1, 3]": {"vocab_start": 3},
    }
    failing = [good._replace(wrong=replaced) for replaced in wrong.values()]
    outcomes = run_jobs([*same.values(), *failing], 2, tmp_path)
    for (name, job), found in zip(same.items(), outcomes, strict=False):
        loss, grad = joined(found)
        job.options.pop("tell_start", None)
        leaf = job.logits.clone().requires_grad_()
        want = torch.nn.functional.cross_entropy(leaf, job.target.long(), **job.options)
        want.sum().backward()
        np.testing.assert_allclose(loss, want.detach(), rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(grad, leaf.grad, atol=1e-6, err_msg=name)
    for message, (first, last) in zip(wrong, outcomes[len(same) :], strict=True):
        assert last.error.startswith(message) and last.n_messages == 1
        shared = message.startswith(("IndexError", "ValueError: vocab_start"))
        assert first.error == last.error if shared else first.error.startswith("RuntimeError: cross_entropy: the arguments of")


RANK = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from fastxent.distributed import cross_entropy
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
rank, (r, c) = dist.get_rank(), mesh.get_coordinate()
torch.manual_seed(0)
hidden, target, table, whole = torch.randn(8, 6), torch.arange(8) % 5, torch.randn(5, 6), torch.randn(8, 5)
mine = slice(4 * r, 4 * r + 4)
want = nn.Parameter(table.clone())
nn.functional.cross_entropy(hidden.bfloat16() @ want.bfloat16().T, target).backward()
layer = nn.Linear(6, (3, 2)[c], bias=False)
with torch.no_grad():
    layer.weight.copy_(table[(slice(0, 3), slice(3, 5))[c]])
layer = DistributedDataParallel(layer, process_group=mesh.get_group("rows"))
with torch.autocast("cpu", torch.bfloat16):
    logits = layer(hidden[mine])
assert logits.dtype == torch.bfloat16
cross_entropy(logits, target[mine], group=mesh.get_group("classes")).backward()
torch.testing.assert_close(layer.module.weight.grad, want.grad[(slice(0, 3), slice(3, 5))[c]], atol=2e-2, rtol=2e-2)
leaf = whole.clone().requires_grad_()
nn.functional.cross_entropy(leaf, target).backward()
sharded = distribute_tensor(whole, mesh["classes"], [Shard(1)]).requires_grad_()
cross_entropy(sharded, target).backward()
torch.testing.assert_close(sharded.grad.full_tensor(), leaf.grad)
dist.destroy_process_group()
"""


@pytest.mark.thorough
def test_torchrun_with_data_parallel_rows_and_dtensors(tmp_path):
    """Four processes, two by two: the rows of a batch over one axis, in DistributedDataParallel, the classes over the other."""
    (tmp_path / "rank.py").write_text(RANK)
    arguments = ["--standalone", "--nproc-per-node=4", str(tmp_path / "rank.py")]
    code = f"import sys; sys.argv = ['torchrun', *{arguments!r}]; from torch.distributed.run import main; main()"
    run_script(code, GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def test_class_probabilities_and_double_backward_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.zeros(2, 3, requires_grad=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1])), x, create_graph=True)
        with pytest.raises(TypeError, match=r"target has dtype torch.float32"):
            cross_entropy(x, x.detach())
    finally:
        dist.destroy_process_group()
