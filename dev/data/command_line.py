"""
What the command lines in dev/data and dev/eval share: flags, errors in one line, progress.
"""

import os
import sys
import time
from pathlib import Path

from dev.run.console import plain, program

DATA = Path(__file__).resolve().parents[2] / "data"  # where the scripts put what they make


def run(main):
    """Call main() and end the program: see program()"""
    sys.exit(program(main))


def add_common_flags(parser, workers=False, shard_size=None):
    parser.add_argument("--data_dir", type=Path, default=DATA, help="where results go (default: data/)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes", "tiny"), default="gpt2",
                        help="bytes: 257 tokens, for small models; tiny: for dev/test/gpt2_tiny.bin")
    if workers:
        parser.add_argument("--workers", type=int, default=0, help="processes that tokenise (default: one a core)")
    if shard_size:
        parser.add_argument("-s", "--shard_size", type=int, default=shard_size, help="tokens in a shard")


def folder_name(name, tokenizer):
    """Of a set of data whose files have fixed names: those of bytes have a folder of their own"""
    return f"{name}_bytes" if tokenizer == "bytes" else name


def show(path):
    """The path as a person would type it: relative when it is below the current folder."""
    path = os.path.abspath(path)
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


class Progress:
    """How far a long job is: a line rewritten in place on a terminal, one every 30 seconds in a log file."""

    def __init__(self, label):
        self.label, self.tty = label, sys.stderr.isatty()
        self.next = time.monotonic() + (0.2 if self.tty else 30)
        self.first = None

    def update(self, count, unit, fraction=None):
        """count: how many (`unit`s) are done; fraction: how much of the whole job that is, where it is known."""
        now = time.monotonic()
        if self.first is None:  # what an earlier run has done says nothing about the speed of this one
            self.first = now, count, fraction
            self.next = max(self.next, now + 0.1)
        if now < self.next:
            return
        self.next = now + (0.2 if self.tty else 30)
        seconds, count0, fraction0 = now - self.first[0], self.first[1], self.first[2]
        text = f"{count:,.0f} {unit}, {(count - count0) / seconds:,.1f} {unit}/s"
        if None not in (fraction, fraction0) and fraction > fraction0:
            left = round(seconds * (1 - fraction) / (fraction - fraction0))
            text += f" | {100 * fraction:.0f}% | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(f"\r{self.label}: {text}\x1b[K" if self.tty else f"{self.label}: {text}",
              end="" if self.tty else "\n", file=sys.stderr, flush=True)

    @staticmethod
    def clear():
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(text):
    """Print a line, in the place of the progress that a terminal may be showing."""
    Progress.clear()
    print(plain(text), flush=True)
