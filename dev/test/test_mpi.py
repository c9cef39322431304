"""
Several processes over MPI: tiny runs under mpirun beside runs of one process, whose numbers they must have.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import ROOT
from runs import N as PARAMETERS
from runs import contents

from dev.run.flags import parse_flags
from dev.run.machine import available_cpus
from dev.run.processes import launched

MPIRUN = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
pytestmark = [
    pytest.mark.skipif(find_spec("mpi4py") is None, reason="mpi4py is not installed: dev/run/requirements-mpi.txt"),
    pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun: dev/run/requirements-mpi.txt"),
]
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
FREE = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")} | ENVIRONMENT
B, T, STEPS = 2, 8, 20
# what every run begins with: code may replace something before it, `rank` is MPI's
MAIN = """
import os, signal, sys, time
import numpy as np
import train_gpt2
from dev.run import processes
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))
{code}
if __name__ == "__main__":
    sys.exit(train_gpt2.main(sys.argv[1:]))
"""
AT_STEP = """
step, backward = [0], train_gpt2.GPT2.backward
def faulty(engine, last=True):
    step[0] += last
    if rank == 1 and last and step[0] == {step}:
        print("now", time.time(), file=sys.stderr, flush=True)
        {fault}
    backward(engine, last)
train_gpt2.GPT2.backward = faulty
"""


WITHIN = """
import atexit, pathlib
counts, forward, read = [0, 0], train_gpt2.GPT2.forward, train_gpt2.GPT2.read
def count(what, act):
    counts[what] += 1
    if rank == {rank} and counts[{what}] == {number} and what == {what}:
        {act}
def counted_forward(engine, inputs, targets=None, train=True):
    if not train:
        count(0, rank)
    return forward(engine, inputs, targets, train)
def counted_read(engine, tokens):
    if engine.processes.size > 1:  # not what compiles
        count(1, rank)
    return read(engine, tokens)
train_gpt2.GPT2.forward, train_gpt2.GPT2.read = counted_forward, counted_read
train_gpt2.HELLASWAG = {hellaswag!r}
atexit.register(lambda: print(f"rank {{rank}}: {{counts[0]}} batches, {{counts[1]}} tokens", flush=True))
"""


def command(processes, arguments, code=""):
    """The command of a run; 0 processes: without mpirun"""
    open_mpi = ["--oversubscribe"] * bool(shutil.which("ompi_info", path=os.path.dirname(MPIRUN)))  # else MPICH
    launcher = [MPIRUN, *open_mpi, "--bind-to", "none", "-np", str(processes)] if processes else []
    return [*launcher, sys.executable, "-c", MAIN.format(code=code), *map(str, arguments)]


@pytest.fixture
def run(flags, out):
    """run(2, "-x 3 ..."): run the trainer in so many processes; returns its output. status: of the run, None = not 0"""
    def run(processes, text, code="", status=0, **environment):
        if "-o " not in text:  # a test begins several runs in one folder
            text += f" -o {out}" + ("" if "-y" in text else " --overwrite 1")
        result = subprocess.run(command(processes, flags(text), code),
                                capture_output=True, text=True, cwd=ROOT, env={**FREE, **environment}, timeout=120)
        if status is None:
            assert result.returncode, result.stdout
        else:
            assert result.returncode == status, result.stderr
        return result.stdout + result.stderr
    return run


def losses(output):
    """Training losses and gradient norms"""
    return np.array(re.findall(r"^step \d+/\d+.*: train loss (\S+) .*? norm (\S+) ", output, re.MULTILINE), float).T


def validations(output):
    return re.findall(r"^val loss (\S+)", output, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# the numbers of one process

# Relative differences of losses. A last bit may round a weight, of few, to the next bfloat16: see scaling.md
CLOSE = {"fp32": 1e-5, "bf16": 1e-3}


@pytest.mark.parametrize("processes, micro_batches, precision", [
    (2, 1, "fp32"), (3, 1, "fp32"), (4, 1, "fp32"), (2, 3, "fp32"), (2, 1, "bf16"), (3, 1, "bf16"), (4, 1, "bf16")])
def test_losses_of_one_process(run, processes, micro_batches, precision):
    text = f"-x {STEPS} -v 5 -m 7 -d {processes * micro_batches * B * T} --precision {precision}"
    one, several = run(0, text), run(processes, text)
    assert losses(several).shape == (2, STEPS)
    assert losses(several)[0] == pytest.approx(losses(one)[0], rel=CLOSE[precision], abs=0)
    assert losses(several)[0, 0] == pytest.approx(losses(one)[0, 0], abs=1.1e-6)  # of the same weights: the same digits
    # norms, of which four digits are printed
    assert losses(several)[1] == pytest.approx(losses(one)[1], rel=10 * CLOSE[precision], abs=2e-4)
    assert len(validations(one)) == 5
    assert np.array(validations(several), float) == pytest.approx(np.array(validations(one), float),
                                                                  rel=CLOSE[precision])
    assert validations(several)[0] == validations(one)[0]


@pytest.mark.parametrize("processes, micro_batches, rows", [(0, 4, 2), (2, 1, 4), (2, 4, 1), (4, 1, 2), (4, 2, 1)])
def test_ways_to_divide_a_batch(run, processes, micro_batches, rows):
    """Eight rows, always the same ones (-a 1), at once or divided among processes and micro-batches"""
    text = f"-x {STEPS} -a 1 -d {8 * T}"
    one, divided = losses(run(0, f"{text} -b 8")), losses(run(processes, f"{text} -b {rows}"))
    assert max(processes, 1) * micro_batches * rows == 8 and divided.shape == (2, STEPS)
    assert divided[0] == pytest.approx(one[0], rel=1e-5, abs=0)
    assert divided[1] == pytest.approx(one[1], rel=1e-4, abs=2e-4)


def test_a_validation_shard_with_little_more_than_a_batch(run, make_shard, tmp_path, rng):
    """Eight processes of four rows, and as many tokens: llm.c needs one more and aborts."""
    path = make_shard(tmp_path / "val.bin", rng.integers(0, 300, 8 * 4 * T))
    text = f"-x 1 -v 1 -m -1 -b 4 -j {path}"
    one, several = run(0, f"{text} -d {8 * 4 * T}"), run(8, text)
    assert validations(several)[0] == validations(one)[0] and "tokens: 256" in several


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lost_micro_batch_shows(run, precision):
    text = f"-x {STEPS} -d {6 * B * T} --precision {precision}"
    lost = """
backward, calls = train_gpt2.GPT2.backward, [0]
def lossy(engine, last=True):
    calls[0] += 1
    if rank == 1 and calls[0] == 5:
        engine.acts.dbtc.fill(0)
    backward(engine, last)
train_gpt2.GPT2.backward = lossy
"""
    one, several = losses(run(0, text))[0], losses(run(2, text, lost))[0]
    close = CLOSE[precision]
    assert several[:2] == pytest.approx(one[:2], rel=close) and several[2:] != pytest.approx(one[2:], rel=close)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_same_bits_from_run_to_run(run, tmp_path, stage, precision):
    processes = 4 if stage else 3
    for folder in "a", "b":
        run(processes, f"-x 10 -n 5 -z {stage} -d {2 * processes * B * T} --precision {precision} "
            f"-o {tmp_path / folder}")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert len(a) == 2 * (3 + processes) + 1 and a == b


def test_evaluation_does_not_touch_a_run(run):
    text = f"-x {STEPS} -d {2 * B * T}"
    assert (losses(run(2, text)) == losses(run(2, f"-v 1 -s 1 -g 3 {text}"))).all()


@pytest.fixture
def hellaswag(tmp_path, rng):
    """The path of an evaluation set of 7 examples"""
    words = [20240522, 1, 7, 100]
    header = np.zeros(256, "<i4")
    header[:4] = words
    body = []
    for index in range(7):
        texts = [rng.integers(0, 300, rng.integers(2, 9)).tolist() for _ in range(5)]
        tail = [index, int(rng.integers(4)), 4] + [word for text in texts for word in (len(text), *text)]
        body += [65535, 2 * (len(tail) + 2), *tail]
    path = tmp_path / "hellaswag.bin"
    path.write_bytes(header.tobytes() + np.array(body, "<u2").tobytes())
    return str(path)


def test_hellaswag_of_one_process(run, hellaswag):
    code = f"train_gpt2.HELLASWAG = {hellaswag!r}"
    said = {re.search(r"HellaSwag: (\d/7) ", run(processes, "-x 0 -v 1 -h 1", code))[1] for processes in (0, 2, 3, 8)}
    assert len(said) == 1


def test_batch_sizes(run, flags):
    assert f"tokens: {3 * 2 * B * T}" in run(2, "-x 3")  # -d has a default
    error = run(3, f"-x 3 -d {4 * B * T}", status=None)
    assert f"not a multiple of the {3 * B * T} of a micro-batch of 3 processes" in error and f"-d {3 * B * T}" in error


def test_threads(run):
    """Processes that share processors divide them; where some lie idle, a line says what frees them."""
    cpus = sorted(os.sched_getaffinity(0))
    printed = run(2, "-x 0", OMP_NUM_THREADS="")
    assert f"threads: {max(1, available_cpus() // 2)} " in printed
    assert ("--bind-to none" in printed) == (len(cpus) < os.cpu_count())
    own = run(2, "-x 0", f"os.sched_setaffinity(0, {{{cpus}[rank % {len(cpus)}]}})", OMP_NUM_THREADS="")
    assert "threads: 1 " in own and ("bound to 2 of" in own) == (os.cpu_count() > 2)
    shared = run(2, "-x 0", f"os.sched_setaffinity(0, {{{cpus[0]}}})", OMP_NUM_THREADS="")
    assert "threads: 1 " in shared and ("2 processes are bound to 1 of" in shared) == (os.cpu_count() > 1)
    assert "bound" not in run(2, "-x 0", f"os.sched_setaffinity(0, {{{cpus[0]}}})", OMP_NUM_THREADS="1")


# ---------------------------------------------------------------------------------------------------------------------
# -z 1, checkpoints

def tensors(config=(64, 384, 2, 32)):
    """(layers, numbers in a layer) of the tiny model's tensors, in the order of the files"""
    maxT, Vp, L, C = config
    return [(1, Vp * C), (1, maxT * C), (L, C), (L, C), (L, 3 * C * C), (L, 3 * C), (L, C * C), (L, C), (L, C), (L, C),
            (L, 4 * C * C), (L, 4 * C), (L, 4 * C * C), (L, C), (1, C), (1, C)]


@pytest.mark.parametrize("processes, precision", [(2, "fp32"), (4, "fp32"), (4, "bf16")])
def test_shared_moments(run, tmp_path, processes, precision):
    """-z 1: the same run, and state files with slice r of each layer's tensor, as llm.c writes them"""
    text = f"-w 1 -x {STEPS} -n {STEPS} --grad_clip 1 -c 0.1 -d {processes * B * T} --precision {precision}"
    whole = run(processes, f"{text} -z 0 -o {tmp_path / '0'}")
    shared = run(processes, f"{text} -z 1 -o {tmp_path / '1'}")
    assert losses(shared) == pytest.approx(losses(whole), rel=1e-6)
    files = [contents(tmp_path / name) for name in "01"]
    model = f"model_{STEPS:08d}.bin"
    assert files[0][model] == files[1][model]
    for rank in range(processes):
        name = f"state_{STEPS:08d}_{rank:05d}.bin"
        zero, one = (f[name] for f in files)
        header = np.frombuffer(one[:1024], "<i4")
        assert (header[:6] == [20240527, 1, processes, rank, 1, 1]).all() and header[10] == STEPS
        expected, start = [], 0
        for moment in np.frombuffer(zero[1024:1024 + 12 * PARAMETERS], "<f4").reshape(3, PARAMETERS):  # and weights
            start = 0
            for layers, size in tensors():
                for _ in range(layers):
                    n = size // processes
                    expected.append(moment[start + rank * n:start + (rank + 1) * n])
                    start += size
            assert start == PARAMETERS
        expected = np.concatenate(expected).tobytes()
        assert one[1024:1024 + len(expected)] == expected
        assert one[1024 + len(expected):] == zero[1024 + 12 * PARAMETERS:]


def test_processes_that_cannot_share(run):
    error = run(3, "-x 3 -z 1", status=None)
    assert "divides 32 channels: 2, 4, 8, 16, 32; there are 3" in error and error.count("error:") == 1


@pytest.mark.parametrize("stage", [0, 1, "1 -w 1 --precision bf16"])  # the last: weights are in pieces, too
def test_killed_run_goes_on(run, tmp_path, stage):
    text = f"-x 9 -n 3 -v 4 -s 4 -g 3 -z {stage} -d {4 * B * T} -o"
    run(2, f"{text} {tmp_path / 'whole'}")
    out = tmp_path / "killed"
    killed = run(2, f"{text} {out}", AT_STEP.format(step=5, fault="os.kill(os.getpid(), signal.SIGKILL)"), status=None)
    assert time.time() - float(re.search(r"now (\S+)", killed)[1]) < 10
    assert (out / "DONE_00000003").exists() and not (out / "DONE_00000006").exists()
    assert "step 3 of" in run(2, f"{text} {out} -y 1")
    assert contents(out) == contents(tmp_path / "whole")


def test_another_number_of_processes_goes_on(run, out):
    text = f"-n 6 -d {6 * B * T}"
    one = losses(run(0, f"{text} -x 12 -o {out}.one"))[0]
    run(2, f"{text} -x 6")
    assert losses(run(3, f"{text} -x 9 -y 1"))[0] == pytest.approx(one[6:9], rel=1e-5)
    assert losses(run(0, f"{text} -x 12 -y 1"))[0] == pytest.approx(one[9:], rel=1e-5)


def test_runs_that_cannot_go_on(run, out):
    text = f"-x 2 -n 2 -d {4 * B * T}"
    run(2, f"{text} -z 1")
    for processes, stage in (4, 1), (2, 0), (0, 0):
        error = run(processes, f"{text} -z {stage} -y 1", status=None)
        assert "a run of 2 processes with -z 1 left off here" in error and error.count("error:") == 1
    (out / "state_00000002_00001.bin").unlink()
    assert "state_00000002_00001.bin is missing" in run(2, f"{text} -z 1 -y 1", status=None)


# ---------------------------------------------------------------------------------------------------------------------
# what one process meets, all do

@pytest.mark.parametrize("fault, words", [
    ("raise RuntimeError('a fault')", "RuntimeError: a fault"),
    ("raise ValueError('a fault')", "error: a fault"),
    ("sys.exit(3)", "left before the run's end"),
    ("os._exit(3)", "exit"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    ("engine.processes.begin(lambda: 1 / 0).result()", "ZeroDivisionError"),
    ("import threading; threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)", "ZeroDivisionError"),
])
def test_a_fault_ends_all(run, fault, words):
    output = run(3, "-x 100000", AT_STEP.format(step=5, fault=fault), status=None)
    assert time.time() - float(re.search(r"now (\S+)", output)[1]) < 10
    assert words in output and "step 2/" in output and "step 3/" not in output  # run_kernels() is a step, too


DEATH = """
def die(*args, **more):
    print("now", time.time(), file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1:
    {}
"""


@pytest.mark.parametrize("where, reached", [
    ("die()", ""),                                                        # before MPI begins
    ("from dev.run import mpi; mpi.Mpi.describe = die", ""),              # when it has begun
    ("train_gpt2.load_kernels = die", "threads: "),
    ("train_gpt2.validate = die", "num_activations: "),
    ("from dev.run import checkpoints; checkpoints.write_file = die", "step 1/2: "),
    ("from dev.run import mpi; mpi.Mpi.close = die", "checkpoint of step 2"),
])
def test_a_death_ends_all(run, out, where, reached):
    """Wherever a process is killed; nothing says that a checkpoint is complete of which its part is missing."""
    output = run(3, "-x 2 -n 2 -v 2", DEATH.format(where), status=None)
    assert time.time() - float(re.search(r"now (\S+)", output)[1]) < 10
    assert reached in output and "signal 9" in output
    assert (out / "DONE_00000002").exists() == ("close" in where)


def test_what_all_find_wrong_is_said_once(run, make_shard, tmp_path):
    path = make_shard(tmp_path / "short.bin", [1] * 10)
    error = run(3, f"-x 3 -i {path}", status=None)
    assert error.count("error:") == 1 and "no shard has the 17 tokens of a batch; the largest has 10" in error


def test_worlds_that_are_not_what_was_asked_for(run, tmp_path):
    error = run(0, "-x 3 -pn 2", status=1)
    assert "there should be 2 processes, but MPI finds 1" in error and "mpirun -np 2" in error
    assert "there should be 4 processes, but MPI finds 1" in run(0, "-x 3", status=1, SLURM_STEP_NUM_TASKS="4")
    error = run(2, "-x 3 -pn 3", status=None)
    assert "there should be 3 processes, but MPI finds 2" in error
    (tmp_path / "mpi4py.py").write_text("raise ImportError('none here')")
    error = run(2, "-x 3", status=1, PYTHONPATH=str(tmp_path))
    assert "need mpi4py and an MPI library: none here" in error and "requirements-mpi.txt" in error


def test_launchers(monkeypatch):
    for name in "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS":
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1
    for name in "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS":
        with monkeypatch.context() as patch:
            patch.setenv(name, "3")
            assert launched() == 3


def test_a_folder_of_llmc_with_several_processes(run, out):
    """It shuffles the batches of each process in another way, and counts batches of all processes together."""
    text = "-x 2 -n 2 -d 64"
    run(2, f"{text} -b 4")  # a batch of so many tokens as two have with -b 2
    (out / "run_00000002.json").unlink()
    error = run(2, f"{text} -y 1", status=None)
    assert error.count("error:") == 1 and "not one of this data" in error
    assert f"llm.c shuffles each process's batches in its own way: -e {out / 'model_00000002.bin'}" in error


@pytest.fixture
def job(flags, out):
    """job(2, "-x 100000"): start such a run; returns the Popen object and the process ids of the ranks."""
    jobs = []

    def job(processes, text):
        pids = 'os.write(2, f"rank {rank} {os.getpid()}\\n".encode())'  # at once: lines of several stay apart
        process = subprocess.Popen(command(processes, flags(f"{text} -o {out}"), pids), text=True, cwd=ROOT, env=FREE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        jobs.append(process)
        lines = [process.stderr.readline().split() for _ in range(processes)]
        return process, {int(rank): int(pid) for _, rank, pid in lines}
    yield job
    for process in jobs:
        process.kill()
        process.communicate()


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the run ended without {words!r}: {process.stderr.read()}")


def test_signal_and_stop_file(job, out, run):
    process, pids = job(3, "-x 100000 -n 50000")
    wait_for(process, "step 20/")
    os.kill(pids[1], signal.SIGUSR1)
    asked = int(wait_for(process, "checkpoint of step").split()[3])
    wait_for(process, f"step {asked + 5}/")
    (out / "STOP").touch()
    wait_for(process, "STOP: stopping")
    stopped = int(wait_for(process, "checkpoint of step").split()[3])
    assert process.wait(20) == 0 and not (out / "STOP").exists()
    names = [f"{kind}_{step:08d}{rest}" for step in (asked, stopped) for kind, rest in (
        ("DONE", ""), ("model", ".bin"), ("run", ".json"), *(("state", f"_{rank:05d}.bin") for rank in range(3)))]
    assert asked < stopped and sorted(contents(out)) == sorted([*names, "main.log"])
    assert f"step {stopped} of" in run(3, f"-x {stopped + 1} -y 1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_one_process_stops_all(job, out, number):
    process, pids = job(2, "-x 100000")
    wait_for(process, "step 20/")
    os.kill(pids[1], number)
    step = int(wait_for(process, "checkpoint of step").split()[3])
    assert process.wait(20) == 0 and (out / f"DONE_{step:08d}").exists()


TERM, TOUCH = "os.kill(os.getpid(), signal.SIGTERM)", "pathlib.Path({out!r}, 'STOP').touch()"


@pytest.mark.parametrize("act, rank, what, number, counts, later", [
    (TERM, 1, 0, 2, [2, 2, 2], 0),          # in the first validation: 6 batches for each process
    (TERM, 2, 0, 7, [7, 7, 7], 0),          # HellaSwag: 3, 2 and 2 examples
    (TERM, 0, 0, 9, [9, 8, 8], 0),          # its last one
    (TERM, 0, 1, 4, [18, 16, 16], 0),       # a text, which only the first process writes, after the second validation
    (TOUCH, 2, 0, 3, [3, 3, 3], 1),         # when the first process has just looked for it: after one more each
    (TOUCH, 0, 1, 4, [18, 16, 16], 0),
])
def test_a_stop_takes_effect_within_a_batch(run, hellaswag, out, tmp_path, act, rank, what, number, counts, later):
    """All processes stop at the same place; the run goes on as if they had not."""
    text = f"-x 6 -n 3 -v 4 -m 18 -h 1 -s 4 -g 9 -d {3 * B * T}"
    values = {"rank": rank, "what": what, "hellaswag": hellaswag}
    run(3, f"{text} -o {tmp_path / 'whole'}", WITHIN.format(**values, number=-1, act="pass"))
    stopped = run(3, text, WITHIN.format(**values, number=number, act=act.format(out=str(out))))
    found = sorted(re.findall(r"rank (\d): (\d+) batches, (\d+) tokens", stopped))
    batches, tokens = [int(x[1]) for x in found], [int(x[2]) for x in found]
    assert batches in ([n + more for n in counts] for more in range(later + 1))
    assert tokens == ([number, 0, 0] if what else [0, 0, 0])
    assert sorted(path.name for path in out.glob("DONE*"))[-1] == f"DONE_{4 * what:08d}"
    run(3, f"{text} -y 1", WITHIN.format(**values, number=-1, act="pass"))
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


def test_a_warning_is_answered_within_a_batch(run, hellaswag, out):
    """SIGUSR1 in a validation: the checkpoint is written before the next batch, though nothing is over. It is the first
    thing that comes into the folder: the first process takes its time to remove what older runs have left there, and
    must not find what the other writes."""
    act = "os.kill(os.getpid(), signal.SIGUSR1)"
    slow = """
from dev.run import folder
remove, replace = folder.remove_temporary, os.replace
def slow_remove(*args):
    time.sleep(0.5)
    remove(*args)
def slow_replace(old, new):
    time.sleep(rank)
    replace(old, new)
folder.remove_temporary, os.replace = slow_remove, slow_replace
"""
    code = WITHIN.format(rank=1, what=0, number=3, hellaswag=hellaswag, act=act) + slow
    said = run(2, "-x 2 -v 2 -m 18 -n 2", code)
    assert said.index("checkpoint of step 0 written") < said.index("val loss")
    assert sorted(path.name for path in out.glob("DONE*")) == ["DONE_00000000", "DONE_00000002"]


AT_BATCH = """
calls, backward = [0], train_gpt2.GPT2.backward
def counted(engine, last=True):
    if engine.processes.size > 1:  # not what compiles
        calls[0] += 1
        if rank == {rank} and calls[0] == {number}:
            {act}
    backward(engine, last)
train_gpt2.GPT2.backward = counted
import atexit
atexit.register(lambda: print(f"rank {{rank}}: {{calls[0]}} micro-batches", flush=True))
"""


@pytest.mark.parametrize("rank, number, step", [(1, 6, 1), (0, 7, 1), (2, 8, 2)])
def test_a_stop_drops_a_step_in_all(run, out, tmp_path, rank, number, step):
    """Four micro-batches a step: no process begins another one, and the run goes on as if it had not stopped."""
    text = f"-x 4 -n 4 -v 2 -m 3 -d {4 * 3 * B * T}"
    run(3, f"{text} -o {tmp_path / 'whole'}")
    stopped = run(3, text, AT_BATCH.format(rank=rank, number=number, act=TERM))
    assert sorted(re.findall(r"rank \d: (\d+) micro-batches", stopped)) == [str(number)] * 3
    assert [path.name for path in out.glob("DONE*")] == [f"DONE_{step:08d}"]
    run(3, f"{text} -y 1")
    whole = contents(tmp_path / "whole")
    assert {name: contents(out)[name] for name in whole} == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_that_is_damaged_in_one_process(run, out, tmp_path, make_shard, rng, rank):
    """All know of it: they save what was trained, and the one that met it says so; or all pass over it together."""
    tokens = rng.integers(0, 300, 321)
    tokens[192] = tokens[224]  # what the sixth batch of all is to predict at its end
    sound = make_shard(tmp_path / "sound.bin", np.concatenate([tokens[:192], tokens[224:]]))
    tokens[192 + rank * B * T + 3] = 300  # in the seventh
    bad = make_shard(tmp_path / "bad.bin", tokens)
    order = "train_gpt2.shuffle = lambda items, random: items\n"  # as they lie there
    text = "-x 4 -n 100 -d 64"
    error = run(2, f"{text} -i {bad}", order, status=None)
    assert error.count("error: ") == 1 and "bad.bin: token 300 at position" in error and "--skip_bad 1" in error
    assert "checkpoint of step 3 written" in error and (out / "DONE_00000003").exists()
    went_on = run(2, f"{text} -i {bad} -y 1 --skip_bad 1", order)
    assert went_on.count("passed over: ") == 1 and "bad.bin: token 300" in went_on
    expected = losses(run(2, f"{text} -i {sound} -o {tmp_path / 'sound'}", order))
    assert (losses(went_on) == expected[:, 3:]).all()
    assert (losses(run(2, f"{text} -i {bad} -o {tmp_path / 'anew'} --skip_bad 1", order)) == expected).all()


def test_an_error_in_one_process_saves_nothing(run, out):
    """The others are somewhere else: there is no checkpoint to which all could add their part."""
    fault = AT_BATCH.format(rank=1, number=5, act="raise ValueError('a fault')")
    assert "error: a fault" in run(2, "-x 9 -n 3", fault, status=None)
    assert [path.name for path in out.glob("DONE*")] == ["DONE_00000003"]


@pytest.mark.parametrize("script, launcher, arguments, number", [
    ("mpirun_124M.sh", "mpirun", ["a,b,c"], 3), ("slurm_124M.sh", "srun", [], 4),
])
def test_recipes(tmp_path, monkeypatch, script, launcher, arguments, number):
    fake = tmp_path / launcher
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NTASKS": "4", "SLURM_CPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    path = ROOT / "dev/scripts/multi_node" / script
    monkeypatch.setattr("dev.run.flags.launched", lambda: number)
    # the project's own .venv comes first in the recipes' PATH, and may have an mpirun: so from a copy
    copy = tmp_path / "dev/scripts/multi_node" / script
    copy.parent.mkdir(parents=True)
    shutil.copy(path, copy)
    said = subprocess.run(["bash", str(copy), *arguments], capture_output=True, text=True, cwd=tmp_path, check=True)
    words = said.stdout.splitlines()
    flags = parse_flags(words[words.index("train_gpt2.py") + 1:])
    assert abs(flags.total_batch_size / 524288 - 1) < 0.02 and flags.batch_size * flags.sequence_length == 4096
    assert (flags.model, flags.num_processes, flags.resume, flags.checkpoint_every) == ("d12", number, 1, 50)


# ---------------------------------------------------------------------------------------------------------------------
# sums

OVERLAP = """
import atexit, threading
from dev.run import mpi
summed, seen, add_up, backward = threading.Event(), [], mpi.Mpi.add_up, train_gpt2.GPT2.backward
def slow(processes, x):
    time.sleep(0.3)
    add_up(processes, x)
    summed.set()
def watched(engine, last=True):
    gelu_backward = engine.kernels.gelu_backward  # in the middle of a layer's backward pass
    def waiting(*args):
        if engine.processes.size > 1:  # not what compiles
            seen.extend([summed.is_set(), summed.wait(5)])
        gelu_backward(*args)
    engine.kernels.gelu_backward = waiting
    backward(engine, last)
    engine.kernels.gelu_backward = gelu_backward
mpi.Mpi.add_up, train_gpt2.GPT2.backward = slow, watched
atexit.register(lambda: print("summed within the backward pass:", seen, flush=True))
"""


@pytest.mark.parametrize("near", [True, False])
def test_sums_go_on_during_the_backward_pass(run, near):
    """Sums of 0.3 s, three a step: the first begins before the last layer's backward pass and ends in it. --profile
    shows it: what is waited for is less than what sums take."""
    far = "" if near else "\nmpi.Mpi.near = property(lambda p: False, lambda p, x: None)"
    output = run(2, "-x 1 --profile 1", OVERLAP + far)
    assert output.count("summed within the backward pass: [False, True, True, True]") == 2
    sums, waiting = (float(re.search(rf"^{name} +([\d.]+) ms", output, re.MULTILINE)[1])
                     for name in ("sums of gradients", "waiting for sums of gradients"))
    assert sums > 3 * 300 and waiting < 0.9 * sums


SUMS = """
from dev.run import mpi
mpi.BUCKET, mpi.SMALL = 4 * 1000, 4 * 100
calls, add_up = [], mpi.Mpi.add_up
mpi.Mpi.add_up = lambda processes, x: (calls.append(1), add_up(processes, x))
{more}
processes = mpi.Mpi({size})
assert processes.near and processes.threaded == {threaded}
processes.near = {near}
shapes = [(3,), (2, 50), (99,), (7, 500), (1000,), (100,)]
def arrays(rank):
    return [np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) * (rank + 1) for shape in shapes]
mine = arrays(rank)
processes.reduce(mine[:2])
processes.reduce(mine[2:])
processes.wait()
whole = sum(range({size} + 1))
for got, shape in zip(mine, shapes):
    assert (got == whole * np.arange(got.size).reshape(shape)).all(), (shape, got)
# 3 numbers, and 100; then 99, 3500 in four buckets, 1000, and 100
assert len(calls) == 1 + 1 + 1 + 4 + 1 + 1, len(calls)
assert processes.sum(2.5) == 2.5 * {size} and type(processes.sum(rank)) is int
assert processes.any(rank == 1) is True and processes.any(False) is False
assert processes.sum(np.array([1.0, rank])).tolist() == [{size}, sum(range({size}))]
processes.agree(same=7)
processes.close()
print("right")
sys.exit()
"""


@pytest.mark.parametrize("more, threaded", [("", True), ("mpi.load_mpi().Query_thread = lambda: 0", False)])
@pytest.mark.parametrize("size, near", [(2, True), (3, False)])
def test_sums(run, size, near, more, threaded):
    """On one machine or several, and where the MPI library allows no thread"""
    assert run(size, "", SUMS.format(size=size, near=near, more=more, threaded=threaded)).count("right") == size
