"""Small models with weights that matter, and batches for them."""
import numpy as np

from train_gpt2 import CLASSIFIER_ROWS, GPT2, GPT2Config

ODD = GPT2Config(9, 37, 128, 3, 4, 20)  # maxT, V, Vp, L, NH, C: heads of 5 channels
LONG = GPT2Config(300, 50, 128, 1, 2, 16)  # attention in several strips, the classifier in several chunks
assert 4 * 270 > CLASSIFIER_ROWS  # the fewest tokens that a test of chunks gives it


def unsettled(config, seed=1):
    """A model whose biases and LayerNorm weights are not 0 and 1, so that each of them matters"""
    model, rng = GPT2(config), np.random.default_rng(seed)
    for name, parameter in tensors(model, "params").items():
        parameter[:] = rng.normal(1.0 if name in ("ln1w", "ln2w", "lnfw") else 0, 0.2, parameter.shape)
    return model


def batch(config, B, T, seed=2):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def tensors(model, what="grads"):
    """{name: array} of an engine's parameters, gradients or moments"""
    return {name: getattr(model.host(what), name) for name, _ in model.table}
