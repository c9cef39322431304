"""
The same bits on any number of threads: kernel by kernel on shapes that are large enough to show a race, then a training
run.
"""
import functools

import numba
import numpy as np
import pytest
from products import BF16

import train_gpt2 as t
from dev.run.config import GPT2Config
from dev.run.engine import Tensors, size_of
from dev.run.random_weights import box_muller

F32 = np.float32
CONFIG = GPT2Config(512, 257, 384, 1, 6, 384)

pytestmark = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 3, reason="NUMBA_NUM_THREADS is less than 3")


@pytest.fixture
def same_bits(rng):
    """same_bits(call, *outputs): call(scratch) must leave the same outputs with 1, 2 and 3 threads, every time."""
    def same_bits(call, *outputs, panel_type=F32):
        before, results = [np.copy(x) for x in outputs], []
        for threads in 1, 2, 3, 2, 3:
            numba.set_num_threads(threads)
            table = t.scratch_table(CONFIG, 3, 512, panel_type)
            scratch = Tensors(np.full(size_of(table), np.nan, F32), table)
            scratch.panels = scratch.panels.view(panel_type)
            for x, old in zip(outputs, before):
                x[:] = old
            call(scratch)
            results.append(b"".join(x.tobytes() for x in outputs))
        assert not np.isnan(outputs[0]).any()
        assert all(result == results[0] for result in results), [result == results[0] for result in results]
    return same_bits


def zeros(*shape):
    return np.zeros(shape, F32)


@pytest.mark.parametrize("BT, C, OC", [(70, 256, 2500), (1030, 180, 333), (1030, 180, 90), (4, 768, 768),
                                       (1, 768, 5000)])
@pytest.mark.parametrize("panel_type", [F32, *BF16])
def test_matmul(rng, same_bits, BT, C, OC, panel_type):
    same_bits = functools.partial(same_bits, panel_type=panel_type)
    inp, weight, bias, dout = (rng.standard_normal(shape, F32) for shape in ((BT, C), (OC, C), OC, (BT, OC)))
    out, act = zeros(BT, OC), zeros(BT, OC)
    same_bits(lambda s: t.matmul_forward(out, act, inp, weight, bias, dout, s.panels), out, act)
    dinp, dweight, dbias = zeros(BT, C), zeros(OC, C), zeros(OC)
    for add in False, True:
        same_bits(lambda s, add=add: t.matmul_backward(dinp, dweight, dbias, dout, inp, weight, add, s.panels),
                  dinp, dweight, dbias)


@pytest.mark.parametrize("B, T, NH, hs", [(2, 512, 8, 64), (3, 200, 5, 20), (1, 512, 1, 64), (1, 400, 2, 20)])
def test_attention(rng, same_bits, B, T, NH, hs):
    qkv, dout = rng.standard_normal((B * T, 3 * NH * hs), F32), rng.standard_normal((B * T, NH * hs), F32)
    out, lse, dqkv = zeros(B * T, NH * hs), zeros(B, NH, T), zeros(B * T, 3 * NH * hs)
    same_bits(lambda s: t.attention_forward(out, lse, qkv, s.panels, s.strips), out, lse)
    same_bits(lambda s: t.attention_backward(dqkv, dout, out, lse, qkv, s.panels, s.strips), dqkv)
    k, v, y = qkv[:T, :NH * hs].copy(), dout[:T], zeros(NH * hs)
    same_bits(lambda _: t.attention_decode(y, qkv[-1], k, v, NH), y)


def test_layernorm(rng, same_bits):
    BT, C = 4097, 1000
    inp, dout = rng.standard_normal((BT, C), F32), rng.standard_normal((BT, C), F32)
    weight, bias = rng.standard_normal(C, F32), rng.standard_normal(C, F32)
    out, mean, rstd = zeros(BT, C), zeros(BT), zeros(BT)
    same_bits(lambda _: t.layernorm_forward(out, mean, rstd, inp, weight, bias), out, mean, rstd)
    dinp, dweight, dbias = zeros(BT, C), zeros(C), zeros(C)
    for add in False, True:
        same_bits(lambda _, add=add: t.layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, add),
                  dinp, dweight, dbias)


def test_encoder(rng, same_bits):
    B, T, C = 16, 256, 1000
    inp, dout = rng.integers(0, 5, (B, T), dtype=np.int32), rng.standard_normal((B * T, C), F32)
    wte, wpe, out = rng.standard_normal((5, C), F32), rng.standard_normal((T, C), F32), zeros(B * T, C)
    same_bits(lambda _: t.encoder_forward(out, inp, wte, wpe, 0), out)
    same_bits(lambda _: t.encoder_backward(wte, wpe, dout, inp, True), wte, wpe)


def test_classifier(rng, same_bits):
    logits, losses = rng.standard_normal((500, 5120), F32), zeros(500)
    targets = rng.integers(0, 5100, 500, dtype=np.int32)
    same_bits(lambda _: t.fused_classifier(logits, losses, targets, F32(0.1), 5100), logits, losses)


def test_gelu_adamw_and_norm(rng, same_bits):
    x, dx, out = (rng.standard_normal((1000, 3000), F32) for _ in range(3))
    same_bits(lambda _: t.gelu_forward(out, x), out)
    same_bits(lambda _: t.gelu_backward(dx, x), dx)
    params, grads, m, v = x.ravel(), dx.ravel(), zeros(x.size), zeros(x.size)
    numbers = [F32(n) for n in (1e-3, 0.9, 0.999, 10, 1000, 1e-8, 0.1, 1)]
    same_bits(lambda _: t.adamw_update(params, grads, m, v, *numbers), params, m, v)
    total = zeros(1).astype(np.float64)

    def norm(_):
        total[0] = t.sum_of_squares(grads).sum()
    same_bits(norm, total)


def test_normal_numbers(rng, same_bits):
    out, bits = zeros(1 << 20), rng.integers(2**32, size=1 << 20, dtype=np.uint32)
    same_bits(lambda _: box_muller(out, bits, F32(0.02)), out)


TRAINING = """
import contextlib, sys
import numba
from dev.run.checkpoints import write_model
from train_gpt2 import GPT2, GPT2Config, DataLoader, init_random
config = GPT2Config(150, 5000, 5120, 2, 3, 48)
model = GPT2(config, weights=lambda params: init_random(config, params))
with contextlib.redirect_stdout(sys.stderr):
    model.prepare(4, 150)
print(numba.get_num_threads())
loader = DataLoader(sys.argv[1], 4, 150, should_shuffle=True)
for step in range(3):
    for micro_batch in range(2):
        print(step, repr(model.forward(*loader.next_batch())))
        model.backward()
    print(step, repr(model.grad_norm()))
    model.update(step, 1e-3, weight_decay=0.1, grad_clip=1.0)
    print(step, repr(model.forward(*loader.next_batch(), train=False)))
write_model(sys.argv[2], model)
"""


def test_training_is_identical(rng, make_shard, python, tmp_path):
    shard, lines, checkpoints = make_shard(tmp_path / "shard.bin", rng.integers(0, 5000, 10_000)), [], []
    counts = ["1", "2", "3"]  # for Numba: of OpenMP's variable the program takes no more than there are processors
    runs = [python("-c", TRAINING, shard, tmp_path / f"model{n}.bin", NUMBA_NUM_THREADS=n) for n in counts]
    for n, run in zip(counts, runs):
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        threads, printed = out.split("\n", 1)
        assert threads == n
        lines.append(printed)
        checkpoints.append((tmp_path / f"model{n}.bin").read_bytes())
    assert len(lines[0].splitlines()) == 12 and lines == [lines[0]] * 3
    assert checkpoints == [checkpoints[0]] * 3


def test_first_run_is_as_later_ones(rng, make_shard, python, tiny, tmp_path):
    """One that has to compile, and one that finds its kernels in the cache"""
    shard, checkpoints = make_shard(tmp_path / "shard.bin", rng.integers(0, 300, 2000)), []
    for name, compiles in ("first", True), ("second", False):
        flags = f"-e {tiny} -i {shard} -j {shard} -b 4 -t 64 -x 4 -v 2 -s 4 -g 20 -n 4 -o {tmp_path / name}".split()
        out, err = python("train_gpt2.py", *flags, NUMBA_CACHE_DIR=str(tmp_path / "cache")).communicate(timeout=300)
        assert ("compiling kernels" in out) == compiles and err == "", out + err
        files = ("model_00000004.bin", "state_00000004_00000.bin", "main.log")
        checkpoints.append([(tmp_path / name / file).read_bytes() for file in files])
    assert checkpoints[0] == checkpoints[1]
