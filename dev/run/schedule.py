"""
From step to step: the learning rate, and how far a loss or a gradient norm is out of line with those before.
"""
import math
from collections import deque

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


class Outliers:
    """The last 128 losses and gradient norms: which steps are so far out of line that their update is better skipped?

    loss_limit, norm_limit: z-scores, see z_score(); 0 = no limit. scores: those of the last step, loss and norm
    """

    def __init__(self, loss_limit=0.0, norm_limit=0.0):
        self.limits, self.windows, self.scores = (loss_limit, norm_limit), (deque(maxlen=128), deque(maxlen=128)), ()

    def far(self, loss, norm):
        """Is a step with this loss and gradient norm too far out?"""
        self.scores = tuple(map(z_score, (loss, norm), self.windows))
        return any(0 < limit < score for limit, score in zip(self.limits, self.scores))


def require_finite(step, loss, norm):
    """ValueError where a step's loss or gradient norm is not a number"""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(f"step {step}: the loss is {loss}, the gradient norm {norm}: training has diverged\n"
                         "---> HINT: use a smaller learning rate (-l), or --grad_clip 1")
