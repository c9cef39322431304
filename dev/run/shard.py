"""
A shard of tokens, read by calls that give an error where a memory map would end the program (SIGBUS): a file that is
cut short, or replaced, while a run reads it, or a disk that fails. And the order in which its samples come.
"""
import itertools
import math
import os
import shlex

import numpy as np

from dev.run.console import shown
from dev.run.files import HEADER_BYTES, SHARD_MAGIC, check_size, read_header

HINT = "---> HINT: is another program writing there, or does the disk fail? Once that is mended, -y 1 goes on"


class DamagedBatch(ValueError):
    """A batch that cannot be trained on. Those before and after it may be sound."""


def read_shard_header(file, path):
    """(tokens, size of the vocabulary: 0 where that is left open, as in GPT-2's). ValueError where it is no shard"""
    try:
        tokens, vocabulary = map(int, read_header(file, path, SHARD_MAGIC, (1,))[2:4])
    except ValueError as error:
        what, command = of_others(file, path)
        raise ValueError(f"{error}\n---> HINT: {what}: {command}" if what else str(error)) from error
    return tokens, vocabulary


def of_others(file, path):
    """What a file may be that is none of ours, and the command that makes shards of it; ("", "") where nobody knows.
    Raw tokens are not mostly zeros, as the headers of our files are."""
    file.seek(0)
    start, folder = file.read(HEADER_BYTES), shlex.quote(os.path.dirname(path) or ".")
    tokens = f"python dev/data/import_tokens.py {folder}"
    words = np.frombuffer(start[:len(start) // 2 * 2], "<u2")
    if start.startswith(b"\x93NUMPY"):
        return "an array of NumPy's, as build-nanogpt's", tokens
    if start and b"\0" not in start and start[:-3].decode(errors="ignore").encode() in start:
        return "it is text", f"python dev/data/text.py {shlex.quote(str(path))}"
    if len(words) and words.max() < 50257 and 2 * np.count_nonzero(words) > len(words):
        return "perhaps raw tokens, as nanoGPT's", tokens
    return "", ""


class Shard:
    """A shard that is open. tokens: how many it had when the run began; vocab_size: one beyond it is damage

    Raises ValueError where it is none, or has become another one."""

    def __init__(self, path, tokens, vocab_size=None):
        self.path, self.tokens, self.vocab_size, self.changed = path, tokens, vocab_size, None
        self.file = open(path, "rb", 0)
        self.look()

    def look(self):
        """Look at the header, unless the file is as it was when that was last done."""
        found = os.fstat(self.file.fileno())
        if self.changed == (found.st_mtime_ns, found.st_size):
            return
        self.file.seek(0)
        tokens, _ = read_shard_header(self.file, self.path)
        check_size(self.path, HEADER_BYTES + 2 * tokens)
        if tokens != self.tokens:
            raise ValueError(f"{self.path}: it has {tokens:,} tokens now, and had {self.tokens:,} when the run began\n"
                             "---> HINT: bring the old file back, or begin anew")
        self.changed = found.st_mtime_ns, found.st_size

    def read(self, start, count):
        """`count` tokens from the one at position `start`, uint16. Raises DamagedBatch where the disk cannot read them,
        or where they are no tokens of the model; ValueError where the file is not the same any more."""
        try:
            self.look()
            self.file.seek(HEADER_BYTES + 2 * start)
            data = self.file.read(2 * count)
        except OSError as error:
            raise DamagedBatch(f"{self.path}: tokens {start:,} to {start + count:,} cannot be read: {error.strerror}\n"
                               f"{HINT}") from error
        if len(data) < 2 * count:
            raise ValueError(f"{self.path}: cut short: it ends before token {start + count:,}\n{HINT}")
        tokens = np.frombuffer(data, np.uint16)
        if self.vocab_size and tokens.max() >= self.vocab_size:
            where = int(tokens.argmax())
            raise DamagedBatch(f"{self.path}: token {tokens[where]} at position {start + where:,} is not in the "
                               f"model's vocabulary of {self.vocab_size:,}\n---> HINT: were these shards made for "
                               "another tokenizer, or is the file damaged?")
        return tokens

    def close(self):
        self.file.close()


def check_shards(loader, tokens, names):
    """ValueError where the shards of a run, which have so many tokens each and these names (None: not known), are not a
    loader's first ones. As many with other names are taken for the same, renamed."""
    shards = list(zip(map(os.path.basename, loader.files), loader.shard_tokens))
    if len(shards) < len(tokens):
        raise ValueError(f"the run had {len(tokens)} shards, now there are {len(shards)}")
    if names is None or len(shards) == len(tokens):
        names = [name for name, _ in shards]
    for was, old, (name, now) in itertools.zip_longest(names[:len(tokens)], tokens, shards[:len(tokens)]):
        if (was, old) != (name, now):
            raise ValueError(f"{shown(name)} of {now:,} tokens is where the run had {shown(was)} of {old:,}: more "
                             "shards can only come after all others")


def samples_of(size, shard_tokens):
    """How many samples of so many tokens each shard has. The last one's targets need another token."""
    return [max(0, tokens - 1) // size for tokens in shard_tokens]


def check_state(state, shard_tokens, T, shuffled):
    """ValueError where a loader's state is not one of these shards, or where it would give a sequence of T tokens parts
    of two samples"""
    shards, size, taken, index = len(shard_tokens), state["sample_tokens"], state["taken"], state["shard_index"]
    order, fits = state.get("shard_order", range(shards)), False
    if size > 0 and size % T == taken % T == 0 and 0 <= index < shards and is_order(order, shards):
        samples = samples_of(size, shard_tokens)
        here = samples[order[index]]
        fits = any(samples) and 0 <= taken <= here * size and shuffled == ("generator" in state)
        fits = fits and (not shuffled or is_order(state["sample_order"], here))
    if not fits:
        raise ValueError("the order of its batches, or its place in it, is not one of this data")


def is_order(numbers, count):
    """Are they 0 … count - 1, in any order?"""
    numbers, seen = np.asarray(numbers), np.zeros(count, bool)
    if len(numbers) != count or count and not 0 <= numbers.min() <= numbers.max() < count:
        return False
    seen[numbers] = True
    return bool(seen.all())


def shuffle(items, random):
    """Permute an array in place with the draws that llm.c makes, and return it. random: numpy's RandomState

    For i from the last one down to 1, items i and j are swapped, where j is a draw in 0 … i. A row of swaps of which
    none has a place in common with another is done at once: 4 s for 67 million items."""
    last = len(items) - 1
    while last > 0:
        count = min(last, 64 + math.isqrt(last) // 4)
        i = np.arange(last, last - count, -1)
        j = random.randint(0, 2**32, count, np.uint32) % (i + 1)
        if j.max() <= last - count and np.diff(np.sort(j)).all():
            items[i], items[j] = items[j], items[i]
        else:
            for a, b in zip(i.tolist(), j.tolist()):
                items[a], items[b] = items[b], items[a]
        last -= count
    return items
