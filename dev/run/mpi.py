"""
Several processes, on one machine or many, that train one model together: Processes by MPI, through mpi4py. Only who
starts the program with an MPI launcher, or says -pn, needs this file and what requirements-mpi.txt names.

One thread of ours makes every MPI call, in the order in which the process asks for them. So gradients are summed while
the main thread computes the rest of the backward pass (an MPI library moves data only while someone calls it), and the
library need not be safe for calls from two threads at once. The thread asks whether a sum is done and sleeps in
between, where a blocking call would spin on the processor that the kernels need.
"""
import atexit
import contextlib
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future

import numpy as np

from dev.run.engine import NO_LAYERS
from dev.run.machine import allowed_cpus
from dev.run.processes import Processes

BUCKET = 8 << 20        # bytes of one sum: 64 MB take 10 ms in shared memory in such parts, 20 at once
SMALL = 1 << 20         # arrays below this go together: 0.1 ms for each call, where a bias of 124M is summed in 0.01
PAUSE, LONGEST_PAUSE = 20e-6, 500e-6  # seconds between two looks at a sum; the first few are short


def load_mpi():
    """mpi4py's module MPI, for calls from one thread at a time. ValueError where it, or an MPI library, is missing"""
    try:
        import mpi4py
        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI
        return MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        raise ValueError(f"several processes need mpi4py and an MPI library: {error}\n"
                         "---> HINT: python -m pip install -r dev/run/requirements-mpi.txt") from error


class Mpi(Processes):
    """All processes that an MPI launcher has started, seen from one of them

    size: how many the launcher, or -pn, says there are. zero_stage: 1 shares AdamW's moments out, by llm.c's rule: a
    process has the same slice of every layer's tensor. ValueError where MPI finds another number of processes.
    """

    def __init__(self, size, zero_stage=0):
        self.MPI = MPI = load_mpi()
        self.comm, self.zero_stage = MPI.COMM_WORLD, zero_stage
        self.library = " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())
        self.rank, self.size = self.comm.rank, self.comm.size
        if self.size != size:
            raise ValueError(f"there should be {size} processes, but MPI finds {self.size} ({self.library})\n"
                             f"---> HINT: start them with `mpirun -np {size}` of the MPI library that mpi4py uses")
        self.machine = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = self.machine.rank, self.machine.size
        self.near = self.local_size == self.size
        masks = self.machine.allgather(allowed_cpus())
        self.sharers = sum(bool(mask & masks[self.local_rank]) for mask in masks)
        self.used_cpus = set().union(*masks)
        self.times, self.begun, self.closed = Counter(), [], False
        self.tasks, self.threaded = queue.SimpleQueue(), MPI.Query_thread() >= MPI.THREAD_SERIALIZED
        threading.Thread(target=self.serve, daemon=True).start()
        sys.excepthook = self.on_error
        threading.excepthook = lambda error: self.on_error(error.exc_type, error.exc_value, error.exc_traceback)
        atexit.register(self.on_exit)

    def describe(self):
        lines = [f"processes: {self.size} | on this machine: {self.local_size} | -z {self.zero_stage} | "
                 f"{self.library}"]
        cpus = os.cpu_count() or 1
        if len(self.used_cpus) < cpus and not os.environ.get("OMP_NUM_THREADS"):
            lines += [f"{self.local_size} processes are bound to {len(self.used_cpus)} of {cpus} processors\n"
                      f"---> HINT: mpirun --bind-to none lets them use all, --map-by slot:PE={cpus // self.local_size} "
                      "divides them"]
        if not self.threaded:
            lines += ["this MPI library allows no calls from a thread: gradients are summed after the backward pass"]
        return lines

    # the thread that calls MPI

    def serve(self):
        while True:
            function, future = self.tasks.get()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def begin(self, function):
        """Have the thread call a function after those before it. Returns its Future."""
        future = Future()
        if self.threaded:
            self.tasks.put((function, future))
        else:
            future.set_result(function())
        return future

    @staticmethod
    def finish(request, longest=LONGEST_PAUSE):
        """Wait for an MPI request, asleep most of the time."""
        pause = PAUSE
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, longest)

    # gradients and parameters

    def reduce(self, arrays):
        start = time.perf_counter()
        self.begun.append(self.begin(lambda: self.reduce_now(arrays)))
        self.times["waiting for sums of gradients"] += time.perf_counter() - start  # where there is no thread for it

    def reduce_now(self, arrays):
        if self.near:  # a call that blocks is three times as fast in shared memory, but spins: not before all are here
            self.finish(self.comm.Ibarrier())
        start = time.perf_counter()
        flat = [x.reshape(-1) for x in arrays]
        small = [x for x in flat if x.nbytes < SMALL]
        together = np.concatenate(small or [np.empty(0, np.float32)])
        for x in [together, *(x for x in flat if x.nbytes >= SMALL)]:
            for first in range(0, x.size, BUCKET // 4):
                self.add_up(x[first:first + BUCKET // 4])
        for x, part in zip(small, np.split(together, np.cumsum([x.size for x in small])[:-1])):
            x[:] = part
        self.times["sums of gradients"] += time.perf_counter() - start

    def add_up(self, x):
        """Sum a bucket over all processes, in place."""
        if self.near:
            self.comm.Allreduce(self.MPI.IN_PLACE, x)
        else:
            self.finish(self.comm.Iallreduce(self.MPI.IN_PLACE, x))

    def wait(self):
        start = time.perf_counter()
        while self.begun:
            self.begun.pop(0).result()
        self.times["waiting for sums of gradients"] += time.perf_counter() - start

    def together(self, array):
        start = time.perf_counter()
        out = np.empty((self.size * len(array), *array.shape[1:]), array.dtype)
        self.begin(lambda: self.finish(self.comm.Iallgather(array, out))).result()
        self.times["waiting for sums of gradients"] += time.perf_counter() - start
        return out

    def moments(self, table):
        if not self.zero_stage:
            return table
        layers = [1 if name in NO_LAYERS else shape[0] for name, shape in table]
        sizes = [math.prod(shape) // L for (_, shape), L in zip(table, layers)]
        if any(size % self.size for size in sizes):
            fit = [str(n) for n in range(2, 65) if not any(size % n for size in sizes)]
            raise ValueError(f"-z 1 needs a number of processes that divides {min(sizes)} channels: {', '.join(fit)}; "
                             f"there are {self.size}\n---> HINT: start one of those numbers, or use -z 0")
        return [(name, (L, size // self.size)) for (name, _), L, size in zip(table, layers, sizes)]

    def pieces(self, tensor):
        return list(tensor.reshape(len(tensor), self.size, -1)[:, self.rank]) if self.zero_stage else [tensor]

    def gather(self, tensor):
        def exchange():
            for layer in tensor.reshape(len(tensor), -1):
                self.finish(self.comm.Iallgather(self.MPI.IN_PLACE, layer))
        if self.zero_stage:
            self.begun.append(self.begin(exchange))

    # numbers, words

    def sum(self, value):
        total = np.array(value)
        self.begin(lambda: self.finish(self.comm.Iallreduce(self.MPI.IN_PLACE, total), longest=0.005)).result()
        return total if np.ndim(value) else total.item()

    def any(self, flag):
        return self.sum(int(flag)) > 0

    @contextlib.contextmanager
    def first(self):
        def meet():
            self.begin(lambda: self.finish(self.machine.Ibarrier(), longest=0.05)).result()
        if self.local_rank > 0:
            meet()
        yield
        if self.local_rank == 0:
            meet()

    # the end

    def close(self):
        self.any(False)  # all have come this far
        self.closed = True

    def abort(self, status):
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(status)

    def fail(self, message, status):
        time.sleep(self.rank > 0)  # what all find wrong, the first one says
        print(message if self.rank == 0 else f"process {self.rank}: {message}", file=sys.stderr, flush=True)
        self.abort(status)

    def on_error(self, kind, error, trace):
        self.fail("".join(traceback.format_exception(kind, error, trace)), 1)

    def on_exit(self):
        if not self.closed:
            self.fail("error: it left before the run's end", 1)
