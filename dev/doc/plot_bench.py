"""
Pictures what dev/bench.py and dev/bench_gpu.py measured: how long a training step takes, against the peers and the
hardware's limit.

    python -m dev.bench --torch --llmc llm.c/train_gpt2
    python -m dev.bench --torch --precision bf16 --only steps,torch
    python dev/doc/plot_bench.py data/bench.json data/bench_bf16.json     both, one above the other; needs matplotlib
    python dev/doc/plot_bench.py data/bench_bf16.json -o dev/doc/step_time_bf16.svg
    python dev/doc/plot_bench.py data/bench_gpu.json -o dev/doc/gpu.svg
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import statistics
import textwrap
from pathlib import Path

from dev.data.command_line import DATA, run, show
from dev.run.arguments import Parser
from dev.run.reading import read_json

OURS, INK, GRID = "#0a7e8c", "#333333", "#dddddd"
PEERS = {"PyTorch": "#e8924a", "llm.c": "#a8adb3"}


def results_by_shape(results):
    """[(the row of our step, {peer: its row})], a pair for each (B, T); of PyTorch's ways the fastest."""
    pairs = []
    for ours in results.get("steps", []):
        found = {}
        for peer, section in (("PyTorch", "torch"), ("llm.c", "llmc")):
            rows = [row for row in results.get(section, [])
                    if "ratio" in row and (row["B"], row["T"]) == (ours["B"], ours["T"])]
            if rows:
                found[peer] = min(rows, key=lambda row: row["ms"])
        pairs.append((ours, found))
    return pairs


def seconds(ms):
    return f"{ms:.0f} ms" if ms < 999.5 else f"{ms / 1e3:.{max(0, 3 - len(str(int(ms / 1e3))))}f} s"


def machine(results):
    if "gpu" in results:
        return f"{results['gpu']}; PyTorch {results.get('torch', 'was not measured')}"
    m = results["machine"]
    return (f"{m['cpu']}, {m['threads']} threads, {m['vector_bits']}-bit vectors; "
            + ", ".join(f"{name} {version}" for name, version in m["versions"].items()))


def precision(results):
    return "bfloat16" if results.get("precision") == "bf16" else "float32"


def markdown(results):
    """The README's table of a bench.json"""
    def line(*cells):
        return "| " + " | ".join(cells) + " |"
    title = f"{results['model']}, {precision(results)}"
    lines = [line(title, "llm.numba", "PyTorch", "llm.c", "the limit"), line(*["---"] * 5)]
    pairs = results_by_shape(results)
    for ours, peers in pairs:
        cells = [f"{seconds(peers[p]['ms'])}, ours takes {peers[p]['ratio']:.2f} of it" if p in peers else ""
                 for p in PEERS]
        lines.append(line(f"a step, B={ours['B']}, T={ours['T']}",
                          f"{seconds(ours['ms'])}, {ours['percent']:.0f} % of the peak",
                          *cells, seconds(ours["limit_ms"])))
    torch = {(ours["B"], ours["T"]): f"{peers['PyTorch']['peak_mib'] / 1024:.1f} GiB"
             for ours, peers in pairs if "PyTorch" in peers}
    for row in results.get("memory", []):
        lines.append(line(f"peak memory, B={row['B']}, T={row['T']}", f"{row['rate'] / 1024:.1f} GiB",
                          torch.get((row["B"], row["T"]), ""), "", ""))
    for row in results.get("sampling", [])[:1]:
        lines.append(line("sampling", f"{row['tokens_per_second']:.1f} tok/s", "", "", f"{row['limit']:.1f} tok/s"))
    if "start" in results:
        start = ", ".join(f"{row['rate']:.1f} s {row['what']}" for row in results["start"])
        lines.append(line("from command to first step", start, "", "", ""))
    peaks = ", ".join(f"{row['what']} {row['rate']:,.0f} {row['unit']}" for row in results["ceilings"])
    return "\n".join(lines) + f"\n\nMeasured on: {machine(results)}. Its ceilings: {peaks}."


def plot_steps(axes, results):
    """Bars: a step's time as a multiple of the hardware's limit. They stand on it, so their height is the loss."""
    pairs = results_by_shape(results)
    names = ["llm.numba"] + [peer for peer in PEERS if any(peer in peers for _, peers in pairs)]
    highest, labels = 1.5, {}
    for group, (ours, peers) in enumerate(pairs):
        rows = {"llm.numba": ours} | peers
        present = [name for name in names if name in rows]
        for i, name in enumerate(present):
            x, times = group + (i - (len(present) - 1) / 2) * 0.27, rows[name]["ms"] / rows[name]["limit_ms"]
            bar = axes.bar(x, max(times - 1, 0), 0.25, bottom=1, color=PEERS.get(name, OURS))
            labels.setdefault(name, bar)
            axes.annotate(seconds(rows[name]["ms"]), (x, max(times, 1)), (0, 3), textcoords="offset points",
                          ha="center", color=INK, fontsize=9, weight="bold" if name == "llm.numba" else "normal")
            highest = max(highest, times)
    ticks = [2**k for k in range(12) if 2**k < 2 * highest]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{n} ×" for n in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.96, 1.35 * highest)
    axes.set_xlim(-0.55, len(pairs) - 0.45)
    axes.set_xticks(range(len(pairs)), [f"B={ours['B']}, T={ours['T']}\nlimit {seconds(ours['limit_ms'])}"
                                        for ours, _ in pairs])
    axes.axhline(1, color=INK, linewidth=1.2)
    axes.grid(axis="y", color=GRID)
    axes.legend(labels.values(), labels, frameon=False, loc="upper right", ncols=len(labels))
    axes.set_title(f"A step in {precision(results)}, in multiples of the hardware's limit", loc="left")


def plot_curve(axes, results):
    """Lines: tokens a second against tokens a step, with the limit above"""
    rows = results["curve"]
    tokens = [row["B"] * row["T"] for row in rows]
    limit = [1e3 * n / row["limit_ms"] for n, row in zip(tokens, rows, strict=True)]
    axes.fill_between(tokens, limit, 1.15 * max(limit), color="#f0f0f0", linewidth=0)
    axes.plot(tokens, limit, color=INK, linewidth=1.2)
    axes.plot(tokens, [row["tokens_per_second"] for row in rows], "o-", color=OURS, linewidth=2, markersize=5,
              clip_on=False, zorder=3)
    middle = len(rows) // 2
    axes.annotate("the limit", (tokens[middle], limit[middle]), (-6, 6), textcoords="offset points", ha="right",
                  color=INK)
    axes.annotate("llm.numba", (tokens[middle], rows[middle]["tokens_per_second"]), (8, -12),
                  textcoords="offset points", color=OURS, weight="bold")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in tokens])
    axes.set_xticks([], minor=True)
    axes.set_xlim(tokens[0], tokens[-1])
    axes.set_ylim(0, 1.15 * max(limit))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=GRID)
    axes.set_title("Tokens a second against tokens a step", loc="left")


def plot_threads(axes, results):
    """Lines: tokens a second against threads, of ours and of PyTorch's step, for each shape"""
    rows = [row for row in results["threads"] if "threads" in row]
    shapes = list(dict.fromkeys((row["B"], row["T"]) for row in rows))
    for (B, T), style in zip(shapes, ("o-", "s--", "^:", "d-."), strict=False):
        for name, color in ("llm.numba", OURS), ("PyTorch", PEERS["PyTorch"]):
            points = [(row["threads"], row["tokens_per_second"]) for row in rows
                      if (row["B"], row["T"]) == (B, T) and ("mode" in row) == (name == "PyTorch")]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, linewidth=2, markersize=5,
                          label=f"{name}, B={B}, T={T}")
    counts = sorted({row["threads"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"Tokens a second against threads, {precision(results)}", loc="left")


def plot_runs(axes, results):
    """Bars: tokens a second on a GPU, of ours and of PyTorch with its kernels for attention, for each row"""
    rows = results["runs"]
    peers = {"ours": ("llm.numba", OURS), "flash": ("PyTorch, flash attention", "#e8924a"),
             "cudnn": ("PyTorch, cuDNN's attention", "#f3c29b"),
             "efficient": ("PyTorch, memory-efficient attention", "#b9a3d0")}
    for name, (label, color) in peers.items():
        for group, row in enumerate(rows):
            if name in row:
                place = group + ([peer for peer in peers if peer in row].index(name) - 1) * 0.27
                rate = row["B"] * row["T"] / statistics.mean(row[name]) * 1e3
                axes.bar(place, rate, 0.25, color=color, label=label)
                label = None  # once in the legend
                axes.annotate(f"{rate / 1e3:,.0f}k", (place, rate), (0, 3), ha="center", fontsize=7,
                              textcoords="offset points", color=INK, weight="bold" if name == "ours" else "normal")
    axes.set_xticks(range(len(rows)), [f"{row['model']}, B={row['B']}\n{row['precision']}" for row in rows])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=GRID)
    axes.margins(y=0.25)
    axes.legend(frameon=False, loc="upper right", fontsize=8, ncols=2)
    axes.set_title(f"Tokens a second, T={rows[0]['T']}", loc="left")


def plot(measured, path):
    """Draw what there is of steps, curve, threads and runs, a panel each, into a file whose name ends in .svg or .png.
    measured: what files of dev/bench.py and bench_gpu.py hold, a dictionary each."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a plot needs matplotlib\n---> HINT: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams.update({
        "svg.hashsalt": "llm.numba", "font.size": 10, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.titleweight": "bold", "axes.titlesize": 11, "axes.titlepad": 12, "axes.edgecolor": "#999999",
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot
    panels = [(draw, width, results) for key, draw, width in
              (("steps", plot_steps, 1.25), ("curve", plot_curve, 1), ("threads", plot_threads, 1),
               ("runs", plot_runs, 1.6))
              for results in measured if results.get(key)]
    if not panels:
        raise ValueError("neither steps, curve, threads nor runs have been measured\n---> HINT: python -m dev.bench")
    widths = [width for _, width, _ in panels]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.4 * sum(widths), 4.4), squeeze=False,
                                   layout="constrained", width_ratios=widths)
    for (draw, _, results), a in zip(panels, axes[0], strict=True):
        draw(a, results)
    model = f"GPT-2 {measured[0]['model']}. " if "model" in measured[0] else ""
    caption = textwrap.fill(model + machine(measured[0]), round(80 * sum(widths)))
    figure.supxlabel(caption, fontsize=8, color="#777777")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="*", default=[DATA / "bench.json"],
                        help="what dev/bench.py wrote (data/bench.json)")
    parser.add_argument("-o", "--output", default=str(Path(__file__).with_name("step_time.svg")),
                        help=".svg or .png (dev/doc/step_time.svg)")
    flags = parser.parse_args(argv)
    plot([read_json(file) for file in flags.json], flags.output)
    print(f"wrote {show(flags.output)}")


if __name__ == "__main__":
    run(main)
