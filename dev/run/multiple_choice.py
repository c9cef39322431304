"""
Multiple choice, such as HellaSwag: a model's answer is the completion with the lowest mean loss after the context.
"""
import math
import os

import numpy as np

from dev.run.console import shown
from dev.run.files import EVAL_MAGIC, read_header, there

HELLASWAG = "data/hellaswag/hellaswag_val.bin"
TOGETHER = 8  # completions in one forward pass, at most: a file cannot ask for more memory than that


def read_examples(path, vocab_size=65536):
    """[(context, completions, label)] of an evaluation set; texts are lists of tokens. ValueError for a damaged file,
    for one without examples, and for a token that is not in the model's vocabulary"""
    path = there(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no evaluation set {shown(path)}\n"
                                "---> HINT: python dev/data/hellaswag.py writes HellaSwag's")
    with open(path, "rb") as file:
        count = int(read_header(file, path, EVAL_MAGIC, (1,))[2])
        words = np.fromfile(file, np.uint16).tolist()
    if count < 1:
        raise ValueError(f"{shown(path)} has no examples\n---> HINT: write it again with the scripts in dev/data/")
    examples, start = [], 0
    for index in range(count):
        # 65535, bytes, index, label, completions, then the context and each completion as its length and its tokens
        try:
            begins, size, _, label, completions = words[start:start + 5]
            texts, at = [], start + 5
            for _ in range(1 + completions):
                texts.append(words[at + 1:at + 1 + words[at]])
                at += 1 + words[at]
            if begins != 65535 or 2 * (at - start) != size or at > len(words) or label >= completions or not all(texts):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(f"{shown(path)}: example {index} of {count} is damaged, or the file truncated\n"
                             "---> HINT: write it again with the scripts in dev/data/") from None
        largest = max(map(max, texts))
        if largest >= vocab_size:
            raise ValueError(f"{shown(path)}: example {index} has the token {largest}, which is not in the model's "
                             f"vocabulary of {vocab_size:,}\n---> HINT: was it made for another tokenizer?")
        examples.append((texts[0], texts[1:], label))
        start = at
    return examples


def answer(engine, context, completions):
    """The number of the completion that the model finds likeliest. A context that is too long loses its beginning.
    ValueError where the model's losses are no numbers."""
    means = [loss for start in range(0, len(completions), TOGETHER)
             for loss in mean_losses(engine, context, completions[start:start + TOGETHER])]
    if not np.isfinite(means).all():
        raise ValueError("the model's losses are not all finite numbers: it has diverged, or its weights are damaged")
    return int(np.argmin(means))


def mean_losses(engine, context, completions):
    """The mean loss of each completion, from one forward pass"""
    maxT = engine.config.max_seq_len
    rows = [(context + completion)[-maxT - 1:] for completion in completions]
    x = np.zeros((2, len(rows), max(map(len, rows)) - 1), np.int32)  # inputs, and targets: the inputs one token later
    for r, row in enumerate(rows):
        x[0, r, :len(row) - 1], x[1, r, :len(row) - 1] = row[:-1], row[1:]
    engine.forward(x[0], x[1], train=False)
    losses = engine.losses()
    return [losses[r, max(0, len(row) - 1 - len(completion)):len(row) - 1].mean()
            for r, (row, completion) in enumerate(zip(rows, completions))]


def score(engine, examples, progress=lambda done: None):
    """(correct, count): how many of read_examples()'s examples an engine's model answers correctly, and of how many.
    The processes divide them among them; progress() is told how many there have been."""
    correct, count, processes = 0, 0, engine.processes
    for context, completions, label in examples:
        progress(count)
        if count % processes.size == processes.rank:
            correct += answer(engine, context, completions) == label
        count += 1
    return processes.sum(correct), count


def accuracy(correct, count):
    """A share, and its standard error"""
    share = correct / count
    return share, math.sqrt(share * (1 - share) / count)
