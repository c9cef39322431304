"""Runs that a signal stops, after the step or at once, and that go on as if it had not."""
import os
import re
import signal

import pytest
from null_engine import NullEngine
from runs import complete, contents, interrupt

import train_gpt2
from dev.run.report import Report

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("owner, name, call, step", [
    (NullEngine, "backward", 8, 4), (NullEngine, "backward", 1, 1), (train_gpt2, "validate", 2, 5),
    (Report, "sample", 1, 3), (os, "replace", 2, 4), (Report, "write_log", 1, 0), (NullEngine, "backward", 24, 12),
])
def test_interrupted_run_goes_on(train, out, tmp_path, monkeypatch, number, owner, name, call, step):
    run = "-x 12 -v 5 -s 3 -g 3 -d 32 -n 4"
    train(f"{run} -o {tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        interrupt(patch, number, owner, name, call)
        printed = train(run, stopped=True)
    assert complete(out)[-1] == step
    closing = rf"^steps: {step}\ntokens: {32 * step}\n(.*\n)*peak memory: .*\n\Z"
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
