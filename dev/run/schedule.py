"""
From step to step: the learning rate, and how far a loss or a gradient norm is out of line with those before.
"""
import math

import numpy as np


def scheduled_learning_rate(flags, step, steps):
    """The learning rate of a step: it rises during the warm-up, then follows its schedule down to a fraction of it."""
    highest, warmup = flags.learning_rate, flags.warmup_iters
    lowest = highest * flags.learning_rate_decay_frac
    if flags.lr_scheduler == "constant":
        return highest
    if step < warmup:
        return highest * (step + 1) / warmup
    start = int(0.8 * steps) if flags.lr_scheduler == "wsd" else warmup
    if step < start:
        return highest
    ratio = (step - start) / (steps - start)
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * ratio)), "linear": 1 - ratio, "wsd": 1 - math.sqrt(ratio)}
    return lowest + remaining[flags.lr_scheduler] * (highest - lowest)


def z_score(value, window):
    """How many standard deviations a value is above the mean of the last 128, itself included: they become the window.
    NaN until that is full."""
    full = len(window) == window.maxlen
    window.append(value)
    std = float(np.std(window))
    return math.nan if not full else (value - float(np.mean(window))) / std if std > 0 else 0.0
