"""What a process pays before its first result, and how much memory it takes."""

from suites.speed import number_of_threads

from benchmarks.bars import OUT, TORCH, TORCH_IN_PLACE
from benchmarks.cases import HEADLINE, Inputs
from benchmarks.providers import BY_NAME
from benchmarks.report import EAGER

ARRAYS = """
import fastxent
import numpy as np
x, y = np.zeros((32, 10), np.float32), np.zeros(32, int)
"""


class Start:
    """Each sample is a process of its own. Kernels come from the disk cache, but for the very first."""

    version = "1"
    rounds, repeat, number = 1, 5, 1

    def timeraw_import(self):
        return "import fastxent"

    def timeraw_first_call(self):
        return "fastxent.cross_entropy_value_and_grad(x, y)", ARRAYS


class Memory:
    """Of the whole process, libraries and logits included. Not checked: a check takes more memory than the call."""

    params = (OUT, TORCH, TORCH_IN_PLACE, EAGER)
    param_names = ("provider",)
    version = "1"

    def setup(self, provider):
        provider = BY_NAME[provider]
        n_threads = number_of_threads("all")
        if reason := provider.missing(n_threads):
            raise NotImplementedError(reason)
        self.run = provider.make(HEADLINE, Inputs(HEADLINE), n_threads).run

    def peakmem_loss_and_gradient(self, provider):
        self.run()
