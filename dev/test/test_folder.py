"""The folder of a run that is over, or still going on: no other run spoils it."""
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from conftest import ROOT
from null_engine import NullEngine
from runs import complete, contents, interrupt, log

import train_gpt2
from dev.run.vocabulary import own_vocabulary

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")


@pytest.fixture
def spared(train, out):
    """spared(flags, *words): the run must end with an error that has the words, and touch nothing in its folder."""
    def spared(flags, *words, stopped=False):
        before = contents(out), out.stat().st_mtime_ns, [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
        printed = train(flags, status=0 if stopped else 1, stopped=stopped)
        assert all(word in printed for word in words), printed
        after = contents(out), out.stat().st_mtime_ns, [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
        assert after == before
    return spared


# ---------------------------------------------------------------------------------------------------------------------
# a run that is over

@pytest.mark.parametrize("more", ["-x 4 -n 2", "-x 4", "-x 4 -n 2 -y 0", "-x 0 -n 1"])
def test_a_folder_with_checkpoints(train, spared, out, more):
    train("-x 4 -n 2 -v 2")
    spared(more, f"{out} holds", "step 4", "HINT: -y 1", "--overwrite 1")


@pytest.mark.parametrize("more", ["-x 4", "-x 4 -n 2"])
def test_a_folder_with_a_log(train, spared, out, more):
    train("-x 4 -v 2")
    for path in set(out.iterdir()) - {out / "main.log"}:
        path.unlink()
    spared(more, f"{out / 'main.log'} is a run's log", "HINT: --overwrite 1")
    train(f"{more} --overwrite 1")
    assert len(log(out)) == 4


def test_an_empty_log_and_other_files_are_no_run(train, out):
    out.mkdir()
    (out / "main.log").touch()
    (out / "notes.txt").write_text("mine")
    train("-x 4 -n 2")
    assert complete(out) == [2, 4] and (out / "notes.txt").read_text() == "mine"


def fail(*args, **more):
    raise ValueError("it cannot")


@pytest.mark.parametrize("more", ["--overwrite 1", "-y 1", "--overwrite 1 -v 2"])
@pytest.mark.parametrize("owner, name", [(NullEngine, "prepare"), (NullEngine, "forward"), (NullEngine, "backward"),
                                         (NullEngine, "update"), (train_gpt2, "require_finite")])
def test_a_failure_before_the_first_step_is_over(train, spared, out, monkeypatch, owner, name, more):
    train("-x 4 -n 2 -v 2")
    (out / "model_00000006.bin.tmp").write_text("half")
    with open(out / "main.log", "a") as file:
        file.write("s:4 trl:1.0 lr:0.1 norm:1.0\n")  # which the checkpoint does not know
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        spared(f"-x 8 -n 2 {more}", "it cannot")
    train(f"-x 8 -n 2 {more}")
    assert not list(out.glob("*.tmp")) and complete(out)[-1] == 8
    assert [line.split()[0] for line in log(out) if "trl" in line] == [f"s:{step}" for step in range(8)]


def test_tokens_of_another_vocabulary(train, spared, make_shard, tmp_path):
    """A model that fails at its first batch"""
    train("-x 4 -n 2")
    spared(f"-x 8 -n 2 --overwrite 1 -i {make_shard(tmp_path / 'other.bin', range(250, 350))}", "vocabulary")


def test_a_stop_before_the_first_step_is_over(train, spared, out, monkeypatch):
    train("-x 4 -n 2 -v 2")
    interrupt(monkeypatch, signal.SIGTERM, train_gpt2, "validate", 1)
    spared("-x 8 -n 2 -v 2 --overwrite 1", stopped=True)


def test_overwriting_is_said_and_done(train, out):
    """Nothing of the old run stays beside the new one, where it could be taken for a part of it."""
    train("-x 6 -n 2")
    (out / "state_00000006_00001.bin").write_text("of a second process")
    assert f"starting anew in {out}" in train("-x 4 -n 3 -l 1e-3 --overwrite 1")
    assert complete(out) == [3, 4] and len(log(out)) == 4 and len(contents(out)) == 2 * 4 + 1
    train("-x 2 --overwrite 1")
    assert complete(out) == [2] and len(contents(out)) == 4 + 1


@pytest.mark.parametrize("call", range(1, 13))
def test_killed_while_the_old_run_goes(train, out, monkeypatch, call):
    """What is left of it is complete, or no checkpoint."""
    train("-x 6 -n 2")
    unlink, calls = os.unlink, itertools.count(1)

    def killed(path, **more):
        if next(calls) == call:
            raise SystemExit(9)
        unlink(path, **more)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "unlink", killed)
        train("-x 8 -n 2 --overwrite 1")
    assert complete(out) == [2, 4, 6][(call + 2) // 4:]
    train("-x 8 -n 2 -y 1")
    assert complete(out)[-1] == 8


def test_both_flags(train, out):
    """-y 1 goes on where there is something; --overwrite 1 is for where there is not."""
    train("-x 2 -n 2")
    assert "step 2 of" in train("-x 4 -n 2 -y 1 --overwrite 1")


def test_a_mistake_leaves_no_folder(train, tmp_path):
    train(f"-x 1 -e d7 -o {tmp_path / 'new'}", status=1)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# a run that goes on

HOLD = """
import os, sys, train_gpt2
from dev.run import folder
from null_engine import NullEngine
train_gpt2.GPT2 = NullEngine
forward = NullEngine.forward
def wait(engine, *args, **more):
    if engine.tensors["m"].memory.any():
        print("at work", flush=True)
        sys.stdin.read()
    return forward(engine, *args, **more)
NullEngine.forward = wait
sys.exit(train_gpt2.main(sys.argv[1:]))
"""


@pytest.fixture
def at_work(flags, out):
    """A process in the middle of a run in the folder `out`"""
    process = subprocess.Popen([sys.executable, "-c", HOLD, *flags("-x 4 -n 1"), "-o", str(out)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'dev/test'}"})
    while "at work" not in (line := process.stdout.readline()):
        assert line
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("more", ["-n 1", "-n 1 -y 1", "-n 1 --overwrite 1", ""])
def test_a_second_run_is_refused(spared, at_work, out, more):
    (out / "model_00000002.bin.tmp").write_text("half")
    spared(f"-x 4 {more}", f"another run is writing to {out}", "HINT")


@pytest.mark.parametrize("name", ["link", "out/../out"])
def test_the_same_folder_by_another_name(train, at_work, tmp_path, out, name):
    (tmp_path / "link").symlink_to(out)
    assert "another run is writing" in train(f"-x 4 -y 1 -o {tmp_path / name}", status=1)


def test_a_lock_ends_with_its_process(train, at_work, out):
    assert complete(out) == [1]
    at_work.kill()
    at_work.wait()
    train("-x 4 -n 1 -y 1")
    assert complete(out) == [1, 2, 3, 4]


def test_two_runs_in_two_folders(train, at_work, tmp_path):
    train(f"-x 4 -n 4 -o {tmp_path / 'other'}")


def test_a_file_system_without_locks(train, out, monkeypatch):
    from dev.run import folder

    def flock(descriptor, how):
        raise OSError(9, "Bad file descriptor")
    monkeypatch.setattr(folder.fcntl, "flock", flock)
    assert f"{out} cannot be locked: " in train("-x 4 -n 4")
    monkeypatch.setattr(folder, "fcntl", None)
    assert f"{out} cannot be locked: " in train("-x 6 -n 4 -y 1")
    assert complete(out) == [4, 6]


# ---------------------------------------------------------------------------------------------------------------------
# what -y 1 says

@pytest.mark.parametrize("steps", [4, 3, 0])
def test_no_step_is_left(train, out, steps):
    train("-x 4 -n 2 -v 2")
    before = contents(out)
    printed = train(f"-x {steps} -n 2 -v 2 -y 1")
    assert f", step 4 of {steps}\nthe run has finished: no step is left\n---> HINT: a greater -x" in printed
    assert contents(out) == before
    assert "HINT" not in train("-x 5 -n 2 -v 2 -y 1")


def test_changed_flags_are_named(train, out):
    train("-x 4 -n 2 -k linear -l 1e-3")
    assert f"{out}, step 4 of 6\n" in train("-x 6 -n 2 -k linear -l 1e-3 -y 1 -v 3")
    assert f"{out}, step 6 of 8 (changed: -k, -l)\n" in train("-x 8 -n 2 -l 2e-3 -y 1")
    printed = train("-x 9 -n 2 -l 2e-3 -y 1 -d 32")
    assert "step 8 of 9 (changed: -d)\n" in printed and "\nsteps: 1 (9 in all)\ntokens: 32 (160 in all)\n" in printed


def test_another_model_is_ignored(train, out, tiny, tmp_path):
    train("-x 4 -n 2")
    shutil.copy(tiny, tmp_path / "other.bin")
    assert " ignored)" not in train("-x 6 -n 2 -y 1")
    for steps in 8, 10:
        printed = train(f"-x {steps} -n 2 -y 1 -e {tmp_path / 'other.bin'}")
        assert (f"resuming {tiny} from {out}, step {steps - 2} of {steps} (-e {tmp_path / 'other.bin'} ignored)\n"
                in printed)
    (tmp_path / "link.bin").symlink_to(tiny)
    assert " ignored)" not in train(f"-x 10 -n 2 -y 1 -e {tmp_path / 'link.bin'}")
    (out / "run_00000010.json").unlink()  # llm.c's checkpoints do not say
    assert " ignored)" not in train(f"-x 12 -n 2 -y 1 -e {tmp_path / 'other.bin'}")


@pytest.mark.parametrize("name", ["model_00000004.bin", "state_00000004_00000.bin"])
@pytest.mark.parametrize("kept, where", [(1, "anew"), (2, "from step 2")])
@pytest.mark.parametrize("size, problem", [(None, "missing"), (0, "cut short"), (1000, "cut short")])
def test_a_part_of_a_checkpoint_is_missing(train, spared, out, name, size, problem, kept, where):
    train(f"-x 4 -n 2 -nk {kept}")
    if size is None:
        (out / name).unlink()
    else:
        os.truncate(out / name, size)
    spared("-x 6 -n 2 -y 1", f"error: {out / name} is {problem}",
           f"remove {out / 'DONE_00000004'}: then -y 1 goes on {where}")
    (out / "DONE_00000004").unlink()
    assert ("step 2 of" in train("-x 6 -n 2 -y 1")) == (kept == 2)


def test_the_way_out_that_a_hint_names_is_open(train, out):
    train("-x 4 -n 2")
    assert "begin anew with --overwrite 1 instead of -y 1" in train("-x 6 -n 2 -y 1 -a 1", status=1)
    train("-x 6 -n 2 --overwrite 1 -a 1")
    assert complete(out) == [2, 4, 6]


# ---------------------------------------------------------------------------------------------------------------------
# -v 0

def test_no_validation_needs_no_validation_data(train, tmp_path):
    printed = train(f"-x 2 -v 0 -j {tmp_path / 'missing.bin'} -o {tmp_path / 'first'}")
    assert "step 1/" in printed and "val loss" not in printed and "nan" not in printed
    assert "missing.bin" in train(f"-x 2 -v 1 -j {tmp_path / 'missing.bin'}", status=1)
    assert "missing.bin" in train(f"-x 2 -v 0 -a 1 -j {tmp_path / 'missing.bin'}", status=1)


# ---------------------------------------------------------------------------------------------------------------------
# files of others in the folder

@pytest.mark.parametrize("more", ["--overwrite 1", "-y 1 -nk 1"])
def test_files_of_the_users_stay(train, out, more):
    train("-x 4 -n 2")
    ours = ["model_00000009.bin.tmp", "main.log.0123456789abcdef.tmp", "DONE_00000009.0123456789abcdef.tmp"]
    theirs = ["thesis.tmp", "model.tmp", "model_00000009.bin.bak.tmp", "state_00000002_notes.txt",
              "model_00000002.bin.bak", "state_00000002_00000.bin.gz", "run_00000001.json~", "DONE_00000001.txt"]
    for name in ours + theirs:
        (out / name).write_text(name)
    train(f"-x 6 -n 2 {more}")
    assert all((out / name).read_text() == name for name in theirs)
    assert not any((out / name).exists() for name in ours)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Unix only")
@pytest.mark.parametrize("resume", [0, 1])
def test_a_log_that_is_a_pipe(train, out, resume):
    """Nobody is waited for, and it stays."""
    train("-x 2 -n 2")
    (out / "main.log").unlink()
    os.mkfifo(out / "main.log")
    printed = train(f"-x 4 -n 2 -y {resume} --overwrite {1 - resume}", status=1)
    assert "main.log is a pipe" in printed and stat.S_ISFIFO((out / "main.log").stat().st_mode)


@pytest.mark.parametrize("target", [os.devnull, "/dev/full"])
def test_an_output_folder_that_is_a_device(train, target):
    before = os.stat(target)
    train(f"-x 1 -n 1 -o {target}", status=1)
    assert os.stat(target)[:2] == before[:2]


def test_a_log_with_bytes_that_are_no_text(train, out, tmp_path):
    train(f"-x 6 -n 2 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2")
    whole = (tmp_path / "whole" / "main.log").read_bytes()
    with open(out / "main.log", "ab") as file:
        file.write(b"s:4 trl:\xff\xfe\n\xc3")
    before = (out / "main.log").read_bytes().replace(b"lr:", b"\xff:", 1)
    (out / "main.log").write_bytes(before)
    train("-x 6 -n 2 -y 1")
    assert (out / "main.log").read_bytes() == whole.replace(b"lr:", b"\xff:", 1)


# ---------------------------------------------------------------------------------------------------------------------
# a model's own tokenizer

@pytest.fixture
def own(tiny, tmp_path):
    """The path of the tiny model, with a tokenizer of its own: a token is a letter, number 0 an a"""
    path = tmp_path / "own.bin"
    shutil.copy(tiny, path)
    (tmp_path / "own.tokenizer").mkdir()
    ids = {chr(ord("a") + i) if i < 26 else f"<{i}>": i for i in range(300)}
    (tmp_path / "own.tokenizer/tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": ids, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}))
    return path


def test_a_tokenizer_goes_along(train, own, out, tmp_path):
    """with the run: for its samples, when it goes on, and for those who take its checkpoints"""
    def sampled(said):
        return said.partition("generating:\n---\n")[2].partition("\n---\n")[0]
    said = train(f"-e {own} -x 2 -n 1 -s 1 -g 20 --prompt ab --temperature 0 -v 0")
    assert f"wrote {out}/model.tokenizer" in said and "token numbers" not in said and sampled(said)
    assert contents(out / "model.tokenizer") == contents(tmp_path / "own.tokenizer")
    own.unlink()
    shutil.rmtree(tmp_path / "own.tokenizer")
    again = train("-x 3 -y 1 -s 1 -g 20 --prompt ab --temperature 0 -v 0")
    assert sampled(again) == sampled(said) and "token numbers" not in again
    assert own_vocabulary(str(out / "model_00000003.bin")).encode("abz") == [0, 1, 25]
    train(f"-e {out} -x 1 -o {tmp_path / 'next'}")
    assert contents(tmp_path / "next/model.tokenizer") == contents(out / "model.tokenizer")


def test_a_tokenizer_goes_with_the_run_that_had_it(train, own, out, tiny):
    train(f"-e {own} -x 1")
    train(f"-e {out} -x 1 --overwrite 1")
    assert (out / "model.tokenizer").exists()
    train(f"-e {tiny} -x 1 --overwrite 1")
    assert not (out / "model.tokenizer").exists()


def test_a_tokenizer_that_nobody_can_read(train, own, out):
    (own.parent / "own.tokenizer/tokenizer.json").write_text("[]")
    said = train(f"-e {own} -x 1 -s 1")
    assert "samples are printed as token numbers: " in said and "tokenizer.json" in said
