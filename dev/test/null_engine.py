"""
An engine that computes nothing: with it the loop, checkpoints, signals and whatever else drives an engine are tested
without a kernel. Its losses follow from its tokens and its parameters, and those from all gradients, moments, steps and
learning rates before, so that what a run loses, or does twice, changes what it leaves behind.
"""
import contextlib

import numpy as np

from dev.run.engine import Engine, Tensors, size_of
from dev.run.processes import ALONE


class NullEngine(Engine):

    def __init__(self, config, table, weights=None, precision=None, processes=ALONE, **options):
        super().__init__(config, table, processes)
        self.precision = precision or "fp32"
        size = size_of(table)
        self.tensors = {what: Tensors(np.zeros(size, np.float32), table) for what in ("params", "grads", "m", "v")}
        self.inputs = self.token_losses = None  # of the last forward pass
        self.direction = np.cos(np.arange(size, dtype=np.float32))  # of every gradient
        if weights:
            weights(self.tensors["params"])

    def describe(self):
        return ["an engine that computes nothing"]

    def prepare(self, B, T, recompute=1, train=True):
        self.check_order("prepare")
        self.check_shape(B, T)
        return {"parameters": 4 * 4 * self.num_parameters}

    def peak(self):
        return 1.0

    def forward(self, inputs, targets=None, train=True):
        self.check_order("forward")
        self.inputs, targets = self.check_batch(inputs, targets)
        self.prepare(*self.inputs.shape)
        self.token_losses = None
        if targets is None:
            return None
        self.pending = train
        size = np.abs(self.tensors["params"].memory[::101]).mean()
        self.token_losses = np.float32(size) + np.abs(self.inputs - targets).astype(np.float32) / 100
        return float(self.token_losses.mean(dtype=np.float64))

    def backward(self, last=True):
        self.check_order("backward")
        if not self.micro_batches:
            self.tensors["grads"].memory.fill(0)
        self.tensors["grads"].memory += self.token_losses.mean() * self.direction
        self.micro_batches += 1
        self.pending = False

    def grad_norm(self):
        self.check_order("grad_norm")
        with np.errstate(over="ignore"):  # of damaged weights
            return float(np.linalg.norm(self.tensors["grads"].memory)) / self.micro_batches

    def update(self, step, learning_rate, *, norm=None, grad_clip=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
               weight_decay=0.0):
        self.check_order("update")
        params, grads, m, v = (self.tensors[what].memory for what in ("params", "grads", "m", "v"))
        with np.errstate(over="ignore"):  # of a damaged state
            m += np.float32(1 / (10 * self.micro_batches)) * grads
            v += m * m
            params -= np.float32(learning_rate / (step + 1)) * m / (1 + v)
        self.micro_batches = 0

    def losses(self):
        if self.token_losses is None:
            raise ValueError("the last forward pass had no targets, and so no losses")
        return self.token_losses

    def logits(self, row):
        if self.inputs is None or not 0 <= row < self.inputs.size:
            raise ValueError(f"the last forward pass had no row {row}")
        token = self.inputs.ravel()[row]
        return np.cos(np.arange(self.config.vocab_size, dtype=np.float32) * (token + 1))

    def read(self, tokens):
        self.check_order("read")
        self.check_reading(len(tokens))
        self.inputs, self.token_losses = self.check_tokens([tokens]), None
        self.tokens_read += len(tokens)
        return self.logits(len(tokens) - 1)

    def host(self, what):
        return self.tensors[what]

    @contextlib.contextmanager
    def kernel_times(self, record):
        record("nothing", {}, 0.0)
        yield
