"""What every engine promises in dev/run/engine.py: the order of calls, the tokens that it takes."""
import numpy as np
import pytest
from models import ODD, batch, unsettled


def test_order_of_calls_is_checked():
    model, (inputs, targets) = unsettled(ODD), batch(ODD, 1, 4)
    for prepare in (lambda: None, lambda: model.forward(inputs), lambda: model.forward(inputs, targets, train=False)):
        prepare()
        with pytest.raises(ValueError):
            model.backward()
        with pytest.raises(ValueError):
            model.update(1e-3)
    model.forward(inputs, targets)
    model.backward()
    with pytest.raises(ValueError):  # its gradients would be counted twice
        model.backward()


@pytest.mark.parametrize("tokens", [[[0, 37]], [[0, -1]], [[]], [1, 2], [[1] * 10]])
def test_bad_tokens_are_refused(tokens):
    model = unsettled(ODD)
    with pytest.raises(ValueError):
        model.forward(np.array(tokens, np.int32))
    with pytest.raises(ValueError):
        model.forward(np.zeros((1, 2), np.int32), np.array(tokens, np.int32))
