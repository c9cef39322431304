"""
A GPU that runs the kernels' own source in plain Python, slowly, and watches them as compute-sanitizer does: every index
must be inside its array, every vector at a multiple of 16 bytes, every shuffle by a whole warp, and between two
barriers no thread may touch what another one writes in shared memory.

A kernel becomes a generator that yields where threads wait for each other: one Python thread can be all of them.
"""
import ast
import inspect
from types import SimpleNamespace

import numpy as np
import numpy_gpu

from dev.engine import cuda_kernels

BARRIER = object()


class Vector(np.ndarray):
    """Eight numbers; += makes new ones, as with numbers"""

    def __new__(cls, x):
        return np.array(x, np.float32).view(cls)

    def __iadd__(self, x):
        return self + x


class Memory:
    """An array that a kernel sees, flat. block: the Block whose threads share it, None for that of all"""

    def __init__(self, array, name, block=None):
        self.array, self.name, self.block, self.size = array.reshape(-1), name, block, array.size
        self.shape, self.dtype, self.touched = array.shape, array.dtype, {}

    def place(self, index, count=1):
        if isinstance(index, tuple):
            assert len(index) == len(self.shape) and all(0 <= i < n for i, n in zip(index, self.shape)), self.name
            index = np.ravel_multi_index([int(i) for i in index], self.shape)
        assert 0 <= index and index + count <= self.size, f"{self.name}[{index}:{index + count}] of {self.size}"
        return int(index)

    def watch(self, index, count, writing):
        """AssertionError where two threads touch a number of shared memory in one interval, and one of them writes"""
        if self.block is None:
            return
        now, thread = self.block.interval, self.block.thread
        for i in range(index, index + count):
            then, writer, readers = self.touched.get(i, (now, None, frozenset()))
            if then != now:
                writer, readers = None, frozenset()
            assert writer in (None, thread) and not (writing and readers - {thread}), f"a race at {self.name}[{i}]"
            self.touched[i] = (now, thread, readers) if writing else (now, writer, readers | {thread})

    def __getitem__(self, index):
        index = self.place(index)
        self.watch(index, 1, False)
        return self.array[index]

    def __setitem__(self, index, x):
        index = self.place(index)
        self.watch(index, 1, True)
        self.array[index] = x

    def vector(self, index):
        """The eight numbers that begin there"""
        assert index % 8 == 0 or self.dtype == np.float32 and index % 4 == 0, f"{self.name}[{index}] is not aligned"
        index = self.place(index, 8)
        return index, slice(index, index + 8)


# ---------------------------------------------------------------------------------------------------------------------
# what the Vec8 section of cuda_kernels.py says, in NumPy

def load(memory, index):
    index, part = memory.vector(index)
    memory.watch(index, 8, False)
    return Vector(numpy_gpu.get(memory.array[part]))


def store(memory, index, x):
    index, part = memory.vector(index)
    memory.watch(index, 8, True)
    numpy_gpu.put(memory.array[part], np.asarray(x))


def total(x):
    x = x.reshape(4, 2).sum(1, dtype=np.float32)
    return (x[0] + x[1]) + (x[2] + x[3])


def keep(x, begin, end, other):
    lanes = np.arange(8)
    return Vector(np.where((begin <= lanes) & (lanes < end), x, other))


VEC8 = {"load": load, "store": store, "total": total, "keep": keep, "largest": np.max, "exp2": np.exp2, "sqrt": np.sqrt,
        "vector": lambda x: Vector(np.full(8, x))}

# ---------------------------------------------------------------------------------------------------------------------
# threads

class Waits(ast.NodeTransformer):
    """Turns what waits for other threads into yields: barriers, shuffles, and device functions, which have some."""

    def visit_Call(self, node):
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called == "cuda.syncthreads":
            return ast.Yield(ast.Name("BARRIER", ast.Load()))
        if called == "cuda.shfl_xor_sync":
            return ast.Yield(ast.Tuple(node.args[1:], ast.Load()))
        return ast.YieldFrom(node) if hasattr(getattr(cuda_kernels, called, None), "py_func") else node


def generators(cuda):
    """{name: function that makes a generator} of all that is compiled in cuda_kernels.py. cuda: what that is in them"""
    names = vars(cuda_kernels) | VEC8 | {"cuda": cuda, "BARRIER": BARRIER}
    for function in list(names.values()):
        if hasattr(function, "py_func"):
            tree = Waits().visit(ast.parse(inspect.getsource(function.py_func)))
            tree.body[0].decorator_list = []
            tree.body[0].body += ast.parse("if False: yield").body  # a generator where nothing waits, too
            exec(compile(ast.fix_missing_locations(tree), cuda_kernels.__file__, "exec"), names)
    return names


class Block:
    """A block of threads, and what the kernel's source calls cuda"""

    def __init__(self):
        self.libdevice = SimpleNamespace(exp2f=np.exp2, log2f=np.log2, rsqrtf=lambda x: np.float32(1) / np.sqrt(x))
        self.shared = SimpleNamespace(array=self.shared_array)
        self.functions = generators(self)

    def shared_array(self, shape, dtype):
        """Every thread asks for the same arrays, in the same order; those of size 0 are the launch's bytes"""
        number = self.asked[self.thread] = self.asked.get(self.thread, -1) + 1
        if number not in self.arrays:
            shape = shape or self.bytes // np.dtype(dtype).itemsize
            self.arrays[number] = Memory(np.full(shape, np.nan, dtype), f"shared array {number}", self)
        return self.arrays[number]

    def grid(self, ndim):
        return self.blockIdx.x * self.blockDim.x + self.threadIdx.x

    def gridsize(self, ndim):
        return self.gridDim.x * self.blockDim.x

    def launch(self, name, grid, block, args, shared):
        (gx, gy), (bx, by) = ((x, 1) if isinstance(x, int) else x for x in (grid, block))
        self.gridDim, self.blockDim, self.bytes = SimpleNamespace(x=gx, y=gy), SimpleNamespace(x=bx, y=by), shared
        places = [SimpleNamespace(x=n % bx, y=n // bx) for n in range(bx * by)]
        for n in range(gx * gy):
            self.blockIdx, self.asked, self.arrays, self.interval = SimpleNamespace(x=n % gx, y=n // gx), {}, {}, 0
            self.run([self.functions[name](*args) for _ in places], places)

    def run(self, threads, places):
        """All threads until they end, each until it waits, again and again"""
        answers, waiting = dict.fromkeys(range(len(threads))), {}
        while answers:
            for self.thread, answer in answers.items():
                self.threadIdx = places[self.thread]
                try:
                    waiting[self.thread] = threads[self.thread].send(answer)
                except StopIteration:
                    waiting.pop(self.thread, None)
            answers = {}
            for first in range(0, len(threads), 32):
                warp = [waiting[thread] for thread in range(first, first + 32) if thread in waiting]
                if any(wait is not BARRIER for wait in warp):
                    assert len(warp) == 32 and BARRIER not in warp, "a shuffle by a part of a warp"
                    answers |= {first + lane: warp[lane ^ distance][0] for lane, (_, distance) in enumerate(warp)}
            if not answers:  # all that are left wait at the barrier
                answers, self.interval = dict.fromkeys(waiting), self.interval + 1


class Gpu(numpy_gpu.Gpu):
    """The GPU of NumPy, but with the kernels' own source"""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def work(self, name, names, args, grid, block, shared):
        args = [Memory(x, name) if isinstance(x, np.ndarray) else np.int64(x) if type(x) is int else x
                for x, name in zip(args, names)]
        with np.errstate(all="ignore"):
            self.block.launch(name, grid, block, args, shared)
