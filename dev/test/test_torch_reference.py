"""
The PyTorch reference itself: what everything else is tested against has to be right first.
Its forward is compared with float64 NumPy, its files and random streams with their definitions.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -r dev/requirements.txt")

from dev import train_gpt2_torch as ref

HERE = Path(__file__).parent
SMALL = ref.Config(maxT=9, V=11, L=2, NH=2, C=10)  # its tensors' sizes are no multiples of 16
PLAIN_FLAGS = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


@pytest.fixture(autouse=True)
def restore_torch():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return str(path)


def small_model():
    model = ref.random_weights(SMALL)
    ref.unsettle(model)
    return model


# -----------------------------------------------------------------------------
# Random weights


def normal_stream(rng, n, std):
    """FACTS: n uniforms, Box-Muller in blocks of 16, the last 16 drawn anew where n is no multiple of 16."""

    def block(u):
        radius = np.sqrt(-2 * np.log(1 - u[:8] + 1e-12))
        theta = 2 * np.pi * u[8:]
        return np.concatenate([radius * np.cos(theta), radius * np.sin(theta)])

    def uniforms(count):
        return (rng.randint(0, 2**32, size=count, dtype=np.uint32) & 0xFFFFFF) / 2**24

    u = uniforms(n)
    out = np.zeros(n)
    for i in range(0, n - 15, 16):
        out[i : i + 16] = block(u[i : i + 16])
    if n % 16:
        out[-16:] = block(uniforms(16))
    return std * out


def test_normal_stream_starts_as_documented():
    expected = [0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282]
    drawn = torch.empty(32).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(42))
    np.testing.assert_allclose(drawn[:4], expected, rtol=1e-6)
    np.testing.assert_allclose(normal_stream(np.random.RandomState(42), 32, 0.02)[:4], expected, rtol=1e-6)


def test_random_weights_follow_the_stream_in_order():
    model = ref.random_weights(SMALL)
    rng, residual = np.random.RandomState(42), 0.02 / math.sqrt(2 * SMALL.L)
    draws = [(model.wte.weight, 0.02), (model.wpe.weight, 0.02)]
    for h in model.h:
        draws += [(h.qkv.weight, 0.02), (h.attproj.weight, residual), (h.fc.weight, 0.02), (h.fcproj.weight, residual)]
    for p, std in draws:
        expected = normal_stream(rng, p.numel(), std).reshape(p.shape)
        np.testing.assert_allclose(p.detach(), expected, rtol=1e-4, atol=1e-7)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (1.0 if "ln" in name and "weight" in name else 0.0)).all(), name


def test_sizes_of_the_descriptors():
    assert ref.config_from_descriptor("d12") == ref.config_from_descriptor("gpt2:d12") == ("gpt2_d12", ref.Config())
    assert ref.Config().num_parameters == 124475904
    assert ref.Config().Vp == 50304
    assert ref.config_from_descriptor("gpt2:l4c256h4") == ("gpt2_l4c256h4", ref.Config(L=4, NH=4, C=256))
    small = ref.Config(maxT=512, V=300, L=4, NH=4, C=256)
    assert ref.config_from_descriptor("l4c256h4t512v300") == ("gpt2_l4c256h4t512v300", small)
    with pytest.raises(ValueError, match="divisible"):
        ref.config_from_descriptor("l4c256h3")
    name, config = ref.config_from_descriptor("gpt3:c1536")
    assert (name, config) == ("gpt3_c1536", ref.Config(maxT=2048, L=24, NH=16, C=1536))
    stored = sum(p.numel() for p in small_model().parameters()) + (SMALL.Vp - SMALL.V) * SMALL.C
    assert SMALL.num_parameters == stored


# -----------------------------------------------------------------------------
# The model


def numpy_loss_and_logits(model, x, y):
    """The forward pass from the formulas, in float64."""
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    T, config = x.shape[1], model.config

    def layernorm(a, name):
        a = a - a.mean(-1, keepdims=True)
        a = a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5)
        return a * w[name + ".weight"] + w[name + ".bias"]

    def linear(a, name):
        return a @ w[name + ".weight"].T + w[name + ".bias"]

    def softmax(a):
        e = np.exp(a - a.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    a = w["wte.weight"][x] + w["wpe.weight"][:T]
    for layer in range(config.L):
        h = f"h.{layer}."
        q, k, v = np.split(linear(layernorm(a, h + "ln1"), h + "qkv"), 3, axis=-1)
        att = np.zeros_like(a)
        for head in range(config.NH):
            hs = config.C // config.NH
            s = slice(head * hs, (head + 1) * hs)
            scores = q[..., s] @ k[..., s].transpose(0, 2, 1) / np.sqrt(hs)
            scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
            att[..., s] = softmax(scores) @ v[..., s]
        a = a + linear(att, h + "attproj")
        f = linear(layernorm(a, h + "ln2"), h + "fc")
        f = 0.5 * f * (1 + np.tanh(np.sqrt(2 / np.pi) * (f + 0.044715 * f**3)))
        a = a + linear(f, h + "fcproj")
    logits = layernorm(a, "lnf") @ w["wte.weight"].T
    probs = np.take_along_axis(softmax(logits), np.asarray(y)[..., None], -1)
    return -np.log(probs).mean(), logits


@pytest.mark.parametrize("T", [1, 7, 9])
def test_forward_against_numpy(T):
    model = small_model()
    tokens = torch.from_numpy(np.random.RandomState(0).randint(0, SMALL.V, (3, T + 1)))
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits, loss = model(x, y)
    expected_loss, expected_logits = numpy_loss_and_logits(model, x.numpy(), y.numpy())
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    np.testing.assert_allclose(logits.detach(), expected_logits, rtol=1e-5, atol=1e-5)


def test_gradients_against_finite_differences():
    model = small_model().double()
    tokens = torch.from_numpy(np.random.RandomState(1).randint(0, SMALL.V, (2, 8)))
    x, y = tokens[:, :-1], tokens[:, 1:]
    model(x, y)[1].backward()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            direction = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            value, h = p.clone(), 1e-6
            p.copy_(value + h * direction)
            above = model(x, y)[1].item()
            p.copy_(value - h * direction)
            below = model(x, y)[1].item()
            p.copy_(value)
            slope = (above - below) / (2 * h)
            assert slope == pytest.approx((p.grad * direction).sum().item(), rel=1e-5, abs=1e-8), name


def test_adamw_against_the_formula():
    model = small_model()
    optimizer = ref.make_optimizer(model, weight_decay=0.1, **PLAIN_FLAGS)
    tensors = [(p.detach().double().numpy().copy(), p) for p in model.parameters()]
    m, v = [0.0] * len(tensors), [0.0] * len(tensors)
    rng = np.random.RandomState(2)
    for t in range(1, 4):
        for i, (expected, p) in enumerate(tensors):
            grad = rng.randn(*p.shape).astype(np.float32)
            p.grad = torch.from_numpy(grad)
            m[i] = 0.9 * m[i] + 0.1 * grad
            v[i] = 0.99 * v[i] + 0.01 * grad.astype(np.float64) ** 2
            decay = 0.1 if p.ndim >= 2 else 0.0  # biases and LayerNorm are not decayed
            expected -= 1e-3 * (m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.99**t)) + 1e-8) + decay * expected)
        optimizer.step()
    for expected, p in tensors:
        np.testing.assert_allclose(p.detach(), expected, rtol=1e-5, atol=1e-6)


# -----------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_round_trip(tmp_path, dtype):
    model, path = small_model(), tmp_path / "model.bin"
    ref.write_model(str(path), model, dtype)
    words = np.fromfile(path, "<i4", 256)
    assert words[:8].tolist() == [20240326, 3 if dtype == torch.float32 else 5, 9, 11, 2, 2, 10, 128]
    assert not words[8:].any()
    assert path.stat().st_size == 1024 + dtype.itemsize * SMALL.num_parameters
    wte = path.read_bytes()[1024 : 1024 + 128 * 10 * dtype.itemsize]
    assert not any(wte[11 * 10 * dtype.itemsize :])  # the padding is zero
    again = ref.load_checkpoint(str(path))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.to(dtype).float(), q)
    assert [f.name for f in tmp_path.iterdir()] == ["model.bin"]  # no temporary file is left


def test_tensors_lie_where_the_format_says(tmp_path):
    model, path = small_model(), tmp_path / "model.bin"
    ref.write_model(str(path), model, torch.float32)
    Vp, T, L, C = 128, 9, 2, 10
    shapes = [(Vp, C), (T, C), (L, C), (L, C), (L, 3 * C, C), (L, 3 * C), (L, C, C), (L, C), (L, C), (L, C)]
    shapes += [(L, 4 * C, C), (L, 4 * C), (L, C, 4 * C), (L, C), (C,), (C,)]
    flat = np.fromfile(path, "<f4", offset=1024)
    parts = np.split(flat, np.cumsum([math.prod(s) for s in shapes])[:-1])
    tensors = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    block = model.h[1]
    layers = [block.ln1.weight, block.ln1.bias, block.qkv.weight, block.qkv.bias, block.attproj.weight]
    layers += [block.attproj.bias, block.ln2.weight, block.ln2.bias, block.fc.weight, block.fc.bias]
    layers += [block.fcproj.weight, block.fcproj.bias]
    for stored, p in zip(tensors[2:14], layers, strict=True):
        np.testing.assert_array_equal(stored[1], p.detach())
    np.testing.assert_array_equal(tensors[0][:11], model.wte.weight.detach())
    np.testing.assert_array_equal(tensors[1], model.wpe.weight.detach())
    np.testing.assert_array_equal(tensors[14:], [model.lnf.weight.tolist(), model.lnf.bias.tolist()])


def test_bf16_is_rounded_to_nearest_even(tmp_path):
    model, path = small_model(), tmp_path / "model.bin"
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e-41, 0.0]
    with torch.no_grad():
        model.wpe.weight[0, :6] = torch.tensor(ties)
    ref.write_model(str(path), model, torch.bfloat16)
    bits = model.wpe.weight.detach().numpy().view(np.uint32)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    stored = np.fromfile(path, "<u2", 9 * 10, offset=1024 + 2 * 128 * 10).reshape(9, 10)
    np.testing.assert_array_equal(stored, expected)


def test_the_committed_tiny_files_are_reproduced(tmp_path):
    """By another version of PyTorch too, hence within a tolerance; the bytes are the same on the same one."""
    ref.main(["-e", "tiny", "--write_dir", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "gpt2_tiny.bin", "gpt2_tiny_bf16.bin", "gpt2_tiny_debug_state.bin", "gpt2_tiny_debug_state.json",
    ]
    for name in ("gpt2_tiny.bin", "gpt2_tiny_debug_state.bin"):
        committed, fresh = np.fromfile(HERE / name, "<i4"), np.fromfile(tmp_path / name, "<i4")
        integers = 256 if name == "gpt2_tiny.bin" else 256 + 2 * 2 * 21
        np.testing.assert_array_equal(fresh[:integers], committed[:integers])
        fresh, committed = fresh[integers:].view("<f4"), committed[integers:].view("<f4")
        np.testing.assert_allclose(fresh, committed, rtol=1e-4, atol=1e-5)
    fresh, committed = (json.loads((d / "gpt2_tiny_debug_state.json").read_text()) for d in (tmp_path, HERE))
    assert fresh.pop("losses") == pytest.approx(committed.pop("losses"), rel=1e-5)
    assert fresh.pop("torch")
    assert committed.pop("torch")
    assert fresh == committed


def test_a_checkpoint_gives_the_debug_state_of_its_model(tmp_path):
    """What is written for a .bin: the state, not the weights again."""
    shard = write_shard(tmp_path / "a.bin", np.arange(100) % 300)
    ref.main(["-e", str(HERE / "gpt2_tiny.bin"), "-b", "1", "-t", "8", "-i", shard,
              "--write_dir", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "gpt2_tiny_debug_state.bin", "gpt2_tiny_debug_state.json",
    ]
    state = np.fromfile(tmp_path / "out" / "gpt2_tiny_debug_state.bin", "<i4")
    assert state[:4].tolist() == [20240327, 2, 1, 8]
    assert state[256:272].tolist() == [*range(8), *range(1, 9)]  # the first batch of the shard, not shuffled
    assert len(state) == 256 + 16 + 8 * 300 + 1 + ref.TINY.num_parameters


# -----------------------------------------------------------------------------
# The data loader


def test_loader_has_the_order_of_llmc(tmp_path):
    shard = write_shard(tmp_path / "train.bin", np.arange(305260) % 50257)
    loader = ref.DataLoader(shard, 4, 64, 50257, shuffle=True)
    assert loader.num_batches == 1192
    order = []
    for _ in range(loader.num_batches):
        x, y = loader.next_batch()
        order.append(loader.batch_order[loader.batch_index - 1])
        start = order[-1] * 256
        assert x.flatten().tolist() == [t % 50257 for t in range(start, start + 256)]
        assert y.flatten().tolist() == [t % 50257 for t in range(start + 1, start + 257)]
    assert order[:12] == [408, 791, 914, 1057, 81, 450, 299, 907, 582, 321, 670, 134]
    assert sorted(order) == list(range(1192))
    assert loader.next_batch()[0][0, 0] != 408 * 256 % 50257  # a new epoch, a new order


def test_loader_visits_every_batch_of_unequal_shards_once(tmp_path):
    lengths = [61, 8, 17, 33]  # batches of B*T = 8: 7, none, 2, 4
    for i, n in enumerate(lengths):
        write_shard(tmp_path / f"{i}.bin", 100 * i + np.arange(n))
    loader = ref.DataLoader(str(tmp_path / "*.bin"), 2, 4, 50257, shuffle=True)
    expected = [100 * i + s for i, n in enumerate(lengths) for s in range(0, n - 8, 8)]
    epochs = [[int(loader.next_batch()[0][0, 0]) for _ in range(13)] for _ in range(3)]
    assert loader.num_batches == 13
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    unshuffled = ref.DataLoader(str(tmp_path / "*.bin"), 2, 4, 50257, shuffle=False)
    assert [int(unshuffled.next_batch()[0][0, 0]) for _ in range(26)] == expected * 2


# -----------------------------------------------------------------------------
# The program


@pytest.fixture
def shards(tmp_path):
    tokens = np.random.RandomState(3).randint(0, 300, 500)
    train, val = write_shard(tmp_path / "train.bin", tokens[:400]), write_shard(tmp_path / "val.bin", tokens[400:])
    return ["-e", str(HERE / "gpt2_tiny.bin"), "-i", train, "-j", val, "-b", "2", "-t", "8", "-l", "1e-3"]


def test_training_prints_what_the_trainer_prints(shards, capsys):
    ref.main([*shards, "-x", "4", "-v", "2", "-m", "3"])
    out = capsys.readouterr().out
    assert "num_parameters: 39808\ntrain dataset num_batches: 24\nval dataset num_batches: 6\n" in out
    line = r"^step (\d+): train loss (\d+\.\d{6}) \(took \d+\.\d{6} ms\) \| norm \d+\.\d{4} \|"
    steps = re.findall(line, out, re.MULTILINE)
    assert [int(step) for step, _ in steps] == [0, 1, 2, 3]
    validation = [float(v) for v in re.findall(r"^val loss (\d+\.\d{6})$", out, re.MULTILINE)]
    assert len(validation) == 3
    assert f"final_train_loss: {steps[-1][1]}\n" in out


def test_overfitting_one_batch_lowers_its_loss(shards, capsys):
    ref.main([*shards, "-x", "6", "-v", "0", "-a", "1"])
    losses = [float(v) for v in re.findall(r"train loss (\S+)", capsys.readouterr().out)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_accumulation_equals_a_larger_batch(shards, tmp_path, capsys):
    """Two micro-batches of one row, twice the tokens per step, on the unshuffled order of a single batch."""
    model = ref.load_checkpoint(str(HERE / "gpt2_tiny.bin"))
    loader = ref.DataLoader(shards[3], 1, 8, 300, shuffle=True)
    expected = np.mean([model(*loader.next_batch())[1].item() for _ in range(2)])
    ref.main([*shards, "-b", "1", "-d", "16", "-x", "1", "-v", "0"])
    assert float(re.search(r"train loss (\S+)", capsys.readouterr().out)[1]) == pytest.approx(expected, abs=2e-6)


def corrupt(path, word=None, value=None, cut=0, more=b""):
    data = bytearray((HERE / "gpt2_tiny.bin").read_bytes())
    if word is not None:
        data[4 * word : 4 * word + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(data[: len(data) - cut] + more)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"word": 0, "value": 7}, "no checkpoint"),
        ({"word": 1, "value": 2}, "version 2"),
        ({"word": 2, "value": 0}, "must be positive"),
        ({"word": 3, "value": -300}, "must be positive"),
        ({"word": 4, "value": 2**31 - 1}, "its header says"),
        ({"word": 5, "value": 3}, "divisible by NH"),
        ({"word": 7, "value": 300}, "expected 384"),
        ({"cut": 1}, "its header says"),
        ({"cut": 160000}, "no checkpoint"),
        ({"more": b"\0"}, "its header says"),
    ],
)
def test_bad_checkpoints(tmp_path, capsys, damage, message):
    corrupt(tmp_path / "bad.bin", **damage)
    with pytest.raises(SystemExit) as e:
        ref.main(["-e", str(tmp_path / "bad.bin")])
    err = capsys.readouterr().err
    assert e.value.code == 1
    assert err.startswith("error: ")
    assert message in err
    assert "bad.bin" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-e", "missing.bin"], "---> HINT"),
        (["-e", "d7"], "unknown model 'd7'"),
        (["-e", "gpt3:c5140"], "does not divide"),
        (["-e", "gpt3:c12288"], "GB"),
        (["-i", "nowhere/*.bin"], "no file matches nowhere/*.bin"),
        (["-b", "0"], "must be positive"),
        (["-t", "-1"], "must be positive"),
        (["-t", "65"], "more than the model's 64"),
        (["-b", "60"], "too few tokens"),
        (["-d", "24"], "no multiple"),
        (["-m", "0"], "for -m 1"),
        (["--write_dir", str(HERE / "gpt2_tiny.bin")], "gpt2_tiny.bin"),
    ],
)
def test_bad_flags(shards, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        ref.main([*shards, *flags])
    err = capsys.readouterr().err
    assert e.value.code == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("damage", "message"),
    [("magic", "no token shard"), ("version", "version 9"), ("size", "its header says"), ("token", "holds token 300")],
)
def test_bad_shards(shards, tmp_path, capsys, damage, message):
    path = Path(shards[3])
    data = bytearray(path.read_bytes())
    if damage == "token":
        data[1024:] = np.full(400, 300, "<u2").tobytes()
    elif damage == "size":
        data += b"\0\0"
    else:
        data[{"magic": 0, "version": 4}[damage]] = 9
    path.write_bytes(data)
    with pytest.raises(SystemExit) as e:
        ref.main([*shards, "-v", "0"])
    err = capsys.readouterr().err
    assert e.value.code == 1
    assert err.startswith("error: ")
    assert message in err
