"""Runs that are killed, or ended, and go on without a trace; which checkpoints are kept; the order of writing."""
import json
import os
import re
import shutil

import pytest
from null_engine import NullEngine
from runs import complete, contents, log

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
