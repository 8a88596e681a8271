"""What a process pays before its first result, and how much memory it takes."""

import os
import subprocess
import sys
import tempfile

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


FIRST = """
import sys
import time
import numpy as np
import fastxent
x, y = np.zeros(tuple(map(int, sys.argv[1:])), np.float32), np.zeros(int(sys.argv[1]), int)
start = time.process_time()
fastxent.cross_entropy_value_and_grad(x, y)
print(time.process_time() - start)
"""


class FirstCall:
    """Processor time of the first loss and gradient of a process: with an empty cache, and with what that has left there."""

    params = (["64 10", "64 1000", "16 100000"], ["compiled", "from the cache"])
    param_names = ("shape", "kernels")
    unit = "s"
    version = "1"
    timeout = 300

    def setup(self, shape, kernels):
        self.folder = tempfile.TemporaryDirectory()
        if kernels != "compiled":
            self.track_first_call(shape, kernels)

    def track_first_call(self, shape, kernels):
        env = {**os.environ, "NUMBA_CACHE_DIR": self.folder.name, "FASTXENT_PREBUILT": "0"}
        command = [sys.executable, "-c", FIRST, *shape.split()]
        return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)

    def teardown(self, shape, kernels):
        self.folder.cleanup()


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
