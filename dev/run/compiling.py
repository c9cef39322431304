"""
Numba's threads, and having kernels compiled before a run.
"""
import functools
import os
import subprocess
import sys

import numba
from numba.core import event

from dev.run.processes import ALONE


@functools.cache  # once: who sets another number later means it
def start_threads(number):
    """Have kernels use so many threads, or all that Numba has where that is fewer."""
    # Waiting threads sleep: 30 µs more for each kernel, but a busy neighbour makes threads that spin 500 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    numba.set_num_threads(min(number, numba.config.NUMBA_NUM_THREADS))


class Refusal(event.Listener):
    """Installed, it raises LookupError where Numba begins to compile."""

    def on_start(self, event):
        raise LookupError

    def on_end(self, event):
        pass


@functools.cache
def load_kernels(run, precision="fp32", processes=ALONE):
    """Have every kernel that run(precision) calls in the cache, and load it from there: no step's time has it in it.

    Where a kernel has just been compiled, Numba runs a version that its optimiser has been over once less than the
    cached one: the last bit of a sum may differ. So two other processes compile, and this one has the same bits in
    the first run as in all later ones.
    """
    if numba.config.DISABLE_JIT:
        return None
    with processes.first():
        try:
            with event.install_listener("numba:compile", Refusal()):
                return run(precision)
        except LookupError:
            processes.print("compiling the kernels: about half a minute, in the first run only")
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        module = "train_gpt2" if run.__module__ == "__main__" else run.__module__
        command = f"import sys; sys.path.insert(0, {root!r}); from {module} import {run.__name__} as run"
        commands = [f"{command}; run({precision!r}, {first})" for first in (False, True)]
        compilers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for code in commands]
        for compiler in compilers:
            compiler.wait()
        return run(precision)
