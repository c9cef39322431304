"""
How fast is a GPU's training step, and PyTorch's beside it? A table on the terminal, and the same rows in a JSON file.

    python -m dev.bench_gpu                                     GPT-2 124M, B = 4, 16, 64, T = 1024, and its kernels
    python -m dev.bench_gpu --torch                             beside compiled PyTorch, with flash and cuDNN attention
    python -m dev.bench_gpu --runs d24:16,d36:8 --torch         other models and batches
    python -m dev.bench_gpu --runs d12:16 --precision fp32      products in TF32
    python dev/doc/plot_bench.py data/bench_gpu.json -o dev/doc/gpu.svg      the README's plot, from the file

Every figure comes from a process of its own, one after another, on a card that nobody else uses. A step is what a
training loop does: a fresh batch, forward, backward, the gradients' norm, clipping to 1, AdamW, and reading the loss.
PyTorch has bfloat16 autocast (or TF32), fused AdamW and a vocabulary that is padded as ours is. A product's ceiling is
the card's peak, another kernel's the rate at which the card copies memory. Memory is all that the card has in use.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PEERS = "flash", "cudnn"  # PyTorch's kernels for attention


def measure(step, steps):
    """Seconds of each of so many steps, after some that are not counted"""
    for _ in range(5):
        step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def copy_rate(gpu, size=256 << 20):
    """Bytes a second that the card reads and writes where it copies so many"""
    from cuda.bindings import runtime
    source, target = (gpu.allocate(size) for _ in range(2))
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    ms = gpu.milliseconds(lambda: runtime.cudaMemcpyAsync(target, source, size, kind, gpu.stream), 10)
    return 2 * size / ms * 1e3


def ours(model, B, T, precision, steps):
    """Our engine's times, and (milliseconds, calls, FLOPs, bytes) of each kernel in one step"""
    begin = time.perf_counter()
    from train_gpt2 import build
    engine = build(model, "cuda", precision)
    engine.prepare(B, T, recompute=0)
    random, count = np.random.default_rng(0), 0

    def step():
        nonlocal count
        tokens = random.integers(engine.config.vocab_size, size=(B, T + 1), dtype=np.int32)
        loss = engine.forward(tokens[:, :-1], tokens[:, 1:])
        engine.backward()
        norm = engine.grad_norm()
        engine.update(count, 3e-4, norm=norm, grad_clip=1.0, weight_decay=0.1)
        count += 1
        return float(loss)
    step()
    first = time.perf_counter() - begin
    times, kernels = measure(step, steps), defaultdict(lambda: [0.0, 0, 0, 0])
    C, Vp = engine.config.channels, engine.config.padded_vocab_size
    weights = {C, 3 * C, 4 * C, Vp}  # their rows

    def record(name, arguments, seconds):
        buffers = [x for x in arguments.values() if hasattr(x, "nbytes")]
        rows = next((x.shape[0] for x in buffers if " " in name and x.shape[0] not in weights), 0)  # of a product
        weight = next((x.size for x in buffers if " " in name and x.shape[0] in weights), 0)
        for i, more in enumerate((1e3 * seconds, 1, 2 * rows * weight, sum(x.nbytes for x in buffers))):
            kernels[name][i] += more
    with engine.kernel_times(record):
        step()
        engine.gpu.synchronize()
    flops, (free, total) = B * T * engine.flops_per_token(T), engine.gpu.free_memory()
    return {"times": times, "first": first, "kernels": kernels, "peak": engine.peak(), "flops": flops,
            "memory": total - free, "copy": copy_rate(engine.gpu), "gpu": engine.gpu.name}


def torch(attention, model, B, T, precision, steps):
    """Compiled PyTorch's times"""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from dev import train_gpt2_torch as reference
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = reference.config_from_descriptor(model)[1]
    config = reference.Config(**{**vars(config), "V": config.Vp})
    net = reference.GPT2(config).cuda()
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    optimizer = reference.make_optimizer(net, 3e-4, 0.9, 0.999, 1e-8, 0.1)
    forward = torch.compile(lambda x, y: net(x, y)[1])

    def step():
        tokens = torch.randint(50257, (B, T + 1)).cuda(non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION}
    with sdpa_kernel(backends[attention]):
        times = measure(step, steps)
        with torch.profiler.profile() as profile:
            step()
    names = {event.key for event in profile.key_averages() if "attention" in event.key and "backward" not in event.key}
    free, total = torch.cuda.mem_get_info()
    return {"times": times, "version": torch.__version__, "attention": sorted(names), "memory": total - free}


def worker(who, model, B, T, precision, steps):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get in between
    B, T, steps = int(B), int(T), int(steps)
    result = ours(model, B, T, precision, steps) if who == "ours" else torch(who, model, B, T, precision, steps)
    print(json.dumps(result), file=answers, flush=True)


def ask(who, *args, **variables):
    """What a worker finds out, with such variables in its environment; None, with a line about it, where it fails"""
    command = [sys.executable, os.path.abspath(__file__), "--worker", who, *map(str, args)]
    caches = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # they take one peer's attention for the other's
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | caches | variables)
    if done.returncode == 0:
        return json.loads(done.stdout)
    reason = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    print(f"{who:10} failed: {' '.join(reason)}")
    return None


def measure_start(model, B, T, precision):
    """{what: seconds} from importing the trainer to the first step's loss: with nothing compiled, with everything"""
    with tempfile.TemporaryDirectory() as cache:
        found = {what: ask("ours", model, B, T, precision, 1, NUMBA_CACHE_DIR=cache, CUDA_CACHE_PATH=cache)
                 for what in ("cold", "warm")}
    return {what: result["first"] for what, result in found.items() if result}


def describe(who, row, found):
    """A line about what a worker found"""
    ms, best, B, T = 1e3 * statistics.median(found["times"]), 1e3 * min(found["times"]), row["B"], row["T"]
    line = f"{row['model']} B={B} T={T} {row['precision']} {who:10} median {ms:8.2f} ms, best {best:8.2f}, "
    line += f"{B * T / ms * 1e3:10,.0f} tok/s, {found['memory'] / 2**30:.1f} GiB, "
    if who == "ours":
        return line + f"{100 * found['flops'] / ms / 1e-3 / found['peak']:.1f} % of {found['gpu']}'s peak"
    return line + f"PyTorch {found['version']}: {' '.join(found['attention'])}"


def kernel_lines(found):
    """A line about each kernel of our step, the longest first: its time, and its rate beside its ceiling"""
    kernels = sorted(found["kernels"].items(), key=lambda item: -item[1][0])
    total = sum(ms for _, (ms, *_) in kernels)
    for name, (ms, calls, flops, size) in kernels:
        product, memory = (flops, "TFLOP/s", 1e12, found["peak"]), (size, "GB/s", 1e9, found["copy"])
        done, unit, scale, ceiling = product if flops else memory
        rate = done / ms * 1e3
        yield (f"    {name:26}{calls:5} x {ms / calls:8.3f} ms = {ms:8.2f} ms {100 * ms / total:5.1f} % "
               f"{rate / scale:8.0f} {unit}, {100 * rate / ceiling:3.0f} % of its ceiling")


def compare(row, peers, flags):
    """Measure one model and batch, ours before and after the peers, since a card gets warm; fills the row. Returns
    {gpu: its name, torch: PyTorch's version}, as far as they are found out."""
    about = {}
    for who in "ours", *peers, *(("ours",) if peers else ()):
        found = ask(who, row["model"], row["B"], row["T"], flags.precision, flags.steps)
        if not found:
            continue
        row.setdefault(who, []).append(1e3 * statistics.median(found["times"]))
        row.setdefault("memory", {})[who] = found["memory"]
        if who == "ours":
            about["gpu"], row["kernels"], lines = found["gpu"], found["kernels"], list(kernel_lines(found))
        else:
            about["torch"] = found["version"]
        print(describe(who, row, found), flush=True)
    for who in peers:
        if who in row and "ours" in row:
            ratio = min(row[who]) / statistics.mean(row["ours"])
            print(f"    ours are {ratio:.3f} times as fast as PyTorch with {who}")
    if "ours" in row and flags.kernels:
        print("\n".join(lines))
    return about


def run(flags):
    runs, results = [name.split(":") for name in flags.runs.split(",")], {"runs": []}
    peers = (PEERS if flags.precision == "bf16" else ("efficient",)) if flags.torch else ()
    results["start"] = measure_start(runs[0][0], int(runs[0][1]), flags.sequence_length, flags.precision)
    for what, seconds in results["start"].items():
        print(f"{runs[0][0]} B={runs[0][1]} first step after {seconds:.1f} s, {what}")
    for model, B in runs:
        row = {"model": model, "B": int(B), "T": flags.sequence_length, "precision": flags.precision}
        results.update(compare(row, peers, flags))
        results["runs"].append(row)
    with open(flags.output, "w") as file:
        json.dump(results, file, indent=1)
    print(f"wrote {flags.output}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", default="d12:4,d12:16,d12:64", help="model:B,… (%(default)s)")
    add("-t", "--sequence_length", type=int, default=1024, help="T (%(default)s)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="fp32: products in TF32 (%(default)s)")
    add("--steps", type=int, default=40, help="steps that are timed (%(default)s)")
    add("--torch", action="store_true", help="also measure compiled PyTorch")
    add("--kernels", action="store_true", help="also a table of the kernels")
    add("--output", default=os.path.join(ROOT, "data", "bench_gpu.json"), help="the JSON file (%(default)s)")
    add("--worker", nargs=6, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.worker:
        worker(*flags.worker)
    else:
        run(flags)


if __name__ == "__main__":
    main()
