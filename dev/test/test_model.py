"""
The whole model: its loss and gradients against PyTorch's numbers and against the formulas, AdamW, accumulation of
micro-batches, checkpoints, initial weights, the sampler, the tokenizer, and use from a notebook.
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from formulas import F32, adamw, close, formula_logits, formula_loss, normal_numbers

import train_gpt2 as t
from dev.run.files import write_file
from dev.run.text import Sampler, Tokenizer, generate
from train_gpt2 import GPT2, DataLoader, GPT2Config

HERE = Path(__file__).parent
ODD = GPT2Config(9, 37, 128, 3, 4, 20)  # maxT, V, Vp, L, NH, C: heads of 5 channels
LONG = GPT2Config(300, 50, 128, 1, 2, 16)  # attention in several strips, the classifier in several chunks


def unsettled(config, seed=1):
    """A model whose biases and LayerNorm weights are not 0 and 1, so that each of them matters"""
    model, rng = GPT2(config), np.random.default_rng(seed)
    for name, shape in model.table:
        getattr(model.params, name)[:] = rng.normal(1.0 if name in ("ln1w", "ln2w", "lnfw") else 0, 0.2, shape)
    return model


def batch(config, B, T, seed=2):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def tensors(model, what="grads"):
    return {name: getattr(getattr(model, what), name) for name, _ in model.table}


# ---------------------------------------------------------------------------------------------------------------------
# loss and gradients

@pytest.mark.parametrize("config, B, T", [(ODD, 1, 1), (ODD, 3, 9), (ODD, 2, 5), (LONG, 4, 140)])
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
    assert (model.grads.wte[config.vocab_size:] == 0).all()
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
    expected = t.Tensors(gradients, model.table)
    assert gradients.size == model.num_parameters
    for name, gradient in tensors(model).items():
        close(gradient, getattr(expected, name), 1e-4)
    model.forward(inputs)
    for row, expected in enumerate(logits):
        close(model.logits(row), expected)


def test_pytorch_training(tiny, debug_state):
    inputs, targets, *_, training = debug_state
    model, settings = GPT2.build(tiny), {name: training[name] for name in ("beta1", "beta2", "eps", "weight_decay")}
    for expected in training["losses"]:
        assert model.forward(inputs, targets) == pytest.approx(expected, rel=1e-5)
        model.backward()
        model.update(training["learning_rate"], **settings)


# ---------------------------------------------------------------------------------------------------------------------
# the update

@pytest.mark.parametrize("grad_clip", [0, 1e9, 0.01])
def test_update_against_the_formula(grad_clip):
    model, (inputs, targets) = unsettled(ODD), batch(ODD, 2, 9)
    w = {name: np.float64(p) for name, p in tensors(model, "params").items()}
    m, v = dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0)
    for step in 1, 2, 3:
        model.forward(inputs, targets)
        model.backward()
        gradients = {name: np.float64(g) for name, g in tensors(model).items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert model.update(0.01, 0.8, 0.9, 1e-3, 0.2, grad_clip) == pytest.approx(norm, rel=1e-5)
        for name, p in w.items():
            g = gradients[name] * (grad_clip / norm if 0 < grad_clip < norm else 1)
            decay = 0 if name.endswith("b") or name.startswith("ln") else 0.2  # only matrices decay
            w[name], m[name], v[name] = adamw(p, g, m[name], v[name], step, 0.01, 0.8, 0.9, 1e-3, decay)
    for name, p in tensors(model, "params").items():
        close(p, w[name])
    assert (model.grads.wte[ODD.vocab_size:] == 0).all()


def accumulate(inputs, targets, micro_batches):
    """The norm and the parameters after an update with the gradient of all rows, in so many micro-batches"""
    model = unsettled(ODD)
    before = model.params.memory.copy()
    for _ in range(2):  # the second update must not see the first one's gradients
        for rows in np.split(np.arange(len(inputs)), micro_batches):
            model.forward(inputs[rows], targets[rows])
            model.backward()
        norm = model.update(10, eps=1.0)  # an eps that makes the update nearly linear in the gradient
    return norm, model.params.memory - before


def test_accumulation_equals_a_large_batch():
    inputs, targets = batch(ODD, 4, 9)
    norm, change = accumulate(inputs, targets, 1)
    for micro_batches in 2, 4:
        accumulated_norm, accumulated_change = accumulate(inputs, targets, micro_batches)
        assert accumulated_norm == pytest.approx(norm, rel=1e-5)
        close(accumulated_change, change)


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


# ---------------------------------------------------------------------------------------------------------------------
# the same bits, whichever way

def train_bits(model, inputs, targets, between=lambda model: None):
    """What two training steps leave: losses, norms, parameters"""
    numbers = []
    for _ in range(2):
        between(model)
        numbers.append(model.forward(inputs, targets))
        model.backward()
        between(model)
        numbers.append(model.update(1e-3))
    return numbers, model.params.memory.tobytes()


@pytest.mark.parametrize("config, B, T", [(ODD, 3, 9), (LONG, 2, 300)])
def test_recomputing_changes_no_bit(config, B, T):
    results = []
    for recompute in 0, 1, 2:
        model = unsettled(config)
        model.recompute = recompute
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
    model, (inputs, targets) = unsettled(LONG), batch(LONG, 2, 300)
    assert model.forward(inputs, targets, train=False) == model.forward(inputs, targets)


def test_a_model_without_training_memory():
    model, (inputs, targets) = unsettled(ODD), batch(ODD, 1, 4)
    loss = model.forward(inputs, targets, train=False)
    assert model.grads is None and model.m is None and loss == unsettled(ODD).forward(inputs, targets)


PLAIN = """
import sys
import numpy as np
from train_gpt2 import GPT2
model, tokens = GPT2.build(sys.argv[1]), np.arange(5, 75, 7, dtype=np.int32).reshape(2, 5)
for _ in range(2):
    print(model.forward(tokens[:, :-1], tokens[:, 1:]))
    model.backward()
    print(model.update(1e-2, weight_decay=0.1))
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
    run = python("-c", "import sys, test_gpt2, train_gpt2; print('VL', train_gpt2.VL); sys.exit(test_gpt2.main(test_gpt2.TINY))",
                 NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and out.startswith(f"VL {VL}\n"), out + err


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def test_checkpoint_round_trip(tiny, tmp_path):
    model, path = GPT2.build(tiny), tmp_path / "model.bin"
    assert model.config == GPT2Config(64, 300, 384, 2, 2, 32)
    assert model.params.memory.tobytes() == Path(tiny).read_bytes()[1024:]
    path.write_text("an older file")
    model.write_checkpoint(str(path))
    assert path.read_bytes() == Path(tiny).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]


def test_round_trip_of_another_shape(tmp_path):
    model, path = unsettled(ODD), str(tmp_path / "model.bin")
    model.write_checkpoint(path)
    copy = GPT2.build(path)
    assert np.fromfile(path, np.int32, 8).tolist() == [20240326, 3, 9, 37, 3, 4, 20, 128]
    assert copy.config == ODD and copy.params.memory.tobytes() == model.params.memory.tobytes()


def test_bfloat16_checkpoint(tiny):
    bits = np.frombuffer((HERE / "gpt2_tiny_bf16.bin").read_bytes()[1024:], np.uint16)
    model = GPT2.build(str(HERE / "gpt2_tiny_bf16.bin"))
    assert (model.params.memory.view(np.uint32) == bits.astype(np.uint32) << 16).all()
    full = GPT2.build(tiny).params.memory
    assert (np.abs(model.params.memory - full) <= np.abs(full) / 256).all()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_text("the old file")
    with pytest.raises(TypeError):
        write_file(str(path), np.zeros(3), object())
    assert path.read_text() == "the old file" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        write_file(str(tmp_path / "missing" / "file.bin"), np.zeros(3))


# ---------------------------------------------------------------------------------------------------------------------
# initial weights

def test_first_normal_numbers():
    out = np.empty(32, F32)
    t.fill_normal(out, 0.02, np.random.RandomState(42))
    np.testing.assert_allclose(out[:4], [0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282], rtol=1e-6)


@pytest.mark.parametrize("n", [16, 17, 31, 48, 1003])
def test_normal_numbers(n):
    out, random, expected_random = np.empty(n, F32), np.random.RandomState(7), np.random.RandomState(7)
    t.fill_normal(out, 0.5, random)
    np.testing.assert_allclose(out, normal_numbers(expected_random, n, 0.5), rtol=1e-4, atol=1e-6)
    assert random.randint(0, 2**32, dtype=np.uint32) == expected_random.randint(0, 2**32, dtype=np.uint32)


def test_initial_weights():
    model, random, V, L, C = GPT2(ODD), np.random.RandomState(42), 37, 3, 20
    model.params.memory.fill(np.nan)
    model.init_random()
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
    ("d6", 1024, 6, 6, 384), ("d12", 1024, 12, 12, 768), ("gpt2:d48", 1024, 48, 25, 1600), ("gpt3:c768", 2048, 12, 12, 768),
    ("gpt3:c1536", 2048, 24, 16, 1536), ("gpt3:c12288", 2048, 96, 96, 12288),
])
def test_descriptors(descriptor, maxT, L, NH, C):
    config = t.model_config(descriptor)
    assert config == GPT2Config(maxT, 50257, 50304, L, NH, C)
    assert t.size_of(t.parameter_table(config)) == (50304 + maxT) * C + L * (12 * C + 13) * C + 2 * C


def test_size_of_124M():
    assert t.size_of(t.parameter_table(t.model_config("d12"))) == 124_475_904


# ---------------------------------------------------------------------------------------------------------------------
# the README's ten lines

def test_notebook(tiny, make_shard, tmp_path):
    text = make_shard(tmp_path / "shard.bin", np.tile(np.arange(40), 50))
    model = GPT2.build(tiny)
    loader = DataLoader(text, B=4, T=32, should_shuffle=True)
    losses = []
    for _ in range(30):
        losses.append(model.forward(*loader.next_batch()))
        model.backward()
        model.update(learning_rate=1e-2)
    assert losses[0] > 5 and losses[-1] < 1


# ---------------------------------------------------------------------------------------------------------------------
# sampler and tokenizer

COINS = [0.230317235, 0.19051826, 0.310865164, 0.902659476, 0.684917867]


def test_coins():
    sampler = Sampler()
    assert [sampler.coin() for _ in COINS] == pytest.approx(COINS, rel=1e-8)


def test_draws_follow_the_coins():
    probs = np.array([0.2, 0.0, 0.05, 0.25, 0.3, 0.2])  # cumulative: 0.2 0.2 0.25 0.5 0.8 1
    with np.errstate(divide="ignore"):
        logits = (np.log(probs) - 20000).astype(F32)
    sampler = Sampler()
    assert [sampler.draw(logits) for _ in COINS] == [2, 0, 3, 5, 4]


def test_a_draw_exceeds_the_coin(monkeypatch):
    sampler = Sampler()
    for coin, token in (0.0, 1), (0.5 - 2**-24, 1), (0.5, 2), (1 - 2**-24, 2):
        monkeypatch.setattr(sampler, "coin", lambda coin=coin: coin)
        assert sampler.draw(np.array([-1e30, 3, 3, -1e30], F32)) == token


def test_reading_token_by_token_equals_reading_at_once():
    model, tokens = unsettled(ODD), batch(ODD, 1, 9)[0]
    for first in 1, 4:
        model.cached, logits = 0, []
        for part in [tokens[0, :first], *tokens[0, first:, None]]:
            logits.append(model.read(part).copy())
        model.forward(tokens)
        for row, expected in enumerate(logits, first - 1):
            close(model.logits(row), expected)
        with pytest.raises(ValueError):  # no position left
            model.read([1])


def test_generate_draws_from_the_model(tiny):
    model, sampler, tokens, start = GPT2.build(tiny), Sampler(), [3, 14], 0
    generated = list(generate(model, Sampler(), [3, 14], 150))
    for token in generated:
        if len(tokens) - start > 64:  # no position left: the second half goes on
            start = len(tokens) - 32
        model.forward(np.array([tokens[start:]], np.int32))
        assert token == sampler.draw(model.logits(len(tokens) - start - 1))
        tokens.append(token)
    assert len(generated) == 150 and max(generated) < 300


@pytest.fixture
def write_tokenizer(tmp_path):
    def write_tokenizer(words, version=2, eot=3, magic=20240328, count=None, cut=0):
        header = np.zeros(256, "<u4")
        header[:3] = magic, version, len(words) if count is None else count
        if version == 2:
            header[3] = eot
        content = header.tobytes() + b"".join(bytes([len(word)]) + word for word in words)
        path = tmp_path / "tokenizer.bin"
        path.write_bytes(content[:len(content) - cut])
        return str(path)
    return write_tokenizer


WORDS = [b"caf", "é".encode()[:1], "é".encode()[1:], b"<|endoftext|>", "😀".encode()[:3], "😀".encode()[3:], b"\n", b"\x1b[2J"]


def test_tokenizer(write_tokenizer):
    tokenizer = Tokenizer(write_tokenizer(WORDS))
    assert tokenizer.eot_token == 3
    assert [tokenizer.decode(i) for i in (0, 1, 2, 6, 4, 5)] == ["caf", "", "é", "\n", "", "😀"]
    assert "\x1b" not in tokenizer.decode(7)
    assert tokenizer.decode(1) == "" and tokenizer.decode(0) == "\ufffdcaf"  # half a character, then another one
    assert Tokenizer(write_tokenizer(WORDS, version=1)).eot_token == 50256


def test_tokenizer_without_its_file(tmp_path):
    tokenizer = Tokenizer(str(tmp_path / "missing.bin"))
    assert tokenizer.eot_token == 50256 and tokenizer.decode(5) + tokenizer.decode(50256) == "5 50256 "


@pytest.mark.parametrize("damage", [{"cut": 1}, {"cut": 3000}, {"count": 9}, {"magic": 5}, {"version": 3}])
def test_damaged_tokenizer(write_tokenizer, damage):
    with pytest.raises(ValueError, match=r"tokenizer\.bin"):
        Tokenizer(write_tokenizer(WORDS, **damage))
