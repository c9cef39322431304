"""AdamW against its formula, and micro-batches whose gradients add up to those of a large batch."""
import math
import re
from statistics import fmean

import numpy as np
import pytest
from formulas import adamw, close
from models import ODD, batch, tensors, unsettled

from train_gpt2 import GPT2, DataLoader


@pytest.mark.parametrize("grad_clip", [0, 1e9, 0.01])
def test_update_against_the_formula(grad_clip):
    model, (inputs, targets) = unsettled(ODD), batch(ODD, 2, 9)
    w = {name: np.float64(p) for name, p in tensors(model, "params").items()}
    m, v = dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0)
    for step in 0, 1, 2:
        model.forward(inputs, targets)
        model.backward()
        gradients = {name: np.float64(g) for name, g in tensors(model).items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert model.grad_norm() == pytest.approx(norm, rel=1e-5)
        model.update(step, 0.01, grad_clip=grad_clip, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.2)
        for name, p in w.items():
            g = gradients[name] * (grad_clip / norm if 0 < grad_clip < norm else 1)
            decay = 0 if name.endswith("b") or name.startswith("ln") else 0.2  # only matrices decay
            w[name], m[name], v[name] = adamw(p, g, m[name], v[name], step + 1, 0.01, 0.8, 0.9, 1e-3, decay)
    for name, p in tensors(model, "params").items():
        close(p, w[name])
    assert (tensors(model)["wte"][ODD.vocab_size:] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# accumulation

def accumulate(inputs, targets, micro_batches):
    """The norm and the parameters after an update with the gradient of all rows, in so many micro-batches"""
    model = unsettled(ODD)
    before = model.host("params").memory.copy()
    for step in range(2):  # the second update must not see the first one's gradients
        for rows in np.split(np.arange(len(inputs)), micro_batches):
            model.forward(inputs[rows], targets[rows])
            model.backward()
        norm = model.grad_norm()
        model.update(step, 10, eps=1.0)  # an eps that makes the update nearly linear in the gradient
    return norm, model.host("params").memory - before


def test_accumulation_equals_a_large_batch():
    inputs, targets = batch(ODD, 4, 9)
    norm, change = accumulate(inputs, targets, 1)
    for micro_batches in 2, 4:
        accumulated_norm, accumulated_change = accumulate(inputs, targets, micro_batches)
        assert accumulated_norm == pytest.approx(norm, rel=1e-5)
        close(accumulated_change, change)


def relative(x, y):
    return np.linalg.norm(x.astype(np.float64) - y) / np.linalg.norm(y.astype(np.float64))


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_accumulated_gradients(tiny, rng, recompute):
    tokens = rng.integers(0, 300, (2, 4, 64)).astype(np.int32)
    whole, parts = GPT2.build(tiny), GPT2.build(tiny)
    whole.prepare(4, 64, recompute)
    parts.prepare(1, 64, recompute)
    for step in range(3):
        loss = whole.forward(tokens[0], tokens[1])
        whole.backward()
        losses = []
        for row in range(4):
            losses.append(parts.forward(tokens[0, row:row + 1], tokens[1, row:row + 1]))
            parts.backward()
        assert fmean(losses) == pytest.approx(loss, rel=1e-6)
        assert parts.grad_norm() == pytest.approx(whole.grad_norm(), rel=1e-5)
        for (name, expected), got in zip(tensors(whole).items(), tensors(parts).values()):
            assert np.linalg.norm(expected) > 0 and relative(got / 4, expected) < 1e-5, name
        for model in whole, parts:
            model.update(step, 1e-3, grad_clip=0.5)
        assert relative(parts.host("params").memory, whole.host("params").memory) < 1e-4


def test_accumulation_in_a_run(really_train, tiny, shards):
    printed = really_train("-x 4 -b 1 -d 32 --grad_clip 0.5")
    model, loader = GPT2.build(tiny), DataLoader(shards, 1, 8, should_shuffle=True)
    expected = []
    for step in range(4):
        inputs, targets = (np.concatenate(arrays) for arrays in zip(*[loader.next_batch() for _ in range(4)]))
        loss = model.forward(inputs, targets)
        model.backward()
        expected += [loss, model.grad_norm()]
        model.update(step, 1e-2, grad_clip=0.5)
    got = re.findall(r"^step \d/\d+.*: train loss (\S+) .*norm (\S+)", printed, re.MULTILINE)
    assert [float(number) for line in got for number in line] == pytest.approx(expected, rel=1e-4)
