"""Runs that are killed, or ended, and go on without a trace; which checkpoints are kept; the order of writing."""
import json
import os
import re
import shutil
import struct

import pytest
from null_engine import NullEngine
from runs import SHARDS, N, complete, contents, log

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Unix only")


# ---------------------------------------------------------------------------------------------------------------------
# killed

def run_killed(python, engine, how, tmp_path, flags):
    process = python("dev/test/killed.py", engine, how, tmp_path / how, *flags, PYTHONPATH=".")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0 and err == "", err
    return json.loads(out)


@needs_fork
def test_killed_at_every_moment(python, tmp_path, flags):
    runs = run_killed(python, "null", "every", tmp_path, flags("-x 4 -n 2 -nk 1 -v 2 -s 2 -g 4"))
    assert runs["kills"] > 100 and "DONE_00000004" in runs["expected"]
    for moment, found in enumerate(runs["found"]):
        assert found == runs["expected"], f"killed at moment {moment}"


@needs_fork
def test_killed_at_random_moments(python, tmp_path, flags):
    """with the real engine, which is most of the time at work"""
    given = flags("-x 30 -n 10 -nk 2 -d 32 -v 5 -s 7 -g 4 -k linear -u 5 -q 0.1")
    runs = run_killed(python, "cpu", "random", tmp_path, given)
    assert runs["kills"] >= 20
    assert {"DONE_00000020", "DONE_00000030", "model_00000030.bin", "main.log"} < set(runs["expected"])
    for found in runs["found"]:
        assert found == runs["expected"]


# ---------------------------------------------------------------------------------------------------------------------
# ended, and resumed

@pytest.mark.parametrize("engine", ["train", "really_train"])
def test_a_finished_run_goes_on(request, engine, out, tmp_path):
    train, long = request.getfixturevalue(engine), "-v 5 -n 10 -nm 20 -c 0.1 --grad_clip 1 -k constant"
    train(f"{long} -x 40 -o {tmp_path / 'whole'}")
    train(f"{long} -x 20")
    train(f"{long} -x 20 -y 1")  # nothing is left to do
    assert "step 20 of 40" in train(f"{long} -x 40 -y 1")
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_without_a_checkpoint(train, out):
    assert f"no checkpoint in {out} yet" in train("-x 1 -n 1 -y 1")
    assert complete(out) == [1]


def test_starting_anew_clears_old_checkpoints(train, out, monkeypatch):
    train("-x 6 -n 2 -v 1")
    assert complete(out) == [2, 4, 6]
    shutil.copytree(out, out.with_name("anew"))

    def killed(engine, inputs, targets, train=True):
        if train and engine.tensors["m"].memory.any():  # the second step
            raise SystemExit(9)
        return forward(engine, inputs, targets, train)
    forward = NullEngine.forward
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(NullEngine, "forward", killed)
        train("-x 6 -n 2 -v 1 --overwrite 1")
    assert complete(out) == [] and log(out) == log(out.with_name("anew"))[:3]
    assert "no checkpoint in" in train("-x 6 -n 2 -v 1 -y 1")
    assert contents(out) == contents(out.with_name("anew"))
    assert "anew" in train("-x 1 --overwrite 1")
    assert complete(out) == [1] and len(log(out)) == 1


def test_outlier_windows_are_resumed(train, out, tmp_path):
    run = "-x 150 -n 135 -sl 1.2 -sg 1.5 -l 1e-3"
    whole = train(f"{run} -o {tmp_path / 'whole'}")
    skips = [int(step) for step in re.findall(r"^step (\d+)/.*update skipped", whole, re.MULTILINE)]
    assert skips and min(skips) >= 128 and max(skips) > 135, skips
    train(f"{run} -n 150")
    for path in tmp_path.glob("whole/*_00000135*"):
        shutil.copy(path, out)
    (out / "DONE_00000150").unlink()
    train(f"{run} -y 1")
    assert contents(out) == contents(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# other batches, more shards

def step_losses(printed):
    return [float(loss) for loss in re.findall(r"^step \d+/\d+.*: train loss (\S+)", printed, re.MULTILINE)]


def place(folder, step):
    """What a state file says of the data: shard, sample, their orders, the generator"""
    state = (folder / f"state_{step:08d}_00000.bin").read_bytes()
    return state[120:136], state[1024 + 8 * N:]


@pytest.mark.parametrize("batch", ["-b 4", "-b 1", "-b 1 -t 16", "-b 2 -t 4", "-b 8 -t 2", "-b 8 -t 4"])
def test_other_batches_of_the_same_step(really_train, out, tmp_path, batch):
    """Their tokens, and so losses and weights to rounding, are those of a run that was never stopped."""
    steps = "-x 30 -n 30 -d 32"  # 17 steps are an epoch
    whole = step_losses(really_train(f"{steps} -o {tmp_path / 'whole'}"))
    really_train(f"{steps} -x 7")
    printed = really_train(f"{steps} -y 1 {batch}")
    names = "-t" if "-b 2" in batch else ", ".join(re.findall("-[bt]", batch))
    more = "; data: on with the next token, in samples of 16 as before" * (batch not in ("-b 1 -t 16", "-b 8 -t 2"))
    assert f"step 7 of 30 (changed: {names}{more})\n" in printed
    assert place(out, 30) == place(tmp_path / "whole", 30)
    if "-t" not in batch:
        assert step_losses(printed) == pytest.approx(whole[7:], rel=1e-4)
        assert step_losses(really_train(f"{steps} -x 33 -n 3 -y 1")) == pytest.approx(
            step_losses(really_train(f"{steps} -x 33 -n 3 -y 1 -o {tmp_path / 'whole'}")), rel=1e-4)


def test_a_checkpoint_within_a_sample(train, out, tmp_path):
    """16 tokens; batches of 8 leave it after three, one of 16 takes the halves of two"""
    train("-x 4 -n 4")
    train("-x 7 -n 7 -y 1 -b 1")
    assert json.loads((out / "run_00000007.json").read_text())["offset"] == 8
    assert "(changed: -b, -d)" in train("-x 8 -n 8 -y 1")
    assert json.loads((out / "run_00000008.json").read_text())["offset"] == 8
    assert ("the run's samples have 16 tokens, the one where it stopped has 8 left: -t 16 does not divide both\n"
            "---> HINT: -t 8 goes on, with any -b\n") in train("-x 9 -n 9 -y 1 -t 16", status=1)
    train("-x 9 -n 9 -y 1 -b 1")
    train(f"-x 7 -n 7 -o {tmp_path / 'whole'}")
    assert place(out, 9) == place(tmp_path / "whole", 7)


@pytest.mark.parametrize("T, fits", [(9, 8), (64, 16), (32, 16), (3, 2)])
def test_sequences_that_do_not_divide_a_sample(train, out, T, fits):
    train("-x 4 -n 2")
    before = contents(out)
    printed = train(f"-x 6 -n 2 -y 1 -b 1 -t {T}", status=1)
    assert f"-t {T} does not divide both\n---> HINT: -t {fits} goes on, with any -b\n" in printed
    assert contents(out) == before
    assert "step 4 of 6 (changed: " in train(f"-x 6 -n 2 -y 1 -b 1 -t {fits}")


@pytest.mark.parametrize("more", ["", "-b 1"])
def test_more_shards(train, out, tmp_path, make_shard, more):
    """Until the epoch's end, after 34 batches, nothing changes; then the new ones come, in the order of their names."""
    train(f"-x 40 -n 30 -d 16 -o {tmp_path / 'whole'}")
    train("-x 20 -n 5 -d 16")
    for i, size in (4, 50), (5, 60):
        make_shard(tmp_path / f"shard_{i}.bin", range(size))
    end = "2 more shards at the end of this epoch)\n"
    printed = train(f"-x 30 -n 5 -y 1 -d 16 {more}")
    assert "step 20 of 30 (" in printed and end in printed
    shard, orders = place(out, 30)
    whole, before = place(tmp_path / "whole", 30)
    assert shard == whole and orders == struct.pack("<Q", 6) + before[8:24] + struct.pack("<2i", 4, 5) + before[24:]
    assert "more shard" not in train(f"-x 37 -n 37 -y 1 -d 16 {more}")
    assert struct.unpack("<QQ", place(out, 37)[0]) == (4, 3)
    assert "more shard" not in train(f"-x 41 -n 41 -y 1 -d 16 {more}")
    assert struct.unpack("<QQ", place(out, 41)[0])[0] < 4 and place(out, 41)[1][8:32] != orders[8:32]


@pytest.mark.parametrize("named", [True, False])
def test_a_shard_between_the_others(train, out, tmp_path, make_shard, named):
    """of the size of the one that has its number. Checkpoints of old know no names."""
    train("-x 4 -n 2")
    if not named:
        run = json.loads((out / "run_00000004.json").read_text())
        del run["shards"]
        (out / "run_00000004.json").write_text(json.dumps(run))
    make_shard(tmp_path / "shard_3a.bin", range(60))
    assert "(data: 1 more shard at" in train("-x 6 -n 6 -y 1")
    (tmp_path / "shard_3a.bin").rename(tmp_path / "shard_4.bin")
    train("-x 8 -n 8 -y 1")
    before = contents(out)
    make_shard(tmp_path / "shard_2a.bin", range(SHARDS[3]))
    assert ("shard_2a.bin of 170 tokens is where the run had shard_3.bin of 170: more shards can only come after all "
            "others\n---> HINT: ") in train("-x 9 -n 9 -y 1", status=1)
    assert contents(out) == before


def test_the_log_has_no_line_twice(train, out):
    train("-x 12 -n 5 -v 5")
    lines = log(out)
    steps = [0, *range(5), 5, *range(5, 10), 10, 10, 11, 12]
    assert [line.split()[0] for line in lines] == [f"s:{step}" for step in steps]
    patterns = {"tel": r"s:\d+ tel:\d+\.\d{4}", "trl": r"s:\d+ trl:\d+\.\d{4} lr:0\.010000 norm:\d+\.\d\d"}
    for line in lines:
        assert re.fullmatch(patterns[line.split()[1][:3]], line)
    (out / "DONE_00000012").unlink()
    with open(out / "main.log", "a") as file:
        file.write("s:12 trl:1.2\ns:1")  # a line of a step that will be done again; one that was cut
    train("-x 12 -n 5 -v 5 -y 1")
    assert log(out) == lines


# ---------------------------------------------------------------------------------------------------------------------
# which checkpoints are kept, and how they are written

@pytest.mark.parametrize("every, kept", [
    ("-n 2", [2, 4, 6, 8, 10, 11]), ("-n 2 -nk 1", [11]), ("-n 2 -nk 3", [8, 10, 11]),
    ("-n 2 -nk 9", [2, 4, 6, 8, 10, 11]), ("-n 1 -nk 2 -nm 4", [4, 8, 10, 11]), ("-n 3 -nk 1 -nm 6", [6, 11]),
    ("-n 2 -nm 4", [2, 4, 6, 8, 10, 11]), ("-n 0", [11]), ("-n 20", [11]),
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
    assert ("name", "DONE_00000004") in [event[::2] for event in events[:first]]
    assert events[first + 1] == ("sync", "out")
