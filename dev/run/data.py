"""
Token shards before they are read: which files a flag means, what their headers say, which vocabulary they are in.

Word 3 of a shard's header is the size of its vocabulary where that is not GPT-2's. llm.c leaves it 0.
"""
import glob
import os
import re

from dev.run.config import is_checkpoint
from dev.run.files import HEADER_BYTES, SHARD_MAGIC, check_size, open_file, read_header
from dev.run.text import Bytes

BYTES = len(Bytes.tokens)


def find_shards(pattern):
    """The files that a name or a glob pattern means; what exists is taken literally. FileNotFoundError without any"""
    folder, name = os.path.split(pattern)
    folder = glob.escape(folder) if os.path.isdir(folder) else folder
    files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(os.path.join(folder, name)))
    if not files:
        raise FileNotFoundError(f"no file matches {pattern}\n---> HINT: python dev/data/tinyshakespeare.py writes "
                                "Tiny Shakespeare's shards; dev/data/ has scripts for other text")
    return files


def tokens_in(path, vocab_size=None):
    """The number of tokens in a shard. ValueError where it is damaged, or not in the vocabulary of the model: a model
    of bytes and GPT-2's tokens never fit, other numbers only have to be in the model's vocabulary."""
    with open_file(path) as file:
        tokens, vocabulary = map(int, read_header(file, path, SHARD_MAGIC, (1,))[2:4])
    check_size(path, HEADER_BYTES + 2 * tokens)
    if vocab_size and (vocabulary not in (0, vocab_size) or vocabulary == 0 and vocab_size == BYTES):
        raise ValueError(f"{path} has {named(vocabulary or 50257)}, the model has {named(vocab_size)}\n"
                         "---> HINT: " + ("another -i and -j, or another model -e" if vocabulary != BYTES else
                                          "-e d6 takes its vocabulary from the data; without --tokenizer bytes the "
                                          "scripts in dev/data make shards for GPT-2"))
    return tokens


def named(vocabulary):
    return "a vocabulary of bytes" if vocabulary == BYTES else f"a vocabulary of {vocabulary:,} tokens"


def fitting(model, pattern):
    """The model's name with the vocabulary of the data, where it is a descriptor that leaves it open"""
    if is_checkpoint(model) or re.search(r"v\d+$", model):
        return model
    path = find_shards(pattern)[0]
    with open_file(path) as file:
        vocabulary = int(read_header(file, path, SHARD_MAGIC, (1,))[3])
    return f"{model}v{vocabulary}" if vocabulary else model
