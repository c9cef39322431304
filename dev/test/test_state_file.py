"""llm.c's state file, byte by byte: what we write, and runs of llm.c that go on here."""
import itertools
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from formulas import Order
from runs import SAMPLES, SHARDS, N, contents

from dev.run import checkpoints
from dev.run.text import Sampler
from train_gpt2 import GPT2, DataLoader, build


def pack(order):
    """The end of a state file, where llm.c keeps the order of batches and the generator"""
    random = order.random
    return (struct.pack(f"<Q{len(order.shards)}i", len(order.shards), *order.shards)
            + struct.pack(f"<Q{len(order.order)}i", len(order.order), *order.order)
            + struct.pack("<QiI624III", 0, random.left, random.next, *random.state, 0, 0x9908B0DF))


def header(**words):
    """A state file's first 1024 bytes"""
    first = 20240527, 1, 1, 0, words.get("master", 0), words.get("shuffled", 1)
    header = bytearray(struct.pack("<6i", *first) + bytes(1000))
    struct.pack_into("<i", header, 40, words["step"])
    struct.pack_into("<QQ", header, 80, words["sampler"], words.get("sampler_before", words["sampler"]))
    struct.pack_into("<QQ", header, 120, words["shard"], words["sample"])
    return bytes(header)


def test_layout_of_a_state_file(really_train, out, tiny, shards):
    really_train("-x 41 -n 41 -s 3 -g 5")  # into the second epoch
    model, loader, order = GPT2.build(tiny), DataLoader(shards, 2, 8, should_shuffle=True), Order(SAMPLES)
    for step in range(41):
        order.draw()
        model.forward(*loader.next_batch())
        model.backward()
        model.update(step, 1e-2)
    sampler = Sampler()
    for _ in range(14 * 4):  # steps 3, 6 … 39, and 41
        sampler.coin()
    expected = header(step=41, sampler=sampler.state, shard=order.shard, sample=order.sample)
    state = (out / "state_00000041_00000.bin").read_bytes()
    assert state[:1024] == expected
    for what, start in ("m", 1024), ("v", 1024 + 4 * N):
        memory = model.host(what).memory
        assert (np.frombuffer(state, "<f4", N, start) == memory).all() and memory.any()
    assert state[1024 + 8 * N:] == pack(order)
    weights = (out / "model_00000041.bin").read_bytes()
    assert struct.unpack("<8i", weights[:32]) == (20240326, 3, 64, 300, 2, 2, 32, 384) and not any(weights[32:1024])
    assert weights[1024:] == model.host("params").memory.tobytes()
    assert (out / "DONE_00000041").read_bytes() == b""


@pytest.mark.parametrize("batches", [0, 1, 17, 24, 25, 33, 34, 35, 300, 624, 625, 1500])
def test_bytes_of_the_order_after(shards, batches):
    loader, order = DataLoader(shards, 2, 8, should_shuffle=True), Order(SAMPLES)
    for _ in range(batches):
        loader.next_batch()
        order.draw()
    state = loader.state()
    assert b"".join(bytes(array) for array in checkpoints.pack_order(state)) == pack(order)
    assert (state["shard_index"], state["taken"]) == (order.shard, 16 * order.sample)
    another = DataLoader(shards, 2, 8, should_shuffle=True)
    another.restore({"shard_index": order.shard, "taken": 16 * order.sample, "sample_tokens": 16,
                     **checkpoints.unpack_order(pack(order), len(SHARDS))})
    for _ in range(60):
        assert (np.stack(another.next_batch()) == np.stack(loader.next_batch())).all()


def llmc_checkpoint(folder, step, order, model_file, m, v, master=None):
    """What llm.c leaves in its output folder. order: None where it doesn't shuffle"""
    folder.mkdir()
    shutil.copy(model_file, folder / f"model_{step:08d}.bin")
    position = {"shard": order.shard, "sample": order.sample} if order else {"shard": 0, "sample": 4, "shuffled": 0}
    state = header(step=step, sampler=13371337, sampler_before=77, master=int(master is not None), **position)
    state += m.tobytes() + v.tobytes() + (b"" if master is None else master.tobytes()) + (pack(order) if order else b"")
    (folder / f"state_{step:08d}_00000.bin").write_bytes(state)
    (folder / f"DONE_{step:08d}").touch()


def llmc_resumes(folder, step, build, master):
    """What llm.c's trainer takes from a checkpoint with -y 1 -w `master` if it was built for fp32 or bf16: its weights,
    m, v, and the order of batches; None where it gives up. By load_state() and
    gpt2_build_from_checkpoint() in its train_gpt2.cu"""
    model = (folder / f"model_{step:08d}.bin").read_bytes()
    magic, version, maxT, V, L, NH, C, Vp = struct.unpack("<8i", model[:32])
    assert (magic, maxT, V, L, NH, C, Vp) == (20240326, 64, 300, 2, 2, 32, 384) and not any(model[32:1024])
    assert len(model) == 1024 + N * {3: 4, 5: 2}[version]
    state = (folder / f"state_{step:08d}_00000.bin").read_bytes()
    assert struct.unpack("<4i", state[:16]) == (20240527, 1, 1, 0) and struct.unpack("<i", state[40:44]) == (step,)
    kept, shuffled = struct.unpack("<2i", state[16:24])
    if master != kept or not shuffled or not master and version != {"fp32": 3, "bf16": 5}[build]:
        return None
    end = 1024 + (12 if kept else 8) * N
    m, v, *weights = np.frombuffer(state[1024:end], "<f4").reshape(-1, N)
    return weights[0] if kept else np.frombuffer(model[1024:], "<f4"), m, v, state[end:]


@pytest.mark.parametrize("precision, master, resumes", [
    ("fp32", 0, {("fp32", 0)}), ("bf16", 0, {("fp32", 0)}),
    ("fp32", 1, {("fp32", 1), ("bf16", 1)}), ("bf16", 1, {("fp32", 1), ("bf16", 1)})])
def test_llmc_goes_on_with_a_run_of_ours(really_train, out, tiny, shards, precision, master, resumes):
    really_train(f"-x 5 -n 5 --precision {precision} -w {master}")
    loader, ours = DataLoader(shards, 2, 8, should_shuffle=True), build(tiny, precision=precision)
    order = Order(SAMPLES)
    for step in range(5):
        order.draw()
        ours.forward(*loader.next_batch())
        ours.backward()
        ours.update(step, 1e-2)
    arrays = [ours.host(what).memory for what in ("params", "m", "v")]
    for build_of, w in itertools.product(("fp32", "bf16"), (0, 1)):
        found = llmc_resumes(out, 5, build_of, w)
        assert (found is not None) == ((build_of, w) in resumes)
        if found:
            assert all((x == y).all() for x, y in zip(found, arrays)) and found[3] == pack(order)
    model = (out / "model_00000005.bin").read_bytes()
    assert struct.unpack("<2i", model[:8])[1] == (5 if precision == "bf16" and master else 3)
    if precision == "bf16" and master:  # between the two neighbours that are a bfloat16 nearest to it
        read = (np.frombuffer(model[1024:], "<u2").astype(np.uint32) << 16).view("<f4").astype(np.float64)
        assert (abs(read - arrays[0]) <= abs(arrays[0]) * 2.0**-8).all() and len(set(read)) < len(set(arrays[0]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_master_weights_goes_on(really_train, out, precision):
    whole = out.with_name("whole")
    really_train(f"-x 6 -n 6 --precision {precision} -w 1 -o {whole}")
    really_train(f"-x 3 -n 3 --precision {precision} -w 1")
    really_train(f"-x 6 -n 6 --precision {precision} -w 1 -y 1")
    left, expected = contents(out), contents(whole)
    assert all(left[name] == expected[name] for name in expected)


def test_bfloat16_weights_alone_are_no_checkpoint(really_train, out, tiny):
    zeros = np.zeros(N, np.float32)
    llmc_checkpoint(out, 3, None, tiny.replace(".bin", "_bf16.bin"), zeros, zeros)
    before = contents(out)
    printed = really_train("-x 5 -a 1 -y 1 -n 5", status=1)
    assert "rounded to bfloat16" in printed and "---> HINT: -e " in printed and contents(out) == before


@pytest.mark.parametrize("step", [1, 24, 33, 34, 623])
@pytest.mark.parametrize("master", [False, True])
def test_a_run_of_llmc_goes_on(really_train, out, tiny, shards, rng, step, master):
    order = Order(SAMPLES)
    for _ in range(step):
        order.draw()
    m, v = (rng.uniform(0, 1e-4, N).astype(np.float32) for _ in range(2))
    model = GPT2.build(tiny)
    model.prepare(2, 8)
    weights = model.host("params").memory
    if master:  # a bfloat16 model is rounded; its master weights are exact
        llmc_checkpoint(out, step, order, tiny.replace(".bin", "_bf16.bin"), m, v, weights)
    else:
        llmc_checkpoint(out, step, order, tiny, m, v)
    printed = really_train(f"-x {step + 60} -y 1 -n {step + 60}")

    tokens = [np.fromfile(path, np.uint16, offset=1024) for path in sorted(Path(shards).parent.glob("shard_*"))]
    model.host("m").memory[:], model.host("v").memory[:], losses = m, v, []
    for later in range(60):
        shard, sample = order.draw()
        batch = tokens[shard][16 * sample:16 * sample + 17].astype(np.int32)
        losses.append(f"{model.forward(batch[:-1].reshape(2, 8), batch[1:].reshape(2, 8)):f}")
        model.backward()
        model.update(step + later, 1e-2)
    assert re.findall(r"^step \d+/\d+.*: train loss (\S+)", printed, re.MULTILINE) == losses
    state = (out / f"state_{step + 60:08d}_00000.bin").read_bytes()
    assert state[1024 + 8 * N:] == pack(order) and struct.unpack("<Q", state[80:88]) == (13371337,)


def test_a_run_of_llmc_goes_on_with_more_shards(train, out, tiny, shards, make_shard):
    order = Order(SAMPLES)
    for _ in range(20):
        order.draw()
    llmc_checkpoint(out, 20, order, tiny, np.zeros(N, np.float32), np.zeros(N, np.float32))
    make_shard(Path(shards).parent / "shard_4.bin", range(100))
    assert "step 20 of 41 (data: 1 more shard at the end of this epoch)\n" in train("-x 41 -y 1 -n 41")
    order.shards, order.samples = [*order.shards, 4], [*SAMPLES, 6]
    for _ in range(21):
        order.draw()
    state = (out / "state_00000041_00000.bin").read_bytes()
    assert state[1024 + 8 * N:] == pack(order) and struct.unpack_from("<QQ", state, 120) == (order.shard, order.sample)


def test_a_run_of_llmc_that_does_not_shuffle_goes_on(really_train, out, tiny, shards):
    llmc_checkpoint(out, 3, None, tiny, np.zeros(N, np.float32), np.zeros(N, np.float32))
    printed = really_train("-x 5 -a 1 -y 1 -n 5")
    model, (inputs, targets), losses = GPT2.build(tiny), DataLoader(shards.replace("*", "0"), 2, 8).next_batch(), []
    for step in 3, 4:
        losses.append((str(step), f"{model.forward(inputs, targets):f}"))
        model.backward()
        model.update(step, 1e-2)
    assert re.findall(r"^step (\d)/\d+.*: train loss (\S+)", printed, re.MULTILINE) == losses
    assert (out / "DONE_00000005").exists()


def test_the_same_tokens_in_a_batch_of_another_shape(really_train, out, shards):
    really_train("-x 4 -n 2")
    really_train("-x 5 -n 1 -y 1 -b 1 -t 16")
    order, loader = Order(SAMPLES), DataLoader(shards, 1, 16, should_shuffle=True)
    for _ in range(5):
        order.draw()
        loader.next_batch()
    state = (out / "state_00000005_00000.bin").read_bytes()
    assert state[1024 + 8 * N:] == pack(order)
    assert loader.taken // 16 == order.sample == struct.unpack_from("<Q", state, 128)[0]
