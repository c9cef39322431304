"""
Token shards before they are read: which files a flag means, what their headers say, which vocabulary they are in, how
large a batch there is for validation; and the validation.

Word 3 of a shard's header is the size of its vocabulary where that is not GPT-2's. llm.c leaves it 0.
"""
import glob
import os
import re
from types import SimpleNamespace

import numpy as np

from dev.run.config import is_checkpoint, model_config
from dev.run.files import HEADER_BYTES, check_size, open_file, there
from dev.run.found import model_file, shards_of
from dev.run.shard import read_shard_header
from dev.run.text import Bytes

BYTES = len(Bytes.tokens)
PLACES = [f"data/{folder}_{{}}.bin" for folder in (
    "tinyshakespeare/tiny_shakespeare", "tinyshakespeare_bytes/tiny_shakespeare", "pydoc/pydoc", "pydoc_bytes/pydoc")]
NO_DATA = SimpleNamespace(num_tokens=0, num_batches=0)  # without validation no -j is needed
DEFAULT = PLACES[0].format("train"), PLACES[0].format("val")  # of -i and -j


def find_shards(pattern):
    """The files that a name or a glob pattern means; what exists is taken literally. FileNotFoundError without any"""
    pattern = there(pattern)
    folder, name = os.path.split(pattern)
    folder = glob.escape(folder) if os.path.isdir(folder) else folder
    files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(os.path.join(folder, name)))
    if not files:
        known = [there(place.format("train")) for place in PLACES]
        found = "".join(f"---> HINT: {path} is there\n" for path in known if os.path.isfile(path))
        raise FileNotFoundError(f"no file matches {pattern}\n{found}"
                                "---> HINT: python dev/data/tinyshakespeare.py writes Tiny Shakespeare's shards\n"
                                "---> HINT: python dev/data/pydoc.py those of Python's own texts, without a network")
    return files


def tokens_in(path, vocab_size=None):
    """The number of tokens in a shard. ValueError where it is damaged, or not in the vocabulary of the model: a model
    of bytes and GPT-2's tokens never fit, other numbers only have to be in the model's vocabulary."""
    with open_file(path) as file:
        tokens, vocabulary = read_shard_header(file, path)
    check_size(path, HEADER_BYTES + 2 * tokens)
    if vocab_size and (vocabulary not in (0, vocab_size) or vocabulary == 0 and vocab_size == BYTES):
        raise ValueError(f"{path} has {named(vocabulary or 50257)}, the model has {named(vocab_size)}\n"
                         "---> HINT: " + ("another -i and -j, or another model -e" if vocabulary != BYTES else
                                          "-e d6 takes its vocabulary from the data; without --tokenizer bytes the "
                                          "scripts in dev/data make shards for GPT-2"))
    return tokens


def named(vocabulary):
    return "a vocabulary of bytes" if vocabulary == BYTES else f"a vocabulary of {vocabulary:,} tokens"


def vocabulary_in(path):
    """The size of a shard's vocabulary; None where its header leaves that open, as GPT-2's do"""
    with open_file(path) as file:
        return read_shard_header(file, path)[1] or None


def choose_data(flags, model):
    """Where -i and -j were left out and the default is not there, or not for this model, take what `make train` has
    made. Returns the model's name: of a run's folder the newest checkpoint, a descriptor with the data's vocabulary."""
    model = model_file(model)
    if os.path.isdir(flags.input_bin):
        if flags.input_val_bin == DEFAULT[1]:
            flags.input_val_bin = flags.input_bin
        flags.input_bin = shards_of(flags.input_bin, "train")
        flags.note = f"data: {flags.input_bin}"
    flags.input_val_bin = shards_of(flags.input_val_bin, "val")
    if (flags.input_bin, flags.input_val_bin) == DEFAULT and (os.path.isfile(model) or not is_checkpoint(model)):
        wanted = model_config(model).vocab_size if is_checkpoint(model) else None
        for train, val in ((path.format("train"), path.format("val")) for path in PLACES):
            file = there(train)
            fits = os.path.isfile(file) and (wanted is None or (vocabulary_in(file) == BYTES) == (wanted == BYTES))
            if fits and train != DEFAULT[0]:
                flags.input_bin, flags.input_val_bin, flags.note = train, val, f"data: {train}, which is there"
            if fits:
                break
    if is_checkpoint(model) or re.search(r"v\d+$", model):
        return model
    model_config(model)  # an unknown one is said as it was typed
    vocabulary = vocabulary_in(find_shards(flags.input_bin)[0])
    return f"{model}v{vocabulary}" if vocabulary else model


def largest_batches(loader, pattern, B, T, vocab_size):
    """A loader(pattern, B, T), or one with fewer sequences in a batch where there are not so many tokens: a text of
    which a part is held out for validation has few there. ValueError where there is not one sequence"""
    fit = (max(loader(pattern, 1, T, vocab_size=vocab_size).shard_tokens) - 1) // T
    return loader(pattern, min(B, fit), T, vocab_size=vocab_size)


def validate(engine, loader, batches):
    """The mean loss of the loader's first batches, one for each item of `batches`; the processes divide them"""
    loader.reset()
    processes, losses = engine.processes, []
    for number, _ in enumerate(batches):
        batch = loader.next_batch(number % processes.size == processes.rank)
        losses.append(float(engine.forward(*batch, train=False)) if batch else 0.0)
    return sum(processes.sum(np.array(losses)).tolist()) / len(losses)
