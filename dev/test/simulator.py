"""
A GPU that runs the kernels' own source in plain Python, slowly, and watches them as compute-sanitizer does: every index
must be inside its array, every vector at a multiple of 16 bytes, every shuffle by a whole warp, and between two
barriers no thread may touch what another one writes in shared memory.

A kernel becomes a generator that yields where threads wait for each other: one Python thread can be all of them. It
yields BARRIER, or what a warp does together: a function of its lanes' arguments, and this lane's.
"""
import ast
import inspect
import textwrap
from types import SimpleNamespace

import numpy as np
import numpy_gpu

from dev.engine import cuda_kernels, flash_attention

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

    def rows(self, count, width):
        """The matrix (count, width) whose rows lie PAD numbers apart; the block's present thread reads it"""
        index, stride = self.place(0, count * (width + flash_attention.PAD)), width + flash_attention.PAD
        for row in range(count):
            self.watch(index + row * stride, width, False)
        return self.array[:count * stride].reshape(count, stride)[:, :width]

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
# what the Fragment section of flash_attention.py says. A tile is (n, 2, 2): of eight columns each, two rows, two
# numbers; rows are (2, 1), columns (n, 1, 2)

def cut(x):
    """float32 numbers as the tensor cores read them"""
    return (x.view(np.int32) & ~0x1fff).view(np.float32)


def rounded(x):
    return Vector((np.float32(x).view(np.int32) + 0x1000).view(np.float32))


def as_matrix(tiles, column):
    """The matrix (16, 8n) of 32 lanes' tiles. column(t, c): that of number c of lane 4g + t, of rows g and g + 8"""
    out = np.empty((16, len(tiles[0]), 8), np.float32)
    for lane, x in enumerate(tiles):
        for c in range(2):
            out[[lane // 4, lane // 4 + 8], :, column(lane % 4, c)] = x[:, :, c].T
    return out.reshape(16, -1)


def calculated(t, c):
    return 2 * t + c


def as_tiles(matrix):
    columns = matrix.reshape(16, -1, 8)
    return [Vector(np.stack([columns[[lane // 4, lane // 4 + 8], :, calculated(lane % 4, c)].T for c in range(2)], -1))
            for lane in range(32)]


def add_product_transposed(lanes):
    out, left, shared = zip(*lanes)
    left = as_matrix(left, lambda t, c: t + 4 * c)
    right = shared[0].rows(8 * len(out[0]), left.shape[1])
    return as_tiles(as_matrix(out, calculated) + cut(left) @ cut(right).T)


def add_product(lanes):
    out, left, shared = zip(*lanes)
    left = as_matrix(left, calculated)
    right = shared[0].rows(left.shape[1], 8 * len(out[0]))
    return as_tiles(as_matrix(out, calculated) + cut(left) @ cut(right))


def over_rows(reduce):
    def collective(lanes):
        found = [reduce(reduce(x, 2), 0)[:, None] for x, in lanes]
        return [Vector(reduce(found[lane // 4 * 4:lane // 4 * 4 + 4], 0)) for lane in range(32)]
    return collective


def exchanged(lanes):
    return [lanes[lane ^ distance][0] for lane, (_, distance) in enumerate(lanes)]


TOGETHER = {"add_product_transposed": add_product_transposed, "add_product": add_product,
            "row_sum": over_rows(np.sum), "row_max": over_rows(np.max), "exchanged": exchanged}


class Fragments:
    """Those intrinsics that need to know which lane they are for"""

    def __init__(self, block):
        self.block = block

    def here(self):
        """This lane's g and t"""
        return divmod(self.block.threadIdx.x % 32, 4)

    def left_factor(self, array, index, stride, rows, n):
        g, t = self.here()
        return Vector([[[array[index + min(row, rows - 1) * stride + 8 * k + t + 4 * c] for c in range(2)]
                        for row in (g, g + 8)] for k in range(n)])

    def row_numbers(self, array, index, rows):
        g, _ = self.here()
        return Vector([[array[index + min(row, rows - 1)]] for row in (g, g + 8)])

    def columns(self, shared, n):
        _, t = self.here()
        return Vector([[[shared[8 * k + 2 * t + c] for c in range(2)]] for k in range(n)])

    def put(self, array, index, stride, rows, x):
        g, t = self.here()
        for half, row in enumerate((g, g + 8)):
            place = index + row * stride
            if row < rows and x.ndim == 2 and t == 0:
                array[place] = x[half, 0]
            for k, c in np.ndindex(len(x), 2) if row < rows and x.ndim == 3 else ():
                assert place % 2 == 0, "a pair is not aligned"
                array[place + 8 * k + 2 * t + c] = x[k, half, c]

    def mask(self, kept):
        def keep(x, offset, other):
            g, t = self.here()
            columns, rows = np.arange(len(x))[:, None, None] * 8 + 2 * t + np.arange(2), np.array([[g], [g + 8]])
            return Vector(np.where(kept(columns, rows + offset), x, other))
        return keep

    def names(self):
        return {"left_factor": self.left_factor, "row_numbers": self.row_numbers, "columns": self.columns,
                "put": self.put, "keep_left": self.mask(np.less_equal), "keep_right": self.mask(np.greater_equal),
                "zeros": lambda n: Vector(np.zeros((n, 2, 2))), "same": lambda x: Vector([[x], [x]]),
                "rounded": rounded, "tf32": rounded, "maximum": np.maximum, "log2": np.log2}


# ---------------------------------------------------------------------------------------------------------------------
# threads

class Waits(ast.NodeTransformer):
    """Turns what waits for other threads into yields: barriers, what a warp does together, and device functions."""

    def __init__(self, names):
        self.names = names

    def visit_Call(self, node):
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called == "cuda.syncthreads":
            return ast.Yield(ast.Name("BARRIER", ast.Load()))
        together, args = (called, node.args) if called in TOGETHER else ("exchanged", node.args[1:])
        if called in TOGETHER or called == "cuda.shfl_xor_sync":
            return ast.Yield(ast.Tuple([ast.Name(together, ast.Load()), *args], ast.Load()))
        return ast.YieldFrom(node) if hasattr(self.names.get(called), "py_func") else node


class Sources:
    """The kernels as functions that make generators. cuda: what that is in them"""

    def __init__(self, cuda):
        self.found = vars(cuda_kernels) | vars(flash_attention)
        self.names = self.found | VEC8 | Fragments(cuda).names() | TOGETHER | {"cuda": cuda, "BARRIER": BARRIER}
        self.made = {}
        for name, function in self.found.items():
            if hasattr(function, "py_func"):
                self.names[name] = self.generator(function.py_func)

    def generator(self, function):
        if function not in self.made:
            tree = Waits(self.found).visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
            tree.body[0].decorator_list = []
            tree.body[0].body += ast.parse("if False: yield").body  # a generator where nothing waits, too
            names = self.names | inspect.getclosurevars(function).nonlocals
            if not function.__closure__:
                names = self.names  # of all of them: device functions call each other
            exec(compile(ast.fix_missing_locations(tree), inspect.getsourcefile(function), "exec"), names)
            self.made[function] = names[function.__name__]
        return self.made[function]


class Block:
    """A block of threads, and what the kernel's source calls cuda"""

    def __init__(self):
        self.libdevice = SimpleNamespace(exp2f=np.exp2, log2f=np.log2, rsqrtf=lambda x: np.float32(1) / np.sqrt(x))
        self.shared = SimpleNamespace(array=self.shared_array)
        self.sources = Sources(self)

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

    def launch(self, function, grid, block, args, shared):
        (gx, gy, gz), (bx, by, _) = ((*np.atleast_1d(x), 1, 1)[:3] for x in (grid, block))
        self.gridDim, self.blockDim, self.bytes = SimpleNamespace(x=gx, y=gy), SimpleNamespace(x=bx, y=by), shared
        kernel = self.sources.generator(function)
        places = [SimpleNamespace(x=n % bx, y=n // bx) for n in range(bx * by)]
        for z, y, x in np.ndindex(gz, gy, gx):
            self.blockIdx, self.asked, self.arrays, self.interval = SimpleNamespace(x=x, y=y, z=z), {}, {}, 0
            self.run([kernel(*args) for _ in places], places)

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
                    assert len(warp) == 32 and BARRIER not in warp, "a part of a warp does what all of it must"
                    assert len({wait[0] for wait in warp}) == 1, "a warp's threads do different things"
                    self.thread = first
                    answers |= enumerate(warp[0][0]([args for _, *args in warp]), first)
            if not answers:  # all that are left wait at the barrier
                answers, self.interval = dict.fromkeys(waiting), self.interval + 1


class Gpu(numpy_gpu.Gpu):
    """The GPU of NumPy, but with the kernels' own source"""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def work(self, function, args, grid, block, shared):
        args = [Memory(x, name) if isinstance(x, np.ndarray) else np.int64(x) if type(x) is int else x
                for x, name in zip(args, function.__code__.co_varnames)]
        with np.errstate(all="ignore"):
            self.block.launch(function, grid, block, args, shared)
