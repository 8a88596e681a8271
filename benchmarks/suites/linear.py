"""The loss of a linear layer with its gradients: time, and its ratio to PyTorch eager's, which holds all logits."""

from suites.speed import EFFORT, THREADS, number_of_threads
from threadpoolctl import threadpool_limits

from benchmarks import linear, measure
from benchmarks.cases import GRAD
from benchmarks.providers import Call

SHAPES = {"1024 x 128 x 16384": (1024, 128, 16384)}
OURS = [linear.NUMPY, linear.TORCH]
OTHERS = (linear.COMPILED, linear.UNCHUNKED, linear.CHUNKED)


def threads_of_all(which):
    """For NumPy's BLAS too."""
    n = number_of_threads(which)
    threadpool_limits(n, user_api="blas")
    return n


def contestants(shape):
    """Those that are right; before the commit that brought the function there are none of ours."""
    return linear.checked(linear.problem(SHAPES[shape], "float32", GRAD), list(linear.SIDES), OTHERS, lambda *_: None)


class Time:
    params = ([*OURS, linear.EAGER], list(SHAPES), THREADS)
    param_names = ("provider", "shape", "threads")
    version = "1"
    rounds, repeat, sample_time, warmup_time = 2, (1, 10, 2.0), 0.01, 0.1

    def setup(self, provider, shape, threads):
        threads_of_all(threads)
        found, missing = contestants(shape)
        if provider not in found:
            raise NotImplementedError(str(missing))
        self.run = found[provider].run

    def time_loss_and_gradients(self, provider, shape, threads):
        self.run()


class Ratio:
    params = (OURS, list(SHAPES), THREADS)
    param_names = ("provider", "shape", "threads")
    version = "1"
    unit = "x PyTorch eager"

    def setup(self, provider, shape, threads):
        self.n_threads = threads_of_all(threads)
        found, missing = contestants(shape)
        if not {provider, linear.EAGER} <= set(found):
            raise NotImplementedError(str(missing))
        self.calls = {name: Call(found[name].run, lambda _: (0.0, None)) for name in (provider, linear.EAGER)}

    def track_ratio(self, provider, shape, threads):
        timed = measure.time_interleaved(self.calls, self.n_threads, EFFORT, lambda text, share=0.0: None)
        return measure.ratio(timed[provider][1], timed[linear.EAGER][1]).median
