"""The middle of a step: stops between micro-batches, damaged batches, errors. What was trained before is not lost."""
import gc
import itertools
import os
import re
import signal
import sys

import numpy as np
import pytest
from formulas import Order
from null_engine import NullEngine
from runs import SAMPLES, SHARDS, complete, contents, interrupt, log
from test_disk_faults import fill_disk

import train_gpt2
from dev.run import checkpoints

STEP = re.compile(r"^step (\d+)/", re.MULTILINE)


def same(out, whole):
    """Is all that one run has left as the other left it?"""
    whole = contents(whole)
    return {name: content for name, content in contents(out).items() if name in whole} == whole


# ---------------------------------------------------------------------------------------------------------------------
# stops, with four micro-batches a step

RUN = "-x 6 -d 64 -n 6 -v 3 -m 2"


@pytest.mark.skipif(os.name == "nt", reason="Unix only")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call, step", [(5, 1), (7, 1), (8, 2), (10, 2), (23, 5), (24, 6)])
def test_a_stop_drops_the_step(train, out, tmp_path, monkeypatch, number, call, step):
    """but where it comes in the last micro-batch, after which there is only the update"""
    train(f"{RUN} -o {tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        interrupt(patch, number, NullEngine, "backward", call)
        printed = train(RUN, stopped=True)
    assert [int(x) for x in STEP.findall(printed)] == list(range(step)) and complete(out) == [step]
    assert f"\nsteps: {step}\ntokens: {64 * step}\n" in printed
    train(f"{RUN} -y 1")
    assert same(out, tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt", reason="Unix only")
def test_a_stop_within_a_batch(train, out, monkeypatch):
    """No other one begins, here or in the file system's way of asking."""
    forward, calls = NullEngine.forward, itertools.count(1)

    def counted(engine, *args, **more):
        assert next(calls) <= 6
        return forward(engine, *args, **more)
    monkeypatch.setattr(NullEngine, "forward", counted)
    interrupt(monkeypatch, signal.SIGTERM, NullEngine, "backward", 6)
    train("-x 6 -d 64", stopped=True)
    assert next(calls) == 7


def test_a_file_stops_within_a_step(train, out, monkeypatch):
    forward, calls = NullEngine.forward, itertools.count(1)

    def touching(engine, *args, **more):
        if next(calls) == 6:
            (out / "STOP").touch()
        return forward(engine, *args, **more)
    monkeypatch.setattr(NullEngine, "forward", touching)
    assert "STOP: stopping\n" in train("-x 6 -d 64") and next(calls) == 7
    assert complete(out) == [1] and not (out / "STOP").exists()


@pytest.mark.skipif(os.name == "nt", reason="Unix only")
@pytest.mark.parametrize("call", [5, 6, 7])
def test_a_warning_within_a_step(train, out, tmp_path, monkeypatch, call):
    """SIGUSR1: the checkpoint of the step's beginning is there before the next batch; the step goes on."""
    train(f"{RUN} -o {tmp_path / 'whole'}")
    backward, calls = NullEngine.backward, itertools.count(1)

    def killed(engine, last=True):
        number = next(calls)
        if number == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        if number == call + 1:
            raise SystemExit(9)
        backward(engine, last)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(NullEngine, "backward", killed)
        train(RUN)
    assert complete(out) == [1]
    train(f"{RUN} -y 1")
    assert same(out, tmp_path / "whole")
    interrupt(monkeypatch, signal.SIGUSR1, NullEngine, "backward", call)
    train(f"{RUN} --overwrite 1")
    assert complete(out) == [1, 6] and same(out, tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt", reason="Unix only")
def test_a_process_that_is_told_to_end(python, flags, out, tmp_path):
    """with the real engine: in the middle of a step of 30,000 micro-batches, which would take a minute"""
    run = flags("-x 3 -n 1 -v 1 -m 1 -d 480000") + ["-o", str(out)]
    process = python("train_gpt2.py", *run, OMP_NUM_THREADS="1")
    while "val loss" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    printed, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == "\nstopping after this batch (once more: at once)\n"
    assert complete(out) == [0] and "checkpoint of step 0 written" in printed and "\nsteps:" not in printed


@pytest.mark.skipif(os.name == "nt", reason="Unix only")
def test_the_real_engine_goes_on(really_train, out, tmp_path, monkeypatch):
    really_train(f"{RUN} -o {tmp_path / 'whole'}")
    for call in 7, 6:
        with monkeypatch.context() as patch:
            interrupt(patch, signal.SIGTERM, train_gpt2.GPT2, "backward", call)
            really_train(f"{RUN} -y 1", stopped=True)
    assert complete(out) == [1, 2]
    really_train(f"{RUN} -y 1")
    assert same(out, tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# batches that are damaged

def visited(count):
    """The first (shard, sample) that a run visits"""
    order = Order(SAMPLES)
    return [order.draw() for _ in range(count)]


@pytest.fixture
def spoil(shards, tmp_path):
    """spoil(7, 9): the 8th and the 10th batch of a run have a token that is in no vocabulary. Returns the name and the
    position of the first one."""
    def spoil(*batches):
        places = [visited(batch + 1)[batch] for batch in batches]
        for shard, sample in places:
            with open(tmp_path / f"shard_{shard}.bin", "r+b") as file:
                file.seek(1024 + 2 * (16 * sample + 5))
                file.write(b"\xff\xff")
        return f"shard_{places[0][0]}.bin", 16 * places[0][1] + 5
    return spoil


@pytest.mark.parametrize("batch, more, step", [
    (7, "-n 100", 7), (7, "-d 32 -n 2", 3), (6, "-d 32 -n 3", 3), (1, "", 1)])
def test_a_damaged_batch(train, out, spoil, batch, more, step):
    name, position = spoil(batch)
    printed = train(f"-x 12 {more}", 1)
    assert re.search(rf"^error: .*{name}: token 65535 at position {position} is not in .*of 300\n", printed, re.M)
    assert "---> HINT: --skip_bad 1 passes over" in printed
    assert complete(out)[-1] == step == len(STEP.findall(printed))
    assert printed.count(f"checkpoint of step {step} written") == 1
    before = contents(out)
    printed = train(f"-x 12 {more} -y 1", 1)
    assert f"{name}: token 65535" in printed and contents(out) == before


@pytest.mark.parametrize("more", ["", "-d 32"])
def test_a_damaged_batch_is_passed_over(train, out, tmp_path, spoil, more):
    """What is trained on is what comes after it; one that was stopped there goes on as one that was told before."""
    name, position = spoil(7, 8)
    printed = train(f"-x 12 -n 3 {more} --skip_bad 1 -o {tmp_path / 'whole'}")
    lines = re.findall(r"^passed over: (.*)$", printed, re.MULTILINE)
    assert len(lines) == 2 and f"{name}: token 65535 at position {position} is not" in lines[0]
    train(f"-x 12 -n 3 {more}", 1)
    assert train(f"-x 12 -n 3 {more} -y 1 --skip_bad 1").count("passed over: ") == 2
    assert same(out, tmp_path / "whole")
    header = np.fromfile(out / "state_00000012_00000.bin", np.uint64, 17)
    order = Order(SAMPLES)
    for _ in range(12 * (2 if more else 1) + 2):
        order.draw()
    assert header[15:].tolist() == [order.shard, order.sample]


def test_the_batches_in_between(really_train, spoil, tiny, shards, tmp_path):
    """Losses of the batches that are sound, in their order"""
    spoil(2, 4)
    printed = really_train("-x 6 --skip_bad 1")
    model = train_gpt2.GPT2.build(tiny)
    places = [place for number, place in enumerate(visited(8)) if number not in (2, 4)]
    for step, (shard, sample) in enumerate(places):
        tokens = np.fromfile(tmp_path / f"shard_{shard}.bin", np.uint16, 17, offset=1024 + 32 * sample).astype(np.int32)
        loss = model.forward(tokens[:-1].reshape(2, 8), tokens[1:].reshape(2, 8))
        assert f"step {step}/6: train loss {loss:f} " in printed
        model.backward()
        model.update(step, 1e-2)


@pytest.mark.parametrize("bad, steps", [(range(3, 13), 12), (range(3, 14), 3), (range(11), 0)])
def test_data_of_which_nothing_is_sound(train, out, spoil, bad, steps):
    """Eleven batches in a row are no damage here and there."""
    spoil(*bad)
    printed = train("-x 12 -n 100 --skip_bad 1", status=0 if steps == 12 else 1)
    assert len(STEP.findall(printed)) == steps and printed.count("passed over: ") == 10
    assert complete(out) == [steps] * bool(steps)


def test_a_mistake_leaves_no_checkpoint(train, out, spoil):
    """where the first step fails, nothing has been trained"""
    spoil(0)
    assert "token 65535" in train("-x 12 -n 3", 1) and not out.exists()


def test_a_shard_that_is_cut_short_under_a_run(train, out, tmp_path, monkeypatch):
    """The bytes come back, and the run goes on: nothing is passed over, though that is allowed."""
    train(f"-x 12 -n 6 -o {tmp_path / 'whole'}")
    sound, update = {path: path.read_bytes() for path in tmp_path.glob("shard_*.bin")}, NullEngine.update

    def cut(engine, step, *args, **more):
        update(engine, step, *args, **more)
        if step == 7:
            for path in sound:
                os.truncate(path, 1030)
    with monkeypatch.context() as patch:
        patch.setattr(NullEngine, "update", cut)
        printed = train("-x 12 -n 6 --skip_bad 1", 1)
    assert re.search(r"^error: .*shard_\d\.bin: truncated: it has 1,030 bytes", printed, re.MULTILINE)
    assert complete(out) == [6, 8]
    for path, content in sound.items():
        path.write_bytes(content)
    train("-x 12 -n 6 -y 1")
    assert same(out, tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# other errors

def fail(patch, owner, name, call, error):
    """Raise an error in a function of the owner when it is called for the `call`th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def failing(*args, **more):
        if next(calls) == call:
            raise error
        return function(*args, **more)
    patch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", [ValueError("a fault"), MemoryError(), OSError(5, "fault"), RuntimeError("a fault")])
@pytest.mark.parametrize("owner, name, call, step", [
    (NullEngine, "forward", 13, 5), (NullEngine, "backward", 8, 3), (NullEngine, "grad_norm", 4, 3),
    (train_gpt2, "require_finite", 6, 5), (train_gpt2, "validate", 2, 4), (train_gpt2, "generate", 1, 4)])
def test_an_error_saves_what_was_trained(train, out, tmp_path, monkeypatch, owner, name, call, step, error):
    """The run goes on from the beginning of the step in which it came, as if it had not."""
    run = "-x 8 -n 20 -d 32 -v 4 -m 1 -s 4 -g 3"
    train(f"{run} -o {tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        fail(patch, owner, name, call, error)
        if isinstance(error, RuntimeError):  # a mistake of ours: Python says where
            with pytest.raises(RuntimeError, match="a fault"):
                train(run)
        else:
            train(run, 1)
    assert complete(out) == [step]
    train(f"{run} -y 1")
    assert same(out, tmp_path / "whole")


@pytest.mark.parametrize("owner, name, call", [(NullEngine, "update", 4), (train_gpt2.Outliers, "far", 4)])
def test_an_error_in_an_update_saves_nothing(train, out, monkeypatch, owner, name, call):
    """Some weights may have been updated, others not."""
    fail(monkeypatch, owner, name, call, ValueError("a fault"))
    assert "error: a fault\n" in train("-x 8 -n 2", 1) and complete(out) == [2]


def test_one_error_where_nothing_can_be_saved(train, out, spoil, monkeypatch):
    spoil(5)
    with monkeypatch.context() as patch:
        fill_disk(patch, 14)
        printed = train("-x 8 -n 4", 1)
    assert "\nstep 5 is not saved: " in printed and "No space left" in printed and printed.count("error: ") == 1
    assert "token 65535" in printed.split("error: ")[1] and complete(out) == [4]


def test_weights_that_are_no_numbers_are_not_saved(train, out, monkeypatch):
    update = NullEngine.update

    def diverge(engine, step, *args, **more):
        update(engine, step, *args, **more)
        engine.host("params").memory[:] *= 1 if step < 5 else np.nan
    monkeypatch.setattr(NullEngine, "update", diverge)
    printed = train("-x 9 -n 4 --grad_clip 1", 1)
    assert "error: step 6: the loss is nan" in printed and "step 6 is not saved: step 6: not all of params" in printed
    assert complete(out) == [4]


def test_a_checkpoint_that_fails_is_tried_once(train, out, monkeypatch):
    tries, write = [], checkpoints.write_run_checkpoint

    def failing(folder, run, *args):
        tries.append(run.step)
        if run.step == 4:
            raise OSError(28, "No space left on device")
        write(folder, run, *args)
    monkeypatch.setattr(checkpoints, "write_run_checkpoint", failing)
    assert "No space left" in train("-x 8 -n 2", 1) and tries == [2, 4]


def test_nothing_is_written_without_a_folder(flags, monkeypatch, capfd):
    monkeypatch.setattr(train_gpt2, "GPT2", NullEngine)
    fail(monkeypatch, NullEngine, "backward", 4, ValueError("a fault"))
    assert train_gpt2.main(flags("-x 10")) == 1 and "not saved" not in capfd.readouterr().out


def test_the_log_knows_what_was_trained(train, out, spoil):
    spoil(5)
    train("-x 8 -n 4", 1)
    assert [line.split()[0] for line in log(out)] == [f"s:{step}" for step in range(5)] and sum(SHARDS) == 580


# ---------------------------------------------------------------------------------------------------------------------
# many steps

def test_memory_stays_flat(train, monkeypatch):
    """A step leaves nothing behind: neither do epochs, validations, texts and checkpoints, after the first few."""
    blocks, step = [], train_gpt2.Report.step

    def counted(report, number, *args):
        step(report, number, *args)
        if number % 500 == 499:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    monkeypatch.setattr(train_gpt2.Report, "step", counted)
    train("-x 3000 -v 100 -m 2 -s 100 -g 3 -n 100 -nk 2 -l 1e-6 -sl 9 --log_every 3000")
    assert len(blocks) == 6 and blocks[-1] - blocks[1] < 500, blocks
