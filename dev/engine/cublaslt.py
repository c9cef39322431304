"""
Matrix products by cublasLt, through nvmath's low-level bindings, with what is done on the way: bias, GELU, residual.

cublasLt thinks in columns: our row-major D = A @ B.T is its D.T = B @ A.T, so its first operand is our second.
"""
import json
import os
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from nvmath.bindings import cublasLt as lt

from dev.engine.cuda_kernels import BF16, F32
from dev.engine.gpu import Buffer
from dev.run.files import write_file

CUDA_TYPE = {F32: 0, BF16: 14}        # CUDA_R_32F, CUDA_R_16BF
COMPUTE_32F, COMPUTE_TF32 = 68, 77
WORKSPACE = 64 << 20                  # bytes
ALIGNMENT = 16                        # bytes: of every operand, since channels are a multiple of 8
CANDIDATES = 8                        # algorithms that are timed for each product: 2 % of the step
REPEATS, TIMED = 20, 10               # times that the best of them are run, if that takes less than so many ms
DESC, EPILOGUE, LAYOUT, PREFERENCE = (lt.MatmulDescAttribute, lt.Epilogue, lt.MatrixLayoutAttribute,
                                      lt.MatmulPreferenceAttribute)
# K may be split between blocks only where their sums stay float32: not through an output in bfloat16, not by atomics
REDUCTIONS = int(lt.ReductionScheme.COMPUTE_TYPE)


class Matrix(NamedTuple):
    """A row-major matrix, or several: address, type, elements from row to row, and from one matrix to the next"""
    ptr: int
    dtype: np.dtype
    row: int
    stride: int = 0


def matrix(buffer):
    return Matrix(buffer.ptr, buffer.dtype, buffer.shape[-1])


class Choices:
    """Which algorithm was the fastest for each product, kept in a file beside the compiled kernels: other algorithms
    may add in another order, and every run should have the same bits. None are chosen where no file can be written."""

    def __init__(self, path, prefix):
        self.path, self.prefix, self.found = path, prefix, {}
        self.writable = os.access(os.path.dirname(path), os.W_OK)

    def read(self):
        """Take what the file has by now: other runs choose, too."""
        try:
            with open(self.path) as file:
                self.found |= {str(name): bytes.fromhex(algorithm) for name, algorithm in json.load(file).items()}
        except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged: choose again
            pass

    def get(self, key):
        name = f"{self.prefix} {key}"
        if name not in self.found:
            self.read()
        return self.found.get(name)

    def put(self, key, algorithm):
        """Keep it, in the file at once: the next engine must not choose otherwise."""
        self.read()
        self.found[f"{self.prefix} {key}"] = algorithm
        text = json.dumps({name: algorithm.hex() for name, algorithm in self.found.items()}, indent=0)
        write_file(self.path, np.frombuffer(text.encode(), np.uint8))


class Products:
    """tf32: round float32 operands to TF32, which tensor cores multiply. choose: time algorithms, else take the first
    """

    def __init__(self, gpu, tf32=True, choose=True, folder=None):
        self.gpu, self.tf32, self.handle, self.plans = gpu, tf32, lt.create(), {}
        self.workspace = Buffer(gpu.allocate(WORKSPACE), (WORKSPACE,), np.uint8)
        self.one, self.zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        folder = folder or os.environ.get("NUMBA_CACHE_DIR") or os.path.join(os.path.dirname(__file__), "__pycache__")
        self.choices = Choices(os.path.join(folder, "cublaslt.json"), f"{gpu.name} {lt.get_version()}")
        self.choosing = choose and self.choices.writable

    # in the layers' terms: inp (BT, C), weight (OC, C), out (BT, OC)

    def forward(self, out, inp, weight, bias=None, residual=None, pre=None):
        """out = inp @ weight.T + bias + residual; with pre, that is pre, and out = gelu(pre)"""
        BT, (OC, C) = inp.shape[0], weight.shape
        epilogue = EPILOGUE.GELU_AUX_BIAS if pre else EPILOGUE.BIAS if bias else EPILOGUE.DEFAULT
        self.multiply(matrix(out), matrix(weight), matrix(inp), (OC, BT, C), (True, False), epilogue=epilogue,
                      bias=bias, aux=pre, c=residual and matrix(residual))

    def backward_input(self, dinp, dout, weight, pre=None):
        """dinp = dout @ weight; with pre, times the derivative of gelu at pre"""
        BT, (OC, C) = dout.shape[0], weight.shape
        epilogue = EPILOGUE.DGELU if pre else EPILOGUE.DEFAULT
        self.multiply(matrix(dinp), matrix(weight), matrix(dout), (C, BT, OC), (False, False), epilogue=epilogue,
                      aux=pre)

    def backward_weight(self, dweight, dout, inp, add):
        """dweight (+)= dout.T @ inp"""
        BT, (OC, C) = dout.shape[0], dweight.shape
        self.multiply(matrix(dweight), matrix(inp), matrix(dout), (C, OC, BT), (False, True),
                      c=matrix(dweight) if add else None)

    def batched(self, out, left, right, sizes, transposed=(False, False), batch=1):
        """out (rows, columns) = left (rows, depth) @ right (depth, columns) for each of several Matrix.

        sizes: (rows, columns, depth); transposed: is left, is right stored as its transpose?"""
        rows, columns, depth = sizes
        self.multiply(out, right, left, (columns, rows, depth), (transposed[1], transposed[0]), batch=batch)

    # in cublasLt's terms: d = op(a) (m, k) @ op(b) (k, n) + c, all of it transposed

    def multiply(self, d, a, b, sizes, transposed, epilogue=EPILOGUE.DEFAULT, bias=None, aux=None, c=None, batch=1):
        shapes = tuple((x.row, x.stride) for x in (d, a, b))
        key = sizes, transposed, int(epilogue), shapes, batch, str(a.dtype), str(d.dtype), self.tf32
        plan = self.plans.get((key, c is not None))
        if plan is None:
            plan = self.plans[key, c is not None] = self.plan(key, d, a, b, epilogue, bias, aux)
            start = time.perf_counter()
            self.choose(plan, key, d, a, b, bias, aux, c)
            self.gpu.spent["choosing products"] += time.perf_counter() - start
        self.run(plan, d, a, b, bias, aux, c)

    def run(self, plan, d, a, b, bias, aux, c):
        for attribute, value in ((DESC.BIAS_POINTER, bias), (DESC.EPILOGUE_AUX_POINTER, aux)):
            if value is not None:
                self.set(plan.desc, attribute, value.ptr)
        beta = self.zero if c is None else self.one
        lt.matmul(self.handle, plan.desc, self.one.ctypes.data, a.ptr, plan.a, b.ptr, plan.b, beta.ctypes.data,
                  (c or d).ptr, plan.d, d.ptr, plan.d, plan.algorithm.ctypes.data, self.workspace.ptr, WORKSPACE,
                  int(self.gpu.stream))

    def set(self, target, attribute, value):
        """Set an attribute of a description of a product, of a matrix, or of what is wanted of an algorithm."""
        kind = type(attribute)
        dtype, setter = {DESC: (lt.get_matmul_desc_attribute_dtype, lt.matmul_desc_set_attribute),
                         LAYOUT: (lt.get_matrix_layout_attribute_dtype, lt.matrix_layout_set_attribute),
                         PREFERENCE: (lt.get_matmul_preference_attribute_dtype,
                                      lt.matmul_preference_set_attribute)}[kind]
        x = np.array([value], dtype(attribute))
        setter(target, attribute, x.ctypes.data, x.nbytes)

    def plan(self, key, d, a, b, epilogue, bias, aux):
        """The descriptions of a product and its matrices"""
        (m, n, k), (ta, tb), batch = key[0], key[1], key[4]
        tf32 = a.dtype == F32 and self.tf32
        plan = SimpleNamespace(desc=lt.matmul_desc_create(COMPUTE_TF32 if tf32 else COMPUTE_32F, CUDA_TYPE[F32]))
        settings = [(DESC.TRANSA, int(ta)), (DESC.TRANSB, int(tb)), (DESC.EPILOGUE, int(epilogue))]
        if bias is not None:
            settings += [(DESC.BIAS_POINTER, bias.ptr), (DESC.BIAS_DATA_TYPE, CUDA_TYPE[bias.dtype])]
        if aux is not None:
            settings += [(DESC.EPILOGUE_AUX_POINTER, aux.ptr), (DESC.EPILOGUE_AUX_LD, m)]
        for attribute, value in settings:
            self.set(plan.desc, attribute, value)

        def layout(x, rows, columns):
            layout = lt.matrix_layout_create(CUDA_TYPE[x.dtype], rows, columns, x.row)
            if batch > 1:
                self.set(layout, LAYOUT.BATCH_COUNT, batch)
                self.set(layout, LAYOUT.STRIDED_BATCH_OFFSET, x.stride)
            return layout
        plan.a, plan.b = layout(a, k, m) if ta else layout(a, m, k), layout(b, n, k) if tb else layout(b, k, n)
        plan.d = layout(d, m, n)
        return plan

    def heuristic(self, plan, count):
        """The algorithms that cublasLt expects to be the fastest, best first"""
        preference = lt.matmul_preference_create()
        self.set(preference, PREFERENCE.MAX_WORKSPACE_BYTES, WORKSPACE)
        self.set(preference, PREFERENCE.REDUCTION_SCHEME_MASK, REDUCTIONS)
        for operand in "ABCD":
            self.set(preference, getattr(PREFERENCE, f"MIN_ALIGNMENT_{operand}_BYTES"), ALIGNMENT)
        results, found = np.zeros(count, lt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
        lt.matmul_algo_get_heuristic(self.handle, plan.desc, plan.a, plan.b, plan.d, plan.d, preference, count,
                                     results.ctypes.data, found.ctypes.data)
        lt.matmul_preference_destroy(preference)
        return [results[i:i + 1]["algo"].copy() for i in range(found[0]) if results[i]["state"] == 0]

    def choose(self, plan, key, d, a, b, bias, aux, c):
        """Give a plan its algorithm: the one that was chosen for its key, else the fastest now, else the first."""
        kept = self.choices.get(key) if self.choosing else None
        if kept is not None and len(kept) == lt.matmul_algo_dtype.itemsize:
            plan.algorithm = np.frombuffer(kept, lt.matmul_algo_dtype).copy()
            if self.fits(plan):
                return
        algorithms = self.heuristic(plan, CANDIDATES if self.choosing else 1)
        if not algorithms:
            raise ValueError(f"cuBLAS has no product for {key}\n---> HINT: this is a fault of the program")
        plan.algorithm = algorithms[0]
        if not self.choosing or c is not None and c.ptr == d.ptr:  # timing would add up to nonsense
            return
        def measure(algorithm, repeats):
            plan.algorithm = algorithm
            return self.gpu.milliseconds(lambda: self.run(plan, d, a, b, bias, aux, c), repeats)
        plan.algorithm = self.fastest(algorithms, measure)
        self.choices.put(key, plan.algorithm.tobytes())

    @staticmethod
    def fastest(algorithms, measure):
        """The fastest by measure(algorithm, repeats), in ms; the first where that is less than 2 % slower"""
        once = [measure(algorithm, 1) for algorithm in algorithms]
        good = [0] + [i for i in range(1, len(once)) if once[i] < 1.25 * min(once)]  # the others are not timed again
        repeats = max(2, min(REPEATS, int(TIMED / min(once))))
        times = {i: measure(algorithms[i], repeats) for i in good}
        best = min(times, key=times.get)
        return algorithms[best if times[best] < 0.98 * times[0] else 0]

    def fits(self, plan):
        """Can the plan's algorithm do its product, in the workspace that there is?"""
        result = np.zeros(1, lt.matmul_heuristic_result_dtype)
        try:
            lt.matmul_algo_check(self.handle, plan.desc, plan.a, plan.b, plan.d, plan.d, plan.algorithm.ctypes.data,
                                 result.ctypes.data)
        except lt.cuBLASLtError:
            return False
        return result[0]["state"] == 0 and result[0]["workspace_size"] <= WORKSPACE
