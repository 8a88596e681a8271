"""What a process pays before its first result, and how much memory it takes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from suites.speed import number_of_threads

import fastxent
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
    """Processor time of the first loss and gradient of a process: with an empty cache, with what that has left there, or
    from a wheel that brings the kernels."""

    params = (["64 10", "64 1000", "16 100000"], ["compiled", "from the cache", "prebuilt"])
    param_names = ("shape", "kernels")
    unit = "s"
    version = "1"
    timeout = 300

    def setup_cache(self):
        """Return a folder with a copy of the package and its kernels, or None: older commits and some machines have none."""
        try:
            from fastxent._codegen.levels import of_this_cpu
        except ImportError:
            return None
        level = next((level.name for level in of_this_cpu() if level.only == "*"), None)
        if level is None:
            return None
        site = Path("site").resolve()
        package = shutil.copytree(Path(fastxent.__file__).parent, site / "fastxent")
        # What starts kernels, and the gradients of the shapes: transposed, pipelined and of split rows
        kernels = ["launch*", "check*", "run_arrays*", "*-f32-labelled-class_lanes-split-gradient"]
        kernels += [f"value_and_grad-f32-labelled-{name}" for name in ("transposed_tile-paired-tile-*", "class_lanes-*tile")]
        command = [sys.executable, "-m", "fastxent", "prebuild", "--levels", level, "--into", package / "_prebuilt"]
        subprocess.run([*command, "--kernels", *kernels], check=True)
        return str(site)

    def setup(self, site, shape, kernels):
        if kernels == "prebuilt" and site is None:
            raise NotImplementedError("no kernels are compiled ahead for this machine, or by this commit")
        self.folder = tempfile.TemporaryDirectory()
        if kernels == "from the cache":
            self.track_first_call(site, shape, kernels)

    def track_first_call(self, site, shape, kernels):
        env = {**os.environ, "NUMBA_CACHE_DIR": self.folder.name, "FASTXENT_PREBUILT": "0"}
        if kernels == "prebuilt":
            env |= {"FASTXENT_PREBUILT": "1", "PYTHONPATH": site}
        command = [sys.executable, "-c", FIRST, *shape.split()]
        seconds = float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
        if kernels == "prebuilt" and os.listdir(self.folder.name):
            raise RuntimeError(f"a kernel was compiled: {os.listdir(self.folder.name)}")
        return seconds

    def teardown(self, site, shape, kernels):
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
