"""What the tests share: random arrays between guards, shards, the tiny model, subprocesses."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

# Numba reads the first when it is imported: tests compare 1, 2 and 3 threads even where there are fewer cores. Engines
# read the second: one thread, unless a test wants more. On a busy machine threads wait for each other.
os.environ.setdefault("NUMBA_NUM_THREADS", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "200"  # lines that say all, wherever tests run
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background: programs that we start hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numba
import numpy as np
import pytest
from null_engine import NullEngine
from runs import SHARDS

import train_gpt2
from dev.run import files

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
GUARD, UNTOUCHED = 17, np.float32(12345)  # 17: the arrays in between are not aligned to anything


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """One thread for every test, and no data but the current folder's. What main() sets in the process, its signal
    handlers, is put back."""
    monkeypatch.setattr(files, "TOP", os.devnull)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    numba.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def new():
    """new(*shape): a float32 array full of NaN, inside a larger array that must be untouched when the test ends."""
    memories = []

    def new(*shape):
        size = int(np.prod(shape))
        memory = np.full(size + 2 * GUARD, UNTOUCHED, np.float32)
        memory[GUARD:GUARD + size] = np.nan
        memories.append((memory, size))
        return memory[GUARD:GUARD + size].reshape(shape)
    yield new
    for memory, size in memories:
        outside = np.concatenate([memory[:GUARD], memory[GUARD + size:]])
        assert (outside == UNTOUCHED).all(), "written out of bounds"


@pytest.fixture
def panels(new):
    """Scratch memory of the products, for the present number of threads"""
    return new(numba.get_num_threads(), train_gpt2.PANELS)


@pytest.fixture
def strips(new):
    """strips(T): scratch memory of the attention to T tokens, for the present number of threads"""
    return lambda T: new(numba.get_num_threads(), 2, train_gpt2.STRIP, T + train_gpt2.STRIP_GAP)


@pytest.fixture
def make_shard():
    """make_shard(path, tokens, ...): write a shard, sound unless told otherwise; returns its path as a string."""
    def make_shard(path, tokens, magic=20240520, version=1, count=None, vocabulary=0):
        header = np.zeros(256, "<i4")
        header[:4] = magic, version, len(tokens) if count is None else count, vocabulary
        path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
        return str(path)
    return make_shard


@pytest.fixture
def tiny():
    """The path of the committed checkpoint: 2 layers, 2 heads, 32 channels, 300 tokens, sequences of up to 64."""
    return str(ROOT / "dev/test/gpt2_tiny.bin")


@pytest.fixture
def python():
    """python(*args, cwd, **env): start Python as a user would, in the project's folder; returns the Popen object."""
    processes = []

    def python(*args, cwd=ROOT, **env):
        inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        process = subprocess.Popen([sys.executable, *map(str, args)], text=True, cwd=cwd, env={**inherited, **env},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        return process
    yield python
    for process in processes:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# tiny runs

@pytest.fixture
def shards(make_shard, tmp_path):
    """The pattern of the training data. The first shard is for validation too."""
    rng = np.random.default_rng(0)
    for i, size in enumerate(SHARDS):
        make_shard(tmp_path / f"shard_{i}.bin", rng.integers(0, 300, size))
    return str(tmp_path / "shard_*.bin")


@pytest.fixture
def flags(tiny, shards):
    """flags("-x 3 ..."): the trainer's arguments for a tiny run"""
    def flags(text=""):
        given = text.split()
        defaults = {"-e": tiny, "-i": shards, "-j": shards.replace("*", "0"), "-b": "2", "-t": "8", "-v": "0",
                    "-s": "0", "-l": "1e-2"}
        return given + [word for name, value in defaults.items() if name not in given for word in (name, value)]
    return flags


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def train(really_train, monkeypatch):
    """train("-x 3 ..."): the same as really_train, with an engine that computes nothing"""
    monkeypatch.setattr(train_gpt2, "GPT2", NullEngine)
    return really_train


@pytest.fixture
def really_train(flags, out, monkeypatch, capfd):
    """really_train("-x 3 ..."): run the trainer, with -o out unless told otherwise; returns its standard output.
    stopped: is it to say, on standard error, that it stops early?"""
    monkeypatch.setattr(train_gpt2, "measure_peak", lambda panels: 1.0)
    monkeypatch.setattr(train_gpt2, "load_kernels", lambda *args: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # some disks take a second

    def train(text, status=0, stopped=False):
        arguments = flags(text)
        got = train_gpt2.main(arguments if "-o" in arguments else [*arguments, "-o", str(out)])
        printed, errors = capfd.readouterr()
        assert got == status, errors
        notice = "\nstopping after this batch (once more: at once)\n" if stopped else ""
        assert errors == notice if status == 0 else re.fullmatch(r"error: .*\n(---> HINT: .*\n)*", errors), errors
        return printed + (errors if status else "")
    return train
