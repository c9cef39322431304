"""
A GPU of NumPy: Gpu and Products as dev/engine/cuda.py calls them, on the host's memory, so that all that the engine
does around its kernels and products runs where there is no GPU. Each kernel is replaced by its formula in float64.

Memory that is allocated is full of NaN. A piece of work that is replayed is recorded the second time, as on a GPU: with
the addresses and numbers of that time, and without copies to or from the host.
"""
import contextlib
import ctypes
from collections import Counter
from unittest import mock

import formulas
import numpy as np
import pytest

F32, BF16 = np.dtype(np.float32), np.dtype(np.uint16)


def engine(*args, gpu=None, **options):
    """dev/engine/cuda.py's engine on a GPU of NumPy, with attention of our own; skips where its packages are missing"""
    for package in "cuda.bindings.runtime", "numba_cuda", "nvmath.bindings":
        pytest.importorskip(package, reason="dev/engine/requirements.txt is not installed", exc_type=ImportError)
    from dev.engine import cuda
    with mock.patch.object(cuda, "Gpu", gpu or Gpu), mock.patch.object(cuda, "Products", Products):
        return cuda.GPT2(*args, **{"precision": "fp32", "attention": "own", **options})


def to_bf16(x):
    """float32 numbers rounded to the nearest bfloat16, as uint16"""
    bits = np.ascontiguousarray(x, F32).view(np.uint32)
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16).astype(BF16)


def from_bf16(x):
    return (x.astype(np.uint32) << 16).view(F32)


def memory_at(ptr, shape, dtype, strides=None):
    """The array at an address"""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if strides else int(np.prod(shape))
    flat = np.frombuffer((ctypes.c_ubyte * (size * np.dtype(dtype).itemsize)).from_address(ptr), dtype)
    if strides is None:
        return flat.reshape(shape)
    return np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in strides])


def get(array):
    """The numbers of an array: float64, or integers"""
    return array if array.dtype == np.int32 else np.float64(from_bf16(array) if array.dtype == BF16 else array)


def put(array, x):
    array[...] = to_bf16(x) if array.dtype == BF16 else x


class Gpu:
    name, capability, multiprocessors, driver, stream = "NVIDIA H200 of NumPy", (9, 0), 2, 13000, 0

    def __init__(self):
        self.memories, self.free_bytes = {}, 1 << 30
        self.seen, self.graphs, self.trace, self.recording, self.spent = set(), {}, None, None, Counter()

    # memory

    def free_memory(self):
        return self.free_bytes - sum(memory.nbytes for memory in self.memories.values()), self.free_bytes

    def allocate(self, nbytes):
        if nbytes > self.free_memory()[0]:
            raise ValueError("the GPU is full\n---> HINT: use a smaller -b")
        memory = np.full(nbytes + 256, 255, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % 256
        self.memories[address] = memory
        return address

    def free(self, address):
        self.memories.pop(address)[:] = 255

    def pinned_memory(self, nbytes):
        return np.full(nbytes, 255, np.uint8)

    def zero(self, buffer):
        self.queue(lambda: memory_at(buffer.ptr, (buffer.nbytes,), np.uint8).fill(0))

    def upload(self, buffer):
        assert self.recording is None, "a copy from the host in a graph"
        memory = memory_at(buffer.ptr, (buffer.nbytes,), np.uint8)
        for start in range(0, buffer.nbytes, 1000):
            piece = np.full(min(1000, buffer.nbytes - start), 255, np.uint8)
            yield piece
            memory[start:start + piece.size] = piece

    def send(self, buffer, array):
        data, start = np.ascontiguousarray(array, buffer.dtype).reshape(-1).view(np.uint8), 0
        for piece in self.upload(buffer):
            piece[:] = data[start:start + piece.size]
            start += piece.size

    def fetch(self, buffer, out):
        assert self.recording is None, "a copy to the host in a graph"
        out.view(np.uint8).reshape(-1)[:] = memory_at(buffer.ptr, (buffer.nbytes,), np.uint8)

    def read(self, buffer):
        out = np.empty(buffer.shape, buffer.dtype)
        self.fetch(buffer, out)
        return out

    # work

    def synchronize(self):
        assert self.recording is None, "waiting in a graph"

    def queue(self, work):
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def launch(self, kernel, grid, block, *args, shared=0):
        threads, blocks = np.prod(block), np.prod(grid)
        assert 1 <= threads <= 1024 and threads % 32 == 0 and blocks >= 1 and shared <= 48 << 10
        name = kernel.py_func.__name__
        arrays = [memory_at(x.ptr, x.shape, x.dtype) if hasattr(x, "ptr") else x for x in args]
        assert not any(isinstance(x, float) for x in args), "a float would be a float64 on a GPU"
        names = kernel.py_func.__code__.co_varnames
        work = lambda: self.work(kernel.py_func, arrays, grid, block, shared)
        self.timed(name, dict(zip(names, args)), lambda: self.queue(work))

    def work(self, function, arrays, grid, block, shared):
        getattr(Kernels, function.__name__)(*arrays)

    def call(self, name, function, *args, **keywords):
        self.timed(name, {"arguments": args}, lambda: function(*args, **keywords))

    def timed(self, name, arguments, work):
        work()
        if self.trace is not None:
            self.trace.append((name, arguments))

    @contextlib.contextmanager
    def timing(self, record):
        self.trace = []
        yield
        trace, self.trace = self.trace, None
        for name, arguments in trace:
            record(name, arguments, 0.0)

    def replay(self, key, work):
        if self.trace is not None or key not in self.seen:
            self.seen.add(key)
            work()
            return
        if key not in self.graphs:
            self.recording = self.graphs[key] = []
            work()
            self.recording = None
        for recorded in self.graphs[key]:
            recorded()

    def drop_graphs(self):
        self.seen, self.graphs = set(), {}


class Products:
    def __init__(self, gpu, *args, **keywords):
        self.gpu = gpu

    def forward(self, out, inp, weight, bias=None, residual=None, pre=None):
        out, inp, weight, bias, residual, pre = (
            x and memory_at(x.ptr, x.shape, x.dtype) for x in (out, inp, weight, bias, residual, pre))

        def work():
            y = get(inp) @ get(weight).T
            y = y + sum(get(x) for x in (bias, residual) if x is not None)
            if pre is not None:
                put(pre, y)
                y = formulas.gelu(y)
            put(out, y)
        self.gpu.queue(work)

    def backward_input(self, dinp, dout, weight, pre=None):
        dinp, dout, weight, pre = (x and memory_at(x.ptr, x.shape, x.dtype) for x in (dinp, dout, weight, pre))

        def work():
            x = get(dout) @ get(weight)
            put(dinp, x if pre is None else x * formulas.gelu_gradient(get(pre)))
        self.gpu.queue(work)

    def backward_weight(self, dweight, dout, inp, add):
        dweight, dout, inp = (memory_at(x.ptr, x.shape, x.dtype) for x in (dweight, dout, inp))
        self.gpu.queue(lambda: put(dweight, get(dout).T @ get(inp) + (get(dweight) if add else 0)))

    def batched(self, out, left, right, sizes, transposed=(False, False), batch=1):
        rows, columns, depth = sizes

        def array(x, shape, turned=False):
            shape = shape[::-1] if turned else shape
            found = memory_at(x.ptr, (batch, *shape), x.dtype, (x.stride, x.row, 1))
            return found.swapaxes(1, 2) if turned else found
        a, b = array(left, (rows, depth), transposed[0]), array(right, (depth, columns), transposed[1])
        y = array(out, (rows, columns))
        self.gpu.queue(lambda: put(y, get(a.copy()) @ get(b.copy())))


def gradient_of_attention(dout, qkv, T, NH):
    """of qkv (B*T, 3*C)"""
    sequences = [get(x).reshape(-1, T, x.shape[1]) for x in (dout, qkv)]
    return formulas.attention_gradient(*sequences, NH).reshape(qkv.shape)


class Kernels:
    """By the names and with the arguments of dev/engine/cuda_kernels.py and flash_attention.py, whose comments say what
    they are"""

    def encoder_forward(out, inp, wte, wpe, place, T, C):
        put(out, get(wte)[inp] + get(wpe)[place[0] + np.arange(inp.size) % T])

    def wpe_backward(dwpe, dout, B, T, C, add):
        x = np.zeros(dwpe.shape)
        x[:T] = get(dout).reshape(B, T, C).sum(0)
        put(dwpe, x + get(dwpe) if add else x)

    def wte_backward(dwte, dout, order, starts, tokens, C):
        for token, begin, end in zip(tokens, starts, starts[1:]):
            if begin < end:
                dwte[token] += get(dout)[order[begin:end]].sum(0)

    def layernorm_forward(out, mean, rstd, inp, weight, bias, C):
        y, mean[:], rstd[:] = formulas.layernorm(get(inp), get(weight), get(bias))
        put(out, y)

    def layernorm_backward(dinp, partial, dout, inp, weight, mean, rstd, C, add):
        dx, dweight, dbias = formulas.layernorm_gradient(get(dout), get(inp), get(weight))
        put(dinp, dx + get(dinp) if add else dx)
        partial[:] = 0  # all of it in the first block's part; the others' are known only from the grid
        partial[:3 * C] = np.concatenate([dweight, dbias, get(dinp).sum(0)])

    def finish_sums(out1, out2, out3, partial, blocks, C, columns, add):
        sums = np.float64(partial[:blocks * columns]).reshape(blocks, columns).sum(0)
        for n, out in enumerate((out1, out2, out3)[:columns // C]):
            part = sums[n * C:(n + 1) * C]
            put(out, part + get(out) if add else part)

    def bias_backward(partial, dout, BT, OC):
        partial[:] = 0
        partial[:OC] = get(dout).sum(0)

    def softmax_forward(probs, lse, scores, scale, T, width):
        s, shown = scale * get(scores)[:, :, :T], np.tri(T, dtype=bool)
        s = np.where(shown, s, -np.inf)
        largest = s.max(-1, keepdims=True)
        sums = np.exp(s - largest).sum(-1, keepdims=True)
        lse[:] = (largest + np.log(sums))[..., 0]
        put(probs, 0.0)
        put(probs[:, :, :T], np.exp(s - largest) / sums)

    def softmax_backward(probs, dscores, scores, dprobs, lse, scale, T, width):
        p = np.where(np.tri(T, dtype=bool), np.exp(scale * get(scores)[:, :, :T] - np.float64(lse)[..., None]), 0)
        d = np.where(np.tri(T, dtype=bool), get(dprobs)[:, :, :T], 0)
        put(probs, 0.0)
        put(dscores, 0.0)
        put(probs[:, :, :T], p)
        put(dscores[:, :, :T], p * (d - (p * d).sum(-1, keepdims=True)) * scale)

    def flash_forward(out, lse, qkv, T, C, scale):
        y, lse[:], _ = formulas.attention(qkv.reshape(-1, T, 3 * C), lse.shape[1])
        put(out, y.reshape(out.shape))

    def flash_dq(dqkv, delta, dout, out, lse, qkv, T, C, scale):
        dqkv[:, :C] = gradient_of_attention(dout, qkv, T, delta.shape[1])[:, :C]
        delta[:] = (get(dout) * get(out)).reshape(-1, T, delta.shape[1], C // delta.shape[1]).sum(-1).swapaxes(1, 2)

    def flash_dkv(dqkv, delta, dout, lse, qkv, T, C, scale):
        dqkv[:, C:] = gradient_of_attention(dout, qkv, T, delta.shape[1])[:, C:]

    def keep_keys(keys, values, qkv, place, C):
        T = len(qkv)
        keys[place[0]:place[0] + T], values[place[0]:place[0] + T] = qkv[:, C:2 * C], qkv[:, 2 * C:]

    def attention_decode(out, qkv, keys, values, place, C, hs, scale):
        n = place[0] + 1
        q, k, v = (get(x).reshape(-1, C // hs, hs).swapaxes(0, 1) for x in (qkv[0, :C], keys[:n], values[:n]))
        s = scale * (q @ k.swapaxes(1, 2))
        p = np.exp(s - s.max(-1, keepdims=True))
        put(out, (p / p.sum(-1, keepdims=True) @ v).reshape(1, C))

    def gelu_forward(out, inp):
        put(out, formulas.gelu(get(inp)))

    def gelu_backward(dinp, inp):
        put(dinp, get(dinp) * formulas.gelu_gradient(get(inp)))

    def fused_classifier(logits, losses, targets, dloss, V, Vp, train):
        rows, x = np.flatnonzero(targets >= 0), get(logits)[:, :V]
        losses[:] = 0
        losses[rows] = formulas.cross_entropy(x[rows], targets[rows])[0]
        if train:
            put(logits, 0.0)
            put(logits[:, :V], dloss * formulas.cross_entropy_gradient(x, targets))

    def mean_loss(mean, losses, count):
        mean[0] = losses.sum(dtype=np.float64) / count[0]

    def sum_of_squares(partial, x):
        partial[:] = 0
        partial[0] = (np.float64(x)**2).sum()

    def adamw_update(params, master, grads, m, v, hyper, decayed):
        lr, beta1, beta2, correction1, correction2, eps, decay, factor = np.float64(hyper)
        grad = get(grads) * factor
        m[...], v[...] = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        change = m * correction1 / (np.sqrt(v * correction2) + eps)
        put(master, master - lr * (change + (decay if decayed else 0) * master))
        put(params, master)

    def convert(out, inp):
        put(out, get(inp))
