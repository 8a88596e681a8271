"""Vocabulary-parallel cross-entropy on gloo: each process has a shard of the classes, and the result is that of whole rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastxent.distributed import cross_entropy, linear_cross_entropy
from fastxent.torch import _linear_blocks
from tests.helpers.cases import FLOAT32, FLOAT64, Z_LOSS, Case, make_case
from tests.helpers.linear_cases import N_ROWS, Problem, assert_no_worse, limit_of, make, step, whole
from tests.helpers.opponent import run_torch
from tests.helpers.processes import ROOT, run_script
from tests.helpers.shards import Job, LinearJob, Outcome, run_jobs
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


def joined(outcomes: list[Outcome], n_messages: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss, which has the same bits on all ranks, and the whole gradient."""
    axis = min(1, outcomes[0].grad.dim() - 1)
    return array(loss_of_all(outcomes, n_messages)), array(torch.cat([o.grad for o in outcomes], axis))


def loss_of_all(outcomes: list[Outcome], n_messages: int) -> torch.Tensor:
    for o in outcomes:
        assert not o.error, o.error
        assert o.n_messages == n_messages
        assert array(o.loss).tobytes() == array(outcomes[0].loss).tobytes()
    return outcomes[0].loss


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


def test_edge_values_and_layouts(tmp_path):
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
    outcomes = run_jobs(list(same.values()), 2, tmp_path)
    for (name, job), found in zip(same.items(), outcomes, strict=True):
        loss, grad = joined(found)
        job.options.pop("tell_start", None)
        leaf = job.logits.clone().requires_grad_()
        want = torch.nn.functional.cross_entropy(leaf, job.target.long(), **job.options)
        want.sum().backward()
        np.testing.assert_allclose(loss, want.detach(), rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(grad, leaf.grad, atol=1e-6, err_msg=name)


# ----------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------

# What all processes say, and what one of three rows and two classes passes to make them.
ERRORS_OF_ALL = {
    "IndexError: Target 99 is out of bounds.": {"target": torch.tensor([0, 1, 99])},
    "IndexError: Target -7 is out of bounds.": {"target": torch.tensor([0, -7, 1])},
    "ValueError: vocab_start is [": {"vocab_start": 3},
    "ValueError: n_rows must be the same in all processes of the group, and is 2 to 3": {
        "local_logits": torch.zeros(2, 2), "input": torch.zeros(2, 4), "target": torch.tensor([0, 1]),
    },
    # Further rows are not in the first message.
    "ValueError: n_rows must be the same in all processes of the group, and is 3 to 5000": {
        "local_logits": torch.zeros(5000, 2), "input": torch.zeros(5000, 4), "target": torch.zeros(5000, dtype=torch.int64),
    },
    "ValueError: target_checksum": {"target": torch.tensor([0, 1, 1])},
    "ValueError: sample_weight_checksum": {"sample_weight": torch.ones(3)},
    "ValueError: has_weight must be the same in all processes of the group, and is 0 to 1": {"weight": torch.ones(2)},
    "ValueError: reduction must be the same in all processes of the group, and is 1 to 2": {"reduction": "sum"},
    "ValueError: ignore_index": {"ignore_index": 1},
    "ValueError: label_smoothing must be the same in all processes of the group, and is 0 to 0.5": {"label_smoothing": 0.5},
    "ValueError: z_loss": {"z_loss": 1e-4},
}  # fmt: skip
# What the process itself says, and the others that it does not go on.
ERRORS_OF_ONE = {
    "RuntimeError: weight must be 2": {"weight": torch.ones(3)},
    "ValueError: label_smoothing = 2.0": {"label_smoothing": 2.0},
    "TypeError: z_loss must be a number": {"z_loss": "much"},
    "ValueError: z_loss = nan": {"z_loss": float("nan")},
    "ValueError: vocab_start = -2 is negative": {"vocab_start": -2},
    "ValueError: other is not a valid value for reduction": {"reduction": "other"},
    "TypeError: target has dtype torch.float32": {"target": torch.zeros(3)},
    "TypeError: {function}(): argument 'target' must be Tensor, not NoneType": {"target": None},
    "TypeError: {function}(): argument '{shard}' must be Tensor, not list": {
        "local_logits": [0.0], "local_linear_weight": [0.0],
    },
    "RuntimeError: size mismatch": {"sample_weight": torch.ones(2)},
    "RuntimeError: weight requires a gradient": {"weight": torch.ones(2).requires_grad_()},
    "RuntimeError: sample_weight requires a gradient": {"sample_weight": torch.ones(3).requires_grad_()},
}  # fmt: skip
LINEAR_ERRORS_OF_ALL = {"ValueError: input_requires_grad": {"input": torch.zeros(3, 4)}}
LINEAR_ERRORS_OF_ONE = {
    "RuntimeError: expected equal input and linear_weight last dimensions": {"input": torch.zeros(3, 5)},
    "RuntimeError: expected linear_weight with dim": {"local_linear_weight": torch.zeros(2)},
    "RuntimeError: expected linear_bias shape (2,)": {"local_linear_bias": torch.zeros(3)},
    "RuntimeError: expected floating point numbers of one dtype": {"input": torch.zeros(3, 4, dtype=torch.float64)},
    "ValueError: memory_limit = 0 is less than 1": {"memory_limit": 0},
}


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_an_error_in_one_process_is_one_in_all(n_ranks, tmp_path):
    """After one message, and the next call works: nobody waits for anybody, and no message is taken for another one."""
    sizes, target = (2,) * n_ranks, torch.tensor([0, 1, 2])
    good = Job(torch.zeros(3, 2 * n_ranks), target, sizes, {})
    linear = LinearJob(torch.zeros(3, 4), torch.zeros(2 * n_ranks, 4), None, target, sizes, {})
    words = {"function": "cross_entropy", "shard": "local_logits"}
    linear_words = {"function": "linear_cross_entropy", "shard": "local_linear_weight"}
    cases = [(m.format(**words), of, good, m in ERRORS_OF_ALL) for m, of in (ERRORS_OF_ALL | ERRORS_OF_ONE).items()]
    of_all = ERRORS_OF_ALL | LINEAR_ERRORS_OF_ALL
    cases += [
        (m.format(**linear_words), of, linear, m in of_all) for m, of in (of_all | ERRORS_OF_ONE | LINEAR_ERRORS_OF_ONE).items()
    ]
    jobs = [job._replace(wrong=taken_by(job, replaced)) for _, replaced, job, _ in cases]
    *outcomes, after, linear_after = run_jobs([*jobs, good, linear], n_ranks, tmp_path)
    for (message, _, _, shared), (*others, last) in zip(cases, outcomes, strict=True):
        assert last.error.startswith(message) and last.n_messages == 1, (message, last)
        for other in others:
            expected = last.error if shared else "RuntimeError: cross_entropy: the arguments of another process"
            assert other.error.startswith(expected) and other.n_messages == 1, (message, other)
    assert joined(after)[0] == pytest.approx(np.log(2 * n_ranks))
    assert loss_of_all(linear_after, n_messages=3) == pytest.approx(np.log(2 * n_ranks))


def taken_by(job: Job | LinearJob, replaced: dict) -> dict:
    """The arguments that the job's function has."""
    others = {"input", "local_linear_weight"} if isinstance(job, Job) else {"local_logits"}
    return {name: value for name, value in replaced.items() if name not in others}


def test_more_rows_than_before_take_one_more_message_once(tmp_path):
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    many = Job(x, torch.arange(3000) % 6, (2, 4), {})
    few = many._replace(logits=x[:2500], target=many.target[:2500])
    leaf = x.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, many.target)
    want.backward()
    first, again, fewer = run_jobs([many, many, few], 2, tmp_path)
    for outcomes, n_messages in (first, 3), (again, 2):
        loss, grad = joined(outcomes, n_messages)
        np.testing.assert_allclose(loss, want.detach(), rtol=2e-6)
        np.testing.assert_allclose(grad, leaf.grad, atol=1e-9)
    joined(fewer, n_messages=2)


# ----------------------------------------------------------------------------------------------------
# A linear layer
# ----------------------------------------------------------------------------------------------------

# 400 classes; the shards are where they were before, or not; empty ones.
LINEAR_SIZES = {1: [(400,)], 2: [(250, 150), (0, 400)], 3: [(140, 0, 260)], 4: [(100, 120, 0, 180)]}
LINEAR_OPTIONS = {
    "index": torch.float32,
    "ignore weight sample_weight z_loss": torch.float64,
    "ignore smoothing": torch.bfloat16,
    "ignore weight smoothing z_loss": torch.float32,
}


def linear_job(problem: Problem, sizes: tuple[int, ...], **more: object) -> LinearJob:
    return LinearJob(*problem.layer, problem.target, sizes, problem.options | more)


def confident(problem: Problem) -> Problem:
    """The target is the most probable class by far: one shard's exponentials underflow beside the other's."""
    x = 30 * problem.input
    logits = torch.nn.functional.linear(x, problem.linear_weight, problem.linear_bias)
    return problem._replace(input=x, target=logits.argmax(1))


def linear_step(outcomes: list[Outcome]) -> list[torch.Tensor]:
    """The loss, and the whole gradients of input, weight and bias; what all have has the same bits on all ranks."""
    loss = loss_of_all(outcomes, n_messages=3)
    for o in outcomes:
        assert torch.equal(o.input_grad, outcomes[0].input_grad)
    weight, bias = (torch.cat(parts) for parts in zip(*((o.grad, o.bias_grad) for o in outcomes), strict=True))
    return [loss, outcomes[0].input_grad, weight, bias]


@pytest.mark.parametrize("n_ranks", LINEAR_SIZES)
def test_a_linear_layer_is_no_worse_than_pytorch(n_ranks, tmp_path):
    """In blocks of 16 rows and in one block."""
    cases, jobs = [], []
    for sizes in LINEAR_SIZES[n_ranks]:
        for option, dtype in LINEAR_OPTIONS.items():
            for reduction in ("mean", "sum", "none"):
                problem = make(option, dtype)
                for limit in (None, 60_000) if reduction == "mean" else (None,):
                    cases.append((problem, reduction))
                    jobs.append(linear_job(problem, sizes, reduction=reduction, memory_limit=limit))
        cases.append((confident(make()), "none"))
        jobs.append(linear_job(cases[-1][0], sizes, reduction="none"))
    for (problem, reduction), outcomes in zip(cases, run_jobs(jobs, n_ranks, tmp_path), strict=True):
        truth = step(whole, problem.to(torch.float64), reduction)
        ulps = 8 if problem.input.dtype == torch.float64 else 1  # the truth has errors
        assert_no_worse(linear_step(outcomes), step(whole, problem, reduction), truth, ulps)


RANK = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from fastxent.distributed import cross_entropy, linear_cross_entropy
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

class Model(nn.Module):
    # a layer that all processes have, and a head of which each has a shard
    def __init__(self, head):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(6, 6), nn.Parameter(head)
    def forward(self, x, target):
        return linear_cross_entropy(self.body(x).tanh(), self.head, target, group=mesh.get_group("classes"))

model = Model(table[(slice(0, 3), slice(3, 5))[c]].clone())
whole_body, whole_head = nn.Linear(6, 6), nn.Parameter(table.clone())
whole_body.load_state_dict(model.body.state_dict())
nn.functional.cross_entropy(whole_body(hidden).tanh() @ whole_head.T, target).backward()
parallel = DistributedDataParallel(model, process_group=mesh.get_group("rows"))
parallel(hidden[mine], target[mine]).backward()
torch.testing.assert_close(model.body.weight.grad, whole_body.weight.grad)
torch.testing.assert_close(model.head.grad, whole_head.grad[(slice(0, 3), slice(3, 5))[c]])
weight = distribute_tensor(table, mesh["classes"], [Shard(0)]).requires_grad_()
replicated = distribute_tensor(whole_body(hidden).tanh().detach(), mesh["classes"], [Replicate()]).requires_grad_()
linear_cross_entropy(replicated, weight, target).backward()
torch.testing.assert_close(weight.grad.full_tensor(), whole_head.grad)
assert replicated.grad.placements == (Replicate(),)
with torch.autocast("cpu", torch.bfloat16):
    half = linear_cross_entropy(hidden, weight, target)
assert half.dtype == torch.float32
torch.testing.assert_close(half, nn.functional.cross_entropy(hidden @ table.T, target), atol=2e-2, rtol=2e-2)
dist.destroy_process_group()
"""


@pytest.mark.thorough
def test_torchrun_with_data_parallel_rows_and_dtensors(tmp_path):
    """Four processes, two by two: the rows of a batch over one axis, in DistributedDataParallel, the classes over the other."""
    (tmp_path / "rank.py").write_text(RANK)
    arguments = ["--standalone", "--nproc-per-node=4", str(tmp_path / "rank.py")]
    code = f"import sys; sys.argv = ['torchrun', *{arguments!r}]; from torch.distributed.run import main; main()"
    run_script(code, GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


@pytest.fixture
def alone(tmp_path):
    """This process is a group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SHAPES = {"one row": (), "no row": (0,), "axes": (3, 2), "all ignored": (4,)}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_any_shape(name, alone):
    problem, n_rows = make(n_rows=6), int(np.prod(SHAPES[name]))
    x = problem.input[:n_rows].reshape(*SHAPES[name], problem.input.shape[1]).requires_grad_()
    w = problem.linear_weight.requires_grad_()
    target = problem.target[:n_rows].reshape(SHAPES[name])
    target = torch.full_like(target, -100) if name == "all ignored" else target
    for reduction in ("mean", "sum", "none"):
        want = whole(x.reshape(n_rows, w.shape[1]), w, target.reshape(-1), reduction=reduction).reshape(
            target.shape if reduction == "none" else ()
        )
        loss = linear_cross_entropy(x, w, target, reduction=reduction)
        torch.testing.assert_close(loss, want, equal_nan=True)
        gradients = (torch.autograd.grad(a.sum(), (x, w)) for a in (loss, want))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b.nan_to_num(0.0) if name in ("no row", "all ignored") else b)


def test_logits_that_fit_the_limit_are_computed_once(alone, monkeypatch):
    """And again by a second backward, which finds their gradient in their place."""
    products = []
    multiply = _linear_blocks._multiply
    monkeypatch.setattr(_linear_blocks, "_multiply", lambda layer, block: (products.append(0), multiply(layer, block)))
    problem = make()
    x, w = problem.input.requires_grad_(), problem.linear_weight.requires_grad_()
    made = {}
    for limit in (None, limit_of(N_ROWS // 2)):
        loss = linear_cross_entropy(x, w, problem.target, memory_limit=limit)
        made[limit] = [torch.autograd.grad(loss, (x, w), retain_graph=True) for _ in range(2)]
        assert len(products) == (2 if limit is None else 3 * 3)
        products.clear()
    (first, second), blocks = made[None], made[limit_of(N_ROWS // 2)][0]
    for a, b, c in zip(first, second, blocks, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


PEAK = """
import torch, torch.distributed as dist
from fastxent.distributed import linear_cross_entropy

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

def step(n):
    y = torch.randint(32000, (n,))
    x, w = torch.randn(n, 64, requires_grad=True), torch.ones(32000, 64, requires_grad=True)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what there is now
    before = status("VmRSS")
    linear_cross_entropy(x, w, y, memory_limit=32_000_000).backward()
    return status("VmHWM") - before - x.grad.nbytes - w.grad.nbytes

torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
step(16)  # loads BLAS and kernels
print(step(4096))
dist.destroy_process_group()
"""


def test_peak_of_memory():
    """The logits have 524 MB."""
    run_script(PEAK)  # it may compile a kernel
    assert int(run_script(PEAK)) <= 32_000_000


def test_class_probabilities_and_double_backward_are_refused(alone):
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1])), x, create_graph=True)
    with pytest.raises(TypeError, match=r"target has dtype torch.float32"):
        cross_entropy(x, x.detach())
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(linear_cross_entropy(x, x, torch.tensor([0, 1])), x, create_graph=True)
