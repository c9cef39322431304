"""What the tests share: random arrays between guards, shards, the tiny model, subprocesses."""
import os
import signal
import subprocess
import sys
from pathlib import Path

# Numba reads this when it is imported: tests compare 1, 2 and 3 threads even where there are fewer cores.
os.environ.setdefault("NUMBA_NUM_THREADS", "3")

import numba
import numpy as np
import pytest

import train_gpt2

ROOT = Path(__file__).resolve().parents[2]
GUARD, UNTOUCHED = 17, np.float32(12345)  # 17: the arrays in between are not aligned to anything


@pytest.fixture(autouse=True)
def undisturbed():
    """One thread for every test: on a busy machine threads wait for each other. What main() sets in the module (its
    choice of matmul) and in the process (signal handlers) is put back."""
    names, handlers = dict(vars(train_gpt2)), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    numba.set_num_threads(1)
    yield
    vars(train_gpt2).update(names)
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
        assert (memory[:GUARD] == UNTOUCHED).all(), "written out of bounds"
        assert (memory[GUARD + size:] == UNTOUCHED).all(), "written out of bounds"


@pytest.fixture
def work(new):
    """Scratch memory of the kernels for sequences of up to 512 tokens and the present number of threads"""
    return new(*train_gpt2.work_shape(train_gpt2.GPT2Config(512, 1, 128, 1, 1, 1)))


@pytest.fixture
def make_shard():
    """make_shard(path, tokens, ...): write a shard, sound unless told otherwise; returns its path as a string."""
    def make_shard(path, tokens, magic=20240520, version=1, count=None):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(tokens) if count is None else count
        path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
        return str(path)
    return make_shard


@pytest.fixture
def tiny():
    """The path of the committed checkpoint: 2 layers, 2 heads, 32 channels, 300 tokens, sequences of up to 64."""
    return str(ROOT / "dev/test/gpt2_tiny.bin")


@pytest.fixture
def python():
    """python(*args, **env): start Python as a user would in the project's folder; returns the Popen object."""
    processes = []

    def python(*args, **env):
        inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        process = subprocess.Popen([sys.executable, *map(str, args)], text=True, cwd=ROOT, env={**inherited, **env},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        return process
    yield python
    for process in processes:
        process.kill()
        process.communicate()
