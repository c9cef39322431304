"""Micro-batches whose gradients add up to those of a large batch."""
import re
from statistics import fmean

import numpy as np
import pytest

from train_gpt2 import GPT2, DataLoader


def relative(x, y):
    return np.linalg.norm(x.astype(np.float64) - y) / np.linalg.norm(y.astype(np.float64))


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_accumulated_gradients(tiny, rng, recompute):
    tokens = rng.integers(0, 300, (2, 4, 64)).astype(np.int32)
    whole, parts = GPT2.build(tiny), GPT2.build(tiny)
    whole.recompute = parts.recompute = recompute
    for _ in range(3):
        loss = whole.forward(tokens[0], tokens[1])
        whole.backward()
        losses = []
        for row in range(4):
            losses.append(parts.forward(tokens[0, row:row + 1], tokens[1, row:row + 1]))
            parts.backward()
        assert fmean(losses) == pytest.approx(loss, rel=1e-6) and parts.grad_norm() == pytest.approx(whole.grad_norm(), rel=1e-5)
        for name, _ in whole.table:
            expected, got = getattr(whole.grads, name), getattr(parts.grads, name)
            assert np.linalg.norm(expected) > 0 and relative(got / 4, expected) < 1e-5, name
        for model in whole, parts:
            model.update(1e-3, grad_clip=0.5)
        assert relative(parts.params.memory, whole.params.memory) < 1e-4


def test_accumulation_in_a_run(train, tiny, shards):
    printed = train("-x 4 -b 1 -d 32 --grad_clip 0.5")
    model, loader = GPT2.build(tiny), DataLoader(shards, 1, 8, should_shuffle=True)
    expected = []
    for _ in range(4):
        inputs, targets = (np.concatenate(arrays) for arrays in zip(*[loader.next_batch() for _ in range(4)]))
        loss = model.forward(inputs, targets)
        model.backward()
        expected += [loss, model.update(1e-2, grad_clip=0.5)]
    got = re.findall(r"^step \d: train loss (\S+) .*norm (\S+)", printed, re.MULTILINE)
    assert [float(number) for line in got for number in line] == pytest.approx(expected, rel=1e-4)
