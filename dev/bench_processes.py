"""
One process with all cores, or several that share them out? The same step on one machine, in shared memory, as a table.

    python -m pip install -r dev/run/requirements-mpi.txt       mpi4py, and mpirun
    python -m dev.bench_processes                               1, 2, 4 processes, float32 and bfloat16: four minutes
    python -m dev.bench_processes --rows fp32:2,fp32:2:z1       some rows
    python -m dev.bench_processes --model d6 --tokens 1024 --sequence 1024 --ranks 1,2

Each row is a run of train_gpt2.py of its own, with the same tokens a step: N processes have 1/N of the micro-batch and
1/N of the cores each (OMP_NUM_THREADS). They are bound by --bind-to none: the kernel may move threads; rows that say
`cores` by --map-by slot:PE=n, which gives each process n cores of its own; `z1` is -z 1. The median and the best of the
steps after the first; what sums took in their thread a step, and how long the main thread waited for them.
Rows come in the order of their importance: those that --seconds leaves no time for are left out.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dev.run.arguments import Parser
from dev.run.console import program
from dev.run.files import SHARD_MAGIC, new_header, write_file
from dev.run.machine import available_cpus
from dev.run.report import step_seconds

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 100  # seconds of a row; those that compile have more


def find_mpirun():
    """The path of mpirun, that of this environment first. ValueError where there is none"""
    path = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
    if path is None:
        raise ValueError("there is no mpirun\n---> HINT: python -m pip install -r dev/run/requirements-mpi.txt")
    return path


def rows_of(flags):
    """[(precision, processes, options)] to measure: those named, or all, the most important first"""
    if flags.rows:
        rows = [row.split(":") for row in flags.rows.split(",")]
        return [(precision, int(ranks), tuple(options)) for precision, ranks, *options in rows]
    plain = [(precision, ranks, ()) for precision in ("fp32", "bf16") for ranks in flags.ranks]
    several = [(precision, ranks) for precision, ranks, _ in plain if ranks > 1]
    return plain + [(*row, option) for option in (("cores",), ("cores", "z1")) for row in several]


def threads_each(ranks):
    return max(1, available_cpus() // ranks)


def command_of(flags, mpirun, shard, precision, ranks, options, steps):
    """The command of one row, a list of words"""
    binding = ["--map-by", f"slot:PE={threads_each(ranks)}:HWTCPUS"] if "cores" in options else ["--bind-to", "none"]
    launcher = [mpirun, "-np", str(ranks), *binding] if ranks > 1 else []
    if ranks > available_cpus():
        launcher += ["--oversubscribe"]
    return [*launcher, sys.executable, str(ROOT / "train_gpt2.py"), "-e", flags.model, "-i", shard, "-v", "0", "-s",
            "0", "-b", str(flags.tokens // flags.sequence // ranks), "-t", str(flags.sequence), "-x", str(steps),
            "--precision", precision, "-z", str(int("z1" in options)), "--profile", "1"]


def measure(command, threads, limit):
    """What a run says: (seconds of its steps but the first, {a line of its profile: seconds a step}, MiB at the peak).
    RuntimeError where it fails, or is not over after `limit` seconds"""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMPI_ALLOW_RUN_AS_ROOT": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit,
                             check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not over after {limit:.0f} s") from None
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip(" -")]
        raise RuntimeError(next((line for line in lines if "error" in line.lower()), (lines or ["no message"])[0]))
    steps = list(filter(None, map(step_seconds, run.stdout.splitlines())))
    profile = re.findall(r"^(.*?) +([\d.]+) ms +[\d.]+ % of the run", run.stdout, re.MULTILINE)
    memory = float(re.search(r"^peak memory: ([\d,]+) MiB", run.stdout, re.MULTILINE)[1].replace(",", ""))
    return steps[1:], {name: float(ms) / 1e3 / len(steps) for name, ms in profile}, memory


def print_row(flags, precision, ranks, options, threads, result):
    """A row of the table, from what measure() returned"""
    steps, profile, memory = result
    median = statistics.median(steps)
    sums, waited = (1e3 * profile.get(name, 0) for name in ("sums of gradients", "waiting for sums of gradients"))
    print(f"| {precision} | {ranks} x {threads} | {' '.join(options) or '-'} | {1e3 * median:.0f} / "
          f"{1e3 * min(steps):.0f} | {flags.tokens / median:,.0f} | {sums:.0f} / {waited:.0f} | {memory:,.0f} |",
          flush=True)


def main(argv=None):
    """The command line: see --help. Returns the exit status."""
    return program(measure_rows, argv)


def measure_rows(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12", help="a model that train_gpt2.py's -e takes; default d12")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, by all processes; default 1024 = 4 x 256")
    parser.add_argument("--sequence", type=int, default=256, help="tokens in a row of a micro-batch; default 256")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes; default 1,2,4")
    parser.add_argument("--rows", help="PRECISION:PROCESSES[:cores][:z1],...; default: all, in their order")
    parser.add_argument("--steps", type=int, default=10, help="of a row, and one more that is not counted; default 10")
    parser.add_argument("--seconds", type=float, default=230, help="no row begins later; default 230")
    flags = parser.parse_args(argv)
    flags.ranks, mpirun = [int(ranks) for ranks in flags.ranks.split(",")], find_mpirun()
    rows = rows_of(flags)
    for _, ranks, _ in rows:
        if flags.tokens % (flags.sequence * ranks):
            raise ValueError(f"{flags.tokens} tokens are not divided by {ranks} processes of {flags.sequence}")

    begun, compiled = time.perf_counter(), set()
    print(f"{flags.model}, {flags.tokens:,} tokens a step in rows of {flags.sequence}, {available_cpus()} processors, "
          f"medians of {flags.steps} steps\n\n"
          "| | processes x threads | | ms a step, median / best | tokens/s | sums / waited, ms | MiB a process |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shard = os.path.join(folder, "random_train.bin")
        tokens = np.random.default_rng(42).integers(50257, size=64 * flags.tokens + 1).astype(np.uint16)
        write_file(shard, new_header(SHARD_MAGIC, 1, tokens.size), tokens)
        for row in rows:
            if time.perf_counter() - begun > flags.seconds:
                print(f"{':'.join(map(str, (*row[:2], *row[2])))} and what follows: no time left")
                break
            precision, ranks, options = row
            threads = threads_each(ranks)
            try:
                if precision not in compiled:  # a small run, before the first row of this precision
                    small = argparse.Namespace(model="d6", tokens=64, sequence=64)
                    measure(command_of(small, mpirun, shard, precision, 1, (), 2), available_cpus(), 3 * LONGEST)
                    compiled.add(precision)
                result = measure(command_of(flags, mpirun, shard, *row, flags.steps + 1), threads, LONGEST)
                print_row(flags, *row, threads, result)
            except RuntimeError as error:
                print(f"| {precision} | {ranks} x {threads} | {' '.join(options) or '-'} | {error} |", flush=True)
    print(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
