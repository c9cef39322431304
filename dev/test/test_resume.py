"""
Long runs: killed and resumed without a trace, llm.c's state files both ways, faults of disks and files, signals,
accumulation, schedules.
"""
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
from collections import deque
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
from formulas import Order

import train_gpt2
from dev.run import checkpoints, files
from dev.run.flags import parse_flags
from dev.run.schedule import scheduled_learning_rate, z_score
from dev.run.text import Sampler
from train_gpt2 import GPT2, DataLoader

resource = pytest.importorskip("resource", reason="Unix only, as are the signals")
SHARDS = 300, 100, 10, 170  # tokens; the third is too short for a batch


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
        defaults = {"-e": tiny, "-i": shards, "-j": shards.replace("*", "0"), "-b": "2", "-t": "8", "-v": "0", "-s": "0",
                    "-l": "1e-2"}
        return given + [word for name, value in defaults.items() if name not in given for word in (name, value)]
    return flags


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def train(flags, out, monkeypatch, capfd):
    """train("-x 3 ..."): run the trainer, with -o out unless told otherwise; returns its standard output.
    stopped: is it to say, on standard error, that it stops early?"""
    monkeypatch.setattr(train_gpt2, "measure_peak", lambda work: 1.0)
    monkeypatch.setattr(train_gpt2, "compile_kernels", lambda matmul: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # some disks take a second

    def train(text, status=0, stopped=False):
        arguments = flags(text)
        got = train_gpt2.main(arguments if "-o" in arguments else [*arguments, "-o", str(out)])
        printed, errors = capfd.readouterr()
        assert got == status, errors
        notice = "\nstopping after this step (once more: at once)\n" if stopped else ""
        assert errors == notice if status == 0 else re.fullmatch(r"error: .*\n(---> HINT: .*\n)*", errors), errors
        return printed + (errors if status else "")
    return train


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def complete(folder):
    """The steps of the complete checkpoints: those whose files are all there"""
    steps = [int(path.name[5:]) for path in sorted(folder.glob("DONE_*"))]
    for step in steps:
        for name in f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"run_{step:08d}.json":
            assert (folder / name).stat().st_size
    return steps


def log(folder):
    return (folder / "main.log").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# killed and resumed

def run_killed(python, how, tmp_path, flags):
    process = python("dev/test/killed.py", how, tmp_path / how, *flags, PYTHONPATH=".")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and err == "", err
    return json.loads(out)


def test_killed_at_every_moment(python, tmp_path, flags):
    runs = run_killed(python, "every", tmp_path, flags("-x 4 -n 2 -nk 1 -v 2 -s 2 -g 4"))
    assert runs["kills"] > 100 and "DONE_00000004" in runs["expected"]
    for moment, found in enumerate(runs["found"]):
        assert found == runs["expected"], f"killed at moment {moment}"


def test_killed_at_random_moments(python, tmp_path, flags):
    runs = run_killed(python, "random", tmp_path, flags("-x 30 -n 10 -nk 2 -d 32 -v 5 -s 7 -g 4 -k linear -u 5 -q 0.1"))
    assert runs["kills"] >= 20
    assert {"DONE_00000020", "DONE_00000030", "model_00000030.bin", "main.log"} < set(runs["expected"])
    for found in runs["found"]:
        assert found == runs["expected"]


def test_a_finished_run_goes_on(train, out, tmp_path):
    long = "-v 5 -n 10 -nm 20 -c 0.1 --grad_clip 1 -k constant"
    train(f"{long} -x 40 -o {tmp_path / 'whole'}")
    train(f"{long} -x 20")
    train(f"{long} -x 20 -y 1")  # nothing is left to do
    assert "resuming from step 20\n" in train(f"{long} -x 40 -y 1")
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_without_a_checkpoint(train, out):
    assert f"no complete checkpoint in {out}" in train("-x 1 -n 1 -y 1")
    assert complete(out) == [1]


def test_starting_anew_clears_old_checkpoints(train, out, monkeypatch):
    train("-x 6 -n 2 -v 1")
    assert complete(out) == [2, 4, 6]
    shutil.copytree(out, out.with_name("anew"))

    def killed(model):
        raise SystemExit(9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(GPT2, "backward", killed)
        train("-x 6 -n 2 -v 1")
    assert complete(out) == [] and log(out) == [log(out.with_name("anew"))[0]]
    assert "no complete checkpoint" in train("-x 6 -n 2 -v 1 -y 1")
    assert contents(out) == contents(out.with_name("anew"))
    assert re.search("anew in .*steps 2 to 6.*overwritten", train("-x 1"))
    assert complete(out) == []


def test_outlier_windows_are_resumed(train, out, tmp_path):
    run = "-x 150 -n 135 -sl 1.2 -sg 1.5 -l 1e-3"
    whole = train(f"{run} -o {tmp_path / 'whole'}")
    skips = [int(step) for step in re.findall(r"^step (\d+): .*update skipped", whole, re.MULTILINE)]
    assert skips and min(skips) >= 128 and max(skips) > 135, skips
    train(f"{run} -n 150")
    for path in tmp_path.glob("whole/*_00000135*"):
        shutil.copy(path, out)
    (out / "DONE_00000150").unlink()
    train(f"{run} -y 1")
    assert contents(out) == contents(tmp_path / "whole")


def test_the_log_has_no_line_twice(train, out):
    train("-x 12 -n 5 -v 5")
    lines = log(out)
    assert [line.split()[0] for line in lines] == ["s:0", *(f"s:{s}" for s in (*range(5), 5, *range(5, 10), 10, 10, 11, 12))]
    patterns = {"tel": r"s:\d+ tel:\d+\.\d{4}", "trl": r"s:\d+ trl:\d+\.\d{4} lr:0\.010000 norm:\d+\.\d\d"}
    for line in lines:
        assert re.fullmatch(patterns[line.split()[1][:3]], line)
    (out / "DONE_00000012").unlink()
    with open(out / "main.log", "a") as file:
        file.write("s:12 trl:1.2\ns:1")  # a line of a step that will be done again; one that was cut
    train("-x 12 -n 5 -v 5 -y 1")
    assert log(out) == lines


@pytest.mark.parametrize("every, kept", [
    ("-n 2", [2, 4, 6, 8, 10, 11]), ("-n 2 -nk 1", [11]), ("-n 2 -nk 3", [8, 10, 11]), ("-n 2 -nk 9", [2, 4, 6, 8, 10, 11]),
    ("-n 1 -nk 2 -nm 4", [4, 8, 10, 11]), ("-n 3 -nk 1 -nm 6", [6, 11]), ("-n 2 -nm 4", [2, 4, 6, 8, 10, 11]),
    ("-n 0", []), ("-n 20", [11]),
])
def test_which_checkpoints_are_kept(train, out, every, kept):
    train(f"-x 11 {every}")
    assert complete(out) == kept
    assert len(contents(out)) == 1 + 4 * len(kept)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_order_of_writing(train, out, monkeypatch):
    """What a name stands for is on the disk before it has the name; DONE is written last and removed first."""
    events = []

    def record(name, event):
        function = getattr(os, name)

        def recorded(*args):
            events.append(event(*args))
            return function(*args)
        monkeypatch.setattr(os, name, recorded)
    record("fsync", lambda descriptor: ("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
    record("replace", lambda old, new: ("name", os.path.basename(old), os.path.basename(new)))
    record("unlink", lambda path: ("remove", os.path.basename(path)))
    train("-x 4 -n 2 -nk 1")
    names = [event[2] for event in events if event[0] == "name" and event[2] != "main.log"]
    assert names == [name.format(step) for step in (2, 4) for name in (
        "model_{:08d}.bin", "state_{:08d}_00000.bin", "run_{:08d}.json", "DONE_{:08d}")]
    for i, (what, *paths) in enumerate(events):
        if what == "name":
            assert events[i - 1] == ("sync", paths[0]) and events[i + 1] == ("sync", "out")
    removed = [event for event in events if event[0] == "remove"]
    assert removed[0] == ("remove", "DONE_00000002") and len(removed) == 4
    first = events.index(removed[0])
    assert ("name", "DONE_00000004") in [event[::2] for event in events[:first]] and events[first + 1] == ("sync", "out")


# ---------------------------------------------------------------------------------------------------------------------
# signals

def interrupt(patch, number, owner, name, call, times=1):
    """Send this process a signal when a function of the owner is called for the `call`th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args, **more):
        if next(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*args, **more)
    patch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("owner, name, call, step", [
    (GPT2, "backward", 8, 4), (GPT2, "backward", 1, 1), (train_gpt2, "validate", 2, 5), (train_gpt2, "print_sample", 1, 3),
    (os, "replace", 2, 4), (train_gpt2, "write_log", 1, 0), (GPT2, "backward", 24, 12),
])
def test_interrupted_run_goes_on(train, out, tmp_path, monkeypatch, number, owner, name, call, step):
    run = "-x 12 -v 5 -s 3 -g 3 -d 32 -n 4"
    train(f"{run} -o {tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        interrupt(patch, number, owner, name, call)
        printed = train(run, stopped=True)
    assert complete(out)[-1] == step
    assert step == 0 or re.search(rf"^steps: {step}\ntokens: {32 * step}\n(.*\n)*peak memory: .*\n\Z", printed, re.MULTILINE)
    train(f"{run} -y 1")
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


def test_interrupted_run_without_checkpoints(train, out, monkeypatch):
    interrupt(monkeypatch, signal.SIGTERM, GPT2, "backward", 3)
    train("-x 10", stopped=True)
    assert complete(out) == [3]


@pytest.mark.parametrize("owner, name, call", [(GPT2, "backward", 4), (os, "replace", 7), (os, "fsync", 16)])
def test_a_second_signal_stops_at_once(train, out, monkeypatch, owner, name, call):
    interrupt(monkeypatch, signal.SIGINT, owner, name, call, times=2)
    with pytest.raises(SystemExit, match="130"):
        train("-x 10 -n 2")
    assert complete(out) == [2] and not list(out.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# llm.c's state file, byte by byte

def pack(order):
    """The end of a state file, where llm.c keeps the order of batches and the generator"""
    random = order.random
    return (struct.pack(f"<Q{len(order.shards)}i", len(order.shards), *order.shards)
            + struct.pack(f"<Q{len(order.order)}i", len(order.order), *order.order)
            + struct.pack("<QiI624III", 0, random.left, random.next, *random.state, 0, 0x9908B0DF))


def header(**words):
    """A state file's first 1024 bytes"""
    header = bytearray(struct.pack("<6i", 20240527, 1, 1, 0, words.get("master", 0), words.get("shuffled", 1)) + bytes(1000))
    struct.pack_into("<i", header, 40, words["step"])
    struct.pack_into("<QQ", header, 80, words["sampler"], words.get("sampler_before", words["sampler"]))
    struct.pack_into("<QQ", header, 120, words["shard"], words["sample"])
    return bytes(header)


SAMPLES = [(size - 1) // 16 for size in SHARDS]
N = 39808  # parameters of the tiny model


def test_layout_of_a_state_file(train, out, tiny, shards):
    train("-x 41 -n 41 -s 3 -g 5")  # into the second epoch
    model, loader, order = GPT2.build(tiny), DataLoader(shards, 2, 8, should_shuffle=True), Order(SAMPLES)
    for _ in range(41):
        order.draw()
        model.forward(*loader.next_batch())
        model.backward()
        model.update(1e-2)
    sampler = Sampler()
    for _ in range(14 * 4):  # steps 3, 6 … 39, and 41
        sampler.coin()
    expected = header(step=41, sampler=sampler.state, shard=order.shard, sample=order.sample)
    state = (out / "state_00000041_00000.bin").read_bytes()
    assert state[:1024] == expected
    assert (np.frombuffer(state, "<f4", N, 1024) == model.m.memory).all() and model.m.memory.any()
    assert (np.frombuffer(state, "<f4", N, 1024 + 4 * N) == model.v.memory).all() and model.v.memory.any()
    assert state[1024 + 8 * N:] == pack(order)
    weights = (out / "model_00000041.bin").read_bytes()
    assert struct.unpack("<8i", weights[:32]) == (20240326, 3, 64, 300, 2, 2, 32, 384) and not any(weights[32:1024])
    assert weights[1024:] == model.params.memory.tobytes()
    assert (out / "DONE_00000041").read_bytes() == b""


@pytest.mark.parametrize("batches", [0, 1, 17, 24, 25, 33, 34, 35, 300, 624, 625, 1500])
def test_bytes_of_the_order_after(shards, batches):
    loader, order = DataLoader(shards, 2, 8, should_shuffle=True), Order(SAMPLES)
    for _ in range(batches):
        loader.next_batch()
        order.draw()
    assert b"".join(bytes(array) for array in checkpoints.shuffle_state(loader)) == pack(order)
    assert (loader.shard_index, loader.sample_index) == (order.shard, order.sample)


def llmc_checkpoint(folder, step, order, model_file, m, v, master=None):
    """What llm.c leaves in its output folder. order: None where it doesn't shuffle"""
    folder.mkdir()
    shutil.copy(model_file, folder / f"model_{step:08d}.bin")
    position = {"shard": order.shard, "sample": order.sample} if order else {"shard": 1, "sample": 4, "shuffled": 0}
    state = header(step=step, sampler=13371337, sampler_before=77, master=int(master is not None), **position)
    state += m.tobytes() + v.tobytes() + (b"" if master is None else master.tobytes()) + (pack(order) if order else b"")
    (folder / f"state_{step:08d}_00000.bin").write_bytes(state)
    (folder / f"DONE_{step:08d}").touch()


@pytest.mark.parametrize("step", [1, 24, 33, 34, 623])
@pytest.mark.parametrize("master", [False, True])
def test_a_run_of_llmc_goes_on(train, out, tiny, shards, rng, step, master):
    order = Order(SAMPLES)
    for _ in range(step):
        order.draw()
    m, v = (rng.uniform(0, 1e-4, N).astype(np.float32) for _ in range(2))
    model = GPT2.build(tiny)
    model.allocate(2, 8)
    weights = model.params.memory.copy()
    # a bfloat16 model is rounded; its master weights are exact
    llmc_checkpoint(out, step, order, tiny.replace(".bin", "_bf16.bin") if master else tiny, m, v, weights if master else None)
    printed = train(f"-x {step + 60} -y 1 -n {step + 60}")

    tokens = [np.fromfile(path, np.uint16, offset=1024) for path in sorted(Path(shards).parent.glob("shard_*"))]
    model.m.memory[:], model.v.memory[:], model.updates = m, v, step
    losses = []
    for _ in range(60):
        shard, sample = order.draw()
        batch = tokens[shard][16 * sample:16 * sample + 17].astype(np.int32)
        losses.append(f"{model.forward(batch[:-1].reshape(2, 8), batch[1:].reshape(2, 8)):f}")
        model.backward()
        model.update(1e-2)
    assert re.findall(r"^step \d+: train loss (\S+)", printed, re.MULTILINE) == losses
    state = (out / f"state_{step + 60:08d}_00000.bin").read_bytes()
    assert state[1024 + 8 * N:] == pack(order) and struct.unpack("<Q", state[80:88]) == (13371337,)


def test_a_run_of_llmc_that_does_not_shuffle_goes_on(train, out, tiny):
    llmc_checkpoint(out, 3, None, tiny, np.zeros(N, np.float32), np.zeros(N, np.float32))
    train("-x 5 -a 1 -y 1 -n 5")
    assert complete(out)[-1:] == [5] if (out / "run_00000003.json").exists() else (out / "DONE_00000005").exists()


# ---------------------------------------------------------------------------------------------------------------------
# files that are damaged or of another run

@pytest.fixture
def refused(train, out):
    """refused(flags, *words): resuming must end with an error that has the words, and leave every file as it was."""
    def refused(flags, *words):
        before = contents(out)
        printed = train(f"-x 9 -n 2 -y 1 {flags}", status=1)
        for word in words:
            assert word in printed
        assert contents(out) == before and "step 4:" not in printed
    return refused


def damage(path, size=None, **words):
    """Cut a file to a size (or so many bytes from its end, or longer), or put 32-bit words at offsets "at_..."."""
    content = bytearray(path.read_bytes())
    for at, word in words.items():
        struct.pack_into("<I", content, int(at[3:]) if at[3] != "_" else len(content) - int(at[4:]), word)
    content = content[:size] + bytes(max(0, (size or 0) - len(content)))
    path.write_bytes(content)


@pytest.mark.parametrize("name, size", [
    *itertools.product(["model_00000004.bin"], [0, 1000, 1024, 50_000, -1]),
    *itertools.product(["state_00000004_00000.bin"], [0, 1000, 1024, 100_000, 200_000, 1024 + 8 * N, -2521, -2520, -100, -4, -1]),
    *itertools.product(["run_00000004.json"], [0, 1, 30, -1]),
    ("model_00000004.bin", 1025 + 4 * N), ("state_00000004_00000.bin", 400_000),
])
def test_truncated_checkpoints(train, refused, out, name, size):
    train("-x 4 -n 2")
    damage(out / name, size)
    refused("", name)


@pytest.mark.parametrize("name", ["model_00000004.bin", "state_00000004_00000.bin"])
def test_done_without_its_files(train, refused, out, name):
    train("-x 4 -n 2")
    (out / name).unlink()
    refused("", name)


@pytest.mark.parametrize("words", [
    {"at_0": 20240326}, {"at_4": 2}, {"at_8": 2}, {"at_16": 1}, {"at_20": 0}, {"at_40": 5}, {"at_120": 4}, {"at_124": 1},
    {"at__2512": 0}, {"at__2508": 1}, {"at__2508": 700}, {"at__2508": 2**31}, {"at__2524": 1000}, {"at__2524": 2**32 - 1},
])
def test_damaged_states(train, refused, out, words):
    train("-x 4 -n 2")
    damage(out / "state_00000004_00000.bin", **words)
    refused("", "state_00000004_00000.bin")


@pytest.mark.parametrize("text", ["[]", "{}", "null", "7", '"tokens_per_batch"', '{"tokens_per_batch": 16}',
                                  '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": 3}',
                                  '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [["a"], []]}'])
def test_damaged_run_file(train, refused, out, text):
    train("-x 4 -n 2")
    (out / "run_00000004.json").write_text(text)
    refused("", "run_00000004.json")


def test_without_our_own_file(train, out, tmp_path):
    train(f"-x 9 -n 2 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2")
    (out / "run_00000004.json").unlink()
    train("-x 9 -n 2 -y 1")
    for name in "model_00000009.bin", "state_00000009_00000.bin", "main.log":
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("overfit", [0, 1])
@pytest.mark.parametrize("shape", [(64, 300, 384, 1, 2, 32), (64, 300, 384, 3, 2, 32)])
def test_state_of_another_model(train, refused, out, tmp_path, overfit, shape):
    maxT, V, Vp, L, NH, C = shape
    model = GPT2(train_gpt2.GPT2Config(maxT, V, Vp, L, NH, C))
    model.init_random()
    model.write_checkpoint(str(tmp_path / "other.bin"))
    train(f"-x 4 -n 2 -a {overfit}")
    shutil.copy(tmp_path / "other.bin", out / "model_00000004.bin")
    refused(f"-a {overfit}", "state_00000004_00000.bin", "HINT")


def test_the_same_tokens_in_a_batch_of_another_shape(train, out, shards):
    train("-x 4 -n 2")
    train("-x 5 -n 1 -y 1 -b 1 -t 16")
    order, loader = Order(SAMPLES), DataLoader(shards, 1, 16, should_shuffle=True)
    for _ in range(5):
        order.draw()
        loader.next_batch()
    state = (out / "state_00000005_00000.bin").read_bytes()
    assert state[1024 + 8 * N:] == pack(order) and loader.sample_index == order.sample == struct.unpack_from("<Q", state, 128)[0]


@pytest.mark.parametrize("change", ["-b 4", "-t 4", "-b 1", "-t 9", "-a 1"])
def test_batches_of_another_size(train, refused, out, change):
    train("-x 4 -n 2")
    refused(change, "HINT")
    (out / "run_00000004.json").unlink()
    refused(change, "HINT")


@pytest.mark.parametrize("change", ["one more", "one less", "longer", "shorter"])
@pytest.mark.parametrize("overfit", [0, 1])
def test_other_shards(train, refused, out, make_shard, tmp_path, change, overfit):
    train(f"-x 4 -n 2 -a {overfit}")
    if change == "one more":
        make_shard(tmp_path / "shard_4.bin", range(100))
    elif change == "one less":
        (tmp_path / "shard_2.bin").unlink()
    else:
        for i, size in enumerate(SHARDS):
            make_shard(tmp_path / f"shard_{i}.bin", range(size + 32 if change == "longer" else max(0, size - 32)))
    refused(f"-a {overfit}", "shard", "HINT")


def test_the_same_shards_in_another_place(train, flags, out, tmp_path):
    train(f"-x 9 -n 2 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2")
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("shard_*"):
        shutil.copy(path, tmp_path / "moved")
    train(f"-x 9 -n 2 -y 1 -i {tmp_path}/moved/s*.bin")
    assert contents(out) == contents(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# disks that are full, folders that cannot be written

class FullDisk:
    """A file on a disk that is full after so many writes, of all files together"""

    def __init__(self, file, writes):
        self.file, self.writes = file, writes

    def write(self, data):
        if next(self.writes, None) is None:
            self.file.write(data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def writelines(self, parts):
        for part in parts:
            self.write(part)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def fill_disk(patch, writes):
    """From now on the trainer's files are on a disk that is full after so many writes."""
    left = iter(range(writes))

    def open_file(path, mode="r"):
        return FullDisk(open(path, mode), left) if mode == "wb" else open(path, mode)
    for module in files, checkpoints:
        patch.setattr(module, "open", open_file, raising=False)


@pytest.mark.parametrize("room", range(7))
def test_full_disk(train, out, monkeypatch, room):
    """Writes: main.log; the model's header and weights; the state's header, m, v and seven arrays; the run."""
    train("-x 4 -n 2 -nk 1")
    before = contents(out)
    with monkeypatch.context() as patch:
        fill_disk(patch, 2 * room)
        printed = train("-x 6 -n 2 -nk 1 -y 1", status=1)
    assert "No space left on device" in printed and str(out) in printed
    after = contents(out)
    assert complete(out) == [4] and not list(out.glob("*.tmp"))
    assert {name: after[name] for name in before if name != "main.log"} == {
        name: content for name, content in before.items() if name != "main.log"}


def test_a_full_disk_is_made_room_on(train, out, tmp_path, monkeypatch):
    train(f"-x 6 -n 2 -nk 1 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2 -nk 1")
    with monkeypatch.context() as patch:
        fill_disk(patch, 5)
        train("-x 6 -n 2 -nk 1 -y 1", status=1)
    train("-x 6 -n 2 -nk 1 -y 1")
    assert contents(out) == contents(tmp_path / "whole")


def test_full_disk_at_the_end_of_a_file(train, out, monkeypatch):
    """Some file systems find out no sooner than fsync."""
    train("-x 4 -n 2")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "No space left" in train("-x 6 -n 2 -y 1", status=1)
    assert complete(out) == [2, 4] and not list(out.glob("*.tmp"))


def test_a_limit_on_file_sizes(train, out):
    """The same from the operating system: a model fits, a state does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        assert "File too large" in train("-x 4 -n 2", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(contents(out)) == ["main.log", "model_00000002.bin"]
    assert "no complete checkpoint" in train("-x 4 -n 2 -y 1") and complete(out) == [2, 4]


@pytest.mark.parametrize("resume", [0, 1])
def test_a_folder_that_cannot_be(train, tmp_path, resume):
    (tmp_path / "file").touch()
    assert "file/out" in train(f"-x 1 -n 1 -y {resume} -o {tmp_path}/file/out", status=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(train, out):
    out.mkdir(mode=0o555)
    assert str(out) in train("-x 1 -n 1", status=1)


# ---------------------------------------------------------------------------------------------------------------------
# accumulation, schedules, outliers

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


def learning_rate(kind, peak, final, warmup, N, s):
    """FACTS: the four schedules"""
    low = peak * final
    if kind == "constant":
        return peak
    if s < warmup:
        return peak * (s + 1) / warmup
    if kind == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * (s - warmup) / (N - warmup))) * (peak - low)
    if kind == "linear":
        return peak - (s - warmup) / (N - warmup) * (peak - low)
    knee = int(0.8 * N)
    return peak if s < knee else low + (1 - math.sqrt((s - knee) / (N - knee))) * (peak - low)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup, N", [(0, 1), (0, 100), (1, 100), (10, 100), (90, 100), (700, 18865), (100, 100), (7, 9)])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_schedules(kind, warmup, N, final):
    flags = parse_flags(f"-k {kind} -u {warmup} -q {final} -l 6e-4".split())
    for step in {0, max(0, warmup - 1), min(warmup, N - 1), N // 2, int(0.8 * N) - (N > 1), int(0.8 * N), N - 1}:
        expected = learning_rate(kind, 6e-4, final, warmup, N, step)
        assert scheduled_learning_rate(flags, step, N) == pytest.approx(expected, rel=1e-9, abs=1e-18), step


def test_known_points_of_the_schedules():
    def rate(text, step, steps=100):
        return scheduled_learning_rate(parse_flags(f"-l 1 {text}".split()), step, steps)
    assert rate("-u 10 -q 0", 0) == 0.1 and rate("-u 10 -q 0", 9) == rate("-u 10 -q 0", 10) == 1
    assert rate("-u 10 -q 0", 55) == pytest.approx(0.5) and rate("-u 10 -q 0.2", 55) == pytest.approx(0.6)
    assert rate("-k linear -q 0", 25) == 0.75 and rate("-k linear -q 0.5", 50) == 0.75
    assert rate("-k wsd -q 0", 79) == rate("-k wsd -q 0", 80) == 1 and rate("-k wsd -q 0", 85) == 0.5
    assert rate("-k constant -u 10 -q 0", 0) == 1 and rate("-q 1", 57) == 1


def test_schedule_in_the_log(train, out):
    train("-x 10 -u 3 -q 0.1 -k linear -l 1e-2")
    rates = [re.search(r" lr:(\S+) ", line)[1] for line in log(out)]
    assert rates == [f"{learning_rate('linear', 1e-2, 0.1, 3, 10, s):.6f}" for s in range(10)]


def test_z_score(rng):
    values = rng.normal(3, 0.5, 400).tolist()
    values[200], values[350] = 30.0, -7.0
    window = deque(maxlen=128)
    scores = [z_score(value, window) for value in values]
    assert all(map(math.isnan, scores[:128])) and len(scores) == 400
    for i in range(128, 400):
        last = values[i - 127:i + 1]
        assert scores[i] == pytest.approx((values[i] - fmean(last)) / pstdev(last), rel=1e-9)
    assert scores[200] > 10 and scores[350] < -9
    same = deque(maxlen=128)
    assert [z_score(2.5, same) for _ in range(130)][128:] == [0, 0]


def test_skipped_updates_leave_the_weights(train, out, tiny):
    """After 128 steps every update with a gradient norm above the mean's 0.01 deviations is skipped."""
    printed = train("-x 133 -n 1 -nk 6 -sg 0.01 -l 1e-4")
    lines = re.findall(r"^step (\d+): (.*)$", printed, re.MULTILINE)
    skipped = {int(step) for step, text in lines if "update skipped" in text}
    assert skipped and min(skipped) >= 128 and skipped != set(range(128, 133)), skipped
    for step in range(128, 133):
        same = (out / f"model_{step:08d}.bin").read_bytes() == (out / f"model_{step + 1:08d}.bin").read_bytes()
        assert same == (step in skipped)


def test_one_epoch(train):
    steps = re.findall(r"^step (\d+):", train("-x -1 -d 32"), re.MULTILINE)
    assert len(steps) == sum(SHARDS) // 32


LLMC = ('-i data/train_*.bin -j data/val_*.bin -o log_gpt2_124M -v 250 -s 20000 -g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 '
        '-c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 -y 1 -e d12')  # scripts/run_gpt2_124M.sh
LLMC_GPT3 = "-k cosine -ge 1 -nk 5 -nm 50000 -sl 7.0 -sg 7.0 -x 572204 -e gpt3:c768"  # some of scripts/run_gpt3_125M.sh


def test_arguments_of_llmc():
    flags = parse_flags(LLMC.split())
    assert (flags.micro_batches, flags.warmup_iters, flags.model, flags.resume) == (8, 700, "d12", 1)
    assert (flags.learning_rate, flags.learning_rate_decay_frac, flags.weight_decay) == (0.0006, 0, 0.1)
    flags = parse_flags(LLMC_GPT3.split())
    assert (flags.checkpoints_keep, flags.major_checkpoint_every, flags.skip_update_gradz) == (5, 50000, 7)


def test_ignored_flags_are_named_once(train):
    ignored = "-f 1 -w 1 -ge 1 -lg 10 -pn 1 -pr 0 -pg 8 -pm mpi -pi . -pf . -ps ."
    printed = train(f"-x 1 {ignored}")
    assert printed.count("ignored") == 1
    line = next(line for line in printed.splitlines() if line.startswith("ignored"))
    assert line.split(": ")[1].split() == ignored.split()[::2]
    assert "ignored" not in train("-x 1")
