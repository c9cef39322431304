"""
Tokens that other programs have written, into shards: nanoGPT's raw .bin (uint16), build-nanogpt's .npy.

    python dev/data/import_tokens.py nanoGPT/data/shakespeare              # all such files in a folder
    python dev/data/import_tokens.py train.bin val.bin --name mine
    python dev/data/import_tokens.py nanoGPT/data/shakespeare_char --vocab_size 65

Writes data/NAME/NAME_train_000000.bin, …, and NAME_val_000000.bin, … from files that have "val" in their names.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import shlex
from pathlib import Path

import numpy as np

from dev.data.command_line import DATA, run, say, show
from dev.data.shards import ShardWriter
from dev.run.arguments import Parser
from dev.run.console import shown
from dev.run.files import SHARD_MAGIC, plain_file

PIECE = 1 << 24  # tokens that are looked at, at a time
GPT2 = 50257


def read_tokens(path):
    """A file's tokens, an array of integers that is read when it is used. ValueError where it holds none"""
    size = plain_file(path)
    with open(path, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{shown(path)} is an array of {tokens.dtype} {tokens.shape}, expected a list of integers")
        if not len(tokens):
            raise ValueError(f"{shown(path)} has no tokens")
        return tokens
    if size % 2 or not size or np.frombuffer(start[:4].ljust(4), "<i4")[0] == SHARD_MAGIC:
        raise ValueError(f"{shown(path)} is {'a shard already' if size and not size % 2 else 'no file of uint16'}")
    return np.memmap(path, "<u2", mode="r")


def files_of(inputs):
    """The files that are meant: of a folder its .bin and .npy. ValueError where there are none"""
    files = [file for path in inputs for file in
             (sorted(path for path in path.iterdir() if path.suffix in (".bin", ".npy")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"{shown(inputs[0])} has neither .bin nor .npy files")
    return files


def write(writer, files, vocab_size):
    """Write the tokens of files, one after another; returns the largest. ValueError where one is beyond the vocabulary
    """
    largest, arrays = 0, [read_tokens(file) for file in files]
    writer.remove_shards()
    for file, tokens in zip(files, arrays, strict=True):
        for first in range(0, len(tokens), PIECE):
            part = np.asarray(tokens[first:first + PIECE])
            if part.min() < 0 or part.max() >= vocab_size:
                raise ValueError(f"{shown(file)}: tokens lie in {part.min()} … {part.max()}, and the vocabulary has "
                                 f"{vocab_size:,}\n---> HINT: are they tokens, and is --vocab_size right?")
            largest = max(largest, int(part.max()))
            for _ in writer.write(part.astype(np.uint16)):
                pass
    writer.finish()
    return largest


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, nargs="+", help="files, or a folder")
    parser.add_argument("--name", help="of the shards (default: that of the folder)")
    parser.add_argument("--vocab_size", type=int, default=GPT2, help=f"at most 65536; default {GPT2}, GPT-2's")
    parser.add_argument("--data_dir", type=Path, default=DATA, help="where results go (default: data/)")
    parser.add_argument("-s", "--shard_size", type=int, default=10**8, help="tokens in a shard")
    args = parser.parse_args()
    if not 0 < args.vocab_size <= 65536:
        parser.error("--vocab_size must be between 1 and 65536")
    files = files_of(args.input)
    name = args.name or files[0].resolve().parent.name
    splits, largest = [], 0
    for split in "train", "val":
        chosen = [file for file in files if ("val" in file.name) == (split == "val")]
        writer = ShardWriter(args.data_dir / name, name, split, args.shard_size)
        writer.vocabulary = 0 if args.vocab_size == GPT2 else args.vocab_size
        if chosen:
            splits.append(split)
            try:
                largest = max(largest, write(writer, chosen, args.vocab_size))
            finally:
                writer.discard()
    if args.vocab_size == GPT2 and largest < 256:
        say(f"note: the largest token is {largest}; where they are characters, say so: --vocab_size {largest + 1}")
    folder = shlex.quote(show(args.data_dir / name))
    said = {"train": f"-i {folder} -v 0", "val": f"-j {folder}"}
    say(f"train with: {said[splits[0]] if len(splits) == 1 else f'-i {folder} -j {folder}'}")


if __name__ == "__main__":
    run(main)
