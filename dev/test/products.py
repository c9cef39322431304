"""tile_product() against float64 NumPy, with panels of any type, and with the triangles of attention's mask."""
import numpy as np
from formulas import F32, close, normal

import train_gpt2 as t
from dev.run.machine import allow_amx

BF16 = [np.int32] + ([np.uint32] if t.PAIRS and (not t.AMX or allow_amx()) else [])  # panels: rounded numbers; pairs


def check_tile_product(rng, new, panels, M, N, K, add, as_read=np.float64, bound=1e-5):
    """Of parts of larger arrays, rows or columns contiguous, as attention and matmul pass them. as_read(x): the numbers
    that the product reads, in float64"""
    C, before = new(M + 2, N + 3), normal(rng, M + 2, N + 3)
    a, b = normal(rng, M, K + 1)[:, 1:], normal(rng, K, N + 1)[:, :-1]
    a_transposed, b_transposed = normal(rng, K, M + 1)[:, 1:].T, normal(rng, N, K + 1)[:, 1:].T
    for A in a, a_transposed:
        for B in b, b_transposed:
            C[:] = before
            if not add:
                C[1:M + 1, 1:N + 1] = np.nan
            t.tile_product(C[1:M + 1, 1:N + 1], A, B, add, panels)
            expected = as_read(A) @ as_read(B) + (before[1:M + 1, 1:N + 1] if add else 0)
            close(C[1:M + 1, 1:N + 1], expected, bound)
            C[1:M + 1, 1:N + 1] = before[1:M + 1, 1:N + 1]
            assert (C == before).all(), "written outside the tile"


def check_triangles(rng, new, panels, M, N, K, d, add, as_read=np.float64, bound=1e-5):
    C, before, A, B = new(M, N), normal(rng, M, N), normal(rng, M, K), normal(rng, K, N)
    r, c, k = np.arange(M)[:, None], np.arange(N), np.arange(K)
    for triangle, zero in (t.SCORES, k < 0), (t.LOWER, k > r + d), (t.UPPER, k < r + d):
        masked = np.where(zero, F32(0), A)
        C[:] = before if add else np.nan
        t.tile_product(C, masked, B, add, panels, triangle, d)
        needed = np.broadcast_to(c <= r + d if triangle == t.SCORES else True, (M, N))
        expected = (as_read(masked) @ as_read(B) + (before if add else 0))[needed]
        if expected.any():
            close(C[needed], expected, bound)
        else:  # nothing is needed, or A is 0
            assert not C[needed].any()
