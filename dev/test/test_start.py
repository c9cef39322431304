"""What a process takes from its machine when it starts: its part of the processors, the environment as it is."""
import json
import os

import numba
import pytest

from dev.run import compiling, machine
from dev.run.processes import ALONE, Processes


@pytest.fixture
def threads(monkeypatch):
    """threads(cpus, sharers, OMP_NUM_THREADS=..., ...): what threads_of() says on a machine with so many processors"""
    def threads(cpus, sharers=1, **variables):
        for name in "OMP_NUM_THREADS", "NUMBA_NUM_THREADS":
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(machine, "available_cpus", lambda: cpus)
        processes = Processes()
        processes.sharers = sharers
        return machine.threads_of(processes)
    return threads


@pytest.mark.parametrize("cpus, sharers, expected", [
    (1, 1, 1), (16, 1, 16), (16, 2, 8), (16, 3, 5), (16, 16, 1), (2, 3, 1), (1, 64, 1)])
def test_processes_of_a_machine_share_its_processors(threads, cpus, sharers, expected):
    assert threads(cpus, sharers) == expected


@pytest.mark.parametrize("variables, expected", [
    ({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "7,2"}, 7), ({"NUMBA_NUM_THREADS": "32"}, 32),
    ({"OMP_NUM_THREADS": ""}, 4), ({"OMP_NUM_THREADS": "", "NUMBA_NUM_THREADS": "5"}, 5),
    ({"NUMBA_NUM_THREADS": "7"}, 7), ({"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "7"}, 2)])
def test_who_asks_for_threads_gets_them(threads, variables, expected):
    """OpenMP's variable, the first of its levels, before Numba's; both before the 8 processors of 2 processes"""
    assert threads(8, 2, **variables) == expected


def test_start_threads(monkeypatch):
    """It asks OpenMP's threads to sleep while they wait, unless the user has said otherwise."""
    start, most = compiling.start_threads.__wrapped__, numba.config.NUMBA_NUM_THREADS
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for number, expected in (1, 1), (most, most), (most + 5, most), (1, 1):
        start(number)
        assert numba.get_num_threads() == expected
    assert machine.os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    start(1)
    assert machine.os.environ["OMP_WAIT_POLICY"] == "active"


def test_a_number_set_later_stays(monkeypatch):
    """Another engine in the same process does not set it back."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("NUMBA_NUM_THREADS is less than 2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    compiling.start_threads.cache_clear()
    compiling.start_threads(machine.threads_of(ALONE))  # 1: see conftest.py
    numba.set_num_threads(2)
    compiling.start_threads(machine.threads_of(ALONE))
    assert numba.get_num_threads() == 2


IMPORT = """
import json, os
for name in set(os.environ) - {"PATH", "HOME", "SYSTEMROOT"}:
    del os.environ[name]  # what these tests have imported may have set it
before = dict(os.environ)
import train_gpt2
print(json.dumps([sorted(set(before.items()) ^ set(os.environ.items())), train_gpt2.__name__]))
"""


def test_importing_the_trainer_leaves_the_environment_alone(python):
    out, err = python("-c", IMPORT).communicate()
    assert err == "" and json.loads(out) == [[], "train_gpt2"]


def test_threads_that_openmp_binds(python):
    """OMP_PROC_BIND ties the main thread to one processor as soon as the threads start: they stay as many."""
    if len(machine.allowed_cpus()) < 2:
        pytest.skip("there is one processor")
    out, err = python("-c", "import train_gpt2 as t; t.build('d6').describe(); t.build('d6'); "
                      "print(t.numba.get_num_threads())",
                      OMP_PROC_BIND="true", OMP_NUM_THREADS="2").communicate()
    assert (out, err) == ("2\n", "")


def test_what_a_bound_thread_starts_is_not_bound(python):
    """PyTorch beside us in dev.bench had one processor, the one that OMP_PROC_BIND had tied our thread to."""
    if len(machine.allowed_cpus()) < 2 or not hasattr(os, "sched_setaffinity"):
        pytest.skip("there is one processor, or threads are not bound here")
    out, err = python("-c", "import os, sys, train_gpt2 as t; t.build('d6').describe(); from dev.bench import spawn; "
                      "before = os.sched_getaffinity(0); show = 'import os; print(len(os.sched_getaffinity(0)))'; "
                      "spawn([sys.executable, '-c', show]).wait(); assert before == os.sched_getaffinity(0)",
                      OMP_PROC_BIND="true", OMP_NUM_THREADS="2").communicate()
    assert (out, err) == (f"{len(machine.allowed_cpus())}\n", "")
