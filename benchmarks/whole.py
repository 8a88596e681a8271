"""What is not one call: threads, a training step, the start of a process, memory. Groups like those of `benchmarks.measure`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastxent as fx
from benchmarks.bars import MEMORY, OUT, START, STEP, THREADS, TORCH, TORCH_IN_PLACE
from benchmarks.cases import HEADLINE, SCALING, Case, Inputs
from benchmarks.measure import Effort, Group, Progress, entry, group, time_interleaved
from benchmarks.providers import BY_NAME, Call

ROOT = Path(__file__).resolve().parent.parent


def run_threads(n_threads: int, effort: Effort, progress: Progress, case: Case = SCALING) -> Group:
    """The same call with 1, 2, ... threads."""
    inputs = Inputs(case)
    x, y, out = inputs.logits, inputs.target, inputs.out

    def call(n: int) -> Call:
        def run() -> Any:
            return fx.cross_entropy_value_and_grad(x, y, out=out, n_threads=n)

        def settle() -> None:
            """A team of another size: the OpenMP runtime starts threads, and the system finds each a core of its own."""
            for _ in range(50):
                run()

        return Call(run, lambda result: result, settle)

    calls = {f"{n} thread{'s' * (n > 1)}": call(n) for n in range(1, n_threads + 1)}
    timed = time_interleaved(calls, n_threads, effort, progress)
    entries = [entry(name, "ours", s, number=n, nbytes=case.bytes_moved) for name, (n, s) in timed.items()]
    return group(THREADS, f"threads: {OUT}, {case.shape}", case.reason, entries, {})


def run_step(n_threads: int, effort: Effort, progress: Progress, batch: int = 2048, n_classes: int = 32000) -> Group:
    """A step of SGD on Linear(256, classes): forward, loss, backward, update."""
    title = f"training step: Linear(256, {n_classes}), batch {batch}, SGD"
    reason = "what the loss's share of the work is; the step without loss is handed a gradient of the logits"
    names = [f"step with {name}" for name in ("PyTorch eager", TORCH, TORCH_IN_PLACE)]
    losses: list[Callable[[Any, Any], Any]] = []
    try:
        import torch
        from torch.nn import functional as F

        from fastxent.torch import cross_entropy

        losses = [F.cross_entropy, cross_entropy, lambda x, y: cross_entropy(x, y, inplace=True)]
    except Exception as error:
        return group(STEP, title, reason, [], dict.fromkeys(names, f"{type(error).__name__}: {error}"))

    torch.manual_seed(0)
    model = torch.nn.Linear(256, n_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(batch, 256), torch.randint(0, n_classes, (batch,))
    dlogits = torch.full((batch, n_classes), 1e-9)

    def without_loss() -> None:
        optimizer.zero_grad()
        model(x).backward(dlogits)
        optimizer.step()

    def step_with(loss: Callable[[Any, Any], Any]) -> Call:
        def step() -> None:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

        return Call(step, lambda _: (0.0, None))

    calls = {"step without loss": Call(without_loss, lambda _: (0.0, None))}
    calls.update({name: step_with(loss) for name, loss in zip(names, losses, strict=True)})
    timed = time_interleaved(calls, n_threads, effort, progress)
    kinds = {name: "ours" if "fastxent" in name else "peer" for name in calls}
    return group(STEP, title, reason, [entry(name, kinds[name], s, number=n) for name, (n, s) in timed.items()], {})


# ----------------------------------------------------------------------------------------------------
# In processes of their own
# ----------------------------------------------------------------------------------------------------

_START = """
import json, time
start = time.perf_counter()
import fastxent
imported = time.perf_counter() - start
import numpy as np
x, y = np.zeros((32, 10), np.float32), np.zeros(32, int)
start = time.perf_counter()
fastxent.cross_entropy_value_and_grad(x, y)
print(json.dumps([imported, time.perf_counter() - start]))
"""

# The highest resident set during one call, above the one before it; a smaller call, past the cache too, has loaded its kernel.
_MEMORY = """
import json, sys
import torch
from fastxent.torch import cross_entropy
rows, classes, in_place = json.loads(sys.argv[1])
def resident(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
def call(rows):
    x = torch.ones(rows, classes, requires_grad=True)
    logits = x * 1.0 if in_place else x
    y = torch.zeros(rows, dtype=torch.long)
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    torch.autograd.grad(cross_entropy(logits, y, inplace=in_place), logits)
    return (resident("VmHWM") - before) / (4 * rows * classes)
call(rows // 8)
print(json.dumps(call(rows)))
"""


def _child(program: str, *args: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", program, *args], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(last)
    return json.loads(done.stdout)


def run_start(progress: Progress, times: int = 5) -> Group:
    """Import, and the first call, with files and kernels in their caches: the first process does not count."""
    title, reason = "start: import fastxent, then the first call", "what a script pays; kernels come from the disk cache"
    try:
        samples = []
        for k in range(times + 1):
            progress(f"process {k + 1} of {times + 1}")
            samples.append(_child(_START))
    except RuntimeError as error:
        return group(START, title, reason, [], {"import fastxent": str(error)})
    imported, first = zip(*samples[1:], strict=True)
    entries = [entry("import fastxent", "ours", imported), entry("first call", "ours", first)]
    return group(START, title, reason, entries, {})


def run_memory(progress: Progress, case: Case = HEADLINE, times: int = 3) -> Group:
    """Peak of extra memory in a call, in sizes of the logits. The first process does not count: it compiles."""
    entries, missing = [], {}
    for name in (TORCH, TORCH_IN_PLACE):
        progress(name)
        arguments = json.dumps([*case.extents, name == TORCH_IN_PLACE])
        reason = BY_NAME[name].missing(1)
        try:
            if reason is None:
                samples = [_child(_MEMORY, arguments) for _ in range(times + 1)]
                entries.append(entry(name, "ours", samples[1:], unit="x logits"))
        except RuntimeError as error:  # also where there is no /proc
            reason = str(error)
        if reason is not None:
            missing[name] = reason
    reason = "loss and gradient; the highest resident set during the call above the one before"
    return group(MEMORY, f"memory: extra bytes by those of the logits, {case.shape}", reason, entries, missing)
