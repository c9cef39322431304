"""
One GPU, through cuda.bindings: memory, one stream on which all work is queued in order, graphs, events.

A Buffer is an address with a shape and a type. Numba's kernels take it as an array, cublasLt and cuDNN its address, so
that one object serves all three. Copies from the host go through pinned memory, and return at once.
"""
import contextlib
import ctypes
import inspect
import math
import os
import time
from collections import Counter

import numba
import numpy as np
from cuda.bindings import runtime as rt
from numba import cuda

numba.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # sums over few blocks are meant to be small

TRACED = 4096  # pieces of work that are timed before their times are read: each has two events
PIECE = 16 << 20  # bytes of a piece of pinned memory, of which there are two
TO_DEVICE, TO_HOST = rt.cudaMemcpyKind.cudaMemcpyHostToDevice, rt.cudaMemcpyKind.cudaMemcpyDeviceToHost


def check(result):
    """What a call of cuda.bindings returns after its status; OSError where that is one of failure"""
    status, *values = result
    if int(status):
        name, text = rt.cudaGetErrorName(status)[1].decode(), rt.cudaGetErrorString(status)[1].decode()
        raise OSError(f"the GPU failed: {name}: {text}\n---> HINT: nvidia-smi shows the state of the card and of its "
                      "driver; -y 1 goes on from the last checkpoint")
    return values[0] if len(values) == 1 else values


def ranges():
    """What makes a context of a name: one that Nsight shows as a range, where it watches this process"""
    if not {"NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"} & set(os.environ):
        return contextlib.nullcontext
    import nvtx
    return nvtx.annotate


class Buffer:
    """An array in the GPU's memory: an address, a shape and a type."""

    def __init__(self, ptr, shape, dtype):
        self.ptr, self.shape, self.dtype, self.size = int(ptr), tuple(shape), np.dtype(dtype), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.parts, self.device_array = {}, None

    @property
    def __cuda_array_interface__(self):
        return {"shape": (self.size,), "typestr": self.dtype.str, "data": (self.ptr, False), "version": 3}

    @property
    def array(self):
        """What kernels take: flat"""
        if self.device_array is None:
            self.device_array = cuda.as_cuda_array(self, sync=False)
        return self.device_array

    def part(self, start, shape):
        """A Buffer of that shape which begins with element `start`"""
        key = start, tuple(shape)
        if key not in self.parts:
            self.parts[key] = Buffer(self.ptr + start * self.dtype.itemsize, shape, self.dtype)
        return self.parts[key]

    def __getitem__(self, index):
        """As with an array: one item of the first dimension, or a slice of them"""
        step = self.size // self.shape[0]
        if isinstance(index, slice):
            begin, end, _ = index.indices(self.shape[0])
            return self.part(begin * step, (end - begin, *self.shape[1:]))
        return self.part(index % self.shape[0] * step, self.shape[1:])


class Views:
    """The tensors of a table of (name, shape) as attributes: parts of one flat Buffer, `memory`, one after another"""

    def __init__(self, memory, table):
        self.memory, start = memory, 0
        for name, shape in table:
            setattr(self, name, memory.part(start, shape))
            start += math.prod(shape)


def bytes_of(table):
    """The bytes of a table of (name, shape, dtype), each of which begins at a multiple of 256"""
    return sum(-(-math.prod(shape) * np.dtype(dtype).itemsize // 256) * 256 for _, shape, dtype in table)


def place(target, table, address):
    """Give `target` the Buffers of a table of (name, shape, dtype) that begin at an address, as attributes."""
    for row in table:
        setattr(target, row[0], Buffer(address, *row[1:]))
        address += bytes_of([row])
    return target


class Gpu:
    """The first GPU that is visible. OSError where there is none, or its driver is too old."""

    def __init__(self):
        version = check(rt.cudaDriverGetVersion())
        if version < 13000:
            found = f"it supports CUDA {version // 1000}.{version % 1000 // 10}" if version else "there is none"
            raise OSError(f"--device cuda needs an NVIDIA driver for CUDA 13 (580 or newer), and {found}\n"
                          "---> HINT: update the driver; nvidia-smi shows what is installed")
        check(rt.cudaFree(0))  # makes the context
        properties = check(rt.cudaGetDeviceProperties(0))
        self.name, self.capability = properties.name.decode().strip("\0"), (properties.major, properties.minor)
        self.multiprocessors, self.driver = properties.multiProcessorCount, version
        self.stream = check(rt.cudaStreamCreateWithFlags(rt.cudaStreamNonBlocking))
        self.numba_stream = cuda.external_stream(int(self.stream))
        self.pinned, self.events, self.turn = [self.pinned_memory(PIECE) for _ in range(2)], [None, None], 0
        self.graphs, self.seen, self.trace, self.record = {}, set(), None, None
        self.range, self.spent = ranges(), Counter()  # spent: seconds of the start, by what took them

    # memory

    def free_memory(self):
        """(free, total) bytes of the card: what other programs hold is not free"""
        return tuple(int(n) for n in check(rt.cudaMemGetInfo()))

    def allocate(self, nbytes):
        status, address = rt.cudaMalloc(max(1, nbytes))
        if status == rt.cudaError_t.cudaErrorMemoryAllocation:
            rt.cudaGetLastError()
            raise ValueError(f"the GPU has no {nbytes / 2**30:.1f} GiB left: {self.free_memory()[0] / 2**30:.1f} GiB "
                             "are free\n---> HINT: use a smaller -b or -t, or -r 2; nvidia-smi shows who else uses it")
        check((status,))
        return int(address)

    def free(self, address):
        self.synchronize()
        check(rt.cudaFree(address))

    def pinned_memory(self, nbytes):
        """Host memory, as an array of bytes, that copies can be made from and to while the program goes on"""
        address = int(check(rt.cudaHostAlloc(nbytes, 0)))
        return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), np.uint8)

    def zero(self, buffer):
        check(rt.cudaMemsetAsync(buffer.ptr, 0, buffer.nbytes, self.stream))

    def upload(self, buffer):
        """Yields pinned memory, piece by piece: what the caller writes there goes to the buffer"""
        for start in range(0, buffer.nbytes, PIECE):
            self.turn = turn = 1 - self.turn
            if self.events[turn] is not None:
                check(rt.cudaEventSynchronize(self.events[turn]))  # the copy before the last is over
            else:
                self.events[turn] = check(rt.cudaEventCreate())
            piece = self.pinned[turn][:min(PIECE, buffer.nbytes - start)]
            yield piece
            check(rt.cudaMemcpyAsync(buffer.ptr + start, piece.ctypes.data, piece.nbytes, TO_DEVICE, self.stream))
            check(rt.cudaEventRecord(self.events[turn], self.stream))

    def send(self, buffer, array):
        """Copy a host array, which may change as soon as this returns, to a buffer."""
        data, start = np.ascontiguousarray(array, buffer.dtype).reshape(-1).view(np.uint8), 0
        for piece in self.upload(buffer):
            piece[:] = data[start:start + piece.size]
            start += piece.size

    def fetch(self, buffer, out):
        """Begin to copy a buffer into host memory: it is there after synchronize()."""
        check(rt.cudaMemcpyAsync(out.ctypes.data, buffer.ptr, buffer.nbytes, TO_HOST, self.stream))

    def read(self, buffer):
        """A buffer's numbers as a host array"""
        out = np.empty(buffer.shape, buffer.dtype)
        self.fetch(buffer, out)
        self.synchronize()
        return out

    # work

    def synchronize(self):
        """Wait until all that is queued is done."""
        check(rt.cudaStreamSynchronize(self.stream))

    def launch(self, kernel, grid, block, *args, shared=0):
        """Queue a kernel. shared: bytes of memory that a block's threads share"""
        arrays = (x.array if isinstance(x, Buffer) else x for x in args)
        launcher = kernel[grid, block, self.numba_stream, shared]
        if self.trace is None:
            start, compiled = time.perf_counter(), len(kernel.overloads)
            launcher(*arrays)
            if len(kernel.overloads) > compiled:  # or loaded from the cache
                self.spent["kernels"] += time.perf_counter() - start
        else:
            names = kernel.py_func.__code__.co_varnames
            self.timed(kernel.py_func.__name__, dict(zip(names, args)), lambda: launcher(*arrays))

    def call(self, name, function, *args, **keywords):
        """Queue what a function of a library queues."""
        if self.trace is None:
            function(*args, **keywords)
        else:
            arguments = inspect.signature(function).bind(*args, **keywords).arguments
            self.timed(name, arguments, lambda: function(*args, **keywords))

    def timed(self, name, arguments, work):
        begin, end = (check(rt.cudaEventCreate()) for _ in range(2))
        trace, self.trace = self.trace, None  # what it queues in turn is a part of it
        with self.range(name):
            check(rt.cudaEventRecord(begin, self.stream))
            work()
            check(rt.cudaEventRecord(end, self.stream))
        self.trace = trace
        trace.append((name, arguments, begin, end))
        if len(self.trace) >= TRACED:
            self.read_times()

    @contextlib.contextmanager
    def timing(self, record):
        """A context without graphs, in which record(name, arguments by name, seconds) is called for all that is queued:
        later, since no time is known before the work is done."""
        self.trace, self.record = [], record
        try:
            yield
        finally:
            self.read_times()
            self.trace = None

    def read_times(self):
        self.synchronize()
        for name, arguments, begin, end in self.trace:
            self.record(name, arguments, check(rt.cudaEventElapsedTime(begin, end)) / 1e3)
            check(rt.cudaEventDestroy(begin))
            check(rt.cudaEventDestroy(end))
        self.trace.clear()

    def milliseconds(self, work, repeats):
        """Milliseconds that a piece of work takes, from events around several"""
        begin, end = (check(rt.cudaEventCreate()) for _ in range(2))
        work()
        check(rt.cudaEventRecord(begin, self.stream))
        for _ in range(repeats):
            work()
        check(rt.cudaEventRecord(end, self.stream))
        check(rt.cudaEventSynchronize(end))
        milliseconds = check(rt.cudaEventElapsedTime(begin, end)) / repeats
        check(rt.cudaEventDestroy(begin))
        check(rt.cudaEventDestroy(end))
        return milliseconds

    # graphs: what has been queued once in the ordinary way is recorded the second time, and replayed from then on

    def replay(self, key, work):
        """Queue a piece of work that is the same in every call with this key: same kernels, addresses and numbers."""
        with self.range(key if isinstance(key, str) else key[0]):
            if self.trace is not None or key not in self.seen:
                self.seen.add(key)
                work()
                return
            if key not in self.graphs:
                self.graphs[key] = self.capture(work)
            check(rt.cudaGraphLaunch(self.graphs[key], self.stream))

    def capture(self, work):
        """What a piece of work queues, as a graph"""
        check(rt.cudaStreamBeginCapture(self.stream, rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            work()
        finally:
            graph = check(rt.cudaStreamEndCapture(self.stream))
        executable = check(rt.cudaGraphInstantiate(graph, 0))
        check(rt.cudaGraphDestroy(graph))
        return executable

    def drop_graphs(self):
        """Forget all graphs: addresses that they were recorded with have changed."""
        self.synchronize()
        for graph in self.graphs.values():
            check(rt.cudaGraphExecDestroy(graph))
        self.graphs, self.seen = {}, set()
