"""The formulas themselves: gradients against finite differences, random numbers against those that are known."""
import formulas
import numpy as np
import pytest
from formulas import close


def agree(gradient, function, x, dout):
    close(gradient, formulas.numeric_gradient(function, x, dout), 1e-8)


def test_gradients_against_finite_differences(rng):
    x, w, b, dout = rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=5), rng.normal(size=(3, 5))
    dx, dw, db = formulas.layernorm_gradient(dout, x, w)
    agree(dx, lambda x: formulas.layernorm(x, w, b)[0], x, dout)
    agree(dw, lambda w: formulas.layernorm(x, w, b)[0], w, dout)
    agree(db, lambda b: formulas.layernorm(x, w, b)[0], b, dout)
    agree(dout * formulas.gelu_gradient(x), formulas.gelu, x, dout)
    targets = np.array([0, 4, 2])
    agree(formulas.cross_entropy_gradient(x, targets), lambda x: formulas.cross_entropy(x, targets)[0], x, 1.0)
    qkv, dout = rng.normal(size=(2, 4, 18)), rng.normal(size=(2, 4, 6))
    agree(formulas.attention_gradient(dout, qkv, 2), lambda x: formulas.attention(x, 2)[0], qkv, dout)


@pytest.mark.parametrize("seed", [5, 42])
def test_mt19937(seed):
    random, expected = formulas.MT19937(seed), np.random.RandomState(seed).randint(0, 2**32, 1500, np.uint32).tolist()
    assert [random.draw() for _ in range(1500)] == expected
    assert seed != 42 or expected[:3] == [1608637542, 3421126067, 4083286876]


def test_first_normal_numbers():
    numbers = formulas.normal_numbers(np.random.RandomState(42), 32, 0.02)
    np.testing.assert_allclose(numbers[:4], [0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282], rtol=1e-6)
