"""
How fast is it, and how fast could it be? One table on the terminal, and the same rows in a JSON file.

    python -m dev.bench                                  everything but the peers
    python -m dev.bench --quick                          without the longest batch
    python -m dev.bench --torch --llmc llm.c/train_gpt2  with PyTorch, and an llm.c trainer that you have built
    python -m dev.bench --precision bf16                 products of bfloat16, PyTorch's under autocast
    python -m dev.bench --only kernels,sampling          some sections; the file keeps its others
    python -m dev.bench --markdown                       the README's table, from the file
    python dev/doc/plot_bench.py                         the README's plot, from the file

"Of the ceiling" is what was reached of the peak (the micro-kernel in the L1 cache, in the precision that is measured),
of the bandwidth at which DRAM is read or, in AdamW's mix, read and written. More than 100 % means that the data came
from a cache. The limit of a step is its model FLOPs, 6 N + 6 L C T a token, at that peak, and then AdamW's 28 bytes a
parameter at the bandwidth of its mix.

Times are wall-clock times: the median, and the best. Batches are random tokens: what they say doesn't change the time.
Run it on a machine that does nothing else. A virtual machine's bandwidth may change from one second to the next (36
and 62 GB/s were seen), so what depends on it most, AdamW and sampling, takes turns with a loop that only moves the same
data.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba import prange

import train_gpt2 as t
from dev.run.arguments import Parser
from dev.run.checkpoints import write_model
from dev.run.console import complaint, open_console
from dev.run.engine import DECAYED, aligned
from dev.run.files import SHARD_MAGIC, new_header, write_file
from dev.run.machine import available_cpus, every_cpu, peak_memory
from dev.run.reading import read_json
from dev.run.report import step_seconds
from dev.run.text import Sampler, generate

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
PAUSE = 0.2  # seconds: until then the threads of the one that was measured before have stopped spinning

# ---------------------------------------------------------------------------------------------------------------------
# measuring


def stopwatch(call, *args):
    """The seconds that a call takes"""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def alternate(calls, seconds, least=3):
    """Make several calls that return seconds, in turns, so that what disturbs the machine disturbs all alike.

    Returns a list of seconds for each: `least` or more, until all of them together have taken `seconds`.
    """
    for call in calls:
        call()  # not counted: it touches memory for the first time, or compiles something
    results = [[] for _ in calls]
    while len(results[0]) < least or sum(map(sum, results)) < seconds:
        for call, times in zip(calls, results):
            time.sleep(PAUSE if len(calls) > 1 else 0)
            times.append(call())
    return results


# From a kernel's arguments: its ceiling, and the FLOPs or bytes that it cannot do without
COST = {
    "encoder_forward": lambda out, **_: ("read", 3 * out.nbytes),
    "encoder_backward": lambda dout, dwpe, **_: ("read", 3 * dout.nbytes + dwpe.nbytes),
    "layernorm_forward": lambda inp, **_: ("read", 2 * inp.nbytes),
    "layernorm_backward": lambda inp, **_: ("read", 4 * inp.nbytes),
    "matmul_forward": lambda out, inp, weight, **_:
        ("read", weight.nbytes) if len(out) == 1 else ("fma", 2 * out.size * inp.shape[1]),
    "matmul_backward": lambda dout, inp, **_: ("fma", 4 * dout.size * inp.shape[1]),
    # two products forward and five backward, and half of each: a token looks only at those before it
    "attention_forward": lambda out, lse, **_: ("fma", 2 * out.size * (lse.shape[2] + 1)),
    "attention_backward": lambda out, lse, **_: ("fma", 5 * out.size * (lse.shape[2] + 1)),
    "attention_decode": lambda k, v, **_: ("read", k.nbytes + v.nbytes),
    "gelu_forward": lambda inp, **_: ("read", 2 * inp.nbytes),
    "gelu_backward": lambda inp, **_: ("read", 3 * inp.nbytes),
    "fused_classifier": lambda logits, **_: ("read", 2 * logits.nbytes),
    "sum_of_squares": lambda x, **_: ("read", x.nbytes),
    "adamw_update": lambda params, **_: ("adamw", 7 * params.nbytes),
}
UNITS = {"fma": "GFLOP/s", "read": "GB/s", "adamw": "GB/s"}


def profile(call, engine, seconds):
    """Make a call a few times. Returns its seconds in each run, and for each kernel of the engine (seconds in each run,
    calls, ceiling, FLOPs or bytes), where calls and FLOPs are those of one run. The products with each weight are kept
    apart."""
    weights = {shape[-2:]: name for name, shape in engine.table if name in DECAYED}
    runs = []

    def record(name, args, seconds):
        label = f"{name} {weights.get(args['weight'].shape, '')}".strip() if "weight" in args else name
        ceiling, amount = COST[name](**args)
        total, calls, _, amounts = runs[-1].get(label, (0.0, 0, None, 0))
        runs[-1][label] = total + seconds, calls + 1, ceiling, amounts + amount

    def run():
        runs.append({})
        return stopwatch(call)
    with engine.kernel_times(record):
        times, = alternate([run], seconds)
    return times, {label: ([r[label][0] for r in runs[1:]], *runs[-1][label][1:]) for label in runs[-1]}


BETA1, BETA2, TINY = np.float32(0.9), np.float32(0.999), np.float32(1e-8)


@t.kernel
def plain_sum(x):
    total = t.ZERO
    for i in prange(x.size):
        total += x[i]
    return total


@t.kernel
def plain_adamw(p, g, m, v):
    for i in prange(p.size):
        m[i] = BETA1 * m[i] + (t.ONE - BETA1) * g[i]
        v[i] = BETA2 * v[i] + (t.ONE - BETA2) * g[i] * g[i]
        p[i] -= TINY * m[i] / (np.sqrt(v[i]) + TINY)


# ---------------------------------------------------------------------------------------------------------------------
# other processes

def peer_environment():
    """For a program with a thread pool of its own: as many threads as we have, and its own way of waiting for work"""
    ours = ("OMP_WAIT_POLICY", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": str(numba.get_num_threads())}


def spawn(command, cwd=ROOT, **options):
    """A Popen with a shell in between: Linux counts what a process's parent holds as the process's own peak."""
    with every_cpu():
        return subprocess.Popen(["sh", "-c", '"$@"; exit $?', "sh", *command], cwd=cwd, start_new_session=True,
                                **options)


def end(process):
    """Kill what spawn() has started."""
    with contextlib.suppress(OSError):  # it is no longer there
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


class Worker:
    """PyTorch in a process of its own, which waits at a pipe, asleep, until it is asked for a step of (B, T) tokens.
    mode: eager, compiled"""

    def __init__(self, model, mode, B, T, precision="fp32"):
        command = [sys.executable, "-m", "dev.bench", "--worker", model, mode, str(B), str(T), precision]
        self.process = spawn(command, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=peer_environment())

    def step(self):
        """The seconds that one step took. RuntimeError where PyTorch failed"""
        with contextlib.suppress(BrokenPipeError):
            print("step", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self.peak_memory = answer["memory"]
        return answer["seconds"]


def worker(model, mode, B, T, precision):
    """The other end of Worker. PyTorch's step is spared the gradient norm, which ours computes."""
    ours = peak_memory()  # mostly Numba, which PyTorch doesn't need
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get in between
    for name in ("OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS"):  # set again by importing train_gpt2
        os.environ.pop(name, None)
    import torch

    from dev import train_gpt2_torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = train_gpt2_torch.build_model(model)[1]
    optimizer = train_gpt2_torch.make_optimizer(model, 1e-4, 0.9, 0.999, 1e-8, 0.0)
    forward = torch.compile(model) if mode == "compiled" else model

    def step(x, y):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(x, y)[1]
        loss.backward()
        optimizer.step()
        return loss.item()
    for _ in sys.stdin:
        try:
            seconds = stopwatch(step, *torch.randint(model.config.V, (2, int(B), int(T))))
            answer = {"seconds": seconds, "memory": peak_memory() - ours}
        except Exception as error:  # noqa: BLE001 - torch.compile fails in many ways
            answer = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(answer), file=answers, flush=True)


@contextlib.contextmanager
def neighbour():
    """Another process, which keeps a processor busy. It is of our session, for which Linux may count processor time: so
    it gets a share as large as each of our threads"""
    with every_cpu():
        process = subprocess.Popen([sys.executable, "-c", "print('busy', flush=True)\nwhile True: pass"],
                                   stdout=subprocess.PIPE)
    with process:
        try:
            process.stdout.readline()
            time.sleep(PAUSE)
            yield process
        finally:
            process.kill()


def lines_of(command, **options):
    """Run a program and yield (seconds since it began, line). It is killed when no more lines are asked for.

    It writes to a terminal: then lines come when they are printed, where a C program would hold them back from a pipe.
    """
    import pty  # there is none on Windows
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = spawn(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    try:
        with open(ours, errors="replace") as file:
            for line in file:
                yield time.perf_counter() - start, line.rstrip()
    except OSError:  # Linux says so when the program has ended
        pass
    finally:
        end(process)


def write_shard(path, tokens):
    write_file(path, new_header(SHARD_MAGIC, 1, tokens.size), tokens.astype(np.uint16))


# ---------------------------------------------------------------------------------------------------------------------
# what the sections share

class Bench:
    """The model, batches, the ceilings, a folder for temporary files, and how rows of the table are made."""

    def __init__(self, flags, folder):
        self.flags, self.folder, self.random = flags, Path(folder), np.random.default_rng(42)
        self.threads = numba.get_num_threads()
        self.model = t.build(flags.model, precision=flags.precision, matmul=flags.matmul)
        self.config, self.ceilings = self.model.config, {}
        self.shapes = [tuple(map(int, shape.split("x"))) for shape in flags.shapes.split(",")]
        self.shapes = self.shapes[:-1] or self.shapes if flags.quick else self.shapes
        self.model.prepare(*self.shapes[0])
        self.shard = str(self.folder / "shard.bin")
        write_shard(self.shard, self.tokens(1 + max(8 * math.prod(shape) for shape in self.shapes)))

    def tokens(self, *shape):
        return self.random.integers(self.config.vocab_size, size=shape, dtype=np.int32)

    def step(self, B, T):
        """Make a whole training step. Returns its seconds"""
        x, y = self.tokens(2, B, T)
        start = time.perf_counter()
        self.model.forward(x, y)
        self.model.backward()
        self.model.update(0, 1e-4)
        return time.perf_counter() - start

    def measure(self, call, *args, least=3):
        return alternate([partial(call, *args)], self.flags.seconds, least)[0]

    def use_threads(self, n):
        """From now on work is divided among n threads."""
        numba.set_num_threads(n)
        with contextlib.redirect_stdout(None):
            self.model.prepare(*self.shapes[0])

    @contextlib.contextmanager
    def peer(self, mode, B, T):
        worker = Worker(self.flags.model, mode, B, T, self.flags.precision)
        try:
            yield worker
        finally:
            end(worker.process)

    def train(self, B, T, *flags, env=None):
        """A run of train_gpt2.py. Returns {a line's beginning, up to a colon: (when it came, the first such line)}."""
        command = [sys.executable, "train_gpt2.py", "-e", self.flags.model, "-i", self.shard, "-j", self.shard,
                   "-b", str(B), "-t", str(T), "--matmul", self.flags.matmul, "--precision", self.flags.precision,
                   *flags]
        lines = list(lines_of(command, env=env))
        seen = {re.split("[:/]", line)[0]: (seconds, line) for seconds, line in reversed(lines)}
        if "peak memory" not in seen:
            raise RuntimeError(f"{' '.join(command)}\n{lines[-1][1] if lines else 'printed nothing'}")
        return seen

    def row(self, what, times, amount, ceiling, peak=None, **more):
        """A row of the table. amount: how many FLOPs or bytes one run takes. peak: if it isn't ceilings[ceiling]"""
        median = float(np.median(times))
        rate = amount / median / 1e9
        return {"what": what, "ms": 1e3 * median, "best_ms": 1e3 * min(times), "runs": len(times), "rate": rate,
                "unit": UNITS[ceiling], "percent": 100 * rate / (peak or self.ceilings[ceiling])} | more

    def step_row(self, what, B, T, times, peak=None, **more):
        flops = B * T * self.model.flops_per_token(T)
        limit = flops / self.ceilings["fma"] / 1e9 + 28 * self.model.num_parameters / self.ceilings["adamw"] / 1e9
        median = float(np.median(times))
        note = more.pop("note", f"{B * T / median:,.0f} tok/s; {limit / median:.0%} of the limit")
        return self.row(what, times, flops, "fma", peak, B=B, T=T, limit_ms=1e3 * limit, note=note,
                        tokens_per_second=B * T / median, **more)

    def kernel_rows(self, call, **more):
        """A profile of a call: the kernels that take the longest first, and what no kernel takes"""
        times, kernels = profile(call, self.model, self.flags.seconds)
        rest = 100.0
        for label, (seconds, calls, ceiling, amount) in sorted(kernels.items(), key=lambda item: -sum(item[1][0])):
            share = 100 * sum(seconds) / sum(times)
            rest -= share
            yield self.row(label, seconds, amount, ceiling, calls=calls, share=share, **more,
                           note=f"{share:4.1f} % of the time, {calls} call{'s' * (calls > 1)}")
        yield {"what": "Python, between kernels", "share": rest, "note": f"{rest:4.1f} % of the time", **more}


# ---------------------------------------------------------------------------------------------------------------------
# the sections: each yields its rows of the table

def ceilings(bench):
    """What this machine can do"""
    bench.use_threads(bench.threads)
    peak = max(bench.model.peak() for _ in range(5)) / 1e9
    size = bench.flags.megabytes << 18
    array = aligned(size, np.ones)
    read = 4e-9 * size / min(bench.measure(stopwatch, plain_sum, array))
    array = [aligned(size // 2, np.ones) for _ in range(4)]
    adamw = 28e-9 * (size // 2) / min(bench.measure(stopwatch, plain_adamw, *array))
    bench.ceilings = {"fma": peak, "read": read, "adamw": adamw}
    names = {"fma": f"{PRECISIONS[bench.flags.precision]} multiply-adds", "read": "reading DRAM",
             "adamw": "AdamW's reading and writing"}
    for key, what in names.items():
        yield {"what": what, "ceiling": key, "rate": bench.ceilings[key], "unit": UNITS[key]}


def kernels(bench):
    """Every kernel within a step, all its calls together; weights are as cold as they are in training"""
    for B, T in bench.shapes:
        yield {"what": f"({B}, {T})"}
        yield from bench.kernel_rows(partial(bench.step, B, T), B=B, T=T)


def steps(bench):
    """Whole steps of (B, T) tokens"""
    for B, T in bench.shapes:
        yield bench.step_row(f"({B}, {T})", B, T, bench.measure(bench.step, B, T))


def curve(bench):
    """Tokens a second against tokens a step"""
    (B, longest), T = bench.shapes[-1], 4
    while T <= longest:
        yield bench.step_row(f"({B}, {T}): {B * T} tokens", B, T, bench.measure(bench.step, B, T))
        T *= 2


def threads(bench):
    """A step on 1, 2, 4 … threads; the ceiling is the peak of as many. With --torch, PyTorch's faster way as well"""
    for B, T in bench.shapes:
        alone = None
        for n in sorted({2**k for k in range(bench.threads.bit_length())} | {bench.threads}):
            bench.use_threads(n)
            peak = bench.model.peak() / 1e9
            times = bench.measure(bench.step, B, T)
            alone = alone or np.median(times)
            speedup = float(alone / np.median(times))
            yield bench.step_row(f"({B}, {T}) on {n}", B, T, times, peak, threads=n, speedup=speedup,
                                 note=f"{speedup:.2f} times one")
            yield from fastest_peer(bench, f"({B}, {T}) PyTorch on {n}", B, T, times, peak)
    bench.use_threads(bench.threads)


def fastest_peer(bench, what, B, T, ours, peak):
    """With --torch a row of PyTorch's step, on as many threads as ours now has, eager or compiled, what is faster"""
    rows = []
    for mode in ("eager", "compiled") if bench.flags.torch else ():
        with contextlib.suppress(RuntimeError), bench.peer(mode, B, T) as peer:
            times = bench.measure(peer.step)
            ratio = float(np.median(ours) / np.median(times))
            rows.append(bench.step_row(what, B, T, times, peak, threads=numba.get_num_threads(), mode=mode,
                                       ratio=ratio, note=f"{mode}; ours takes {ratio:.2f} of it"))
    yield from sorted(rows, key=lambda row: row["ms"])[:1]


def busy(bench):
    """A step while another process keeps a processor busy, in turns with a step without"""
    B, T = bench.shapes[0]

    def disturbed(step):
        with neighbour():
            return step()

    def rows(what, step):
        alone, beside = alternate([step, partial(disturbed, step)], 4 * bench.flags.seconds)
        mean, best = float(np.mean(beside) / np.mean(alone)), min(beside) / min(alone)
        yield bench.step_row(f"({B}, {T}) {what}", B, T, beside, ratio=mean, best_ratio=best,
                             note=f"takes {mean:.2f} times as long on average, at best {best:.2f}")
    yield from rows("ours", partial(bench.step, B, T))
    if bench.flags.torch:
        with bench.peer("eager", B, T) as peer:
            yield from rows("PyTorch, eager", peer.step)


def memory(bench):
    """The peak of `train_gpt2.py -x 2 -m 1` in a process of its own, against what it said that it would need"""
    for B, T in bench.shapes:
        seen = bench.train(B, T, "-x", "2", "-m", "1")
        plan, peak = (float(seen[key][1].split()[-2].replace(",", "")) for key in ("memory", "peak memory"))
        yield {"what": f"({B}, {T})", "rate": peak, "unit": "MiB", "percent": 100 * peak / plan, "plan": plan,
               "B": B, "T": T}


def adamw(bench):
    """AdamW, in turns with a plain loop over the same four arrays, which is its ceiling"""
    model = bench.model
    arrays = [model.host(what).memory for what in ("params", "grads", "m", "v")]
    numbers = np.array([1e-8, 0.9, 0.999, 1, 1, 1e-8, 0, 1], np.float32)  # lr … grad_scale
    times, loop = alternate([partial(stopwatch, t.adamw_update, *arrays, *numbers),
                             partial(stopwatch, plain_adamw, *arrays)], bench.flags.seconds)
    ratio, moved = float(np.median(times) / np.median(loop)), 28 * model.num_parameters
    yield bench.row("all parameters", times, moved, "adamw", 1e-9 * moved / np.median(loop), ratio=ratio,
                    note=f"{ratio:.2f} times the loop's {1e3 * np.median(loop):.1f} ms")


def sampling(bench):
    """Drawing a text, in turns with reading all weights from DRAM, which is its ceiling"""
    model, text, many = bench.model, generate(bench.model, Sampler(), [0], 1 << 30), 16  # tokens between two pauses
    weights = model.host("params").memory
    times, reads = np.array(alternate([partial(stopwatch, lambda: [next(text) for _ in range(many)]),
                                       partial(stopwatch, lambda: [plain_sum(weights) for _ in range(many)])],
                                      bench.flags.seconds)) / many
    speed, limit = 1 / np.median(times), 1 / np.median(reads)
    bench.ceilings["read"] = 1e-9 * weights.nbytes * limit  # as it is now, for the kernels' rows
    yield bench.row("a token", times, weights.nbytes, "read", tokens_per_second=speed, limit=limit,
                    note=f"{speed:.1f} tok/s; the limit is {limit:.1f}")
    yield from bench.kernel_rows(partial(next, text))
    model.rewind()


def start(bench):
    """From the command to the first step, but for making the model; cold: all kernels are compiled"""
    env = os.environ | {"NUMBA_CACHE_DIR": str(bench.folder / "cache")}
    for what in "cold", "warm":
        seen = bench.train(*bench.shapes[0], "-x", "1", "-v", "0", "-s", "0", env=env)
        (ready, line), (built, _), (end, step) = seen["kernels"], seen["[GPT-2]"], seen["step 0"]
        model = built - ready
        yield {"what": what, "rate": end - step_seconds(step) - model, "unit": "s", "model_seconds": model,
               "note": f"{line.split('(')[0].strip()}; making the model: {model:.1f} s more"}


def torch(bench):
    """PyTorch and ours in turns; the ratio is our time to PyTorch's"""
    for B, T in bench.shapes:
        ratios = []
        for mode in "eager", "compiled":
            try:
                with bench.peer(mode, B, T) as peer:
                    times, ours = alternate([peer.step, partial(bench.step, B, T)], 2 * bench.flags.seconds)
            except RuntimeError as error:
                yield {"what": f"({B}, {T}) {mode}", "note": f"failed: {error}"}
                continue
            ratio, best = float(np.median(ours) / np.median(times)), min(ours) / min(times)
            mib = peer.peak_memory / 2**20
            yield bench.step_row(f"({B}, {T}) ours", B, T, ours)
            yield bench.step_row(f"({B}, {T}) {mode}", B, T, times, mode=mode, ratio=ratio, best_ratio=best,
                                 peak_mib=mib, note=f"ratio {ratio:.3f}, of the best times {best:.3f}; "
                                                    f"peak memory {mib:,.0f} MiB")
            ratios.append(ratio)
        if ratios:
            yield {"what": f"({B}, {T}) the better", "note": f"ratio {max(ratios):.3f}"}


def llmc(bench):
    """llm.c's trainer, whose batch is (4, 64), on a checkpoint and shards of ours"""
    folder = bench.folder / "llmc"
    data = folder / "dev/data/tinyshakespeare"
    data.mkdir(parents=True)
    write_model(str(folder / "gpt2_124M.bin"), bench.model)
    for split in "train", "val":
        write_shard(str(data / f"tiny_shakespeare_{split}.bin"), bench.tokens(1 << 13))
    times, command = [], [os.path.abspath(bench.flags.llmc)]
    with contextlib.closing(lines_of(command, cwd=folder, env=peer_environment())) as lines:
        for _, line in lines:
            times += filter(None, [step_seconds(line)])
            if len(times) > 3:
                break
    if len(times) < 4:
        raise RuntimeError(f"{bench.flags.llmc} made {len(times)} steps")
    ours = bench.measure(bench.step, 4, 64)
    ratio = float(np.median(ours) / np.median(times[1:]))
    yield bench.step_row("(4, 64) ours", 4, 64, ours)
    yield bench.step_row("(4, 64) llm.c", 4, 64, times[1:], ratio=ratio, note=f"ratio {ratio:.3f}")


SECTIONS = {f.__name__: f for f in (ceilings, kernels, steps, curve, threads, busy, memory, adamw, sampling, start,
                                    torch, llmc)}


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def processor():
    """The name of the CPU, as far as the system says"""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def machine():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    versions = {"Python": platform.python_version(), "NumPy": np.__version__, "Numba": numba.__version__,
                "llvmlite": llvmlite.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["PyTorch"] = importlib.metadata.version("torch")
    return {"cpu": processor(), "cores": available_cpus(), "threads": numba.get_num_threads(), "vector_bits": 32 * t.VL,
            "memory_gib": round(memory / 2**30), "system": f"{platform.system()} {platform.machine()}",
            "versions": versions}


def in_words(setting):
    """What is measured, and on which machine, as two lines of text"""
    found = setting["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB of memory, {found['system']} | "
            f"{versions}\nmodel: {setting['model']} | precision: {setting['precision']} | {setting['matmul']}")


def parse_flags(argv):
    parser = Parser(prog="python -m dev.bench", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="leave out the longest batch")
    add("--torch", action="store_true", help="also measure PyTorch, eager and compiled")
    add("--llmc", metavar="PATH", help="also measure this train_gpt2 of llm.c")
    add("--only", metavar="SECTION,…", help=f"some of {', '.join(SECTIONS)}; the ceilings are always measured")
    add("--precision", default="fp32", choices=PRECISIONS, help="what products read (%(default)s)")
    add("--output", help="the JSON file (data/bench.json, of bf16 data/bench_bf16.json)")
    add("--markdown", action="store_true", help="measure nothing, print the README's table from the JSON file")
    add("--model", default="d12", help="a descriptor or a checkpoint (%(default)s)")
    add("--shapes", default="4x64,4x256,4x1024", help="B x T of the steps (%(default)s)")
    add("--matmul", default="auto", choices=("auto", "numba", "blas"), help="who multiplies matrices (%(default)s)")
    add("--seconds", type=float, default=4.0, help="how long each thing is measured, at least (%(default)s)")
    add("--megabytes", type=int, default=1024, help="memory that is read to find the bandwidth (%(default)s)")
    add("--worker", nargs=5, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    flags.output = flags.output or f"data/bench{'_bf16' if flags.precision == 'bf16' else ''}.json"
    optional = {"torch": flags.torch, "llmc": flags.llmc}
    flags.sections = flags.only.split(",") if flags.only else [name for name in SECTIONS if optional.get(name, True)]
    if not set(flags.sections) <= set(SECTIONS):
        parser.error(f"--only {flags.only}: the sections are {', '.join(SECTIONS)}")
    if "torch" in flags.sections and not importlib.util.find_spec("torch"):
        parser.error("PyTorch is not installed: pip install torch")
    if "llmc" in flags.sections and not os.access(flags.llmc or "", os.X_OK):
        parser.error(f"--llmc must be the path of llm.c's train_gpt2, not {flags.llmc}")
    return flags


def show(row):
    times = f"{row['ms']:11,.2f}{row['best_ms']:12,.2f}" if "ms" in row else " " * 23
    rate = f"{row['rate']:11,.1f} {row['unit']:<7}" if "rate" in row else " " * 19
    percent = f"{row['percent']:8.1f} %" if "percent" in row else " " * 10
    print(f"{row['what']:<27}{times}{rate}{percent}  {row.get('note', '')}".rstrip(), flush=True)


def run(flags):
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    engine = t.build(flags.model, precision=flags.precision, matmul=flags.matmul)
    setting = {"machine": machine(), "model": flags.model, "precision": flags.precision, "matmul": engine.describe()[0]}
    print(in_words(setting))
    if load > 0.5:
        print(f"load average {load:.1f}: other programs are running, so these numbers are not what the machine can do")
    results = setting | {"load_average": load}
    if flags.only and os.path.isfile(flags.output):
        old = read_json(flags.output)
        results = old | results if all(old.get(key) == setting[key] for key in setting) else results
    os.makedirs(os.path.dirname(os.path.abspath(flags.output)), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(flags, folder)
        print(f"{'':<27}{'median ms':>11}{'best ms':>12}{'rate':>11} {'':<7}{'of ceiling':>10}")
        for name, section in SECTIONS.items():
            if name != "ceilings" and name not in flags.sections:
                continue
            print(f"--- {name}: {section.__doc__}")
            results[name] = []
            for row in section(bench):
                show(row)
                results[name].append({key: round(value, 4) if isinstance(value, float) else value
                                      for key, value in row.items()})
            Path(flags.output).write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {flags.output}")


def main(argv=None):
    open_console()
    flags = parse_flags(argv)
    try:
        if flags.worker:
            worker(*flags.worker)
        elif flags.markdown:
            from dev.doc.plot_bench import markdown
            print(markdown(read_json(flags.output)))
        else:
            run(flags)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(complaint(error))


if __name__ == "__main__":
    main()
