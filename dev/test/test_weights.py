"""Initial weights, number by number, and the sizes of the models that descriptors name."""
import math

import numpy as np
import pytest
from formulas import F32, normal_numbers
from models import ODD, tensors

import train_gpt2 as t
from dev.run import random_weights
from dev.run.random_weights import fill_normal
from train_gpt2 import GPT2, GPT2Config


def test_first_normal_numbers():
    out = np.empty(32, F32)
    fill_normal(out, 0.02, np.random.RandomState(42))
    np.testing.assert_allclose(out[:4], [0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282], rtol=1e-6)


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize("n", [16, 17, 31, 48, 1003])
def test_normal_numbers(n, chunk, monkeypatch):
    monkeypatch.setattr(random_weights, "CHUNK", chunk)
    out, random, expected_random = np.empty(n, F32), np.random.RandomState(7), np.random.RandomState(7)
    fill_normal(out, 0.5, random)
    np.testing.assert_allclose(out, normal_numbers(expected_random, n, 0.5), rtol=1e-4, atol=1e-6)
    assert random.randint(0, 2**32, dtype=np.uint32) == expected_random.randint(0, 2**32, dtype=np.uint32)


def test_initial_weights():
    model, random, V, L, C = GPT2(ODD), np.random.RandomState(42), 37, 3, 20
    model.host("params").memory.fill(np.nan)
    t.init_random(ODD, model.host("params"))
    w = tensors(model, "params")
    draws = [(w["wte"][:V], 0.02), (w["wpe"], 0.02)]
    for l in range(L):
        small = 0.02 / math.sqrt(2 * L)
        draws += [(w["qkvw"][l], 0.02), (w["attprojw"][l], small), (w["fcw"][l], 0.02), (w["fcprojw"][l], small)]
    for tensor, std in draws:
        np.testing.assert_allclose(tensor.ravel(), normal_numbers(random, tensor.size, std), rtol=1e-4, atol=1e-7)
    assert (w["wte"][V:] == 0).all() and w["fcb"].shape == (L, 4 * C)
    for name in w:
        if name.startswith("ln") or name.endswith("b"):
            assert (w[name] == (1 if name in ("ln1w", "ln2w", "lnfw") else 0)).all(), name


@pytest.mark.parametrize("descriptor, maxT, L, NH, C", [
    ("d6", 1024, 6, 6, 384), ("d12", 1024, 12, 12, 768), ("gpt2:d48", 1024, 48, 25, 1600),
    ("l7c448h7", 1024, 7, 7, 448), ("gpt2:l4c256h4", 1024, 4, 4, 256),
    ("gpt3:c768", 2048, 12, 12, 768), ("gpt3:c1536", 2048, 24, 16, 1536), ("gpt3:c12288", 2048, 96, 96, 12288),
])
def test_descriptors(descriptor, maxT, L, NH, C):
    config = t.model_config(descriptor)
    assert config == GPT2Config(maxT, 50257, 50304, L, NH, C)
    assert t.size_of(t.parameter_table(config)) == (50304 + maxT) * C + L * (12 * C + 13) * C + 2 * C


@pytest.mark.parametrize("descriptor, maxT, V, Vp", [
    ("gpt2:l4c256h4t512v300", 512, 300, 384), ("l4c256h4t512", 512, 50257, 50304),
    ("gpt2:l4c256h4v257", 1024, 257, 384),
])
def test_descriptors_of_any_shape(descriptor, maxT, V, Vp):
    assert t.model_config(descriptor) == GPT2Config(maxT, V, Vp, 4, 4, 256)


@pytest.mark.parametrize("descriptor", ["l4c256h3", "l0c256h4", "l4c256h4t0", "l4c256h4v0", "gpt3:l4c256h4", "l4c256",
                                        "l4c256h4t", "lc256h4", "t512", "v300"])
def test_impossible_shapes(descriptor):
    with pytest.raises(ValueError, match=descriptor):
        t.model_config(descriptor)


def test_size_of_124M():
    assert t.size_of(t.parameter_table(t.model_config("d12"))) == 124_475_904
