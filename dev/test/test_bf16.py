"""
Products that read bfloat16 and add in float32: against the product of the rounded numbers, in each way that this
processor has; whole steps against float32; the same bits on any number of threads, and after a resume.
"""
import numba
import numpy as np
import pytest
from formulas import F32, close, normal
from models import LONG, ODD, batch, tensors, unsettled
from products import BF16, check_tile_product, check_triangles

import train_gpt2 as t
from dev.run.engine import aligned


def rounded(x):
    """To the nearest bfloat16, ties to even, in float64"""
    bits = np.ascontiguousarray(x, F32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(F32).astype(np.float64)


@pytest.fixture(params=BF16, ids=lambda dtype: dtype.__name__)
def panels(request):
    return np.full(t.PANELS, -1, np.int32).view(request.param)  # -1: NaN, if it were read


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 50, 3), (3, 7, 4), (8, 48, 192), (9, 49, 193), (32, 32, 32),
                                     (17, 100, 258), (33, 33, 800), (250, 130, 515), (40, 850, 400), (512, 64, 1600)])
@pytest.mark.parametrize("add", [False, True])
def test_tile_product(rng, new, panels, M, N, K, add):
    check_tile_product(rng, new, panels, M, N, K, add, rounded, 2e-6)


@pytest.mark.parametrize("M, N, K", [(64, 96, 128), (70, 90, 250), (32, 32, 800)])
def test_stores_past_the_caches(rng, panels, M, N, K):
    A, B, results = normal(rng, M, K), normal(rng, K, N), []
    for start in 0, 1:  # at a cache line, where AMX stores in another way, and not
        for later in False, True:
            C = aligned((M + 2) * 128)
            C[:] = 7
            C = C.reshape(M + 2, 128)[1:, start:]
            t.tile_product(C[:M, :N], A, B, False, panels, 0, 0, later)
            assert (C[M] == 7).all() and (C[:, N:] == 7).all(), "written outside the tile"
            results.append(C[:M, :N].tobytes())
    assert len(set(results)) == 1
    close(C[:M, :N], rounded(A) @ rounded(B), 2e-6)


@pytest.mark.parametrize("M, N, K", [(13, 66, 70), (128, 640, 64), (300, 40, 130), (40, 30, 517)])
@pytest.mark.parametrize("d", [0, 1, 37, 384, -17])
@pytest.mark.parametrize("add", [False, True])
def test_triangles(rng, new, panels, M, N, K, d, add):
    check_triangles(rng, new, panels, M, N, K, d, add, rounded, 2e-6)


@pytest.mark.parametrize("BT, C, OC", [(513, 33, 70), (600, 400, 200), (1030, 100, 420)])
@pytest.mark.parametrize("add", [False, True])
def test_packed_once_or_by_each_tile(rng, new, panels, BT, C, OC, add):
    inp, weight, bias, dout = normal(rng, BT, C), normal(rng, OC, C), normal(rng, OC), normal(rng, BT, OC)
    before, results = normal(rng, OC, C), []
    for rooms in 1, 8:  # AMX packs once where there is room for all
        memory = np.tile(panels, rooms)[None]
        out, dinp, dweight, dbias = new(BT, OC), new(BT, C), new(OC, C), new(OC)
        dweight[:], dbias[:] = before, bias
        t.matmul_forward(out, t.NOTHING, inp, weight, bias, t.NOTHING, memory)
        t.matmul_backward(dinp, dweight, dbias, dout, inp, weight, add, memory)
        results.append(b"".join(x.tobytes() for x in (out, dinp, dweight, dbias)))
        close(out, rounded(inp) @ rounded(weight).T + bias, 2e-6)
        close(dinp, rounded(dout) @ rounded(weight), 2e-6)
        close(dweight, rounded(dout).T @ rounded(inp) + add * before, 2e-6)
    assert results[0] == results[1]


def test_nan_and_infinity_stay(new, panels):
    A, B, C = np.ones((40, 64), F32), np.ones((64, 40), F32), new(40, 40)
    A[3, 5], A[7, 9] = np.nan, np.inf
    t.tile_product(C, A, B, False, panels)
    assert np.isnan(C[3]).all() and (C[7] == np.inf).all() and (np.delete(C, (3, 7), 0) == 64).all()


@pytest.mark.parametrize("config, B, T", [(ODD, 3, 9), (LONG, 4, 300)])
def test_a_step_is_close_to_float32(config, B, T):
    grads, losses = [], []
    for precision in "fp32", "bf16":
        weights = unsettled(config).params.memory
        engine = t.GPT2(config, None, lambda params, w=weights: np.copyto(params.memory, w), precision)
        losses.append(engine.forward(*batch(config, B, T)))
        engine.backward()
        grads.append(tensors(engine))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[0] != losses[1]
    for name, expected in grads[0].items():
        assert np.linalg.norm(grads[1][name] - expected) <= 4e-2 * np.linalg.norm(expected), name


def test_the_same_bits_on_any_number_of_threads(tiny):
    found = []
    for threads in 1, 2, 3:
        numba.set_num_threads(threads)
        engine = t.build(tiny, precision="bf16")
        for step in range(2):
            engine.forward(*batch(engine.config, 4, 64))
            engine.backward()
            engine.update(step, 1e-2)
        found.append(engine.host("params").memory.tobytes())
    assert found[0] == found[1] == found[2]


def test_what_it_says_and_refuses(tiny):
    assert "bfloat16" in t.build(tiny, precision="bf16").describe()[0]
    with pytest.raises(ValueError, match="HINT"):
        t.build(tiny, precision="bf16", matmul="blas")
