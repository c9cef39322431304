"""
Each kernel against its formula in float64 NumPy (formulas.py).

Outputs are full of NaN before a kernel runs and lie between guards (see conftest.py), so that what is not written, or
is written outside, shows.
"""
import functools
import inspect

import formulas
import numba
import numpy as np
import pytest
from formulas import F32, close, normal
from products import check_tile_product, check_triangles

import train_gpt2 as t
from dev.run.random_weights import box_muller


@pytest.fixture(autouse=True)
def two_threads(undisturbed):
    numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))


# ---------------------------------------------------------------------------------------------------------------------
# helpers: exp, maximum

@numba.njit  # not cached: the cache does not notice changes in another file
def exp_of(out, x):
    for i in range(x.size):
        out[i] = t.exp(x[i])


def test_exp_is_exact_to_float32():
    x = np.linspace(-87, 88, 1_000_003).astype(F32)
    out = np.empty_like(x)
    exp_of(out, x)
    expected = np.exp(np.float64(x))
    assert (np.abs(out - expected) <= 3e-7 * expected).all()
    exp_of(out[:1], np.zeros(1, F32))
    assert out[0] == 1


def test_exp_at_its_limits():
    out = np.empty(6, F32)
    exp_of(out, np.array([-np.inf, -1e30, -88, 88, 1e30, np.inf], F32))
    assert (out[:3] > 0).all() and (out[:3] <= np.exp(np.float64(-86.99))).all()
    assert (out[3:] == out[3]).all() and out[3] == pytest.approx(np.exp(88.0), rel=1e-6)
    exp_of(out[:2], np.array([np.nan, -np.nan], F32))
    assert np.isnan(out[:2]).all()


@pytest.mark.parametrize("size", [1, 2, 15, 64, 300])
@pytest.mark.parametrize("shift", [0, -30000, 30000])
def test_maximum(rng, size, shift):
    for _ in range(20):
        x = normal(rng, size) + F32(shift)
        assert t.maximum(x) == x.max()


@pytest.mark.parametrize("values, expected", [
    ([-np.inf], -np.inf), ([-np.inf, -1e38], -1e38), ([-1e38, np.inf, 3], np.inf), ([-0.0, -1.0], 0),
    ([-1e-45, -1], -1e-45),
])
def test_maximum_of_extremes(values, expected):
    assert t.maximum(np.array(values, F32)) == F32(expected)


def test_maximum_propagates_nan():
    assert np.isnan(t.maximum(np.array([1, np.nan, np.inf], F32)))


# ---------------------------------------------------------------------------------------------------------------------
# matrix products

@pytest.mark.parametrize("M, N, K", [
    (1, 1, 1), (1, 50, 3), (3, 7, 4), (8, 48, 192), (9, 49, 193), (17, 100, 258), (250, 130, 515)])
@pytest.mark.parametrize("add", [False, True])
def test_tile_product(rng, new, panels, M, N, K, add):
    check_tile_product(rng, new, panels[0], M, N, K, add)


@pytest.mark.parametrize("M, N, K", [
    (1, 1, 1), (13, 66, 70), (128, 640, 64), (128, 64, 640), (300, 40, 130), (40, 30, 517)])
@pytest.mark.parametrize("d", [0, 1, 3, 37, 384, -1, -17, -290])
@pytest.mark.parametrize("add", [False, True])
def test_triangles(rng, new, panels, M, N, K, d, add):
    check_triangles(rng, new, panels[0], M, N, K, d, add)


SIZES = [(1, 1, 1), (1, 5, 7), (1, 400, 813), (3, 16, 50), (65, 48, 96), (257, 200, 30), (300, 400, 813),
         (2, 196, 1700)]  # B*T, C, OC


@pytest.mark.parametrize("BT, C, OC", SIZES)
@pytest.mark.parametrize("parts", ["", "bias", "bias residual", "bias act", "residual", "bias residual act"])
@pytest.mark.parametrize("forward", [t.matmul_forward, functools.partial(t.blas_forward, t.gelu_forward)])
def test_matmul_forward(rng, new, panels, BT, C, OC, parts, forward):
    out, inp, weight = new(BT, OC), normal(rng, BT, C), normal(rng, OC, C)
    bias = normal(rng, OC) if "bias" in parts else t.NOTHING[0]
    residual = normal(rng, BT, OC) if "residual" in parts else t.NOTHING
    act = new(BT, OC) if "act" in parts else t.NOTHING
    forward(out, act, inp, weight, bias, residual, panels)
    expected = np.float64(inp) @ weight.T + (bias if bias.size else 0) + (residual if residual.size else 0)
    close(out, expected)
    if act.size:
        close(act, formulas.gelu(expected))


@pytest.mark.parametrize("BT, C, OC", SIZES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("backward", [t.matmul_backward, t.blas_backward])
def test_matmul_backward(rng, new, panels, BT, C, OC, has_bias, add, backward):
    inp, weight, dout = normal(rng, BT, C), normal(rng, OC, C), normal(rng, BT, OC)
    dinp, dweight, dbias = new(BT, C), new(OC, C), new(OC) if has_bias else t.NOTHING[0]
    before, bias_before = normal(rng, OC, C), normal(rng, OC)
    if add:
        dweight[:] = before
        if has_bias:
            dbias[:] = bias_before
    backward(dinp, dweight, dbias, dout, inp, weight, add, panels)
    close(dinp, np.float64(dout) @ weight)
    close(dweight, np.float64(dout).T @ inp + (before if add else 0))
    if has_bias:
        close(dbias, np.float64(dout).sum(0) + (bias_before if add else 0))


# ---------------------------------------------------------------------------------------------------------------------
# encoder

@pytest.mark.parametrize("B, T, C, start", [(1, 1, 1, 0), (2, 3, 17, 0), (3, 9, 64, 0), (1, 1, 20, 8), (2, 3, 17, 4)])
def test_encoder_forward(rng, new, B, T, C, start):
    wte, wpe, inp = normal(rng, 11, C), normal(rng, 9, C), rng.integers(0, 11, (B, T), dtype=np.int32)
    out = new(B * T, C)
    t.encoder_forward(out, inp, wte, wpe, start)
    close(out, (np.float64(wte)[inp] + wpe[start:start + T]).reshape(B * T, C), 1e-7)


@pytest.mark.parametrize("B, T, C", [(1, 1, 1), (2, 3, 17), (3, 9, 64), (40, 5, 33)])
@pytest.mark.parametrize("add", [False, True])
def test_encoder_backward(rng, new, B, T, C, add):
    inp, dout = rng.integers(0, 3, (B, T), dtype=np.int32), normal(rng, B * T, C)  # 3: every token comes often
    wte_before, wpe_before = normal(rng, 11, C), normal(rng, 9, C)
    dwte, dwpe = new(11, C), new(9, C)
    dwte[:] = wte_before  # the classifier's part, always added to
    if add:
        dwpe[:] = wpe_before
    t.encoder_backward(dwte, dwpe, dout, inp, add)
    expected = np.float64(wte_before)
    np.add.at(expected, inp.ravel(), dout)
    close(dwte, expected, 1e-6)
    assert (dwte[3:] == wte_before[3:]).all()
    expected = np.float64(wpe_before) if add else np.zeros((9, C))
    expected[:T] += np.float64(dout).reshape(B, T, C).sum(0)
    close(dwpe, expected, 1e-6)
    assert add or (dwpe[T:] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# layernorm

ROWS = [(1, 2), (1, 16), (31, 17), (33, 100), (130, 768)]  # B*T, C


@pytest.mark.parametrize("BT, C", ROWS)
@pytest.mark.parametrize("std, shift", [(1, 0), (3, 20), (0.003, 0)])  # 0.003: eps matters
def test_layernorm_forward(rng, new, BT, C, std, shift):
    inp, weight, bias = normal(rng, BT, C, std=std) + F32(shift), normal(rng, C), normal(rng, C)
    out, mean, rstd = new(BT, C), new(BT), new(BT)
    t.layernorm_forward(out, mean, rstd, inp, weight, bias)
    for actual, expected in zip((out, mean, rstd), formulas.layernorm(inp, weight, bias)):
        close(actual, expected)


def test_layernorm_forward_of_equal_channels(new):
    out, mean, rstd = new(2, 5), new(2), new(2)
    t.layernorm_forward(out, mean, rstd, np.full((2, 5), 3, F32), np.full(5, 2, F32), np.full(5, 7, F32))
    assert (out == 7).all() and (mean == 3).all()
    close(rstd, np.full(2, 1e-5**-0.5), 1e-6)


@pytest.mark.parametrize("BT, C", ROWS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("std", [1, 0.003])
def test_layernorm_backward(rng, new, BT, C, add, std):
    inp, weight, dout = normal(rng, BT, C, std=std), normal(rng, C), normal(rng, BT, C)
    mean, rstd = (x.astype(F32) for x in formulas.layernorm(inp, weight, 0)[1:])
    before = [normal(rng, BT, C), normal(rng, C), normal(rng, C)]
    dinp, dweight, dbias = new(BT, C), new(C), new(C)
    dinp[:] = before[0]  # the residual stream's gradient, always added to
    if add:
        dweight[:], dbias[:] = before[1:]
    else:
        before[1:] = 0, 0
    t.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, add)
    for actual, old, expected in zip((dinp, dweight, dbias), before, formulas.layernorm_gradient(dout, inp, weight)):
        close(actual, old + expected)


def test_threads_share_what_prange_says():
    """Numba would make a parallel region of np.zeros and of y[:] = 0, too, and wake every thread for it."""
    kernel, x, w, rows = t.layernorm_backward, np.zeros((4, 8), F32), np.zeros(8, F32), np.zeros(4, F32)
    function = numba.njit(parallel=kernel.targetoptions["parallel"])(kernel.py_func)
    function(x, w, w, x, x, w, rows, rows, False)
    regions = function.overloads[function.signatures[0]].metadata["parfor_diagnostics"].count_parfors()
    assert regions == inspect.getsource(kernel.py_func).count("prange(")


# ---------------------------------------------------------------------------------------------------------------------
# attention

HEADS = [(1, 1, 1, 5), (1, 2, 2, 16), (2, 17, 3, 5), (1, 128, 1, 64), (2, 129, 2, 16), (1, 300, 2, 20),
         (1, 512, 1, 8)]  # B, T, NH, hs


@pytest.mark.parametrize("B, T, NH, hs", HEADS)
@pytest.mark.parametrize("std", [1, 8])  # 8: scores up to a few hundred
def test_attention_forward(rng, new, panels, strips, B, T, NH, hs, std):
    qkv = normal(rng, B * T, 3 * NH * hs, std=std)
    out, lse = new(B * T, NH * hs), new(B, NH, T)
    t.attention_forward(out, lse, qkv, panels, strips(T))
    expected_out, expected_lse, _ = formulas.attention(qkv.reshape(B, T, -1), NH)
    close(out, expected_out.reshape(out.shape), 1e-5 * std)
    close(lse, expected_lse)


@pytest.mark.parametrize("T, NH, hs", [(1, 1, 5), (2, 2, 16), (130, 3, 5), (300, 2, 64)])
@pytest.mark.parametrize("std", [1, 8])
def test_attention_decode(rng, new, T, NH, hs, std):
    C = NH * hs
    qkv, out = normal(rng, T, 3 * C, std=std), new(C)
    k, v = qkv[:, C:2 * C].copy(), qkv[:, 2 * C:].copy()
    t.attention_decode(out, qkv[-1], k, v, NH)
    close(out, formulas.attention(qkv[None], NH)[0][0, -1], 1e-5 * std)


@pytest.mark.parametrize("B, T, NH, hs", HEADS)
@pytest.mark.parametrize("std", [1, 4])
def test_attention_backward(rng, new, panels, strips, B, T, NH, hs, std):
    qkv, dout = normal(rng, B * T, 3 * NH * hs, std=std), normal(rng, B * T, NH * hs)
    out, lse, _ = (x.astype(F32) for x in formulas.attention(qkv.reshape(B, T, -1), NH))
    dqkv = new(B * T, 3 * NH * hs)
    t.attention_backward(dqkv, dout, out.reshape(dout.shape), lse, qkv, panels, strips(T))
    expected = formulas.attention_gradient(dout.reshape(B, T, -1), qkv.reshape(B, T, -1), NH).reshape(B * T, 3, -1)
    for actual, part in zip(np.split(dqkv, 3, axis=1), expected.swapaxes(0, 1)):
        if T > 1:  # with one key the probability is 1, whatever q and k are
            close(actual, part, 1e-5 * std)
    np.testing.assert_allclose(dqkv.reshape(B * T, 3, -1), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_attention_looks_only_back(rng, new, panels, strips):
    T, C = 300, 10
    qkv = normal(rng, T, 3 * C)
    first, second, lse = new(T, C), new(T, C), new(1, 2, T)
    t.attention_forward(first, lse, qkv, panels, strips(T))
    for cut in 1, 127, 128, 255, 256, 299:
        changed = qkv.copy()
        changed[cut:] = 1e4
        t.attention_forward(second, lse, changed, panels, strips(T))
        assert (first[:cut] == second[:cut]).all() and (first[cut] != second[cut]).any()


# ---------------------------------------------------------------------------------------------------------------------
# gelu

@pytest.mark.parametrize("BT, OC", [(1, 1), (3, 17), (50, 400)])
@pytest.mark.parametrize("std", [1, 10])
def test_gelu(rng, new, BT, OC, std):
    inp, dout, out, dinp = normal(rng, BT, OC, std=std), normal(rng, BT, OC), new(BT, OC), new(BT, OC)
    t.gelu_forward(out, inp)
    close(out, formulas.gelu(inp))
    dinp[:] = dout
    t.gelu_backward(dinp, inp)
    close(dinp, dout * formulas.gelu_gradient(inp))


def test_gelu_far_from_zero(new):
    inp, out, dinp = np.array([[-1e4, -300, -12, 0, 12, 300, 1e4]], F32), new(1, 7), new(1, 7)
    t.gelu_forward(out, inp)
    np.testing.assert_allclose(out[0], [0, 0, 0, 0, 12, 300, 1e4], atol=1e-25)
    dinp[:] = 1
    t.gelu_backward(dinp, inp)
    np.testing.assert_allclose(dinp[0], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-25)


def test_gelu_has_no_subnormal_numbers(new):
    """which processors are slow with: a model that has overfitted has inputs far below zero. NaNs stay."""
    inp, out, dinp = np.linspace(-30, 0, 3001, dtype=F32)[None].copy(), new(1, 3001), new(1, 3001)
    inp[0, 7] = np.nan
    t.gelu_forward(out, inp)
    dinp[:] = 1
    t.gelu_backward(dinp, inp)
    for x, expected in (out, formulas.gelu(inp)), (dinp, formulas.gelu_gradient(inp)):
        assert np.isnan(x[0, 7]) and np.isnan(x).sum() == 1
        assert ((x == 0) | (abs(x) > 1e-18) | np.isnan(x)).all()
        np.testing.assert_allclose(x, expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# classifier

@pytest.mark.parametrize("R, V, Vp", [(1, 1, 128), (2, 5, 128), (33, 300, 384), (7, 256, 256), (3, 50257, 50304)])
@pytest.mark.parametrize("std, shift", [(1, 0), (10, 0), (1, -20000), (1, 20000)])  # llm.c's maximum starts at -10000
def test_fused_classifier(rng, new, R, V, Vp, std, shift):
    logits, losses, targets = new(R, Vp), new(R), rng.integers(0, V, R, dtype=np.int32)
    targets[0] = V - 1
    logits[:] = normal(rng, R, Vp, std=std) + F32(shift)
    logits[:, V:] = 1e6  # the padding takes no part
    before = logits[:, :V].copy()
    t.fused_classifier(logits, losses, targets, F32(1 / R), V)
    if V > 1:
        close(losses, formulas.cross_entropy(before, targets)[0])
        close(logits[:, :V], formulas.cross_entropy_gradient(before, targets) / R)
    else:
        assert (losses == 0).all() and (logits == 0).all()
    assert (logits[:, V:] == 0).all()


def test_fused_classifier_propagates_nan(new):
    logits, losses = new(2, 128), new(2)
    logits[:], logits[1, 3] = 0, np.nan
    t.fused_classifier(logits, losses, np.zeros(2, np.int32), F32(1), 100)
    assert losses[0] == pytest.approx(np.log(100)) and np.isnan(losses[1])


# ---------------------------------------------------------------------------------------------------------------------
# AdamW and the gradient norm

@pytest.mark.parametrize("size", [1, 1000, 16384, 50001])
@pytest.mark.parametrize("weight_decay, grad_scale", [(0, 1), (0.1, 1), (0.1, 0.25)])
def test_adamw_update(rng, new, size, weight_decay, grad_scale):
    beta1, beta2, eps, learning_rate = 0.9, 0.99, 1e-2, 0.05
    params, grads, m, v = (new(size) for _ in range(4))
    params[:], m[:], v[:] = normal(rng, size), normal(rng, size), normal(rng, size)**2
    p64, m64, v64 = (np.float64(x) for x in (params, m, v))
    for step in 1, 2, 3:
        grads[:] = normal(rng, size)
        correction1, correction2 = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
        t.adamw_update(params, grads, m, v, *(F32(x) for x in (
            learning_rate, beta1, beta2, correction1, correction2, eps, weight_decay, grad_scale)))
        p64, m64, v64 = formulas.adamw(p64, np.float64(grads) * grad_scale, m64, v64, step,
                                       learning_rate, beta1, beta2, eps, weight_decay)
        for actual, expected in zip((params, m, v), (p64, m64, v64)):
            close(actual, expected)


@pytest.mark.parametrize("size", [1, 17, 16384, 16385, 100_003])
def test_sum_of_squares(rng, size):
    x = normal(rng, size)
    assert t.sum_of_squares(x).sum() == pytest.approx((np.float64(x)**2).sum(), rel=1e-5)
    x[-1] = np.nan
    assert np.isnan(t.sum_of_squares(x).sum())


# ---------------------------------------------------------------------------------------------------------------------
# normal numbers

def test_box_muller(rng, new):
    bits, out = rng.integers(2**32, size=48, dtype=np.uint32), new(48)
    bits[:8] = 0, 1 << 24, 0xFF << 24, 1, 1 << 23, 2**24 - 1, 1 << 22, 3 << 22  # the upper 8 don't count
    box_muller(out, bits, F32(0.02))
    u = bits % 2**24 * 2**-24
    expected = 0.02 * np.concatenate([formulas.box_muller(x) for x in np.split(u, 3)])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)
