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
    def begun(text="", step=0, processes=None, epoch=1000):
        report = Report(parse_flags(f"-b 2 -t 8 -d 32 -s 0 {text}".split()), processes or Processes())
        run = SimpleNamespace(engine=Engine(), step=step, tokens=32 * step, resumed=None,
                              loader=SimpleNamespace(num_tokens=epoch))
        report.begin(run, 10, SimpleNamespace(tokens=None, problem="no x\n---> HINT: y"), Output())
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
    assert capfd.readouterr().out == ("step 3/10: train loss 4.250000 (took 500.0 ms) | mean 4.250 | norm 1.5000 "
                                      "| lr 3.00e-04 | 100.0% MFU | 64 tok/s | 0:03 left\n")
    assert report.output.lines == ["s:3 trl:4.2500 lr:0.000300 norm:1.50"]


@pytest.mark.parametrize("seconds, step, left", [(1, 8, "0:01"), (61, 8, "1:01"), (61, 9, "0:00"),
                                                 (3600, 0, "9:00:00"), (20_000, 0, "2 days, 2:00:00")])
def test_time_left(begun, clock, capfd, seconds, step, left):
    """To the end: the mean of the steps so far, for each that is to come."""
    report = begun()
    make_step(report, clock, seconds, step, 4.0, 1.0, 1e-3)
    assert re.findall(r"tok/s \| (.*) left$", capfd.readouterr().out, re.MULTILINE) == [left]


def test_smoothed_loss(begun, clock, capfd):
    """The mean of all losses, in which one weighs 0.95 of what the next one does"""
    report = begun()
    for step, loss in enumerate((4.0, 3.0, 5.0)):
        make_step(report, clock, 1, step, loss, 1.0, 1e-3)
    mean = (0.95**2 * 4 + 0.95 * 3 + 5) / (0.95**2 + 0.95 + 1)
    assert capfd.readouterr().out.splitlines()[-1].split(" | ")[1] == f"mean {mean:.3f}"


def test_epochs(begun, clock, capfd):
    """They are counted where a run of 10 steps of 32 tokens has more than one."""
    make_step(begun(epoch=128), clock, 1, 3, 4.0, 1.0, 1e-3)
    make_step(begun("-a 1", epoch=128), clock, 1, 3, 4.0, 1.0, 1e-3)
    make_step(begun(epoch=320), clock, 1, 3, 4.0, 1.0, 1e-3)
    make_step(begun(step=4, epoch=128), clock, 1, 4, 4.0, 1.0, 1e-3)
    starts = [line.split(":")[0] for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert starts == ["step 3/10 (epoch 0.2)", "step 3/10", "step 3/10", "step 4/10 (epoch 1.2)"]


@pytest.mark.parametrize("columns, parts", [
    (200, "epoch 3.0|took|mean|norm|lr|MFU|tok/s|left"), (110, "epoch 3.0|took|mean|norm|tok/s|left"),
    (100, "epoch 3.0|took|mean|norm|left"), (80, "took|mean|left"), (62, "took|left"), (20, "took"),
])
def test_narrow_terminals(begun, clock, capfd, monkeypatch, columns, parts):
    report = begun(step=11, epoch=128)
    report.last_step = 120
    monkeypatch.setenv("COLUMNS", str(columns))
    make_step(report, clock, 0.5, 11, 4.0, 1.0, 1e-3)
    line = capfd.readouterr().out.splitlines()[-1]
    everything = "epoch 3.0|took|mean|norm|lr|MFU|tok/s|left".split("|")
    assert [part for part in everything if part in line] == parts.split("|")
    assert line.startswith("step 11/120") and (len(line) <= columns or columns < 62)


def test_a_file_has_100_columns(begun, clock, capfd, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    report = begun()
    report.last_step = 20000
    make_step(report, clock, 1, 12345, 4.0, 1.0, 1e-3)
    line = capfd.readouterr().out.splitlines()[-1]
    assert 80 < len(line) <= 100 and line.endswith(" left") and "| mean 4.000 | norm 1.0000" in line


def test_log_every(begun, clock, capfd):
    report = begun("--log_every 4")
    for step in range(10):
        make_step(report, clock, 1, step, 4.0, 1.0, 1e-3)
    assert re.findall(r"^step (\d)", capfd.readouterr().out, re.MULTILINE) == ["0", "4", "8", "9"]
    assert len(report.output.lines) == 10


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


def test_the_end_of_a_run_that_went_on(begun, clock, capfd):
    report = begun("-v 0")
    make_step(report, clock, 1, 7, 4.0, 1.0, 1e-3)
    report.run.step, report.run.tokens, report.run.resumed = 8, 256, (7, True)
    capfd.readouterr()
    report.end()
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == ["steps: 1 (8 in all)", "tokens: 32 (256 in all)", "final train loss: 4.000000"]
    assert not any("val" in line for line in lines)


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
    assert "samples are printed as token numbers: no x\n---> HINT: y\n" in out


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
                 SimpleNamespace(num_tokens=50, B=1, T=8))
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == ["memory: parameters 3 + activations 2,000 = 2,003 MiB",
                         "validation has 50 tokens: a batch of it has 1 x 8", "[GPT-2]"]
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
