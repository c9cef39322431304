"""Odd machines: no compiler, numbers of threads and flags that make no sense."""
import os

import pytest

import train_gpt2
from dev.run import machine
from dev.run.flags import parse_flags
from dev.run.processes import ALONE
from dev.run.text import Sampler

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")


# ---------------------------------------------------------------------------------------------------------------------
# threads

@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS"])
@pytest.mark.parametrize("value", ["0", "-1", "abc", "2.5", ",2", "1e1", "٣x"])
def test_numbers_of_threads_that_make_no_sense(monkeypatch, name, value):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} is not a number of threads\n---> HINT: "):
        machine.threads_of(ALONE)


@pytest.mark.parametrize("value", ["0", "-1", "abc"])
@pytest.mark.parametrize("program", [["train_gpt2.py"], ["-m", "dev.generate"]])
def test_the_error_for_threads(python, tiny, flags, program, value):
    given = flags() if program[0] == "train_gpt2.py" else ["-e", tiny]
    run = python(*program, *given, OMP_NUM_THREADS=value)
    out, err = run.communicate()
    lines = [line for line in err.splitlines() if line and not line.startswith("libgomp")]
    assert run.returncode == 1 and lines[0] == f"error: OMP_NUM_THREADS={value} is not a number of threads", err
    assert len(lines) == 2


@pytest.mark.parametrize("value, cpus, threads, said", [
    ("64", 2, 2, True), ("3", 2, 2, True), ("2", 2, 2, False), ("1", 2, 1, False), ("4,2", 8, 4, False),
    ("", 6, 6, False), (" 2 ", 6, 2, False)])
def test_more_threads_than_processors(monkeypatch, capfd, value, cpus, threads, said):
    monkeypatch.setattr(machine, "available_cpus", lambda: cpus)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine.threads_of(ALONE) == threads
    out, err = capfd.readouterr()
    line = f"OMP_NUM_THREADS={value}, but this process may use {cpus} processors: {threads} threads are started\n"
    assert out == "" and err == (line if said else "")


# ---------------------------------------------------------------------------------------------------------------------
# flags

FLOATS = [name for name, value in vars(parse_flags([])).items() if isinstance(value, float)]


def test_there_are_flags_that_are_floats():
    assert len(FLOATS) == 11 and {"temperature", "learning_rate", "top_p", "eps", "skip_update_lossz"} < set(FLOATS)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_that_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=f"--{name} must lie in .* not be -?(nan|inf)"):
        parse_flags([f"--{name}={value}"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_samplers_that_make_no_sense(python, tiny, name, value):
    with pytest.raises(ValueError, match=f"cannot sample with .*{name} {value}"):
        Sampler(**{name: float(value)})
    run = python("-m", "dev.generate", "-e", tiny, f"--{name}={value}")
    out, err = run.communicate()
    assert run.returncode == 1 and out == "" and err.startswith("error: cannot sample") and err.count("\n") == 2


@pytest.mark.parametrize("given", ["-h", "-h -v 3", "-x 2 -h", "--hellaswag_eval"])
def test_a_bare_h_points_to_help(capsys, given):
    with pytest.raises(SystemExit, match="^2$"):
        train_gpt2.main(given.split())
    assert capsys.readouterr().err == ("train_gpt2.py: error: -h is HellaSwag, as in llm.c, and needs a 1 or a 0\n"
                                       "---> HINT: --help lists the flags\n")
