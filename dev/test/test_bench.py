"""
The benchmark runs, and knows every kernel: tiny sizes, and no claims about times.
"""
import json
import math
import signal

import numpy as np
import pytest

import train_gpt2 as t
from dev import bench
from dev.doc import plot_bench

TINY_RUN = ["--shapes", "2x8,4x16", "--seconds", "0", "--megabytes", "4"]


@pytest.fixture
def measure(tiny, tmp_path):
    """measure(*flags): run the benchmark on the tiny model; returns what it wrote."""
    def measure(*flags):
        output = tmp_path / "new folder" / "bench.json"
        bench.main(["--model", tiny, *TINY_RUN, "--output", str(output), *flags])
        return json.loads(output.read_text())
    return measure


def test_sections(measure, capsys):
    measure("--only", "memory", "--shapes", "2x8")
    results = measure("--only", "kernels,steps,curve,threads,busy,adamw,sampling")
    sections = {"machine", "ceilings", "memory", "kernels", "steps", "curve", "threads", "busy", "adamw", "sampling"}
    assert sections <= set(results)
    for section in bench.SECTIONS:
        for row in results.get(section, []):
            numbers = {key: x for key, x in row.items() if isinstance(x, float)}
            assert all(math.isfinite(x) and (x > 0 or key == "share") for key, x in numbers.items()), row
    assert [(row["B"], row["T"]) for row in results["steps"]] == [(2, 8), (4, 16)]
    assert [row["B"] * row["T"] for row in results["curve"]] == [16, 32, 64]
    for row in results["adamw"][0], results["sampling"][0]:  # to a ceiling of their own
        assert row["unit"] == "GB/s" and 0 < row["percent"] < 1000
    assert results["adamw"][0]["ratio"] == pytest.approx(100 / results["adamw"][0]["percent"], rel=1e-3)
    drawn = results["sampling"][0]
    assert drawn["tokens_per_second"] == pytest.approx(1000 / drawn["ms"], rel=0.01)
    assert drawn["percent"] == pytest.approx(100 * drawn["tokens_per_second"] / drawn["limit"], rel=1e-3)
    kernels = sum(row["ms"] for row in results["sampling"] if "calls" in row)
    assert 0.1 < drawn["ms"] / kernels < 100  # of one token, not of the many between two pauses
    seen = {row["what"].split()[0] for section in ("kernels", "sampling") for row in results[section] if "calls" in row}
    assert seen == set(bench.COST)
    for B, T in (2, 8), (4, 16):
        shares = [row["share"] for row in results["kernels"] if (row.get("B"), row.get("T")) == (B, T)]
        assert sum(shares) == pytest.approx(100, abs=0.1)
    assert "| a step, B=4, T=16 |" in plot_bench.markdown(results)
    assert "% of the time" in capsys.readouterr().out


def test_the_machine_in_words_and_its_threads(tiny, tmp_path, python):
    """OMP_NUM_THREADS counts, here as everywhere."""
    words = ["-m", "dev.bench", "--model", tiny, *TINY_RUN, "--only", "ceilings", "--output", tmp_path / "bench.json"]
    out, err = python(*words, OMP_NUM_THREADS="1").communicate()
    found = json.loads((tmp_path / "bench.json").read_text())["machine"] if not err else err
    first, second, *_ = out.splitlines()
    assert found["threads"] == 1 and "threads: 1 (" in second
    assert first.startswith(f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB of memory, ")
    assert f"Numba {found['versions']['Numba']}" in first and "{" not in first + second


def test_bfloat16(measure):
    results = measure("--only", "kernels,steps", "--precision", "bf16")
    assert results["precision"] == "bf16" and "bfloat16" in results["matmul"] + results["ceilings"][0]["what"]
    assert "tiny" in results["model"] and "bfloat16 |" in plot_bench.markdown(results).splitlines()[0]


def test_neighbour():
    """It is there meanwhile, and gone afterwards."""
    with bench.neighbour() as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


def test_every_kernel_has_a_cost():
    kernels = {name for name, f in vars(t).items() if getattr(f, "targetoptions", {}).get("parallel")}
    elsewhere = {"multiply_in_cache"}  # no part of a step
    assert kernels - elsewhere == set(bench.COST), "COST in dev/bench.py needs a line for each kernel"


def test_costs():
    """of a (4, 64) step of GPT-2 124M: the products are 6 FLOPs a weight and token; AdamW moves 28 bytes a weight"""
    def empty(*shape):
        return np.broadcast_to(np.float32(0), shape)
    BT, C, OC = 256, 768, 2304
    x, y, weight = empty(BT, C), empty(BT, OC), empty(OC, C)
    kind, forward = bench.COST["matmul_forward"](out=y, inp=x, weight=weight, bias=0)
    assert kind == "fma"
    assert forward + bench.COST["matmul_backward"](dout=y, inp=x, weight=weight)[1] == 6 * BT * weight.size
    assert bench.COST["matmul_forward"](out=y[:1], inp=x[:1], weight=weight)[0] == "read"
    T, hs, pairs = 64, 64, 64 * 65 // 2
    _, attention = bench.COST["attention_forward"](out=x, lse=empty(4, C // hs, T))
    assert attention == 2 * 2 * 4 * (C // hs) * pairs * hs
    assert bench.COST["adamw_update"](params=weight) == ("adamw", 28 * weight.size)


@pytest.mark.parametrize("matmul", ["numba", "blas"])
def test_kernel_times(tiny, rng, matmul):
    engine, calls, tokens = t.build(tiny, matmul=matmul), [], rng.integers(0, 300, (2, 8))
    with pytest.raises(ZeroDivisionError), engine.kernel_times(lambda *call: calls.append(call)):
        loss = engine.forward(tokens, tokens, train=False)
        raise ZeroDivisionError
    assert [name for name, _, _ in calls].count("matmul_forward") == 4 * 2 + 1  # four a layer, and the classifier's
    assert {name for name, _, _ in calls} == {
        "encoder_forward", "layernorm_forward", "matmul_forward", "attention_forward", "fused_classifier"}
    for name, arguments, seconds in calls:
        assert bench.COST[name](**arguments)[1] > 0 and seconds > 0
    count = len(calls)
    assert engine.forward(tokens, tokens, train=False) == loss and len(calls) == count


def test_alternate():
    calls = []
    first, second = bench.alternate([lambda: calls.append("a") or 1.0, lambda: calls.append("b") or 2.0], 6, least=1)
    assert "".join(calls) == "ababab" and (first, second) == ([1, 1], [2, 2])


def test_llmc(measure, tmp_path):
    """a program that prints what llm.c prints, then hangs"""
    program = tmp_path / "train_gpt2"
    program.write_text("""#!/bin/sh
text=dev/data/tinyshakespeare/tiny_shakespeare
cat gpt2_124M.bin ${text}_train.bin ${text}_val.bin | wc -c
for step in 0 1 2 3 4; do echo "step $step: train loss 5.123456 (took 250.500000 ms)"; done
sleep 1000
""")
    program.chmod(0o755)
    ours, theirs = measure("--only", "llmc", "--llmc", str(program))["llmc"]
    assert theirs["ms"] == pytest.approx(250.5)
    assert theirs["ratio"] == pytest.approx(ours["ms"] / 250.5, rel=1e-2, abs=1e-4)
    with pytest.raises(SystemExit):
        measure("--only", "llmc", "--llmc", "/dev/null")


def test_torch_worker(tiny):
    pytest.importorskip("torch")
    peer = bench.Worker(tiny, "eager", 2, 8)
    try:
        assert peer.step() > 0 and peer.step() > 0
        assert 0 < peer.peak_memory < 4 << 30
    finally:
        bench.end(peer.process)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    step = {"B": 4, "T": 64, "ms": 700.0, "limit_ms": 600.0, "percent": 85.0, "tokens_per_second": 365.0}
    on = [step | {"threads": n} for n in (1, 2)]
    results = {"machine": bench.machine(), "model": "d12", "steps": [step], "curve": [step, step | {"T": 128}],
               "llmc": [step | {"ms": 6000.0, "ratio": 0.12}], "threads": on + [on[1] | {"mode": "compiled"}]}
    half = results | {"precision": "bf16", "curve": [], "threads": []}
    plot_bench.plot([results, half], str(tmp_path / "plot.svg"))
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in (
        "A step in float32, in multiples of the hardware's limit", "A step in bfloat16, in multiples of the hardware's "
        "limit", "Tokens a second against tokens a step", "PyTorch, B=4, T=64", "llm.numba, B=4, T=64"))
    with pytest.raises(ValueError, match="HINT"):
        plot_bench.plot([{}], str(tmp_path / "plot.svg"))


def test_plot_of_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"model": "d12", "B": 64, "T": 1024, "precision": "bf16", "ours": [115.2, 113.9], "flash": [141.0]}
    plot_bench.plot([{"runs": [row, row | {"B": 16, "cudnn": [37.8]}], "gpu": "NVIDIA H100"}], str(tmp_path / "x.svg"))
    drawn = (tmp_path / "x.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in (
        "572k", "465k", "433k", "llm.numba", "PyTorch, flash attention", "NVIDIA H100; PyTorch was not measured"))
