"""
What dev/engine/cuda.py does around its kernels, on a GPU of NumPy (numpy_gpu.py): the same numbers as the engine for
CPUs, from every path through it. The kernels themselves: test_cuda.py.
"""
import contextlib
import importlib.util
import io
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy_gpu
import pytest
from formulas import close
from models import batch, tensors

import train_gpt2 as t
from dev import generate
from dev.data.shards import write_evalfile
from dev.eval import multiple_choice

SMALL = t.GPT2Config(200, 37, 128, 2, 2, 32)  # maxT, V, Vp, L, NH, C
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture
def several_chunks(monkeypatch):
    """The classifier goes over several chunks of rows."""
    cuda = pytest.importorskip("dev.engine.cuda", exc_type=(ImportError, ValueError))
    monkeypatch.setattr(cuda, "CLASSIFIER_ROWS", 32)
    monkeypatch.setattr(cuda, "SQUARES", 2000)


@pytest.fixture
def fake_gpu(monkeypatch):
    """--device cuda runs on the GPU of NumPy."""
    numpy_gpu.engine(SMALL, t.parameter_table(SMALL), weights(SMALL))  # skips where packages are missing
    from dev.engine import cuda
    monkeypatch.setattr(cuda, "Gpu", numpy_gpu.Gpu)
    monkeypatch.setattr(cuda, "Products", numpy_gpu.Products)


def weights(config):
    def fill(params):
        rng = np.random.default_rng(1)
        for name, _ in t.parameter_table(config):
            x = getattr(params, name)
            x[:] = rng.normal(1.0 if name in ("ln1w", "ln2w", "lnfw") else 0, 0.2, x.shape)
    return fill


def engines(precision="fp32", **options):
    """The engine for GPUs and that for CPUs, with the same weights"""
    table = t.parameter_table(SMALL)
    ours = numpy_gpu.engine(SMALL, table, weights(SMALL), precision=precision, **options)
    return ours, t.GPT2(SMALL, table, weights(SMALL))


def step(engine, inputs, targets):
    loss = float(engine.forward(inputs, targets))
    engine.backward()
    return loss


def same_gradients(ours, cpu, bound):
    """Assert that both engines have the same gradients. Returns their norm."""
    for name, g in tensors(cpu).items():
        close(tensors(ours)[name], g, bound * 10)
    norm = cpu.grad_norm()
    assert ours.grad_norm() == pytest.approx(norm, rel=bound * 3)
    return norm


@pytest.mark.parametrize("precision, attention", [("fp32", "own"), ("fp32", "flash"), ("bf16", "own")])
@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("B, T", [(3, 20), (1, 1), (2, 64), (2, 13)])
def test_training(precision, attention, recompute, B, T, several_chunks):
    """Four steps of two micro-batches: by then all that is done in a step has been replayed from a graph."""
    (ours, cpu), bound = engines(precision, attention=attention), BOUNDS[precision]
    for engine in ours, cpu:
        engine.prepare(B, T, recompute)
    for k in range(4):
        batches = [batch(SMALL, B, T, seed=10 * k + n) for n in range(2)]
        losses = [[step(engine, *each) for each in batches] for engine in (ours, cpu)]
        assert losses[0] == pytest.approx(losses[1], rel=bound)
        norm = same_gradients(ours, cpu, bound)
        for engine in ours, cpu:
            engine.update(k, 1e-3, norm=norm, grad_clip=norm / 2, weight_decay=0.1)
    if precision == "fp32":
        for what in "params", "m", "v":
            close(ours.host(what).memory, cpu.host(what).memory, 1e-4)


@pytest.mark.parametrize("precision, tf32, NH, capability, expected", [
    ("bf16", 1, 2, (9, 0), "cudnn"), ("fp32", 1, 2, (8, 0), "flash"), ("fp32", 0, 2, (9, 0), "own"),
    ("fp32", 1, 2, (7, 5), "own"), ("fp32", 1, 4, (9, 0), "own")])  # the last: heads of 8 channels
def test_attention_is_chosen(precision, tf32, NH, capability, expected, monkeypatch):
    config = t.GPT2Config(64, 37, 128, 1, NH, 32)
    monkeypatch.setattr(numpy_gpu.Gpu, "capability", capability)

    def choose(wish):
        return numpy_gpu.engine(config, t.parameter_table(config), weights(config), precision=precision, tf32=tf32,
                                attention=wish).attention_name
    assert choose("auto") == expected or expected == "cudnn" and not importlib.util.find_spec("cudnn")
    assert choose("own") == "own"
    for wish in {"cudnn", "flash"} - {expected}:
        with pytest.raises(ValueError, match=f"--attention {wish} needs .*\n---> HINT: --attention own"):
            choose(wish)


@pytest.mark.parametrize("precision", BOUNDS)
def test_any_cut_of_a_batch_is_the_same_batch(precision):
    """Twelve sequences as micro-batches of 12, 6, 4, 1: the gradient, and what three updates leave"""
    found = []
    for B in 12, 6, 4, 1:
        engine, numbers = engines(precision)[0], []
        for k in range(3):
            whole = batch(SMALL, 12, 20, seed=k)
            losses = [step(engine, *(x[first:first + B] for x in whole)) for first in range(0, 12, B)]
            numbers += [np.mean(losses), engine.grad_norm()]
            gradient = engine.host("grads").memory / len(losses)
            engine.update(k, 1e-3, norm=numbers[-1], grad_clip=numbers[-1] / 2)
        found.append((numbers, gradient))
    for numbers, gradient in found[1:]:
        assert numbers == pytest.approx(found[0][0], rel=BOUNDS[precision])
        assert np.linalg.norm(gradient - found[0][1]) < 2 * BOUNDS[precision] * np.linalg.norm(gradient)


@pytest.mark.parametrize("precision", BOUNDS)
def test_evaluation_changes_no_bit_of_training(precision):
    results = []
    for evaluating in False, True:
        engine = engines(precision)[0]
        engine.prepare(2, 20)
        for k in range(4):
            step(engine, *batch(SMALL, 2, 20, seed=k))
            if evaluating:
                engine.forward(*batch(SMALL, 3, 7, seed=k), train=False)
                engine.forward(batch(SMALL, 2, 20, seed=k)[0])
                engine.read([1, 2, 3])
                engine.rewind()
            step(engine, *batch(SMALL, 2, 20, seed=k + 9))
            engine.update(k, 1e-2)
            if evaluating:
                engine.forward(*batch(SMALL, 9, 150, seed=k), train=False)  # larger than what was made room for
        results.append(engine.host("params").memory)
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("precision", BOUNDS)
def test_any_batch_is_evaluated(precision):
    (ours, cpu), bound = engines(precision), BOUNDS[precision]
    for turn in range(3):
        for B, T in (3, 20), (1, 1), (4, 65), (1, 200), (2, 129):
            inputs, targets = batch(SMALL, B, T, seed=turn)
            losses = [float(engine.forward(inputs, targets, train=False)) for engine in (ours, cpu)]
            assert losses[0] == pytest.approx(losses[1], rel=bound)
            close(ours.losses(), np.array(cpu.losses()), bound)
            for row in 0, T // 2, B * T - 1:
                close(ours.logits(row), np.array(cpu.logits(row)), bound * 3)
            assert ours.forward(inputs) is None and cpu.forward(inputs) is None
            close(ours.logits(B * T - 1), np.array(cpu.logits(B * T - 1)), bound * 3)


@pytest.mark.parametrize("precision", BOUNDS)
def test_text(precision):
    ours, cpu = engines(precision)
    for prompt in [5], [1, 2, 3], list(range(30)) * 6:
        for tokens in [prompt] + [[n] for n in range(8)]:
            close(ours.read(tokens), np.array(cpu.read(tokens)), BOUNDS[precision] * 3)
        for engine in ours, cpu:
            engine.rewind()


def test_losses_are_read_later():
    """more of them than there is room for on the way"""
    ours = engines()[0]
    slots = ours.slots.size
    losses = [ours.forward(*batch(SMALL, 1, 2, seed=n), train=False) for n in range(slots + 9)]
    for n in 0, 5, slots, slots + 8:
        expected = float(ours.forward(*batch(SMALL, 1, 2, seed=n), train=False))
        assert float(losses[n]) == expected


def test_a_checkpoint_moves_between_engines():
    ours, cpu = engines("bf16")
    for engine in ours, cpu:
        engine.prepare(2, 8)
    step(cpu, *batch(SMALL, 2, 8))
    cpu.update(0, 1e-2)
    for what in "params", "m", "v":
        ours.load(what, io.BytesIO(cpu.host(what).memory.tobytes()))
        assert (ours.host(what).memory == cpu.host(what).memory).all()
    inputs, targets = batch(SMALL, 2, 8, seed=4)
    expected = float(cpu.forward(inputs, targets, train=False))
    assert float(ours.forward(inputs, targets, train=False)) == pytest.approx(expected, rel=2e-3)


def test_a_run_goes_on_here_and_there(really_train, out, fake_gpu):
    """From a GPU to a CPU and back, killed twice, with float32 weights in the state: as if it had stayed on a CPU"""
    text, cpu, gpu = "-x {} -n 2 -v 2 -s 2 -g 3 -l 1e-3 -y 1 -w 1", "--precision fp32", "--device cuda --attention own"
    printed = really_train(f"{text.format(6)} {cpu} -o {out}_cpu")
    loss = re.compile(r"^(?:val loss|step .*: train loss) (\S+)", re.MULTILINE)
    expected = loss.findall(printed)
    found = [really_train(f"{text.format(steps)} {device}")
             for steps, device in ((2, gpu), (4, cpu), (6, gpu))]
    losses = [number for run in found for number in loss.findall(run)]
    assert np.float64(losses) == pytest.approx(np.float64(expected), rel=5e-3)
    versions = [np.fromfile(out / f"model_{step:08d}.bin", np.int32, 2)[1] for step in (2, 4, 6)]
    assert versions == [5, 3, 5]


def test_text_and_evaluation(tiny, tmp_path, rng, fake_gpu, monkeypatch, capsys):
    """dev/generate.py and dev/eval: what they print is the same with --device cuda."""
    monkeypatch.setattr(t, "load_kernels", lambda *args: None)
    examples = [(tokens[:30].tolist(), tokens[30:].reshape(4, -1).tolist(), 0)
                for tokens in rng.integers(0, 300, (20, 50))]
    write_evalfile(tmp_path / "set.bin", examples)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def printed(*flags):
        generate.main(["-e", tiny, "-n", "90", "--past_end", "--samples", "2", *flags])  # more than the 64 positions
        monkeypatch.setattr("sys.argv", ["mmlu.py", "-e", tiny, "-i", str(tmp_path / "set.bin"), *flags])
        multiple_choice.main("MMLU", "")
        out, errors = capsys.readouterr()
        assert "180 tokens in" in errors and "standard error" in out
        return [line for line in out.splitlines() if not line.startswith(("kernels: ", "GPU: "))]
    assert printed("--device", "cuda", "--precision", "fp32") == printed()


def test_a_full_card_says_what_fits():
    ours = engines("bf16")[0]
    ours.prepare(2, 8)
    allocated = set(ours.gpu.memories)
    ours.gpu.free_bytes = sum(memory.nbytes for memory in ours.gpu.memories.values()) + (8 << 20)
    with pytest.raises(ValueError, match=r"---> HINT: use -b (\d+)") as error:
        ours.prepare(5000, 200)
    assert set(ours.gpu.memories) == allocated
    fits = int(str(error.value).split("use -b ")[1].split(";")[0])
    with pytest.raises(ValueError):
        ours.prepare(fits + 1, 200)
    assert ours.prepare(fits, 200)["parameters"] == 18 * ours.num_parameters


def test_a_full_card_in_the_middle():
    """evaluation of a batch that does not fit: afterwards no old memory is used, and what fits runs as before"""
    ours = engines()[0]
    tokens = batch(SMALL, 2, 8)
    ours.prepare(2, 8)
    loss = step(ours, *tokens)
    ours.forget()
    held = sum(memory.nbytes for memory in ours.gpu.memories.values())
    ours.gpu.free_bytes = held + 1000
    with pytest.raises(ValueError, match="---> HINT: use a smaller -b"):
        ours.forward(*batch(SMALL, 9, 150), train=False)
    for _ in range(3):
        assert step(ours, *tokens) == loss
        ours.forget()
    assert sum(memory.nbytes for memory in ours.gpu.memories.values()) <= held


def test_runs_side_by_side_keep_each_others_choices(tmp_path):
    pytest.importorskip("nvmath.bindings", reason="dev/engine/requirements.txt is not installed", exc_type=ImportError)
    pytest.importorskip("numba_cuda", reason="dev/engine/requirements.txt is not installed")
    from dev.engine.cublaslt import Choices
    path = str(tmp_path / "choices.json")
    first, second = Choices(path, "H100"), Choices(path, "H100")
    first.put("a", b"\1")
    second.put("b", b"\2")
    third = Choices(path, "H100")
    assert [third.get("a"), third.get("b"), first.get("b"), second.get("a")] == [b"\1", b"\2", b"\2", b"\1"]
    assert Choices(path, "H200").get("a") is None
    (tmp_path / "choices.json").write_text("[1, ")
    assert Choices(path, "H100").get("a") is None


def test_the_fastest_product_is_chosen():
    """of those that are not hopeless, the first where another is hardly faster; long ones are not run often"""
    pytest.importorskip("nvmath.bindings", reason="dev/engine/requirements.txt is not installed", exc_type=ImportError)
    pytest.importorskip("numba_cuda", reason="dev/engine/requirements.txt is not installed")
    from dev.engine.cublaslt import Products

    def chosen(*ms):
        runs = [0] * len(ms)

        def measure(i, repeats):
            runs[i] += repeats
            return ms[i]
        return Products.fastest(range(len(ms)), measure), runs
    assert chosen(1.0, 0.99, 0.985)[0] == 0 and chosen(1.0, 0.99, 0.97)[0] == 2 and chosen(1.0)[0] == 0
    assert chosen(0.1, 0.2, 0.05)[1] == [21, 1, 21]
    assert sum(n * ms for n, ms in zip(chosen(7.0, 6.5, 6.6, 9.0)[1], (7.0, 6.5, 6.6, 9.0))) < 80


class Runtime:
    """What of cuda.bindings.runtime is needed to time work: a clock that goes on by 2 ms with every piece of it"""

    def __init__(self):
        self.clock, self.events, self.most = 0, {}, 0

    def cudaEventCreate(self):
        event = object()
        self.events[event] = None
        self.most = max(self.most, len(self.events))
        return 0, event

    def cudaEventRecord(self, event, stream):
        self.events[event] = self.clock
        return 0,

    def cudaEventElapsedTime(self, begin, end):
        return 0, self.events[end] - self.events[begin]

    def cudaEventDestroy(self, event):
        del self.events[event]
        return 0,

    def cudaStreamSynchronize(self, stream):
        return 0,


@pytest.fixture
def bare_gpu(monkeypatch):
    """A Gpu that has nothing but events, gpu.runtime"""
    pytest.importorskip("cuda.bindings.runtime", reason="dev/engine/requirements.txt is not installed",
                        exc_type=ImportError)
    pytest.importorskip("numba_cuda", reason="dev/engine/requirements.txt is not installed")
    from dev.engine import gpu
    monkeypatch.setattr(gpu, "rt", Runtime())
    bare = gpu.Gpu.__new__(gpu.Gpu)
    bare.runtime, bare.stream, bare.trace, bare.seen, bare.graphs, bare.range = gpu.rt, 0, None, set(), {}, gpu.ranges()
    return bare


def test_a_profile_of_a_long_run(bare_gpu):
    """Every piece of work is recorded with its seconds, and there are never many events."""
    found, runtime = [], bare_gpu.runtime

    def work(a, b):
        runtime.clock += 2
    with pytest.raises(RuntimeError), bare_gpu.timing(lambda *row: found.append(row)):
        for n in range(10_001):
            bare_gpu.call("work", work, n, b=1)
        raise RuntimeError  # what was done until then is recorded
    assert found == [("work", {"a": n, "b": 1}, 0.002) for n in range(10_001)]
    assert not runtime.events and runtime.most < 10_000 and bare_gpu.trace is None


def test_ranges_for_nsight(bare_gpu, monkeypatch):
    """There are none unless it watches; then a step's parts have their names, with --profile 1 also every kernel."""
    from dev.engine import gpu
    assert "nvtx" not in sys.modules and gpu.ranges() is contextlib.nullcontext
    said = []

    @contextlib.contextmanager
    def annotate(name):
        said.append(f"{name} begins")
        yield
        said.append(f"{name} ends")
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "a library of Nsight's")
    bare_gpu.range = gpu.ranges()
    bare_gpu.replay(("forward", 4, 64), lambda: said.append("work"))
    with bare_gpu.timing(lambda *row: None):
        bare_gpu.replay("update", lambda: bare_gpu.call("adamw", lambda: said.append("work")))
    assert said == ["forward begins", "work", "forward ends", "update begins", "adamw begins", "work", "adamw ends",
                    "update ends"]


@pytest.mark.parametrize("version, found", [(0, "there is none"), (12040, "it supports CUDA 12.4")])
def test_an_old_driver(bare_gpu, version, found):
    from dev.engine import gpu
    bare_gpu.runtime.cudaDriverGetVersion = lambda: (0, version)
    with pytest.raises(OSError, match="needs an NVIDIA driver for CUDA 13 .580 or newer., and " + found) as error:
        gpu.Gpu()
    assert "---> HINT: update the driver" in str(error.value)


def test_versions_that_fit_are_pinned():
    """numba-cuda is only maintained, and does not say which Numba it is for."""
    lines = (Path(__file__).parents[1] / "engine/requirements.txt").read_text().splitlines()
    for name in "numba", "llvmlite", "numba-cuda[cu13]", "nvmath-python", "nvidia-cudnn-frontend":
        assert any(re.fullmatch(re.escape(name) + r"==[0-9.]+", line) for line in lines), name
    assert "numpy>=1.26,<2.5" in lines and "nvidia-cudnn-cu13>=9.15.1" in lines


@pytest.mark.parametrize("B, NH, T", [(64, 12, 1024), (4, 16, 2048), (32, 16, 2048), (7, 12, 1024), (1, 25, 8192)])
def test_workspace_of_deterministic_attention(B, NH, T):
    """The backward pass takes B*NH*T*T bfloat16, or goes over slices: it never has more than 2 GiB for several."""
    attention = pytest.importorskip("dev.engine.cudnn_attention", exc_type=ImportError)
    n = attention.sequences(B, NH, T)
    assert B % n == 0 and (n == 1 or 2 * n * NH * T * T <= 2 << 30)
    assert all(2 * m * NH * T * T > 2 << 30 for m in range(n + 1, B + 1) if B % m == 0)  # as few slices as can be
    assert attention.workspace_bytes(B, NH, T) >= 2 * n * NH * T * T


def test_what_the_start_took(capsys):
    ours = engines()[0]
    ours.gpu.spent["kernels"] += 100
    ours.prepare(2, 8)
    line = capsys.readouterr().out
    seconds, parts = re.fullmatch(r"GPU: ready after (\S+) s: (.*)\n", line).groups()
    parts = dict(part.rsplit(" ", 1) for part in parts.split(", "))
    assert float(parts["kernels"]) == 100 and sum(map(float, parts.values())) == pytest.approx(float(seconds), abs=0.5)


@pytest.mark.parametrize("sound", [True, False])
def test_a_step_is_repeated_without_cudnn(sound, monkeypatch, capsys):
    """Where cuDNN's backward pass gives NaN, a step of two batches is that of our own attention; a run that has
    diverged has no finite norm after that either."""
    faulty, B, T = [], 2, 8
    ours, cpu = engines(precision="bf16")
    cuda = sys.modules[type(ours).__module__]

    class CuDNN(cuda.Attention):
        def backward(self, *args):
            self.scale = np.float32(np.nan if faulty else self.hs**-0.5)
            super().backward(*args)

    def cudnn_attention(B, T, hs, train):
        table = cuda.squares_table(SMALL.num_heads, T, ours.dtype)
        squares = cuda.place(SimpleNamespace(), table, ours.gpu.allocate(cuda.bytes_of(table)))
        attention = CuDNN(ours.gpu, ours.products, SMALL.num_heads, T, hs, list(vars(squares).values()))
        return lambda: attention
    monkeypatch.setattr(ours, "cudnn_attention", cudnn_attention)
    ours.attention_name = "cudnn"
    rng = np.random.default_rng(3)
    for step in range(3):
        faulty[:] = [True] * (step == 1)
        if not sound and step == 1:
            numpy_gpu.memory_at(ours.tensors["params"].lnfw.ptr, (1,), np.float32)[:] = np.nan
            ours.round()
        losses = []
        for _ in range(2):
            inputs, targets = rng.integers(37, size=(2, B, T), dtype=np.int32)
            losses.append([engine.forward(inputs, targets) for engine in (ours, cpu)])
            ours.backward()
            cpu.backward()
        norm, expected = ours.grad_norm(), cpu.grad_norm()
        said = capsys.readouterr().out
        if not sound and step == 1:
            assert not np.isfinite(norm) and "and nan with our own" in said
            break
        assert norm == pytest.approx(expected, rel=2e-2) and ("the gradient's norm is nan" in said) == (step == 1)
        assert [float(a) for a, _ in losses] == pytest.approx([float(b) for _, b in losses], rel=1e-2)
        for engine in ours, cpu:
            engine.update(step, 1e-3, norm=expected)
    assert ours.attention_name == "cudnn"


def test_weights_arrive_while_kernels_are_compiled(monkeypatch):
    """They are drawn beside the first passes, and a step has them; what goes wrong there is said here."""
    begun, table = threading.Event(), t.parameter_table(SMALL)

    def draw(params):
        assert begun.wait(30), "prepare() waits for the weights before it compiles"
        weights(SMALL)(params)
    ours, cpu = numpy_gpu.engine(SMALL, table, draw), t.GPT2(SMALL, table, weights(SMALL))
    try_out = ours.try_out

    def compile_first(*args):
        try_out(*args)
        begun.set()
    monkeypatch.setattr(ours, "try_out", compile_first)
    ours.prepare(2, 8)
    np.testing.assert_array_equal(ours.host("params").memory, cpu.host("params").memory)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    assert float(ours.forward(tokens, tokens)) == pytest.approx(float(cpu.forward(tokens, tokens)), rel=1e-5)

    def fail(params):
        raise ValueError("the file is truncated")
    with pytest.raises(ValueError, match="truncated"):
        numpy_gpu.engine(SMALL, table, fail).prepare(2, 8)


@pytest.mark.parametrize("name, bf16", [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989.4),
    ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125),
    ("NVIDIA A1000", None), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090", 165.2), ("Foo", None)])
def test_peak(monkeypatch, name, bf16):
    monkeypatch.setattr(numpy_gpu.Gpu, "name", name)
    found = [engines(precision)[0].peak() for precision in ("bf16", "fp32")]
    assert found == pytest.approx([bf16 * 1e12, bf16 / 2 * 1e12] if bf16 else [np.nan] * 2, nan_ok=True)


@pytest.mark.parametrize("maxT, C, NH", [(8, 36, 3), (8, 4096, 32), (8, 3200, 25), (8, 264, 1), (12000, 64, 1)])
def test_models_that_do_not_run(maxT, C, NH):
    config = t.GPT2Config(maxT, 37, 128, 1, NH, C)
    with pytest.raises(ValueError, match="HINT"):
        numpy_gpu.engine(config, t.parameter_table(config), weights(config))


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("NH, C", [(2, 32), (1, 24), (2, 80), (5, 40)])
def test_the_kernels_source(precision, NH, C):
    """A step, evaluation and text with the kernels themselves, in simulator.py: odd sizes, heads of 8, 16, 24, 40"""
    config, bound = t.GPT2Config(70, 37, 128, 1, NH, C), BOUNDS[precision]
    table = t.parameter_table(config)
    numpy_gpu.engine(config, table, weights(config))  # skips where packages are missing
    import simulator
    ours = numpy_gpu.engine(config, table, weights(config), precision=precision, gpu=simulator.Gpu)
    cpu = t.GPT2(config, table, weights(config))
    losses = [[step(engine, *batch(config, 2, 13, seed=k)) for k in range(2)] for engine in (ours, cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    norm = same_gradients(ours, cpu, bound)
    for engine in ours, cpu:
        engine.update(0, 1e-5, norm=norm, grad_clip=norm / 2, weight_decay=0.1)
        engine.forward(*batch(config, 1, 65, seed=9), train=False)
    close(ours.losses(), np.array(cpu.losses()), bound * 3)
    for tokens in [1, 2, 3], [4], [5]:
        close(ours.read(tokens), np.array(cpu.read(tokens)), bound * 3)
