"""The lines of a run: what Report says of the numbers that it is given, and what it keeps of them for the end."""
import math
import re
from types import SimpleNamespace

import pytest

from dev.run import engine
from dev.run import report as module
from dev.run.config import GPT2Config
from dev.run.flags import parse_flags
from dev.run.processes import Processes
from dev.run.report import Report
from dev.run.schedule import Outliers

CONFIG = GPT2Config(64, 300, 384, 2, 2, 32)
FLOPS = 32 * (6 * 1000 + 6 * 2 * 32 * 8)  # of a step: 32 tokens, 1000 parameters, attention to 8 tokens in 2 layers


class Engine:
    """One with 1000 parameters, on which a step that takes a second has 50 % MFU"""
    config, num_parameters, num_activations = CONFIG, 1000, 7
    flops_per_token = engine.Engine.flops_per_token

    def peak(self):
        return 2.0 * FLOPS


class Output:
    """Keeps the lines of the log"""

    def __init__(self):
        self.lines = []

    def describe(self, last_step):
        return [f"a log of {last_step} steps"]

    def log(self, line):
        self.lines.append(line)


@pytest.fixture
def clock(monkeypatch):
    """What time it is for a report: clock.now, in seconds"""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def begun(clock, capfd):
    """begun("--profile 1", ...): a report of a run that is about to make its first of 10 steps"""
    def begun(text="", step=0, processes=None):
        report = Report(parse_flags(f"-b 2 -t 8 -d 32 -s 0 {text}".split()), processes or Processes())
        report.begin(SimpleNamespace(engine=Engine(), step=step), 10, SimpleNamespace(tokens=None), Output())
        return report
    return begun


def make_step(report, clock, seconds, *numbers):
    report.start_step()
    clock.now += seconds
    report.step(*numbers)


def test_a_step(begun, clock, capfd):
    report = begun()
    assert capfd.readouterr().out == "a log of 10 steps\n"
    make_step(report, clock, 0.5, 3, 4.25, 1.5, 3e-4)
    assert capfd.readouterr().out == ("step 3: train loss 4.250000 (took 500.000000 ms) | norm 1.5000 | lr 3.00e-04 "
                                      "| 100.0% MFU | 64 tok/s\n")
    assert report.output.lines == ["s:3 trl:4.2500 lr:0.000300 norm:1.50"]


@pytest.mark.parametrize("seconds, step, left", [(60, 8, ""), (61, 8, "0:01:01"), (61, 9, ""), (3600, 0, "9:00:00"),
                                                 (20_000, 0, "2 days, 2:00:00")])
def test_time_left(begun, clock, capfd, seconds, step, left):
    """It is said where it is more than a minute: the mean of the steps so far, for each that is to come."""
    report = begun()
    make_step(report, clock, seconds, step, 4.0, 1.0, 1e-3)
    assert re.findall(r"tok/s \| (.*) left$", capfd.readouterr().out, re.MULTILINE) == ([left] if left else [])


def test_a_skipped_update(begun, clock, capfd):
    report, outliers = begun(), Outliers(3, 3)
    outliers.scores = 4.26, -0.5
    make_step(report, clock, 1, 9, 4.0, 1.0, 1e-3, outliers)
    assert capfd.readouterr().out.endswith(" | update skipped: z-scores of loss 4.3, norm -0.5\n")


def test_validation_and_hellaswag(begun, capfd):
    report = begun()
    capfd.readouterr()
    report.validation(20, 2.0)
    report.validation(40, 1e9)  # whose perplexity is no number
    report.hellaswag(20, 30, 100)
    error = math.sqrt(0.3 * 0.7 / 100)
    first, second, third = capfd.readouterr().out.splitlines()
    assert first == "val loss 2.000000 | perplexity 7.39" and second.startswith("val loss 1000000000.000000 | ")
    assert third.startswith("HellaSwag: 30/100 = 0.300000 | standard error ")
    assert float(third.split()[-1]) == pytest.approx(error, rel=0.01)
    assert report.output.lines == ["s:20 tel:2.0000", "s:40 tel:1000000000.0000", "s:20 eval:0.3000"]


def test_the_end(begun, clock, capfd):
    """A step of 1 s and one of 3 s: 2 s in the mean, 25 % MFU"""
    report = begun()
    report.validation(0, 3.5)
    make_step(report, clock, 1, 0, 4.0, 1.0, 1e-3)
    make_step(report, clock, 3, 1, 3.0, 1.0, 1e-3)
    capfd.readouterr()
    report.end()
    *lines, memory = capfd.readouterr().out.splitlines()
    assert lines == ["steps: 2", "tokens: 64", "final train loss: 3.000000", "final val loss: 3.500000",
                     "mean ms per step: 2000.0", "best ms per step: 1000.0", "tokens per second: 16", "MFU: 25.0%"]
    assert re.fullmatch(r"peak memory: [\d,]+ MiB", memory)


def test_the_end_of_no_step(begun, capfd):
    report = begun()
    capfd.readouterr()
    report.end()
    assert capfd.readouterr().out == ""


def test_a_profile(begun, clock, capfd):
    """The kernels by their time, with what sums over processes have taken, in 8 s"""
    processes = Processes()
    processes.times = {"reduce": 3.0}
    report = begun("--profile 1", processes=processes)
    report.kernels.update({"gelu": 1.0, "matmul": 4.0})
    clock.now += 8
    capfd.readouterr()
    report.end()
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert [(name, ms, share) for name, ms, _, share, *_ in rows] == [
        ("matmul", "4000.0", "50.0"), ("reduce", "3000.0", "37.5"), ("gelu", "1000.0", "12.5")]


def test_where_a_run_begins(begun, capfd):
    begun("-s 5", step=7)
    out = capfd.readouterr().out
    assert "resuming from step 7\n" in out and "samples are printed as token numbers\n---> HINT: " in out


@pytest.mark.parametrize("count", [0, 3])
def test_a_text_that_breaks_off_is_closed(begun, capfd, count):
    report, tokenizer = begun(), SimpleNamespace(reset=lambda: None, decode="<{}>".format)
    capfd.readouterr()

    def tokens():
        yield from range(count)
        raise InterruptedError
    with pytest.raises(InterruptedError):
        report.sample(tokenizer, tokens())
    assert capfd.readouterr().out == "generating:\n---\n" + "".join(f"<{i}>" for i in range(count)) + "\n---\n"


def test_memory_and_model(begun, capfd):
    report = begun()
    capfd.readouterr()
    report.model(Engine(), {"parameters": 3 << 20, "activations": 2000 << 20}, SimpleNamespace(num_tokens=100),
                 SimpleNamespace(num_tokens=50))
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["memory: parameters 3 + activations 2,000 = 2,003 MiB", "[GPT-2]"]
    assert {"channels: 32", "num_parameters: 1000", "train dataset num_batches: 6", "val dataset num_batches: 3",
            "num_activations: 7"} < set(lines)


def test_only_the_first_process_speaks(begun, clock, capfd):
    second = Processes()
    second.rank = 1
    report = begun("-s 5", step=3, processes=second)
    report.validation(3, 2.0)
    report.sample(None, None)
    report.checkpoint(3, 1.0)
    make_step(report, clock, 1, 3, 4.0, 1.0, 1e-3)
    report.end()
    assert capfd.readouterr() == ("", "")
