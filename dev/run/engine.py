"""
The contract between the training loop and what computes. An engine holds a GPT-2 on one device: its parameters, its
gradients, AdamW's moments. Whoever drives one (the loop, checkpoints, evaluation, sampling, tests) calls what is here
and nothing else, and sets none of its attributes, so that all of them work with every engine there is.

A training step is, for every engine and any number of processes:

    for micro_batch in range(micro_batches):
        losses.append(engine.forward(inputs, targets))
        engine.backward(last=micro_batch == micro_batches - 1)
    norm = engine.grad_norm()
    engine.update(step, learning_rate, norm=norm, grad_clip=1.0)      # or engine.forget()

An engine's module has a class GPT2(config, table, weights, precision, processes, **options), where table is the list of
(name, shape) that describes its tensors, weights a function that fills such Tensors with the first parameters, and
options are the flags that only this engine knows. build() in train_gpt2.py finds it by the name of the device.
"""
import contextlib
import inspect
import math
import time
from types import SimpleNamespace

import numpy as np

from dev.run.processes import ALONE

DECAYED = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # weight decay is for matrices, not biases or LayerNorm
NO_LAYERS = ("wte", "wpe", "lnfw", "lnfb")  # the other tensors have a part for each layer


def size_of(table):
    """The number of elements of a table's tensors"""
    return sum(math.prod(shape) for _, shape in table)


def aligned(size, make=np.empty):
    """A flat float32 array that begins at a cache line. NumPy asks for huge pages where it is large."""
    memory = make(size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start:start + size]


class Tensors:
    """The tensors of a table as attributes: views of one flat array, `memory`, one after another."""

    def __init__(self, memory, table):
        self.memory, start = memory, 0
        for name, shape in table:
            size = math.prod(shape)
            setattr(self, name, memory[start:start + size].reshape(shape))
            start += size


class Engine:
    """What every engine has and does. The order of calls is checked here, where there is only one of it."""

    precision = "fp32"  # or bf16: what products read, and so what a model's file may hold

    def __init__(self, config, table, processes=ALONE):
        self.config, self.table, self.processes = config, table, processes
        self.num_parameters = size_of(table)
        self.num_activations = 0  # of the batch that prepare() made room for
        self.tokens_read = 0      # tokens whose keys and values read() holds
        self.rows = 0             # of the last forward pass, whose logits can be had
        self.scored = None        # (B, T) of the last forward pass, if it had targets
        self.micro_batches = 0    # whose gradients have been added up since the last update
        self.pending = False      # was the last forward pass for training, and does its backward pass not come yet?

    # before the first step

    def describe(self):
        """Lines for the start of a run: threads and kernels, or the GPU and its libraries"""
        raise NotImplementedError

    def prepare(self, B, T, recompute=1, train=True):
        """Compile and allocate all that batches of (B, T) tokens need, so that no step pays for it.

        recompute: what the backward pass computes again instead of keeping it: 1 GELU's output, 2 LayerNorm's too.
        train: False where the model is only evaluated, or writes text. Returns {what: bytes}, the memory that it takes.
        Raises ValueError where the batch cannot be, or does not fit into memory; nothing has been allocated then.
        """
        raise NotImplementedError

    def peak(self):
        """The FLOP/s that the device could reach in this precision, by which MFU is measured; NaN where unknown"""
        raise NotImplementedError

    # a step

    def forward(self, inputs, targets=None, train=True):
        """The forward pass. inputs, targets: (B, T) integers. Returns the mean cross-entropy where there are targets:
        a number, or what becomes one by float(), which waits for the device. train: backward() will follow."""
        raise NotImplementedError

    def backward(self, last=True):
        """The backward pass of the last forward pass; its gradients are added to those of the micro-batches before.
        last: they are final, and their sum over the processes begins layer by layer."""
        raise NotImplementedError

    def grad_norm(self):
        """The global norm of the mean gradient over the micro-batches since the last update, and over the processes"""
        raise NotImplementedError

    def update(self, step, learning_rate, *, norm=None, grad_clip=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
               weight_decay=0.0):
        """One step of AdamW with the mean gradient. step: from 0, for the bias correction.

        grad_clip: a gradient of a greater norm is scaled down to it; 0 = never. norm: what grad_norm() returned, for
        callers who know it already. Weight decay is for matrices only."""
        raise NotImplementedError

    def forget(self):
        """Drop the gradients since the last update, and a forward pass that has no backward pass yet."""
        self.pending, self.micro_batches = False, 0

    # evaluation, text

    def losses(self):
        """The cross-entropy of each token of the last forward pass with targets, (B, T) float32"""
        raise NotImplementedError

    def logits(self, row):
        """The logits (V,) of one row of the last forward pass: row b*T + t predicts the token after inputs[b, t].
        They lie in memory that the next call uses again."""
        raise NotImplementedError

    def read(self, tokens):
        """Read tokens that follow those read before: any number at first, then one at a time. Their keys and values
        are kept, so that one token costs one pass over the weights. Returns the logits (V,) of the token that follows.
        """
        raise NotImplementedError

    def rewind(self):
        """Begin another text: read() will have read nothing."""
        self.tokens_read = 0

    # what a checkpoint holds, and what a profile shows

    def host(self, what):
        """The Tensors "params", "grads", "m" or "v": on a CPU the arrays themselves, from a GPU a copy"""
        raise NotImplementedError

    def load(self, what, file):
        """Replace "params", "m" or "v" by the float32 numbers that come next in a binary file."""
        memory = self.host(what).memory
        if file.readinto(memory.view(np.uint8)) != memory.nbytes:
            raise ValueError(f"{file.name}: truncated: it has fewer than {memory.size:,} numbers for {what}")

    @contextlib.contextmanager
    def kernel_times(self, record):
        """A context in which every kernel's call ends with record(name, arguments by name, seconds). As it is here: for
        an engine that calls the functions of a SimpleNamespace, self.kernels"""
        def timed(name, function):
            names = inspect.signature(getattr(function, "py_func", function)).parameters

            def call(*args):
                start = time.perf_counter()
                result = function(*args)
                record(name, dict(zip(names, args)), time.perf_counter() - start)
                return result
            return call
        plain = self.kernels
        self.kernels = SimpleNamespace(**{name: timed(name, function) for name, function in vars(plain).items()})
        try:
            yield
        finally:
            self.kernels = plain

    def flops_per_token(self, T):
        """Model FLOPs of a training step for each token, in sequences of T: llm.c's formula for MFU"""
        return 6 * self.num_parameters + 6 * self.config.num_layers * self.config.channels * T

    # what all of them check

    def check_order(self, call):
        """ValueError where `call`, a method's name, may not come now"""
        if call == "backward" and not self.pending:
            raise ValueError("backward() needs a forward pass with targets and train=True before it")
        if call != "backward" and self.pending:
            raise ValueError(f"{call}() cannot come between a forward pass for training and its backward pass\n"
                             "---> HINT: call backward() first, or forget() to drop that forward pass")
        if call in ("grad_norm", "update") and not self.micro_batches:
            raise ValueError("there are no gradients: forward() and backward() come before")

    def check_tokens(self, tokens):
        """The tokens as a contiguous (B, T) int32 array; ValueError where one is not in the vocabulary."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"tokens must be a (B, T) array, not one of shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise ValueError(f"token {bad} is not in the model's vocabulary of {self.config.vocab_size}")
        return tokens

    def check_shape(self, B, T):
        """ValueError for a batch that the model cannot have"""
        if B < 1 or T < 1:
            raise ValueError(f"batch size and sequence length must be at least 1, not {B} and {T}")
        maxT = self.config.max_seq_len
        if T > maxT:
            raise ValueError(f"a sequence of {T} tokens is too long: this model's limit is {maxT}\n"
                             f"---> HINT: use -t {maxT} or less")

    def check_batch(self, inputs, targets=None):
        """inputs and targets as check_tokens() returns them; ValueError where they are too long or differ in shape."""
        inputs = self.check_tokens(inputs)
        self.check_shape(*inputs.shape)
        if targets is None:
            return inputs, None
        if np.shape(targets) != inputs.shape:
            raise ValueError(f"targets of shape {np.shape(targets)} do not belong to inputs of shape {inputs.shape}")
        return inputs, self.check_tokens(targets)

    def check_scored(self):
        """ValueError where the last forward pass had no targets"""
        if self.scored is None:
            raise ValueError("the last forward pass had no targets, and so no losses")

    def check_row(self, row):
        """ValueError where the last forward pass has no such row"""
        if not 0 <= row < self.rows:
            raise ValueError(f"there is no row {row}: the last forward pass had {self.rows} tokens")

    def check_reading(self, count):
        """ValueError where read() cannot take so many tokens now"""
        maxT = self.config.max_seq_len
        if count < 1 or self.tokens_read + count > maxT or self.tokens_read and count != 1:
            raise ValueError(f"cannot read {count} tokens after {self.tokens_read}: the model has {maxT} positions, "
                             "and once it has read something it takes one token at a time")
