"""
The whole model: its loss and gradients against PyTorch's numbers and against the formulas; the same bits, whichever way
it computes them; plain Python, shorter vectors, a notebook.
"""
import json
from pathlib import Path

import numpy as np
import pytest
from formulas import F32, close, formula_logits, formula_loss
from models import LONG, ODD, batch, tensors, unsettled

import train_gpt2 as t
from dev.run.engine import Tensors
from dev.run.text import Sampler, generate
from train_gpt2 import GPT2, DataLoader

HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------------------------
# loss and gradients

@pytest.mark.parametrize("config, B, T", [(ODD, 1, 1), (ODD, 3, 9), (ODD, 2, 5), (LONG, 4, 270)])
def test_loss_and_gradients_against_the_formulas(config, B, T, rng):
    model, (inputs, targets) = unsettled(config), batch(config, B, T)
    w = {name: np.float64(p) for name, p in tensors(model, "params").items()}
    loss = model.forward(inputs, targets)
    assert loss == pytest.approx(formula_loss(config, w, inputs, targets), rel=1e-6)
    model.backward()
    for name, gradient in tensors(model).items():
        for _ in range(3 if config == ODD else 1):  # the slope of the loss in a random direction
            direction, h = rng.choice([-1.0, 1.0], gradient.shape), 1e-5
            above, below = (formula_loss(config, w | {name: w[name] + s * direction}, inputs, targets) for s in (h, -h))
            slope, norm = (gradient * direction).sum(dtype=np.float64), np.linalg.norm(gradient)
            assert abs(slope - (above - below) / (2 * h)) <= 1e-4 * norm + 1e-9, name
    assert (tensors(model)["wte"][config.vocab_size:] == 0).all()
    model.forward(inputs)
    for row, expected in enumerate(formula_logits(config, w, inputs).reshape(B * T, -1)):
        close(model.logits(row), expected)


@pytest.fixture(scope="module")
def debug_state():
    """PyTorch's numbers for the tiny model: inputs, targets, logits, loss, gradients, and the JSON file beside them"""
    with open(HERE / "gpt2_tiny_debug_state.bin", "rb") as file:
        header = np.fromfile(file, np.int32, 256)
        assert header[:2].tolist() == [20240327, 2]
        B, T = header[2:4]
        inputs, targets = np.fromfile(file, np.int32, 2 * B * T).reshape(2, B, T)
        logits, loss = np.fromfile(file, F32, B * T * 300).reshape(B * T, 300), np.fromfile(file, F32, 1)[0]
        gradients = np.fromfile(file, F32)
    return inputs, targets, logits, loss, gradients, json.loads((HERE / "gpt2_tiny_debug_state.json").read_text())


def test_pytorch_gradients(tiny, debug_state):
    inputs, targets, logits, loss, gradients, _ = debug_state
    model = GPT2.build(tiny)
    assert model.forward(inputs, targets) == pytest.approx(loss, rel=1e-5)
    model.backward()
    expected = Tensors(gradients, model.table)
    assert gradients.size == model.num_parameters
    for name, gradient in tensors(model).items():
        close(gradient, getattr(expected, name), 1e-4)
    model.forward(inputs)
    for row, expected in enumerate(logits):
        close(model.logits(row), expected)


def test_pytorch_training(tiny, debug_state):
    inputs, targets, *_, training = debug_state
    model, settings = GPT2.build(tiny), {name: training[name] for name in ("beta1", "beta2", "eps", "weight_decay")}
    for step, expected in enumerate(training["losses"]):
        assert model.forward(inputs, targets) == pytest.approx(expected, rel=1e-5)
        model.backward()
        model.update(step, training["learning_rate"], **settings)


# ---------------------------------------------------------------------------------------------------------------------
# the same bits, whichever way

def train_bits(model, inputs, targets, between=lambda model: None):
    """What two training steps leave: losses, norms, parameters"""
    numbers = []
    for step in range(2):
        between(model)
        numbers.append(model.forward(inputs, targets))
        model.backward()
        between(model)
        numbers.append(model.grad_norm())
        model.update(step, 1e-3)
    return numbers, model.host("params").memory.tobytes()


@pytest.mark.parametrize("config, B, T", [(ODD, 3, 9), (LONG, 4, 300)])
def test_recomputing_changes_no_bit(config, B, T):
    results = []
    for recompute in 0, 1, 2:
        model = unsettled(config)
        model.prepare(B, T, recompute)
        results.append(train_bits(model, *batch(config, B, T)))
    assert results[0] == results[1] == results[2]


def test_validation_and_sampling_do_not_disturb_training(tiny):
    def between(model):
        model.forward(*batch(model.config, 4, 50, seed=3), train=False)
        list(generate(model, Sampler(), [7], 5))
        assert model.forward(inputs, targets, train=False) == model.forward(inputs, targets, train=False)
    inputs, targets = batch(GPT2.build(tiny).config, 2, 21)
    undisturbed = train_bits(GPT2.build(tiny), inputs, targets)
    assert train_bits(GPT2.build(tiny), inputs, targets, between) == undisturbed


def test_validation_loss_equals_training_loss():
    model, (inputs, targets) = unsettled(LONG), batch(LONG, 4, 300)
    assert model.forward(inputs, targets, train=False) == model.forward(inputs, targets)


def test_a_model_without_training_memory():
    model, (inputs, targets) = unsettled(ODD), batch(ODD, 1, 4)
    assert model.forward(inputs, targets, train=False) == unsettled(ODD).forward(inputs, targets)
    for what in "grads", "m", "v":
        with pytest.raises(ValueError, match=f"{what} (.|\n)*HINT"):
            model.host(what)


# ---------------------------------------------------------------------------------------------------------------------
# plain Python, other processors, a notebook

PLAIN = """
import sys
import numpy as np
from train_gpt2 import GPT2
model, tokens = GPT2.build(sys.argv[1]), np.arange(5, 75, 7, dtype=np.int32).reshape(2, 5)
for step in range(2):
    print(model.forward(tokens[:, :-1], tokens[:, 1:]))
    model.backward()
    print(model.grad_norm())
    model.update(step, 1e-2, weight_decay=0.1)
model.forward(tokens)
print(*model.logits(9)[:5])
"""


def test_plain_python_agrees(tiny, python):
    runs = [python("-W", "ignore", "-c", PLAIN, tiny, NUMBA_DISABLE_JIT=disable) for disable in ("0", "1")]
    numbers = []
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        numbers.append([float(x) for x in out.split()])
    assert len(numbers[0]) == 9 and numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=2e-5)


@pytest.mark.skipif("+avx" not in t.CPU_FEATURES, reason="not a processor with AVX")
@pytest.mark.parametrize("name, features, VL", [("haswell", "+avx,+avx2,+fma", 8), ("x86-64", "+sse2", 4)])
def test_narrower_vectors(name, features, VL, python):
    """A processor with shorter vectors than this one's gets kernels of its own from the same code."""
    code = "import sys, test_gpt2, train_gpt2; print('VL', train_gpt2.VL); sys.exit(test_gpt2.main(test_gpt2.TINY))"
    run = python("-c", code, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and out.startswith(f"VL {VL}\n"), out + err


@pytest.mark.skipif("+avx512f" not in t.CPU_FEATURES, reason="not a processor with AVX-512")
@pytest.mark.parametrize("name, features, registers", [
    ("sapphirerapids", None, {"zmm"}), ("haswell", "+avx,+avx2,+fma", {"ymm"}),
    ("sapphirerapids", "+avx,+avx2,+fma,+avx512f,+prefer-256-bit", {"ymm"})])
def test_loops_use_whole_registers(name, features, registers, python):
    """Of AVX-512's registers, too, on Intel's servers, unless NUMBA_CPU_FEATURES has it otherwise"""
    code = ("import re, numpy as np, train_gpt2 as t\n"
            "f = t.numba.njit(error_model='numpy', fastmath=t.FASTMATH)(t.gelu_backward.py_func)\n"
            "f(np.ones((2, 64), np.float32), np.ones((2, 64), np.float32))\n"
            "print(*re.findall(r'vmulps.*%([yz]mm)', *f.inspect_asm().values()))")
    run = python("-c", code, NUMBA_CPU_NAME=name, **{"NUMBA_CPU_FEATURES": features} if features else {})
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and set(out.split()) == registers, out + err


def test_notebook(tiny, make_shard, tmp_path):
    text = make_shard(tmp_path / "shard.bin", np.tile(np.arange(40), 50))
    model = GPT2.build(tiny)
    loader = DataLoader(text, B=4, T=32, should_shuffle=True)
    losses = []
    for step in range(30):
        losses.append(model.forward(*loader.next_batch()))
        model.backward()
        model.update(step, learning_rate=1e-2)
    assert losses[0] > 5 and losses[-1] < 1
