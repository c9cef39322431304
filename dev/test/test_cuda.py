"""
The engine for NVIDIA GPUs, where the packages of dev/engine/requirements.txt are. With and without a GPU: all kernels
compile, and agree with the formulas; without one their source runs in simulator.py. On a GPU only: the whole model in
both precisions, the same bits from run to run. What every engine promises is in test_contract.py.
"""
import math
import os
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import numpy_gpu
import pytest
from formulas import (
    attention,
    attention_gradient,
    close,
    cross_entropy,
    cross_entropy_gradient,
    gelu,
    gelu_gradient,
    layernorm,
    layernorm_gradient,
    normal,
)

import train_gpt2 as t

pytest.importorskip("numba_cuda", reason="the packages of dev/engine/requirements.txt are not installed")
import simulator  # noqa: E402
from numba.cuda import types  # noqa: E402

from dev.engine import cuda_kernels as k  # noqa: E402
from dev.engine import flash_attention  # noqa: E402

F32, BF16 = k.F32, k.BF16


def has_gpu():
    try:
        from cuda.bindings import runtime
        return int(runtime.cudaGetDeviceCount()[0]) == 0
    except (ImportError, RuntimeError):
        return False


gpu_only = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")

# ---------------------------------------------------------------------------------------------------------------------
# without a GPU: PTX, and what ptxas says of it

ACTS, FLOATS, INTS = "acts", "floats", "ints"
N, YES, NUMBER = "size", "flag", "number"
SIGNATURES = {
    "encoder_forward": (ACTS, INTS, ACTS, ACTS, INTS, N, N), "wpe_backward": (FLOATS, ACTS, N, N, N, YES),
    "wte_backward": (FLOATS, ACTS, INTS, INTS, INTS, N),
    "layernorm_forward": (ACTS, FLOATS, FLOATS, ACTS, ACTS, ACTS, N),
    "layernorm_backward": (ACTS, FLOATS, ACTS, ACTS, ACTS, FLOATS, FLOATS, N, YES),
    "finish_sums": (FLOATS, FLOATS, FLOATS, FLOATS, N, N, N, YES), "bias_backward": (FLOATS, ACTS, N, N),
    "softmax_forward": (ACTS, FLOATS, FLOATS, NUMBER, N, N),
    "softmax_backward": (ACTS, ACTS, FLOATS, FLOATS, FLOATS, NUMBER, N, N), "keep_keys": (ACTS, ACTS, ACTS, INTS, N),
    "attention_decode": (ACTS, ACTS, ACTS, ACTS, INTS, N, N, NUMBER), "gelu_forward": (ACTS, ACTS),
    "gelu_backward": (ACTS, ACTS), "fused_classifier": (ACTS, FLOATS, INTS, NUMBER, N, N, YES),
    "mean_loss": (FLOATS, FLOATS, INTS), "sum_of_squares": (FLOATS, FLOATS),
    "adamw_update": (ACTS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, YES), "convert": (ACTS, FLOATS),
}


FLASH = {"flash_forward": (FLOATS, FLOATS, FLOATS, N, N, NUMBER),
         "flash_dq": (FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, N, N, NUMBER),
         "flash_dkv": (FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, N, N, NUMBER)}


def test_every_kernel_has_a_signature():
    kernels = {name for name, f in vars(k).items() if hasattr(f, "py_func") and not f.targetoptions.get("device")}
    assert kernels == set(SIGNATURES)
    assert [kernel.py_func.__name__ for kernel in flash_attention.kernels(16)] == list(FLASH)


@pytest.fixture
def translate(monkeypatch, tmp_path):
    """translate(kernel, kinds, acts): its PTX, for such types of arguments, and what ptxas says of it"""
    from numba import cuda
    nvidia = pytest.importorskip("nvidia")
    ptxas = os.path.join(list(nvidia.__path__)[0], "cu13", "bin", "ptxas")
    if not os.path.exists(ptxas):
        pytest.skip("no ptxas: pip install nvidia-cuda-nvcc")
    device = SimpleNamespace(compute_capability=(9, 0))  # which overloads ask for
    for module in "dispatcher", "api":
        monkeypatch.setattr(f"numba.cuda.{module}.get_current_device", lambda: device)
    array = lambda dtype: types.Array(dtype, 1, "C")

    def translate(kernel, kinds, acts=types.float32):
        names = {ACTS: array(acts), FLOATS: array(types.float32), INTS: array(types.int32), N: types.int64,
                 YES: types.boolean, NUMBER: types.float32}
        signature = types.void(*(names[kind] for kind in kinds))
        ptx, _ = cuda.compile(kernel.py_func, signature, cc=(9, 0), output="ptx", device=False, abi="numba")
        (tmp_path / "kernel.ptx").write_text(ptx)
        command = [ptxas, "-arch=sm_90", "-v", str(tmp_path / "kernel.ptx"), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        return ptx, said.stdout + said.stderr
    return translate


@pytest.mark.parametrize("acts", [types.uint16, types.float32])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile(name, acts, translate):
    ptx, said = translate(getattr(k, name), SIGNATURES[name], acts)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert name == "mean_loss" or re.search(r"ld\.global[.a-z]*\.v4", ptx), "no load of 16 bytes"


@pytest.mark.parametrize("hs", [16, 48, 64])
def test_flash_attention_compiles(hs, translate):
    """Nothing spills before registers are capped; keys and values come 16 bytes at a time; a product of (16, 64) by
    (64, 64) has 64 instructions."""
    products = {"flash_forward": 2, "flash_dq": 3, "flash_dkv": 4}
    for kernel, (name, kinds) in zip(flash_attention.kernels(hs), FLASH.items()):
        ptx, said = translate(kernel, kinds)
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        assert int(re.search(r"(\d+) bytes smem", said)[1]) <= 48 << 10
        assert ptx.count("mma.sync") == products[name] * hs and "ld.global.v4" in ptx
        assert not re.search(r"\b(ld|st)\.[a-z0-9]*32", ptx), "an address that is not known to be in shared memory"


# ---------------------------------------------------------------------------------------------------------------------
# kernels against the formulas

@pytest.fixture(scope="module")
def gpu():
    from dev.engine.gpu import Gpu
    return Gpu() if has_gpu() else simulator.Gpu()


@pytest.fixture(params=["bf16", "fp32"])
def put(request, gpu):
    """put(array): its copy on the GPU, and what that holds as float64. put.tolerance: of the precision"""
    from dev.engine.gpu import Buffer

    def put(x, exact=False):
        x = np.asarray(x)
        dtype = F32 if exact else BF16 if request.param == "bf16" else F32
        if x.dtype == np.int32:
            dtype = np.dtype(np.int32)
        held = x
        if dtype == BF16:
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            held = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
        buffer = Buffer(gpu.allocate(max(16, held.nbytes)), held.shape, dtype)
        gpu.send(buffer, held)
        return buffer, get(buffer)

    def get(buffer):
        x = gpu.read(buffer)
        return (x.astype(np.uint32) << 16).view(np.float32) if buffer.dtype == BF16 else x
    put.get, put.tolerance = get, 1e-2 if request.param == "bf16" else 1e-5
    return put


@pytest.mark.parametrize("BT, C", [(1, 8), (37, 24), (130, 768), (9, 1280), (5, 1600)])
def test_layernorm(gpu, put, rng, BT, C):
    inp, weight, bias, dout, old = (normal(rng, *shape) for shape in ((BT, C), (C,), (C,), (BT, C), (BT, C)))
    (x, xs), (w, ws), (b, bs), (dy, dys), (dx, dxs) = map(put, (inp, weight, bias, dout, old))
    out, (mean, _), (rstd, _) = put(np.zeros((BT, C)))[0], put(np.zeros(BT), True), put(np.zeros(BT), True)
    gpu.launch(k.layernorm_forward, -(-BT // 8), (32, 8), out, mean, rstd, x, w, b, C)
    close(put.get(out), layernorm(xs, ws, bs)[0], put.tolerance)
    blocks, width = 7, -(-C // 256) * 32
    partial, sums = put(np.zeros((blocks, 3, C)), True)[0], [put(np.zeros(C), True)[0] for _ in range(3)]
    gpu.launch(k.layernorm_backward, blocks, (width, k.LN_ROWS), dx, partial, dy, x, w, mean, rstd, C, True,
               shared=12 * C)
    gpu.launch(k.finish_sums, -(-3 * C // 64), (8, 64), *sums, partial, blocks, C, 3 * C, False)
    expected = layernorm_gradient(dys, xs, ws)
    close(put.get(dx), dxs + expected[0], put.tolerance)
    for got, what in zip(sums[:2], expected[1:]):
        close(put.get(got), what, 1e-4)
    close(put.get(sums[2]), (dxs + expected[0]).sum(0), 1e-2)


@pytest.mark.parametrize("V, Vp", [(37, 128), (300, 384), (50257, 50304)])
def test_classifier(gpu, put, rng, V, Vp):
    R = 9
    targets = rng.integers(0, V, R).astype(np.int32)
    targets[0] = V - 1
    (logits, held), (losses, _) = put(normal(rng, R, Vp, std=3.0)), put(np.zeros(R), True)
    gpu.launch(k.fused_classifier, R, 1024, logits, losses, put(targets)[0], np.float32(0.5), V, Vp, True)
    close(put.get(losses), cross_entropy(held[:, :V], targets)[0], 1e-5)
    found = put.get(logits)
    close(found[:, :V], 0.5 * cross_entropy_gradient(held[:, :V], targets), put.tolerance)
    assert not found[:, V:].any()


@pytest.mark.parametrize("n", [8, 1000, 4096])
def test_gelu(gpu, put, rng, n):
    (x, xs), (dx, dxs), out = put(normal(rng, n, std=2.0)), put(normal(rng, n)), put(np.zeros(n))[0]
    gpu.launch(k.gelu_forward, -(-n // 2048), 256, out, x)
    close(put.get(out), gelu(xs), put.tolerance)
    gpu.launch(k.gelu_backward, -(-n // 2048), 256, dx, x)
    close(put.get(dx), dxs * gelu_gradient(xs), put.tolerance)


@pytest.mark.parametrize("which", ["own", "flash", "cudnn"])
@pytest.mark.parametrize("B, T, NH, hs", [(2, 64, 2, 64), (1, 1, 2, 16), (3, 50, 4, 16), (2, 70, 1, 32),
                                          (1, 130, 2, 16), (2, 192, 3, 80), (1, 193, 1, 48), (1, 1000, 2, 64),
                                          (1, 1024, 2, 64)])
@pytest.mark.parametrize("low", [False, True])  # rows whose log-sum-exp is about -100
def test_attention(gpu, put, rng, which, B, T, NH, hs, low, monkeypatch):
    from dev.engine import cuda
    from dev.engine.cublaslt import Products
    if which == "cudnn" and (put.tolerance < 1e-2 or T == 1):
        pytest.skip("cuDNN's attention is for bfloat16 and more than one token")
    if which == "flash" and (put.tolerance == 1e-2 or hs > 64):
        pytest.skip("our fused attention is for float32 and heads of at most 64 channels")
    if not has_gpu() and (which == "cudnn" or T > (130 if which == "flash" else 200)):
        pytest.skip("no NVIDIA GPU; the simulator has no cuDNN and takes a minute")
    C = NH * hs
    values = normal(rng, B * T, 3 * C)
    if low:
        values[:, :C], values[:, C:2 * C] = 1 + values[:, :C] / 10, -100 / math.sqrt(hs) + values[:, C:2 * C] / 10
    (qkv, held), (dout, douts) = put(values), put(normal(rng, B * T, C))
    out, dqkv = put(np.zeros((B * T, C)))[0], put(np.zeros((B * T, 3 * C)))[0]
    lse = put(np.zeros((B, NH, T)), True)[0]
    if which == "own":
        monkeypatch.setattr(cuda, "SQUARES", 8 * T * T)  # two heads at a time
        dtype = F32 if put.tolerance < 1e-2 else BF16
        squares = [put(np.full(shape, np.nan), kind == F32)[0] for _, shape, kind in cuda.squares_table(NH, T, dtype)]
        products = Products(gpu, tf32=False, choose=False) if has_gpu() else numpy_gpu.Products(gpu)
        unit = cuda.Attention(gpu, products, NH, T, hs, squares)
    elif which == "flash":
        unit = flash_attention.Attention(gpu, B, NH, T, hs, put(np.zeros((B, NH, T)))[0])
    else:
        from dev.engine import cudnn_attention
        unit = cudnn_attention.Attention(gpu, B, NH, T, hs, True)
    unit.forward(out, lse, qkv)
    unit.backward(dqkv, dout, out, lse, qkv)
    tolerance = put.tolerance
    if which == "flash":  # TF32: of a score of -100 the third digit is wrong
        tolerance = 1e-2 if low else 1e-3
    expected, expected_lse, _ = attention(held.reshape(B, T, -1), NH)
    close(put.get(out), expected.reshape(B * T, C), 2 * tolerance)
    close(put.get(lse), expected_lse, tolerance)
    gradient = attention_gradient(douts.reshape(B, T, C), held.reshape(B, T, -1), NH).reshape(B * T, 3 * C)
    error = np.linalg.norm(put.get(dqkv) - gradient) / np.linalg.norm(gradient)
    assert error < (10 if low else 2) * tolerance, error  # a float32 of -100 has three digits fewer


# ---------------------------------------------------------------------------------------------------------------------
# the whole model

def steps(model, precision, graphs=True, **options):
    """What a few steps with two micro-batches and evaluation in between leave: losses, norms, the weights' bytes"""
    engine, random, numbers = t.build(model, "cuda", precision, **options), np.random.default_rng(3), []
    if not graphs:
        engine.gpu.replay = lambda key, work: work()
    for step in range(4):
        for _ in range(2):
            tokens = random.integers(0, 300, (2, 3, 30), dtype=np.int32)
            numbers.append(float(engine.forward(*tokens)))
            engine.backward()
        numbers.append(engine.grad_norm())
        engine.update(step, 1e-3, norm=numbers[-1], grad_clip=0.5, weight_decay=0.1)
        engine.forward(tokens[0][:, :7], tokens[1][:, :7], train=False)
        engine.rewind()
        engine.read([1, 2, 3])
        engine.read([4])
    return numbers, engine.host("params").memory.tobytes()


@gpu_only
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_same_bits(tiny, precision):
    first = steps(tiny, precision)
    assert steps(tiny, precision) == first and steps(tiny, precision, graphs=False) == first


@gpu_only
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_the_same_bits_of_large_batches(gpu, recompute):
    """B=64, T=1024: where llm.c's attention was not deterministic, and small tests never saw it"""
    if gpu.free_memory()[0] < 45 << 30:
        pytest.skip("45 GiB of the GPU are not free")

    def run():
        engine, random = t.build("d12", "cuda"), np.random.default_rng(3)
        engine.prepare(64, 1024, recompute)
        for step in range(17):
            engine.forward(*random.integers(0, 50257, (2, 64, 1024), dtype=np.int32))
            engine.backward()
            engine.update(step, 1e-3, grad_clip=1.0)
        found = engine.host("params").memory.tobytes()
        engine.free_activations()
        for views in {id(views.memory): views.memory for views in engine.tensors.values()}.values():
            engine.gpu.free(views.ptr)
        return found
    assert run() == run()


@gpu_only
@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("precision, options, bound", [("fp32", {"tf32": 0}, 1e-4), ("bf16", {}, 4e-2),
                                                      ("bf16", {"attention": "own"}, 4e-2)])
def test_gradients_are_the_cpus(tiny, rng, recompute, precision, options, bound):
    tokens = rng.integers(0, 300, (2, 4, 33)).astype(np.int32)
    engines = t.build(tiny), t.build(tiny, "cuda", precision, **options)
    losses = []
    for engine in engines:
        engine.prepare(4, 33, recompute)
        for _ in range(2):  # the second is added
            loss = float(engine.forward(*tokens))
            engine.backward()
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=bound / 10)
    ours, theirs = (engine.host("grads") for engine in engines)
    for name, _ in engines[0].table:
        x, y = getattr(ours, name), getattr(theirs, name)
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(x) and np.linalg.norm(x) > 0, name


@gpu_only
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_reading_is_a_forward_pass(tiny, rng, precision):
    engine = t.build(tiny, "cuda", precision, tf32=0)
    tokens = rng.integers(0, 300, 40).astype(np.int32)
    found = [engine.read(tokens[:5])] + [engine.read(tokens[i:i + 1]) for i in range(5, 40)]
    engine.forward(tokens[None])
    for i, logits in enumerate(found):
        close(logits, engine.logits(4 + i), 3e-2 if precision == "bf16" else 1e-3)
