"""The table of one process beside several: what is run, what is read from a run, what is left out."""
from types import SimpleNamespace

import pytest

from dev import bench_processes as b


@pytest.fixture
def flags(tiny):
    return SimpleNamespace(model=tiny, tokens=64, sequence=8, ranks=[1, 2], rows=None)


@pytest.fixture
def main(monkeypatch, capsys):
    """main(results, "--ranks 1,2 ..."): with measure() replaced by a function; returns what is printed, as lines."""
    def main(measure, text=""):
        monkeypatch.setattr(b, "find_mpirun", lambda: "mpirun")
        monkeypatch.setattr(b, "available_cpus", lambda: 16)
        monkeypatch.setattr(b, "measure", measure)
        assert b.main(text.split()) == 0
        return capsys.readouterr().out.splitlines()
    return main


def test_a_run_is_read(flags, shards):
    """One process needs no launcher: its steps but the first, its profile, its memory are found in what it prints."""
    command = b.command_of(flags, None, shards, "fp32", 1, (), 4)
    steps, profile, memory = b.measure(command, 1, 100)
    assert len(steps) == 3 and all(0 < seconds < 10 for seconds in steps)
    assert 0 < profile["matmul_backward"] < 10 and 10 < memory < 10000
    with pytest.raises(RuntimeError, match="not over after 0 s"):
        b.measure(command, 1, 0.001)
    with pytest.raises(RuntimeError, match="error: .*no-such-model"):
        b.measure(["no-such-model" if word == flags.model else word for word in command], 1, 100)


def test_the_work_is_divided(flags, monkeypatch):
    monkeypatch.setattr(b, "available_cpus", lambda: 16)
    words = " ".join(b.command_of(flags, "mpirun", "shard", "bf16", 4, ("cores", "z1"), 7))
    assert words.startswith("mpirun -np 4 --map-by slot:PE=4:HWTCPUS ") and "--oversubscribe" not in words
    assert "-b 2 -t 8 -x 7 --precision bf16 -z 1" in words
    words = " ".join(b.command_of(flags, "mpirun", "shard", "fp32", 2, (), 7))
    assert words.startswith("mpirun -np 2 --bind-to none ") and "-b 4 -t 8 -x 7 --precision fp32 -z 0" in words


def test_a_table(main):
    seen = []

    def measure(command, threads, limit):
        seen.append(threads)
        if "bf16" in command and threads == 4:
            raise RuntimeError("error: no room")
        return [0.5, 0.25, 0.75], {"sums of gradients": 0.1, "waiting for sums of gradients": 0.02}, 1234.0
    lines = main(measure)
    assert seen == [16, 16, 8, 4, 16, 16, 8, 4] + [8, 4] * 4  # a run that compiles comes before each precision's first
    assert "| fp32 | 2 x 8 | - | 500 / 250 | 2,048 | 100 / 20 | 1,234 |" in lines
    assert "| bf16 | 4 x 4 | - | error: no room |" in lines and "| bf16 | 4 x 4 | cores z1 | error: no room |" in lines
    lines = main(measure, "--seconds -1")
    assert "fp32:1 and what follows: no time left" in lines
    lines = main(measure, "--rows bf16:2:cores:z1")
    assert lines[4].startswith("| bf16 | 2 x 8 | cores z1 | 500 / 250 |") and lines[5] == ""


def test_what_cannot_be_divided(monkeypatch, capsys):
    monkeypatch.setattr(b, "find_mpirun", lambda: "mpirun")
    assert b.main("--tokens 1024 --sequence 512 --ranks 1,4".split()) == 1
    assert "1024 tokens are not divided by 4 processes of 512" in capsys.readouterr().err
