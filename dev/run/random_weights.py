"""
A model's first weights: llm.c's (and PyTorch's) normal draws, from the generator MT19937.
"""
import math

import numpy as np
from numba import prange

from dev.run.compiling import PRANGE, cached, load_kernels

CHUNK = 1 << 22  # numbers that are drawn at a time: memory for all of wte at once took half as long again
LOW_24, UNIT = np.uint32(0xFFFFFF), np.float32(2**-24)


@cached(parallel=PRANGE, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp", "afn"})
def box_muller(out, bits, std):
    # out (n,) normal, from the lower 24 of 32 random bits (n,), both in blocks of 16: eight radii and eight angles
    for block in prange(out.size // 16):
        for t in range(block * 16, block * 16 + 8):
            u, v = np.float32(bits[t] & LOW_24) * UNIT, np.float32(bits[t + 8] & LOW_24) * UNIT  # in [0, 1)
            radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u + np.float32(1e-12)))
            theta = np.float32(2 * np.pi) * v
            out[t] = radius * np.cos(theta) * std
            out[t + 8] = radius * np.sin(theta) * std


def fill_normal(out, std, random):
    """Fill a flat array of 16 or more with normal numbers of mean 0. random: numpy's RandomState, their source"""
    def bits(n):
        return random.randint(0, 2**32, n, np.uint32)
    std = np.float32(std)
    for start in range(0, out.size, CHUNK):
        part = out[start:start + CHUNK]
        box_muller(part, bits(part.size), std)
    if out.size % 16:  # the last 16 are drawn anew
        box_muller(out[-16:], bits(16), std)


def draw(precision, attention_first=False):
    """Run the kernel that draws random weights."""
    fill_normal(np.empty(16, np.float32), 0.02, np.random.RandomState(42))


def init_random(config, params, seed=42):
    """GPT-2's initial weights: normal with std 0.02, less where a layer adds to the residual stream."""
    load_kernels(draw)
    p, L, random = params, config.num_layers, np.random.RandomState(seed)
    p.memory.fill(0)
    for name in ("ln1w", "ln2w", "lnfw"):
        getattr(p, name).fill(1)
    for l in range(L):
        if l == 0:
            fill_normal(p.wte[:config.vocab_size].ravel(), 0.02, random)
            fill_normal(p.wpe.ravel(), 0.02, random)
        for weight, std in ((p.qkvw, 0.02), (p.attprojw, 0.02 / math.sqrt(2 * L)),
                            (p.fcw, 0.02), (p.fcprojw, 0.02 / math.sqrt(2 * L))):
            fill_normal(weight[l].ravel(), std, random)
