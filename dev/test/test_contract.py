"""
What every engine promises in dev/run/engine.py, whatever it computes: the order of calls, the batches that it takes,
what it holds. Another engine is one more line in ENGINES.
"""
import contextlib
import io

import numpy as np
import numpy_gpu
import pytest
from models import batch, tensors
from null_engine import NullEngine

import train_gpt2 as t
from dev.run.engine import Engine, size_of

ENGINES = {"cpu": t.GPT2, "cpu, blas": lambda *args: t.GPT2(*args, matmul="blas"), "null": NullEngine,
           "cuda, on NumPy": numpy_gpu.engine}
with contextlib.suppress(ImportError, ValueError, OSError):  # no packages, no GPU, too old a driver
    from dev.engine import cuda
    from dev.engine.gpu import Gpu
    Gpu()
    ENGINES |= {"cuda, bf16": cuda.GPT2, "cuda, fp32": lambda *args: cuda.GPT2(*args, "fp32", tf32=0)}


@pytest.fixture(params=ENGINES)
def engine(request, tiny):
    config = t.model_config(tiny)
    return ENGINES[request.param](config, t.parameter_table(config), lambda params: t.read_checkpoint(tiny, params))


def step(engine, inputs, targets):
    """Forward and backward pass; returns the loss."""
    loss = float(engine.forward(inputs, targets))
    engine.backward()
    return loss


def refused(call, *args):
    with pytest.raises(ValueError) as error:
        call(*args)
    return str(error.value)


def test_every_method_is_there(engine):
    for name, method in vars(Engine).items():
        if callable(method) and "NotImplementedError" in method.__code__.co_names:
            assert getattr(type(engine), name) is not method, f"{type(engine)} has no {name}()"
    assert engine.num_parameters == size_of(engine.table) == 39808


def test_describe(engine):
    lines = engine.describe()
    assert lines and all(isinstance(line, str) for line in lines)


def test_prepare(engine):
    memory = engine.prepare(2, 8)
    assert memory["parameters"] in (16 * engine.num_parameters, 18 * engine.num_parameters)  # bfloat16 copies of them
    assert all(size >= 0 for size in memory.values())
    assert engine.peak() > 0
    refused(engine.prepare, 2, 65)
    refused(engine.prepare, 0, 8)
    assert step(engine, *batch(engine.config, 2, 8)) > 0  # as if those had not been asked for


# ---------------------------------------------------------------------------------------------------------------------
# the order of calls

def test_nothing_comes_before_a_forward_pass(engine):
    inputs, targets = batch(engine.config, 1, 4)
    for before in (lambda: None, lambda: engine.forward(inputs), lambda: engine.forward(inputs, targets, train=False),
                   lambda: engine.read([1, 2])):
        before()
        assert "forward" in refused(engine.backward)
        assert "no gradients" in refused(engine.update, 0, 1e-3) and "no gradients" in refused(engine.grad_norm)


def test_a_backward_pass_comes_once(engine):
    step(engine, *batch(engine.config, 1, 4))
    refused(engine.backward)
    engine.update(0, 1e-3)
    refused(engine.backward)
    refused(engine.update, 1, 1e-3)
    refused(engine.grad_norm)


def test_what_cannot_come_before_the_backward_pass(engine):
    """A second forward pass would add the classifier's gradient twice: its norm was 3.02 then, not 2.17."""
    inputs, targets = batch(engine.config, 2, 8)
    step(engine, inputs, targets)
    expected = {name: g.copy() for name, g in tensors(engine).items()}
    engine.forget()
    engine.forward(inputs, targets)
    for call, *args in [
        (engine.forward, inputs, targets), (engine.forward, inputs, targets, False), (engine.forward, inputs),
        (engine.read, [1]), (engine.grad_norm,), (engine.update, 0, 1e-3), (engine.prepare, 2, 20),
    ]:
        assert "backward" in refused(call, *args)
    engine.backward()
    for name, g in tensors(engine).items():
        assert (g == expected[name]).all(), name


def test_a_second_micro_batch_cannot_be_left_out(engine):
    inputs, targets = batch(engine.config, 2, 8)
    step(engine, inputs, targets)
    engine.forward(inputs, targets)
    refused(engine.forward, inputs, targets)
    refused(engine.update, 0, 1e-3)
    engine.backward()
    engine.update(0, 1e-3)


def test_forget(engine):
    """What was forgotten leaves no trace in what is computed after it."""
    inputs, targets = batch(engine.config, 2, 8)
    others = batch(engine.config, 2, 8, seed=5)
    step(engine, inputs, targets)
    norm, gradients = engine.grad_norm(), {name: g.copy() for name, g in tensors(engine).items()}
    engine.forget()
    refused(engine.grad_norm)
    step(engine, *others)
    engine.forward(*others)  # no backward pass follows
    engine.forget()
    refused(engine.backward)
    refused(engine.update, 0, 1e-3)
    step(engine, inputs, targets)
    assert engine.grad_norm() == norm and all((g == gradients[name]).all() for name, g in tensors(engine).items())


def test_evaluation_and_text_may_come_between_micro_batches(engine):
    inputs, targets = batch(engine.config, 2, 8)
    step(engine, inputs, targets)
    step(engine, targets, inputs)
    norm = engine.grad_norm()
    engine.forget()
    step(engine, inputs, targets)
    engine.forward(*batch(engine.config, 3, 20, seed=7), train=False)
    engine.read([1, 2, 3])
    engine.read([4])
    step(engine, targets, inputs)
    assert engine.grad_norm() == norm


# ---------------------------------------------------------------------------------------------------------------------
# losses, text

def test_losses(engine):
    inputs, targets = batch(engine.config, 3, 7)
    loss = float(engine.forward(inputs, targets, train=False))
    losses = np.array(engine.losses())
    assert losses.shape == (3, 7) and losses.dtype == np.float32
    assert losses.mean(dtype=np.float64) == pytest.approx(loss, rel=1e-6)
    assert float(engine.forward(inputs, targets)) == pytest.approx(loss, rel=1e-6)
    assert engine.losses() == pytest.approx(losses, rel=1e-5)


def test_there_are_no_losses(engine):
    """before a forward pass with targets, and after one without, or after reading"""
    inputs, targets = batch(engine.config, 2, 5)
    refused(engine.losses)
    for other in lambda: engine.forward(inputs), lambda: engine.read([1]):
        engine.forward(inputs, targets, train=False)
        other()
        refused(engine.losses)
        engine.rewind()


def test_logits(engine):
    inputs, _ = batch(engine.config, 2, 5)
    refused(engine.logits, 0)
    assert engine.forward(inputs) is None
    logits = engine.logits(9)
    assert logits.shape == (300,) and np.isfinite(logits).all()
    refused(engine.logits, 10)
    refused(engine.logits, -1)


def test_tokens_read(engine):
    assert engine.tokens_read == 0
    assert engine.read([1, 2, 3]).shape == (300,)
    assert engine.tokens_read == 3
    after_four = np.array(engine.read([7]))
    assert engine.tokens_read == 4
    assert "one token at a time" in refused(engine.read, [1, 2])
    refused(engine.read, [])
    assert engine.tokens_read == 4
    engine.rewind()
    assert engine.tokens_read == 0
    refused(engine.read, [1] * 65)
    bound = 0.1 if "bfloat16" in engine.describe()[0] else 1e-4
    assert engine.read([1, 2, 3, 7]) == pytest.approx(after_four, abs=bound)
    engine.rewind()
    engine.read([1] * 64)
    assert "positions" in refused(engine.read, [1])


# ---------------------------------------------------------------------------------------------------------------------
# batches that cannot be

@pytest.mark.parametrize("tokens", [[[0, 300]], [[0, -1]], [[]], [1, 2], [[1] * 65]])
def test_bad_tokens_are_refused(engine, tokens):
    refused(engine.forward, np.array(tokens, np.int32))
    refused(engine.forward, np.zeros((1, 2), np.int32), np.array(tokens, np.int32))
    refused(engine.backward)  # nothing has begun
    assert step(engine, *batch(engine.config, 1, 4)) > 0


def test_a_bad_token_is_named(engine):
    assert "token 301 is not in the model's vocabulary of 300" in refused(engine.forward, [[5, 301]])
    assert "token -2 " in refused(engine.read, [5, -2])
    assert engine.tokens_read == 0


# ---------------------------------------------------------------------------------------------------------------------
# what an engine holds

def test_load(engine):
    engine.prepare(1, 4)
    numbers = np.arange(3 * engine.num_parameters, dtype=np.float32).reshape(3, -1)
    file = io.BytesIO(numbers.tobytes() + b"more")
    file.name = "state.bin"
    for what, row in zip(("m", "v", "params"), numbers):
        engine.load(what, file)
        assert (engine.host(what).memory == row).all()
    assert file.read() == b"more"
    file.seek(100 - numbers[0].nbytes, io.SEEK_END)
    assert "state.bin" in refused(engine.load, "m", file)


def test_tensors_are_those_of_the_table(engine):
    engine.prepare(1, 4)
    for what in "params", "grads", "m", "v":
        shapes = [(name, x.shape) for name, x in tensors(engine, what).items()]
        assert shapes == engine.table and engine.host(what).memory.size == engine.num_parameters


def test_an_update_changes_parameters_and_moments(engine):
    step(engine, *batch(engine.config, 2, 8))
    before = {what: engine.host(what).memory.copy() for what in ("params", "m", "v")}
    norm = engine.grad_norm()
    assert norm > 0 and engine.update(0, 1e-2, norm=norm, grad_clip=1.0, weight_decay=0.1) is None
    for what, memory in before.items():
        assert (engine.host(what).memory != memory).any(), what


def test_kernel_times(engine):
    calls = []
    with engine.kernel_times(lambda name, arguments, seconds: calls.append((name, arguments, seconds))):
        step(engine, *batch(engine.config, 2, 8))
    assert calls and all(name and isinstance(arguments, dict) and seconds >= 0 for name, arguments, seconds in calls)
    timed = len(calls)
    step(engine, *batch(engine.config, 2, 8))
    assert len(calls) == timed
