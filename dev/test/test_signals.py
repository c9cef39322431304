"""Runs that a signal stops, after the step or at once, and that go on as if it had not."""
import itertools
import os
import re
import signal

import numpy as np
import pytest
from null_engine import NullEngine
from runs import complete, contents, interrupt

import train_gpt2
from dev.run.checkpoints import complete_checkpoints
from dev.run.folder import Output
from dev.run.report import Report

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")


SIGHUP, SIGUSR1 = (getattr(signal, name, None) for name in ("SIGHUP", "SIGUSR1"))


@pytest.fixture(autouse=True)
def listening():
    """Not as under nohup"""
    signal.signal(SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, SIGHUP])
@pytest.mark.parametrize("owner, name, call, step", [
    (NullEngine, "backward", 8, 4), (NullEngine, "backward", 1, 0), (train_gpt2, "validate", 2, 5),
    (Report, "sample", 1, 3), (os, "replace", 2, 4), (Output, "log", 1, 0), (NullEngine, "backward", 24, 12),
])
def test_interrupted_run_goes_on(train, out, tmp_path, monkeypatch, number, owner, name, call, step):
    run = "-x 12 -v 5 -s 3 -g 3 -d 32 -n 4"
    train(f"{run} -o {tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        interrupt(patch, number, owner, name, call)
        printed = train(run, stopped=True)
    assert complete(out)[-1] == step
    end = r"verdict: .*\n(?:(?:go on|write text|to plot|plot): +.*\n)+" if step == 12 else ""
    closing = rf"^steps: {step}\ntokens: {32 * step}\n(.*\n)*peak memory: .*\n{end}\Z"
    assert step == 0 or re.search(closing, printed, re.MULTILINE)
    train(f"{run} -y 1")
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


def test_interrupted_run_without_checkpoints(train, out, monkeypatch):
    interrupt(monkeypatch, signal.SIGTERM, NullEngine, "backward", 3)
    train("-x 10", stopped=True)
    assert complete(out) == [3]


@pytest.mark.parametrize("owner, name, call", [(NullEngine, "backward", 4), (os, "replace", 7), (os, "fsync", 16)])
def test_a_second_signal_stops_at_once(train, out, monkeypatch, owner, name, call):
    interrupt(monkeypatch, signal.SIGINT, owner, name, call, times=2)
    with pytest.raises(SystemExit, match="130"):
        train("-x 10 -n 2")
    assert complete(out) == [2] and not list(out.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# what takes long is cut short, and done again

@pytest.fixture
def hellaswag(monkeypatch):
    """HellaSwag has ten examples."""
    rng = np.random.default_rng(1)
    examples = [([1, 2, 3], [rng.integers(0, 300, 4).tolist() for _ in range(4)], 2) for _ in range(10)]
    monkeypatch.setattr(train_gpt2, "read_examples", lambda path, vocab_size: examples)


class Forwards(NullEngine):
    """Counts its forward passes that are not for training, and sends this process a signal in one of them"""
    count, last, number = 0, 0, 0

    def forward(self, inputs, targets=None, train=True):
        Forwards.count += not train
        if not train and Forwards.count == Forwards.last:
            os.kill(os.getpid(), Forwards.number)
        return super().forward(inputs, targets, train)

    def read(self, tokens):
        self.forward(np.array([tokens]), train=False)
        return super().read(tokens)


RUN = "-x 8 -v 4 -s 4 -g 6 -m -1 -h 1 -n 4"  # a validation of 18 batches, 10 examples, a text of 5 tokens
LOOK = 18 + 10  # forward passes at step 0


@pytest.mark.parametrize("number", [signal.SIGTERM, SIGHUP])
@pytest.mark.parametrize("last, step", [(1, 0), (18, 0), (19, 0), (LOOK + 1, 4), (LOOK + 20, 4), (LOOK + 28, 4),
                                        (LOOK + 30, 4), (LOOK + 33, 4), (2 * LOOK + 8, 8), (3 * LOOK + 7, 8)])
def test_a_stop_takes_effect_within_a_batch(train, hellaswag, out, tmp_path, monkeypatch, number, last, step):
    monkeypatch.setattr(train_gpt2, "GPT2", Forwards)
    Forwards.last = 0
    train(f"{RUN} -o {tmp_path / 'whole'}")
    Forwards.count, Forwards.last, Forwards.number = 0, last, number
    train(RUN, stopped=True)
    assert Forwards.count == last and complete(out)[-1] == step
    train(f"{RUN} -y 1")
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


def test_stopped_again_and_again(train, hellaswag, out, tmp_path, monkeypatch):
    """Each time after three forward passes more than the time before"""
    monkeypatch.setattr(train_gpt2, "GPT2", Forwards)
    Forwards.last = 0
    train(f"{RUN} -o {tmp_path / 'whole'}")
    for last in range(3, 40, 3):
        Forwards.count, Forwards.last, Forwards.number = 0, last, signal.SIGTERM
        train(f"{RUN} -y 1", stopped=last < 37)
    train(f"{RUN} -y 1")
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


@pytest.mark.parametrize("last", [1, 20, LOOK + 2, LOOK + 21, LOOK + 31])
def test_a_warning_is_answered_at_once(train, hellaswag, out, tmp_path, monkeypatch, last):
    """SIGUSR1: the checkpoint is there before the next batch. Killed then, the run goes on as if nothing had been."""
    monkeypatch.setattr(train_gpt2, "GPT2", Forwards)
    Forwards.last = 0
    train(f"{RUN} -o {tmp_path / 'whole'}")
    Forwards.count, Forwards.last, Forwards.number = 0, last, SIGUSR1

    def killed(engine, inputs, targets=None, train=True):
        if Forwards.count == last + 2:
            raise SystemExit(9)
        return forward(engine, inputs, targets, train)
    forward = Forwards.forward
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Forwards, "forward", killed)
        train(RUN)
    assert complete(out) == [0 if last < LOOK else 4]
    Forwards.last = 0
    train(f"{RUN} -y 1")
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


@pytest.mark.parametrize("call", range(9))
def test_killed_while_a_checkpoint_is_written_anew(train, hellaswag, out, tmp_path, monkeypatch, call):
    """SIGUSR1 in the validation of step 4 writes one, and when that is over it is due: at no moment is there none."""
    monkeypatch.setattr(train_gpt2, "GPT2", Forwards)
    Forwards.last = 0
    train(f"{RUN} -nk 1 -o {tmp_path / 'whole'}")
    Forwards.count, Forwards.last, Forwards.number = 0, LOOK + 32, SIGUSR1  # in the text, whose coins are drawn
    replaced, replace = itertools.count(), os.replace

    def killed(*names):
        if complete_checkpoints(out) == [4] and next(replaced) == call:
            raise SystemExit(9)
        replace(*names)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        try:
            train(f"{RUN} -nk 1")
        except SystemExit:
            assert complete_checkpoints(out) == [4]
    Forwards.last = 0
    train(f"{RUN} -nk 1 -y 1")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("owner, name, call, steps", [
    (NullEngine, "backward", 3, [3, 5, 10]), (NullEngine, "backward", 5, [5, 10]), (Output, "log", 1, [0, 5, 10])])
def test_a_warning_does_not_stop(train, out, tmp_path, monkeypatch, owner, name, call, steps):
    train(f"-x 10 -n 5 -v 5 -o {tmp_path / 'whole'}")
    interrupt(monkeypatch, SIGUSR1, owner, name, call)
    train("-x 10 -n 5 -v 5")
    whole = contents(tmp_path / "whole")
    assert complete(out) == steps and {name: contents(out)[name] for name in whole} == whole


def test_a_hangup_comes_twice(train, out, monkeypatch):
    """From the system and from the shell, the second while the checkpoint is written"""
    interrupt(monkeypatch, SIGHUP, NullEngine, "backward", 2)
    interrupt(monkeypatch, SIGHUP, os, "replace", 3, times=2)
    train("-x 10", stopped=True)
    assert complete(out) == [2]


def test_nohup(train, out, monkeypatch):
    signal.signal(SIGHUP, signal.SIG_IGN)
    interrupt(monkeypatch, SIGHUP, NullEngine, "backward", 2)
    train("-x 4 -n 4")
    assert complete(out) == [4]


def test_a_stop_without_a_folder(flags, monkeypatch, capfd):
    monkeypatch.setattr(train_gpt2, "GPT2", NullEngine)
    interrupt(monkeypatch, SIGHUP, NullEngine, "backward", 2)
    interrupt(monkeypatch, SIGUSR1, NullEngine, "backward", 1)
    assert train_gpt2.main(flags("-x 10")) == 0 and "steps: 2\n" in capfd.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# a model that has diverged

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what, index", [("params", 0), ("params", -1), ("m", 7), ("v", 9)])
def test_no_checkpoint_of_what_is_not_finite(train, out, monkeypatch, what, index, value):
    update = NullEngine.update

    def diverge(engine, step, *args, **more):
        update(engine, step, *args, **more)
        if step == 5:
            engine.host(what).memory[index] = value
    with monkeypatch.context() as patch:
        patch.setattr(NullEngine, "update", diverge)
        printed = train("-x 9 -n 2 -nk 1", 1)
        assert re.search(r"^error: step 6: not all of .*diverged\n---> HINT: .*-l", printed, re.MULTILINE)
    assert complete(out) == [4] and len(contents(out)) == 5
    train("-x 9 -n 2 -nk 1 -y 1")
    assert complete(out) == [9]


@pytest.mark.parametrize("engine", ["train", "really_train"])  # the real one reads weights when it needs them
def test_a_checkpoint_that_is_not_finite(request, engine, out):
    """written by others"""
    train = request.getfixturevalue(engine)
    train("-x 4 -n 2")
    for path in out.glob("model_00000004.bin"):
        weights = np.fromfile(path, np.float32)
        weights[-10] = np.nan
        weights.tofile(path)
    before = contents(out)
    printed = train("-x 9 -n 2 -y 1", 1)
    assert "model_00000004.bin" in printed and f"remove {out / 'DONE_00000004'}" in printed and contents(out) == before
    assert "then -y 1 goes on from step 2\n" in printed
    (out / "DONE_00000004").unlink()
    assert ", step 2 of 9" in train("-x 9 -n 2 -y 1")


def test_a_stop_of_a_model_that_has_diverged(train, out, monkeypatch):
    interrupt(monkeypatch, signal.SIGTERM, NullEngine, "backward", 5)
    update = NullEngine.update

    def diverge(engine, step, *args, **more):
        update(engine, step, *args, **more)
        engine.host("params").memory[:] *= 1 if step < 4 else np.nan
    monkeypatch.setattr(NullEngine, "update", diverge)
    with pytest.raises(AssertionError, match="stopping after this batch.*\n.*error: step 5: not all of params"):
        train("-x 9 -n 2 -nk 1", stopped=True)
    assert complete(out) == [4]
