"""
The command line: what a run prints and in which order, how it is interrupted, and one clear error for each bad input.
"""
import io
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import train_gpt2
from dev.run import machine
from train_gpt2 import GPT2, DataLoader

FLOAT, COUNT = r"\d+\.\d+", r"\d+"


@pytest.fixture
def text(make_shard, tmp_path):
    return make_shard(tmp_path / "text.bin", np.random.default_rng(3).integers(0, 300, 1000))


@pytest.fixture
def cli(tiny, text, tmp_path, monkeypatch, capsys):
    """cli(flags): run the trainer on the tiny model; returns its exit status, standard output, and standard error"""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def cli(flags=""):
        given = flags.split()
        defaults = {"-e": tiny, "-i": text, "-j": text, "-b": "2", "-t": "8", "-x": "2", "-v": "0", "-s": "0"}
        for name, value in defaults.items():
            given += [name, value] if name not in given else []
        status = train_gpt2.main(given)
        return status, *capsys.readouterr()
    return cli


# ---------------------------------------------------------------------------------------------------------------------
# a run

STEP = re.compile(rf"step ({COUNT})/{COUNT}(?: \(epoch {FLOAT}\))?: train loss ({FLOAT}) \(took {FLOAT} ms\) "
                  rf"\| mean {FLOAT} \| norm ({FLOAT}) \| lr (\d\.\d\de[+-]\d\d) "
                  rf"\| {FLOAT}% MFU \| {COUNT} tok/s \| [\d:]+ left")


def test_lines_of_a_run(cli):
    status, out, err = cli("-x 2 -v 1 -s 2 -g 5 -l 3e-3")
    assert status == 0 and err == ""
    expected = [
        r"llm\.numba: .*", r"threads: .*", r"kernels: ready after .*", r"memory: .*", r"\[GPT-2\]", r"max_seq_len: 64",
        r"vocab_size: 300", r"padded_vocab_size: 384", r"num_layers: 2", r"num_heads: 2", r"channels: 32",
        r"num_parameters: 39808", r"train dataset num_batches: 62", r"val dataset num_batches: 62",
        rf"num_activations: {COUNT}", rf"val loss {FLOAT}.*", STEP.pattern + ".*", rf"val loss {FLOAT}.*",
        STEP.pattern + ".*", rf"val loss {FLOAT}.*", "generating:", "---", rf"({COUNT} ){{4}}", "---", "steps: 2",
        "tokens: 32", rf"final train loss: {FLOAT}", rf"final val loss: {FLOAT}", rf"mean ms per step: {FLOAT}",
        rf"best ms per step: {FLOAT}", rf"tokens per second: {COUNT}", rf"MFU: {FLOAT}%", r"peak memory: [\d,]+ MiB",
    ]
    lines = iter(out.splitlines())  # others may come in between
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in lines), f"no {pattern} where it should be in\n{out}"


def events(out):
    return re.findall(r"^(step \d+|val loss|generating)", out, re.MULTILINE)


def test_order_of_a_run(cli):
    _, out, _ = cli("-x 4 -v 2 -s 3 -g 2")
    assert events(out) == ["val loss", "step 0", "step 1", "val loss", "step 2", "generating", "step 3", "val loss",
                           "generating"]
    assert events(cli("-x 2 -v 0 -s 0")[1]) == ["step 0", "step 1"]
    assert events(cli("-x 0 -v 5 -s 5 -g 2")[1]) == ["val loss", "generating"]


def test_numbers_of_a_run(cli, tiny, text):
    _, out, _ = cli("-x 3 -v 3 -m 4 -l 2e-3 -c 0.1")
    model, loader = GPT2.build(tiny), DataLoader(text, 2, 8, should_shuffle=True)

    def validate():
        batches = DataLoader(text, 2, 8)
        return f"{sum(model.forward(*batches.next_batch(), train=False) for _ in range(4)) / 4:f}"
    val_losses, steps = [validate()], []
    for step in range(3):
        loss = model.forward(*loader.next_batch())
        model.backward()
        steps.append((str(step), f"{loss:f}", f"{model.grad_norm():.4f}", "2.00e-03"))
        model.update(step, 2e-3, weight_decay=0.1)
    val_losses.append(validate())
    assert STEP.findall(out) == steps
    assert re.findall(rf"^val loss ({FLOAT})", out, re.MULTILINE) == val_losses
    assert f"final train loss: {steps[-1][1]}\nfinal val loss: {val_losses[-1]}\n" in out


def test_overfitting_a_single_batch(cli, tiny, make_shard, tmp_path):
    """the first one for validation"""
    val = make_shard(tmp_path / "val.bin", range(100))
    losses = [float(loss) for _, loss, *_ in STEP.findall(cli(f"-a 1 -x 8 -l 1e-2 -j {val}")[1])]
    assert losses[0] == pytest.approx(GPT2.build(tiny).forward(*DataLoader(val, 2, 8).next_batch()), abs=1e-6)
    assert len(losses) == 8 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("matmul, who", [("numba", "micro-kernel"), ("blas", "NumPy's BLAS")])
def test_profile(cli, matmul, who):
    status, out, _ = cli(f"--profile 1 --matmul {matmul} -v 1")
    rows = re.findall(rf"^(\w+) +{FLOAT} ms +({FLOAT}) % of the run$", out, re.MULTILINE)
    assert status == 0 and re.search(rf"^threads: .* matrix product: .*{who}", out, re.MULTILINE)
    assert {name for name, _ in rows} == {
        "encoder_forward", "encoder_backward", "layernorm_forward", "layernorm_backward", "matmul_forward",
        "matmul_backward", "attention_forward", "attention_backward", "gelu_forward", "gelu_backward",
        "fused_classifier", "sum_of_squares", "adamw_update"}
    assert len(rows) == 13 and 0 < sum(float(percent) for _, percent in rows) < 101  # nothing is counted twice


def test_text_with_a_tokenizer(cli):
    header = np.zeros(256, "<u4")
    header[:4] = 20240328, 2, 300, 299
    Path("data").mkdir()
    words = b"".join(bytes([6]) + f"<{i:04}>".encode() for i in range(300))
    Path("data/gpt2_tokenizer.bin").write_bytes(header.tobytes() + words)
    _, out, _ = cli("-s 1 -x 0 -g 6")
    assert re.search(r"^generating:\n---\n(<0[012]\d\d>){5}\n---$", out, re.MULTILINE), out
    assert cli("-s 1 -x 0 -g 6")[1].split("generating")[1] == out.split("generating")[1]


@pytest.mark.parametrize("pause", [0, 2])
def test_interrupt_stops_after_the_step(python, tiny, text, pause):
    """Even when print() waits, since nobody has read the lines before it: the pause fills the pipe."""
    flags = f"-e {tiny} -i {text} -j {text} -b 2 -t 8 -x 1000000 -v 0 -s 0".split()
    run, out = python("train_gpt2.py", *flags, OMP_NUM_THREADS="1"), ""
    while "step 3/" not in out:
        out += run.stdout.readline()
    time.sleep(pause)
    run.send_signal(signal.SIGINT)
    out, err = out + run.stdout.read(), run.stderr.read()
    assert run.wait(100) == 0 and err == "\nstopping after this batch (once more: at once)\n", err
    steps = STEP.findall(out)
    assert [int(step) for step, *_ in steps] == list(range(len(steps)))
    assert re.search(rf"^steps: {len(steps)}\ntokens: {16 * len(steps)}\n(.*\n)*peak memory: .*\n\Z", out, re.MULTILINE)


def test_memory_estimate(python, text):
    flags = f"-e d6 -i {text} -j {text} -b 4 -t 32 -x 1 -v 1 -s 1 -g 4".split()
    out, err = python("train_gpt2.py", *flags, OMP_NUM_THREADS="1").communicate(timeout=300)
    estimate, peak = (int(re.search(rf"{words} ([\d,]+) MiB$", out, re.MULTILINE)[1].replace(",", ""))
                      for words in ("^memory: .* =", "^peak memory:"))
    assert 0.95 < estimate / peak < 1.05 and peak > 500, out + err


def test_help(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train_gpt2.main(["--help"])
    out = capsys.readouterr().out
    pairs = {"-e": "model", "-i": "input_bin", "-j": "input_val_bin", "-b": "batch_size", "-t": "sequence_length",
             "-x": "num_iterations", "-l": "learning_rate", "-c": "weight_decay", "-v": "val_loss_every",
             "-m": "val_max_steps", "-s": "sample_every", "-g": "gen_tokens", "-a": "overfit_single_batch"}
    assert "None" not in out and "(default: )" not in out and "(default: 0.0001)" in out
    for short, long in pairs.items():
        assert re.search(rf"^ +{short}\b.* --{long}\b", out, re.MULTILINE), short


# ---------------------------------------------------------------------------------------------------------------------
# bad input

def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(cli, tmp_path):
    """refused(flags, *words): the run must end with one error that has the words, and leave no file behind."""
    def refused(flags, *words):
        before = files(tmp_path)
        status, out, err = cli(flags)
        first, *hints = err.splitlines()
        assert status == 1 and first.startswith("error: ") and "Traceback" not in out + err
        assert all(hint.startswith("---> HINT: ") for hint in hints), err
        for word in words:
            assert word in err
        assert files(tmp_path) == before and "step 0/" not in out
    return refused


def damaged(tiny, tmp_path, words=(), size=None):
    """A copy of the tiny checkpoint with other words {index: value} in its header, cut or extended to a size"""
    content = bytearray(Path(tiny).read_bytes())
    for index, value in dict(words).items():
        content[4 * index:4 * index + 4] = value.to_bytes(4, "little", signed=True)
    path = tmp_path / "damaged.bin"
    path.write_bytes(bytes(content[:size]) + bytes(max(0, (size or 0) - len(content))))
    return f"-e {path}"


def test_missing_checkpoint(refused):
    refused("-e missing.bin", "missing.bin", "python dev/start.py", "-e d6")


SIZE = 1024 + 4 * 39808


@pytest.mark.parametrize("words, size, message", [
    ({0: 20240520}, None, "magic number is 20240520, expected 20240326"),
    ({1: 4}, None, "version 4, expected 3 or 5"),
    ({}, SIZE - 1, "truncated"), ({}, 1024, "truncated"), ({}, SIZE + 1, "too long"), ({}, 2 * SIZE, "too long"),
    ({1: 5}, None, "too long"), ({}, 1000, "magic number is missing"), ({}, 0, "magic number is missing"),
    ({5: 3}, None, "32 channels and 3 heads"),
    ({2: 0}, None, "make no sense"), ({3: -300}, None, "make no sense"), ({4: 0}, None, "make no sense"),
    ({5: 0}, None, "make no sense"), ({6: -32}, None, "make no sense"), ({7: 256}, None, "make no sense"),
    ({4: 2**31 - 1}, None, "make no sense"), ({2: 128}, None, "truncated"), ({4: 1}, None, "too long"),
])
def test_damaged_checkpoints(refused, tiny, tmp_path, words, size, message):
    refused(damaged(tiny, tmp_path, words, size), "damaged.bin", message)


@pytest.mark.parametrize("name", ["d7", "gpt3:c5", "gpt2:c768", "d", "gpt4:d12", "nonsense"])
def test_unknown_descriptors(refused, name):
    refused(f"-e {name}", f"'{name}'", "HINT", "d12", "gpt3:c768")


def test_an_unknown_descriptor_is_said_as_it_was_typed(refused, make_shard, tmp_path):
    """even where the data, which are not GPT-2's, would have brought a vocabulary along"""
    make_shard(tmp_path / "bytes.bin", tokens=range(100), vocabulary=257)
    refused(f"-e nonsense -i {tmp_path}/bytes.bin", "unknown model descriptor 'nonsense'\n")


@pytest.mark.parametrize("name, message", [
    ("runs/nothing", "no such checkpoint: runs/nothing\n"), ("gpt2", "import_hf -i gpt2 -o data/gpt2.bin"),
    ("openai-community/gpt2-xl", "import_hf -i openai-community/gpt2-xl -o data/gpt2-xl.bin")])
def test_models_that_are_not_there(refused, name, message):
    refused(f"-e {name}", message)


def test_a_folder_is_no_checkpoint(refused, tmp_path):
    refused(f"-e {tmp_path}", str(tmp_path))


@pytest.mark.parametrize("flag", ["-i", "-j"])
@pytest.mark.parametrize("shard, message", [
    ({"magic": 5}, "magic number is 5"), ({"version": 7}, "version 7"), ({"count": 1001}, "truncated"),
    ({"count": 999}, "too long"), (None, "no file matches"),
])
def test_damaged_shards(refused, make_shard, tmp_path, flag, shard, message):
    if shard is not None:
        make_shard(tmp_path / "shard.bin", **({"tokens": range(1000)} | shard))
    refused(f"-v 1 {flag} {tmp_path}/sh*.bin", "sh", message)


@pytest.mark.parametrize("flag, tokens, message", [  # validation takes one sequence of 8, where there are no two
    ("-i", range(16), "17 tokens"), ("-i", [], "17 tokens"), ("-j", range(8), "9 tokens"), ("-j", [], "9 tokens")])
def test_shards_without_a_batch(refused, make_shard, tmp_path, flag, tokens, message):
    refused(f"-v 1 {flag} {make_shard(tmp_path / 'shard.bin', tokens)}", "shard.bin", message)


@pytest.mark.parametrize("tokens, B", [(9, 1), (16, 1), (17, 2), (40, 4)])
def test_validation_with_few_tokens(cli, make_shard, tmp_path, tiny, tokens, B):
    """It takes as many sequences as there are, up to -b: the loss is that of exactly these."""
    path = make_shard(tmp_path / "val.bin", range(tokens))
    status, out, err = cli(f"-b 4 -x 0 -v 1 -m 1 -j {path}")
    expected = GPT2.build(tiny).forward(*DataLoader(path, B, 8).next_batch(), train=False)
    assert status == 0 and float(re.search(rf"val loss ({FLOAT})", out)[1]) == pytest.approx(expected, abs=2e-6), err
    assert (f"validation has {tokens} tokens: a batch of it has {B} x 8\n" in out) == (B < 4)


@pytest.mark.parametrize("flags", ["-v 0 -i", "-v 1 -j"])
def test_tokens_outside_the_vocabulary(refused, make_shard, tmp_path, flags):
    path = make_shard(tmp_path / "shard.bin", [7] * 16 + [300])
    refused(f"{flags} {path}", "shard.bin: token 300 at position 16", "300", "HINT")


@pytest.mark.parametrize("flags, words", [
    ("-t 65", ["64"]), ("-b 0", ["batch_size", "0"]), ("-b -3", ["batch_size", "-3"]), ("-t 0", ["sequence_length"]),
    ("-t -1", ["sequence_length"]), ("-b 2000000000", ["HINT"]),
])
def test_batches_that_cannot_be(refused, flags, words):
    refused(flags, *words)


@pytest.mark.parametrize("flags, free, message", [
    ("-t 65", 1 << 40, "limit is 64"), ("-e d6 -b 1 -t 1025", 1 << 40, "limit is 1024"),
    ("-t 64", 1 << 20, "GiB of memory"), ("-e d6", 1 << 20, "GiB of memory"),
])
def test_a_bad_batch_costs_no_weights(refused, monkeypatch, make_shard, tmp_path, flags, free, message):
    """It is refused before weights are read or drawn, and before kernels are compiled."""
    def too_early(*args):
        raise AssertionError("too early")
    for name in "read_checkpoint", "init_random", "load_kernels":
        monkeypatch.setattr(train_gpt2, name, too_early)
    monkeypatch.setattr(machine, "available_memory", lambda: free)
    refused(f"{flags} -i {make_shard(tmp_path / 'long.bin', [7] * 3000)}", message)


def test_more_memory_than_there_is(refused, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
    refused("", "GiB of memory", "HINT")


@pytest.mark.parametrize("system, free", [
    ({}, float("inf")),  # not Linux
    ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8000 kB\n"}, 8_192_000),
    ({"/proc/meminfo": "MemAvailable: 8000 kB", "memory.max": "max", "memory.current": "1000000"}, 8_192_000),
    ({"/proc/meminfo": "MemAvailable: 8000 kB", "memory.max": "5000000", "memory.current": "1000000"}, 4_000_000),
    ({"/proc/meminfo": "MemAvailable: 8000 kB", "memory.max": "50000000", "memory.current": "1000000"}, 8_192_000),
])
def test_available_memory(monkeypatch, system, free):
    def open(path):
        for name, content in system.items():
            if str(path).endswith(name):
                return io.StringIO(content)
        raise FileNotFoundError(path)
    monkeypatch.setattr(machine, "open", open, raising=False)
    assert machine.available_memory() == free


@pytest.mark.parametrize("flags", ["-m 0 -v 1", "-m -2 -v 1", "-x -2", "-v -1", "-s -1"])
def test_counts_that_make_no_sense(refused, flags):
    refused(flags)


def test_diverged_training(cli):
    status, out, err = cli("-x 10 -l 1e30")
    assert status == 1 and re.match(r"error: step \d: .*diverged\n---> HINT: .*-l", err) and "step 0/10" in out


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_checkpoint_without_sense_stops_the_run(cli, tiny, tmp_path, value):
    weights = np.fromfile(tiny, np.float32)
    weights[-10] = float(value)
    weights.tofile(tmp_path / "model.bin")
    status, out, err = cli(f"-e {tmp_path / 'model.bin'}")
    assert status == 1 and err.startswith(f"error: {tmp_path}/model.bin: ") and "Traceback" not in out + err


def test_damaged_tokenizer(refused):
    Path("data").mkdir()
    Path("data/gpt2_tokenizer.bin").write_bytes(bytes(2000))
    refused("-s 1", "gpt2_tokenizer.bin", "magic")


@pytest.mark.parametrize("folder", ["text.bin", "text.bin/out"])
def test_unwritable_output(refused, tmp_path, folder):
    refused(f"-o {tmp_path / folder} -n 1", "text.bin")


@pytest.mark.parametrize("mistake", ["-e missing.bin", "-i missing.bin", "-v 1 -j missing.bin", "-t 65",
                                     "-b 2000000000"])
def test_a_mistake_spoils_no_earlier_run(cli, refused, tmp_path, mistake):
    assert cli(f"-o {tmp_path / 'out'} -n 1")[0] == 0
    for meant in "-y 0", "--overwrite 1":
        refused(f"-o {tmp_path / 'out'} -n 1 {meant} {mistake}")


@pytest.mark.parametrize("flags", ["-b two", "--nonsense 1", "-x", "-l fast", "extra"])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        train_gpt2.main(flags.split())
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"train_gpt2\.py: error: .* \(--help lists the flags\)\n", err)


@pytest.mark.parametrize("flags, closest", [
    ("--lerning_rate 1", "--learning_rate"), ("--batch 3", "--batch_size"),
    ("-x 3 --learning-rate=1e-3", "--learning_rate"),
    ("-lr 1", "-l"), ("--nothing_like_it 1", None),
])
def test_the_closest_flag(flags, closest, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        train_gpt2.main(flags.split())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.findall(r"is (\S+) meant\?", err) == ([closest] if closest else [])
