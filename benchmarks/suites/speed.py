"""Time of loss and gradient, and its ratio to PyTorch eager's.

Shapes are few: every process checks its result, and every commit compiles its kernels. A ``version`` is changed by hand when
what is measured changes; asv would otherwise drop the history at every edit of this file.
"""

import fastxent as fx
from benchmarks import measure  # its time_interleaved, by name, would be taken for a benchmark
from benchmarks.bars import OUT, TORCH
from benchmarks.cases import Inputs, case_of
from benchmarks.providers import BY_NAME, Call
from benchmarks.report import EAGER

SHAPES = {case.shape: case for case in map(case_of, ((32, 10), (1024, 1000), (65536, 10), (4096, 8192)))}
THREADS = ["1", "all"]
EFFORT = measure.Effort(7, 80, 2.0)


def checked(name, inputs, n_threads):
    """A call that is right; where there is none, as before a commit that brought it, asv notes n/a."""
    if reason := BY_NAME[name].missing(n_threads):
        raise NotImplementedError(reason)
    call = measure.make_checked(BY_NAME[name], inputs, n_threads)
    if not isinstance(call, Call):
        raise NotImplementedError(call)
    return call


def number_of_threads(which):
    """For everybody."""
    fx.set_num_threads(None)
    n = 1 if which == "1" else fx.get_num_threads()
    measure.set_threads(n)
    return n


class Time:
    """PyTorch is a series of its own: where it moves too, the machine did."""

    params = ([OUT, TORCH, EAGER], list(SHAPES), THREADS)
    param_names = ("provider", "shape", "threads")
    version = "1"
    rounds, repeat, sample_time, warmup_time = 2, (1, 10, 2.0), 0.01, 0.1

    def setup(self, provider, shape, threads):
        n_threads = number_of_threads(threads)
        call = checked(provider, Inputs(SHAPES[shape]), n_threads)
        call.prepare()
        self.run = call.run

    def time_loss_and_gradient(self, provider, shape, threads):
        self.run()


class Ratio:
    """Time by PyTorch eager's, medians of interleaved pairs: less is better, so that asv's finder of regressions works."""

    params = ([OUT, TORCH], list(SHAPES), THREADS)
    param_names = ("provider", "shape", "threads")
    version = "1"
    unit = "x PyTorch eager"

    def setup(self, provider, shape, threads):
        self.n_threads = number_of_threads(threads)
        inputs = Inputs(SHAPES[shape])
        self.calls = {name: checked(name, inputs, self.n_threads) for name in (provider, EAGER)}

    def track_ratio(self, provider, shape, threads):
        timed = measure.time_interleaved(self.calls, self.n_threads, EFFORT, lambda text, share=0.0: None)
        return measure.ratio(timed[provider][1], timed[EAGER][1]).median
