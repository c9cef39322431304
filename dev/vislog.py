"""
Plots training runs: loss, learning rate and, where a run measured it, HellaSwag, from the main.log in output folders.

    python dev/vislog.py RUN [RUN ...] -o run.png                a run is a folder, or a file such as RUN/main.log
    python dev/vislog.py a=RUN b=RUN -o runs.svg --smooth 50     under other names, smoothed over 50 steps
    python dev/vislog.py RUN --line published=1.88              with a line at a loss to compare with
    python dev/vislog.py RUN -o run.csv                          a table: a line a step, for other programs
    python dev/vislog.py RUN -o run.html --watch                 a page that shows a run while it goes on
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import csv
import html
import io
import itertools
import math
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

from dev.run.arguments import Parser
from dev.run.console import program
from dev.run.files import write_file

# What OpenAI's checkpoints reach: validation loss on FineWeb and HellaSwag accuracy, as in llm.c's dev/vislog.ipynb.
GPT2 = {"124M": (3.424958, 0.294463), "350M": (3.083089, 0.375224),
        "774M": (3.000580, 0.431986), "1558M": (2.831273, 0.488946)}
COLORS = "#2563c9", "#d9662b", "#2a8f5f", "#8a4fbf", "#c2334d", "#7d6a1f", "#1f8a9c", "#5b5b5b"
LARGEST = 1e30  # of the numbers in a log: a picture of greater ones cannot be drawn
INK, FAINT, GRID = "#222222", "#767676", "#e6e6e6"

# ---------------------------------------------------------------------------------------------------------------------
# what a log says


def read_log(path):
    """{"trl": {step: loss}, "lr", "norm", "tel", "eval"} of a main.log, and the number of lines that make no sense.

    A step that was done twice, since the run was stopped in between, counts as it was done the last time.
    """
    streams, malformed = defaultdict(dict), 0
    for line in Path(path).read_text(errors="replace").splitlines():
        words = re.fullmatch(r"s:(\d+)((?: \w+:\S+)+)\s*", line)
        try:
            values = {name: float(value) for name, value in (word.split(":") for word in words[2].split())}
        except (TypeError, ValueError):  # no match, not a number
            values = {"": math.nan}
        if all(abs(value) < LARGEST for value in values.values()) and len(words[1]) < 16:
            for name, value in values.items():
                streams[name][int(words[1])] = value
        else:
            malformed += 1
    return streams, malformed


def find_runs(arguments):
    """[(name, path of its log)] for folders and files, each optionally as NAME=PATH. ValueError where there is none."""
    runs = []
    for argument in arguments:
        name, _, path = argument.rpartition("=") if not Path(argument).exists() else ("", "", argument)
        path = Path(path)
        log = path / "main.log" if path.is_dir() else path
        if not log.is_file():
            raise ValueError(f"no {log}\n---> HINT: a run writes its log into the folder that -o names")
        runs.append((name or (log.resolve().parent.name if log.name == "main.log" else log.stem), log))
    return runs


def columns(stream):
    """The steps of a stream in their order, and the values beside them"""
    steps = sorted(stream)
    return steps, [stream[step] for step in steps]


def smoothed(values, window):
    """The mean of each value and those around it: `window` of them; fewer at the beginning, where values fall fast, and
    at the end none that come later"""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = ((max(0, i - window // 2), min(i + min(window // 2, i) + 1, len(values))) for i in range(len(values)))
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ends]


# ---------------------------------------------------------------------------------------------------------------------
# the picture

def spread(wanted, gap):
    """Places as near as can be to those wanted, in order, with a gap between any two"""
    groups = []  # (middle, indices): neighbours that would be too close share a group
    for i in sorted(range(len(wanted)), key=wanted.__getitem__):
        middle, group = wanted[i], [i]
        while groups and middle - groups[-1][0] < gap * (len(group) + len(groups[-1][1])) / 2:
            other, before = groups.pop()
            middle = (other * len(before) + middle * len(group)) / (len(before) + len(group))
            group = before + group
        groups.append((middle, group))
    places = {i: middle + gap * (k - (len(group) - 1) / 2) for middle, group in groups for k, i in enumerate(group)}
    return [places[i] for i in range(len(wanted))]


def label_ends(axes, labels, size=9):
    """Names at the right, beside the ends of their lines. labels: (y, lines of text, color)"""
    low, high = axes.get_ylim()
    at = [min(max((y - low) / (high - low), 0), 1) for y, _, _ in labels]
    height = axes.get_position().height * axes.figure.get_figheight() * 72
    lines = max((len(text) for _, text, _ in labels), default=1)
    for y, (_, text, color) in zip(spread(at, (1.25 * lines + 0.35) * size / height), labels, strict=True):
        axes.annotate("\n".join(text), (1, y), (8, 0), xycoords="axes fraction", textcoords="offset points",
                      color=color, fontsize=size, va="center", linespacing=1.25, annotation_clip=False)


def draw_lines(axes, lines):
    """Dotted lines at losses to compare with. lines: (name, loss)"""
    for name, loss in lines:
        axes.axhline(loss, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(f"{name}: {loss:g}", (0.992, loss), (0, 2), xycoords=("axes fraction", "data"), color=FAINT,
                      textcoords="offset points", fontsize=8, ha="right", va="bottom")


def draw_references(axes, which):
    """Dotted lines at the GPT-2 figures that lie in the picture. Their names are staggered, since two are close."""
    low, high = axes.get_ylim()
    seen = [(size, figures[which]) for size, figures in GPT2.items() if low <= figures[which] <= high]
    for i, (size, value) in enumerate(seen):
        above = size in ("124M", "350M")
        axes.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(f"GPT-2 {size}", (0.008 + 0.095 * i, value), (0, 2 if above else -2.5),
                      xycoords=("axes fraction", "data"), textcoords="offset points", color=FAINT, fontsize=7.5,
                      va="bottom" if above else "top", zorder=1.6,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8})
    return bool(seen)


def style(axes, title, formatter):
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_formatter(formatter)


def range_of_losses(runs):
    """Where all losses are but the highest ones, the fall of the first steps, which says the least"""
    losses = sorted(loss for _, streams in runs for name in ("trl", "tel") for loss in streams[name].values())
    low, high = losses[0], losses[int(0.97 * (len(losses) - 1))]
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def plot(runs, kind, smooth=None, loss_min=None, loss_max=None, title=None, references=False,
         lines=()):
    """The bytes of a picture of runs, [(name, streams)]. kind: png, svg, pdf and others that matplotlib knows

    references: with OpenAI's models. lines: with others, (name, loss). smooth: train losses are averaged over so many
    steps; otherwise over a fiftieth of the run.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a plot needs matplotlib\n---> HINT: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

    names = ["loss", "rate"] + ["eval"] * any(streams["eval"] for _, streams in runs)
    alone, longest = len(runs) == 1, max(11, *(len(name) for name, _ in runs))
    size = 10, 3.9 + 0.8 * len(names)
    figure, panels = pyplot.subplots(len(names), 1, sharex=True, figsize=size, dpi=150, gridspec_kw={
        "height_ratios": [3.4, 1, 1.2][:len(names)], "hspace": 0.3, "left": 0.06,
        "right": 0.985 if alone else max(0.5, 0.975 - 0.0078 * longest),
        "top": 0.88 if title else 0.93, "bottom": 0.075})
    axes = dict(zip(names, panels, strict=True))
    low, high = range_of_losses(runs)
    axes["loss"].set_ylim(low if loss_min is None else loss_min, high if loss_max is None else loss_max)
    last = max(step for _, streams in runs for values in streams.values() for step in values)
    axes["loss"].set_xlim(0, 1.006 * max(1, last))

    ends = {name: [] for name in names}
    for (name, streams), color in zip(runs, itertools.cycle(COLORS), strict=False):
        text = []
        if streams["trl"]:
            steps, losses = columns(streams["trl"])
            mean = smoothed(losses, smooth or len(losses) // 50)
            axes["loss"].plot(steps, losses, color=color, alpha=0.22, linewidth=0.7)
            axes["loss"].plot(steps, mean, color=color, linewidth=1.5)
            text.append(f"train {mean[-1]:.3f}")
        if streams["tel"]:
            steps, losses = columns(streams["tel"])
            axes["loss"].plot(steps, losses, color=color, linewidth=0.9, linestyle=(0, (3, 1.5)), marker="o",
                              markersize=3.4, markerfacecolor="white", markeredgewidth=1.1)
            text.insert(0, f"val {losses[-1]:.3f}")
        ends["loss"].append((losses[-1], [name, *text], color))
        if streams["lr"]:
            axes["rate"].plot(*columns(streams["lr"]), color=color, linewidth=1.5)
        if streams["eval"]:
            steps, accuracies = columns(streams["eval"])
            axes["eval"].plot(steps, accuracies, color=color, linewidth=1.2, marker="o", markersize=3)
            ends["eval"].append((accuracies[-1], [name, f"{100 * accuracies[-1]:.1f}%"], color))

    draw_lines(axes["loss"], lines)
    keys = ["line: train", "circles: validation"]
    if references and draw_references(axes["loss"], 0):
        keys.append("dotted: OpenAI's models on FineWeb")
    own = f" of {': '.join([ends['loss'][0][1][0], ', '.join(ends['loss'][0][1][1:])])}" if alone else ""
    style(axes["loss"], f"Loss{own} ({', '.join(keys)})", FuncFormatter(lambda y, _: f"{y:g}"))
    style(axes["rate"], "Learning rate",
          FuncFormatter(lambda y, _: re.sub(r"(\.0)?e-0?", "e-", f"{y:.1e}") if y else "0"))
    axes["rate"].set_ylim(bottom=0)
    axes["rate"].yaxis.set_major_locator(MaxNLocator(3))
    if "eval" in axes:
        style(axes["eval"], "HellaSwag accuracy", PercentFormatter(1, decimals=0))
        if references:
            draw_references(axes["eval"], 1)
    for name in () if alone else names:
        label_ends(axes[name], ends[name])
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[-1].set_xlabel("step", color=FAINT, fontsize=9, loc="right")
    if title:
        figure.suptitle(title, x=0.06, y=0.97, ha="left", fontsize=13, color=INK)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    pyplot.close(figure)
    return picture.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# the other kinds of output

def table(runs):
    """The text of a CSV file: for each step of each run what was measured there"""
    names = {"trl": "train_loss", "tel": "val_loss", "lr": "learning_rate", "norm": "grad_norm", "eval": "hellaswag"}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", *names.values()])
    for run, streams in runs:
        for step in sorted({step for stream in streams.values() for step in stream}):
            writer.writerow([run, step, *(streams[name].get(step, "") for name in names)])
    return out.getvalue()


def page(runs, picture, seconds):
    """The text of an HTML page with a picture (svg) in it, which needs no other file. seconds: a browser loads it again
    so often, None = never"""
    again = f'<meta http-equiv="refresh" content="{seconds}">' if seconds else ""
    picture = picture[picture.index("<svg"):].replace("<svg ", '<svg style="width: 100%; height: auto" ', 1)
    names = html.escape(", ".join(name for name, _ in runs))
    state = f"renewed every {seconds} s" if seconds else "not renewed any more"
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{again}<title>{names}</title></head>'
            f'<body style="margin: 1em; font: 14px sans-serif; color: {FAINT}">'
            f'<div style="max-width: 75em">{picture}</div>'
            f'<p>{names}, {time.strftime("%Y-%m-%d %H:%M:%S")}, {state}</p></body></html>\n')


def read_runs(arguments):
    """[(name, streams)] of the runs that are named. ValueError where one has no step"""
    runs = []
    for name, path in find_runs(arguments):
        streams, malformed = read_log(path)
        if malformed:
            print(f"{path}: {malformed} malformed line{'s' * (malformed > 1)} skipped")
        if not streams["trl"] and not streams["tel"]:
            raise ValueError(f"{path}: there is no step in it")
        runs.append((name, streams))
    return runs


def write(flags, runs, seconds=None):
    """Write the output, in the format that its suffix names; a page is loaded again every so many seconds."""
    kind = Path(flags.output).suffix.lower().strip(".") or "png"
    options = flags.smooth, flags.loss_min, flags.loss_max, flags.title, flags.gpt2, flags.line
    if kind == "csv":
        data = table(runs).encode()
    elif kind == "html":
        data = page(runs, plot(runs, "svg", *options).decode(), seconds).encode()
    else:
        data = plot(runs, kind, *options)
    write_file(flags.output, data)


def watch(flags):
    """Write the page again whenever a log has changed, until Ctrl-C; then once more, so that it rests."""
    seen, runs = None, read_runs(flags.runs)
    print(f"{flags.output} is renewed every {flags.watch} s: open it in a browser; Ctrl-C ends this")
    try:
        while True:
            sizes = [os.stat(path)[6:9:2] for _, path in find_runs(flags.runs)]
            if sizes != seen:
                seen, runs = sizes, read_runs(flags.runs)
                write(flags, runs, flags.watch)
            time.sleep(flags.watch)
    except KeyboardInterrupt:
        write(flags, runs)


def named_loss(text):
    """("name", 1.88) of name=1.88"""
    name, _, loss = text.rpartition("=")
    try:
        if name and abs(float(loss)) < LARGEST:
            return name, float(loss)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"NAME=LOSS is expected, such as published=1.88, not {text}")


def main(argv=None):
    """The command line: see --help. Returns the exit status."""
    return program(draw, argv)


def draw(argv):
    parser = Parser(prog="vislog.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output folder or log, optionally as NAME=PATH")
    parser.add_argument("-o", "--output", default="runs.png",
                        help="a picture: .png, .svg or .pdf; a page: .html; a table: .csv")
    parser.add_argument("--watch", type=int, nargs="?", const=5, metavar="SECONDS",
                        help="renew an .html so often (without a number: every 5 s) while a run goes on")
    parser.add_argument("--gpt2", action="store_true", help="with what OpenAI's models reach on FineWeb and HellaSwag")
    parser.add_argument("--line", type=named_loss, action="append", default=[], metavar="NAME=LOSS",
                        help="with a dotted line at this loss; may be given again")
    parser.add_argument("--smooth", type=int,
                        help="steps that the train loss is averaged over (default: a fiftieth of the run)")
    parser.add_argument("--loss_min", type=float, help="lower end of the loss axis")
    parser.add_argument("--loss_max", type=float, help="upper end of the loss axis")
    parser.add_argument("--title", help="above the picture")
    flags = parser.parse_args(argv)
    if flags.smooth is not None and flags.smooth < 1:
        raise ValueError(f"--smooth is a number of steps, 1 or more, not {flags.smooth}\n"
                         "---> HINT: --smooth 1 draws the losses as they are")
    for name in "loss_min", "loss_max":
        if not math.isfinite(getattr(flags, name) or 0):
            raise ValueError(f"--{name} is a loss, not {getattr(flags, name)}\n---> HINT: leave it out")
    if flags.watch is not None and (flags.watch < 1 or not flags.output.endswith(".html")):
        raise ValueError("--watch renews a page every so many seconds, 1 or more\n---> HINT: -o run.html --watch 5")
    watch(flags) if flags.watch else write(flags, read_runs(flags.runs))
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    sys.exit(main())
