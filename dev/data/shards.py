"""
What the trainer reads: token shards, and evaluation sets.
"""

import os
import re
from pathlib import Path

import numpy as np

from dev.data.command_line import say, show
from dev.run.files import EVAL_MAGIC, HEADER_BYTES, SHARD_MAGIC, NewFile, new_header, remove_temporary


def shard_header(ntok, vocabulary=0):
    """vocabulary: its size, 0 for GPT-2's: so llm.c's files stay what they are"""
    if not 0 < ntok < 2**31:
        raise ValueError(f"a shard holds 1 to 2^31 - 1 tokens, not {ntok:,}")
    return new_header(SHARD_MAGIC, 1, ntok, vocabulary)


def shard_bytes(ntok):
    return HEADER_BYTES + 2 * ntok


def announce(ntok, path):
    say(f"writing {ntok:,} tokens to {show(path)} ({shard_bytes(ntok):,} bytes)")


def check_shard(path):
    """The number of tokens in a shard. Raises ValueError where it is none, or not a whole one."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES), dtype="<i4")
    if len(header) != 256 or header[0] != SHARD_MAGIC or header[1] != 1:
        raise ValueError(f"{path} is not a token shard of version 1: it begins with {header[:2].tolist()}")
    ntok = int(header[2])
    if size != shard_bytes(ntok):
        raise ValueError(f"{path} has {size:,} bytes, but {ntok:,} tokens make {shard_bytes(ntok):,}")
    return ntok


def write_datafile(path, tokens, vocabulary=0):
    """Write tokens (integers in 0 … 65535) as one shard. Raises ValueError for others, and writes nothing then."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens are a list of integers, found {tokens.dtype} of shape {tokens.shape}")
    header = shard_header(len(tokens), vocabulary)
    if tokens.min() < 0 or tokens.max() > 65535:
        raise ValueError(f"tokens lie in 0 … 65535, found {tokens.min()} … {tokens.max()}")
    announce(len(tokens), path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with NewFile(path) as f:
        f.write(header)
        f.write(tokens.astype("<u2").tobytes())


class ShardWriter:
    """
    Writes a stream of tokens as name_split_000000.bin, name_split_000001.bin, … of shard_size tokens each; a shard
    appears under its name when it is complete. Without a split, shard 0 is "val" and the others are "train"; without
    a shard_size there is one file, name_split.bin.
    """

    def __init__(self, folder, name, split="", shard_size=None):
        if shard_size is not None and not 0 < shard_size < 2**31:
            raise ValueError(f"a shard holds 1 to 2^31 - 1 tokens, not {shard_size:,}")
        self.folder, self.name, self.split = Path(folder), name, split
        self.numbered, self.shard_size = shard_size is not None, shard_size or 2**31 - 1
        self.vocabulary = 0  # see shard_header(); tokenize() sets it
        self.shard, self.shards, self.count = None, 0, 0  # the open one, how many are complete, tokens in the open one

    def path(self, index):
        split = self.split or ("train" if index else "val")
        return self.folder / (f"{self.name}_{split}_{index:06d}.bin" if self.numbered else f"{self.name}_{split}.bin")

    def write(self, tokens):
        """Append tokens (uint16); yields how many of them are used up whenever a shard has become complete."""
        used = 0
        while used < len(tokens):
            if self.shard is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.shard = NewFile(self.path(self.shards))
                self.shard.open().write(bytes(HEADER_BYTES))
            now = tokens[used : used + self.shard_size - self.count]
            self.shard.file.write(now.astype("<u2", copy=False).data)
            used, self.count = used + len(now), self.count + len(now)
            if self.count == self.shard_size:
                self.finish()
                yield used

    def finish(self):
        """Give the shard its header and its name."""
        if self.shard is None:
            return
        announce(self.count, self.shard.path)
        self.shard.file.seek(0)
        self.shard.file.write(shard_header(self.count, self.vocabulary))
        self.shard.finish()
        self.shard, self.shards, self.count = None, self.shards + 1, 0

    def discard(self):
        """Drop the shard that is not complete."""
        if self.shard is not None:
            self.shard.discard()
        self.shard, self.count = None, 0

    def names(self):
        """A regular expression for the names of its shards, and of nothing else"""
        split = re.escape(self.split) if self.split else "(?:val|train)"
        return rf"{re.escape(self.name)}_{split}{'_[0-9]{6}' if self.numbered else ''}\.bin"

    def remove_leftovers(self):
        """Remove the beginnings of files, a shard or progress.json, that were being written when a run was killed."""
        if self.folder.is_dir():
            remove_temporary(self.folder, rf"{self.names()}|{re.escape(self.name)}\.progress\.json")

    def complete(self):
        """The paths of the complete shards with this name that are there"""
        there = self.folder.iterdir() if self.folder.is_dir() else []
        return [path for path in there if re.fullmatch(self.names(), path.name)]

    def remove_shards(self):
        """Remove the shards of an earlier run with this name, so that old and new ones never mix."""
        for path in self.complete():
            path.unlink()


# -----------------------------------------------------------------------------
# evaluation sets


def write_evalfile(path, examples):
    """
    Write multiple-choice examples, (context ids, [ids of each completion], label), as one evaluation set.
    Raises ValueError for an example that the format cannot hold.
    """
    words, longest, index = [], 0, -1
    for index, (context, completions, label) in enumerate(examples):
        example = [65535, 0, index, label, len(completions), len(context), *context]
        for completion in completions:
            example += [len(completion), *completion]
        example[1] = 2 * len(example)  # in bytes
        whole = context and all(completions)  # the reader takes an empty text for damage
        if not 0 <= label < len(completions) or not whole or max(example[1:]) > 65534:
            raise ValueError(f"{show(path)}: example {index} does not fit the format: {2 * len(example)} bytes, "
                             f"label {label}")
        longest = max(longest, example[1])
        words.append(np.array(example, dtype="<u2"))
    if not words:
        raise ValueError(f"no examples for {show(path)}")
    say(f"writing {len(words):,} examples to {show(path)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with NewFile(path) as f:
        f.write(new_header(EVAL_MAGIC, 1, len(words), longest))
        f.write(np.concatenate(words).tobytes())
