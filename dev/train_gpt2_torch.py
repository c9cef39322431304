"""
GPT-2 in PyTorch: the numbers that train_gpt2.py is measured against.

This file shares no code with train_gpt2.py, so that a mistake in one does not hide in the other; it even has its own
numbers of llm.c's formats, and takes from the rest only what makes writing safe and finds a run's newest checkpoint.
It computes in float32 on the CPU and knows one process and one device: no CUDA, no mixed precision.
It does one of two things.

Trains, with the flags and the output of train_gpt2.py, for comparing losses and speed:
    python dev/train_gpt2_torch.py -e d12
    python dev/train_gpt2_torch.py -e data/gpt2_124M.bin -b 4 -t 1024 -x 10 --compile 1

Or, with --write_dir, writes a model and what it does on one batch, for testing:
    python dev/train_gpt2_torch.py -e gpt2 --write_dir data      OpenAI's weights, from Hugging Face
    python dev/train_gpt2_torch.py -e d12 --write_dir data       random weights
    python dev/train_gpt2_torch.py -e tiny --write_dir dev/test  the model of the unit tests
    <name>.bin, <name>_bf16.bin     the weights, unless they came from a .bin
    <name>_debug_state.bin          inputs, targets, logits, loss and gradients
    <name>_debug_state.json         the losses of ten AdamW steps on that batch, and with which settings
    gpt2_tokenizer.bin              GPT-2's vocabulary, unless it is there already (tiny has none)
On one machine, with the same number of threads, the same command writes the same bytes every time;
tiny always computes on one thread.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import glob
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dev.run.files import NewFile
from dev.run.found import model_file

# -----------------------------------------------------------------------------
# The model


@dataclass
class Config:
    maxT: int = 1024
    V: int = 50257
    L: int = 12
    NH: int = 12
    C: int = 768

    def __post_init__(self):
        if min(self.maxT, self.V, self.L, self.NH, self.C) <= 0 or self.C % self.NH != 0:
            raise ValueError(f"impossible model: {self}; all sizes must be positive and C divisible by NH")

    @property
    def Vp(self):
        return (self.V + 127) // 128 * 128

    @property
    def num_parameters(self):  # as stored: with the padding of wte
        return (self.Vp + self.maxT + 2) * self.C + self.L * (12 * self.C + 13) * self.C


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.C
        self.NH = config.NH
        self.ln1 = nn.LayerNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, 3 * C)
        self.attproj = nn.Linear(C, C)
        self.ln2 = nn.LayerNorm(C, eps=1e-5)
        self.fc = nn.Linear(C, 4 * C)
        self.fcproj = nn.Linear(4 * C, C)

    def attention(self, x):  # [B, T, C] -> [B, T, C]
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.NH, C // self.NH)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # [B, NH, T, hs] each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attproj(out.transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.V, config.C)  # the V real rows: the padding exists in files only
        self.wpe = nn.Embedding(config.maxT, config.C)
        self.h = nn.ModuleList([Block(config) for _ in range(config.L)])
        self.lnf = nn.LayerNorm(config.C, eps=1e-5)

    def forward(self, inputs, targets):
        """Logits [B, T, V] and their mean cross-entropy, for tokens [B, T]."""
        x = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)  # the classifier is the embedding, used once more
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# The order of the tensors in files: (llm.c's name, ours, Hugging Face's). {l} is the layer; a tensor
# with one stores all its layers before the next tensor begins.
TENSORS = [
    ("wte", "wte.weight", "transformer.wte.weight"),
    ("wpe", "wpe.weight", "transformer.wpe.weight"),
    ("ln1w", "h.{l}.ln1.weight", "transformer.h.{l}.ln_1.weight"),
    ("ln1b", "h.{l}.ln1.bias", "transformer.h.{l}.ln_1.bias"),
    ("qkvw", "h.{l}.qkv.weight", "transformer.h.{l}.attn.c_attn.weight"),
    ("qkvb", "h.{l}.qkv.bias", "transformer.h.{l}.attn.c_attn.bias"),
    ("attprojw", "h.{l}.attproj.weight", "transformer.h.{l}.attn.c_proj.weight"),
    ("attprojb", "h.{l}.attproj.bias", "transformer.h.{l}.attn.c_proj.bias"),
    ("ln2w", "h.{l}.ln2.weight", "transformer.h.{l}.ln_2.weight"),
    ("ln2b", "h.{l}.ln2.bias", "transformer.h.{l}.ln_2.bias"),
    ("fcw", "h.{l}.fc.weight", "transformer.h.{l}.mlp.c_fc.weight"),
    ("fcb", "h.{l}.fc.bias", "transformer.h.{l}.mlp.c_fc.bias"),
    ("fcprojw", "h.{l}.fcproj.weight", "transformer.h.{l}.mlp.c_proj.weight"),
    ("fcprojb", "h.{l}.fcproj.bias", "transformer.h.{l}.mlp.c_proj.bias"),
    ("lnfw", "lnf.weight", "transformer.ln_f.weight"),
    ("lnfb", "lnf.bias", "transformer.ln_f.bias"),
]


def tensors_in_file_order(model):
    """Yields (llm.c's name, Hugging Face's name, parameter), one layer at a time."""
    parameters = dict(model.named_parameters())
    for name, ours, theirs in TENSORS:
        for layer in range(model.config.L if "{l}" in ours else 1):
            yield name, theirs.format(l=layer), parameters[ours.format(l=layer)]


# -----------------------------------------------------------------------------
# Where weights come from: random draws, a checkpoint, Hugging Face

# descriptor -> channels and heads; the number after the d is the depth
GPT2_SIZES = {
    "d6": (384, 6), "d12": (768, 12), "d24": (1024, 16), "d36": (1280, 20), "d48": (1600, 25),
    "d60": (1920, 30), "d72": (2880, 30), "d84": (3456, 36),
}
# descriptor -> layers and head size; the number after the c is the channels
GPT3_SIZES = {
    "c384": (6, 64), "c768": (12, 64), "c1024": (24, 64), "c1536": (24, 96), "c2048": (24, 128),
    "c2560": (32, 80), "c4096": (32, 128), "c5140": (40, 128), "c12288": (96, 128),
}
# Hugging Face's name -> the name of our files, layers, heads, channels
PRETRAINED = {
    "gpt2": ("gpt2_124M", 12, 12, 768), "gpt2-medium": ("gpt2_355M", 24, 16, 1024),
    "gpt2-large": ("gpt2_774M", 36, 20, 1280), "gpt2-xl": ("gpt2_1558M", 48, 25, 1600),
}
TINY = Config(maxT=64, V=300, L=2, NH=2, C=32)


def config_from_descriptor(descriptor):
    """d12, gpt2:d12, gpt3:c768, gpt2:l4c256h4t512v300 or tiny -> (the name of its files, Config). t and v, the longest
    sequence and the vocabulary, may be left out, and may follow any of the others."""
    more = re.search(r"(?<=\d)(t\d+)?(v\d+)?$", descriptor)
    if more and more[0]:
        name, config = config_from_descriptor(descriptor[: more.start()])
        maxT, V = more.groups()
        return name + more[0], replace(config, maxT=int(maxT[1:]) if maxT else config.maxT,
                                       V=int(V[1:]) if V else config.V)
    family, _, size = descriptor.rpartition(":")
    shape = re.fullmatch(r"l(\d+)c(\d+)h(\d+)", size)
    if shape and family in ("", "gpt2"):
        L, C, NH = map(int, shape.groups())
        return f"gpt2_{size}", Config(L=L, NH=NH, C=C)
    if descriptor == "tiny":
        return "gpt2_tiny", TINY
    if family in ("", "gpt2") and size in GPT2_SIZES:
        C, NH = GPT2_SIZES[size]
        return f"gpt2_{size}", Config(L=int(size[1:]), NH=NH, C=C)
    if family == "gpt3" and size in GPT3_SIZES:
        L, hs = GPT3_SIZES[size]
        C = int(size[1:])
        if C % hs != 0:
            raise ValueError(f"gpt3:{size} cannot be built: its head size {hs} does not divide its {C} channels")
        return f"gpt3_{size}", Config(maxT=2048, L=L, NH=C // hs, C=C)
    raise ValueError(
        f"unknown model '{descriptor}'\n---> HINT: one of tiny, {', '.join(GPT2_SIZES)}, "
        f"gpt3:{', gpt3:'.join(GPT3_SIZES)}, gpt2:l4c256h4, "
        f"{', '.join(PRETRAINED)}, or the path of a .bin checkpoint"
    )


def empty_model(config):
    """A model whose weights are not set yet: PyTorch's own initialisation would be drawn in vain."""
    needed = 16 * config.num_parameters  # weights, gradients, m and v; activations come on top
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise ValueError(f"a model of {config.num_parameters:,} parameters needs {needed / 1e9:.1f} GB, "
                         f"this machine has {memory / 1e9:.1f} GB\n---> HINT: a smaller model: -e d6")
    with torch.device("meta"):
        model = GPT2(config)
    return model.to_empty(device="cpu")


@torch.no_grad()
def random_weights(config):
    """Draws the weights that llm.c draws: one MT19937 stream of seed 42, layer by layer."""
    model = empty_model(config)
    for name, _, p in tensors_in_file_order(model):
        if p.ndim == 1:
            p.fill_(1.0 if name in ("ln1w", "ln2w", "lnfw") else 0.0)
    rng = torch.Generator().manual_seed(42)
    std, residual_std = 0.02, 0.02 / math.sqrt(2 * config.L)
    model.wte.weight.normal_(0.0, std, generator=rng)
    model.wpe.weight.normal_(0.0, std, generator=rng)
    for block in model.h:
        block.qkv.weight.normal_(0.0, std, generator=rng)
        block.attproj.weight.normal_(0.0, residual_std, generator=rng)
        block.fc.weight.normal_(0.0, std, generator=rng)
        block.fcproj.weight.normal_(0.0, residual_std, generator=rng)
    return model


@torch.no_grad()
def unsettle(model):
    """
    Adds noise to every tensor. Fresh weights make poor tests: biases are 0 and LayerNorm's weights 1,
    so leaving them out changes nothing, and weights of std 0.02 give an attention so uniform that
    errors in its softmax hardly show.
    """
    rng = torch.Generator().manual_seed(1337)
    for p in model.parameters():
        p.add_(torch.empty_like(p).normal_(0.0, 0.2, generator=rng))


@torch.no_grad()
def load_checkpoint(path):
    """Reads a model .bin, version 3 (float32) or 5 (bfloat16)."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path}\n---> HINT: python dev/train_gpt2_torch.py -e gpt2 "
                                "--write_dir data makes data/gpt2_124M.bin; -e d12 needs no file")
    with open(path, "rb") as f:
        header = read_header(f, path, "checkpoint", 20240326, (3, 5))
        try:
            config = Config(*header[2:7])
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        if header[7] != config.Vp:
            raise ValueError(f"{path}: padded vocabulary of {header[7]}, expected {config.Vp} for {config.V} tokens")
        dtype = torch.float32 if header[1] == 3 else torch.bfloat16
        size, expected = os.path.getsize(path), 1024 + dtype.itemsize * config.num_parameters
        if size != expected:
            raise ValueError(f"{path}: {size:,} bytes, its header says {expected:,}\n---> HINT: fetch it again")
        model = empty_model(config)
        for name, _, p in tensors_in_file_order(model):
            rows = config.Vp if name == "wte" else p.shape[0]
            words = np.fromfile(f, np.dtype(f"<i{dtype.itemsize}"), rows * p[0].numel())
            p.copy_(torch.from_numpy(words).view(dtype)[: p.numel()].view_as(p))
    return model


@torch.no_grad()
def load_pretrained(name):
    """OpenAI's weights, through the transformers package."""
    try:
        from transformers import GPT2LMHeadModel

        weights = GPT2LMHeadModel.from_pretrained(name).state_dict()
    except ImportError:
        raise ValueError(f"-e {name} needs a package\n---> HINT: pip install transformers") from None
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(f"cannot get the weights of {name} from Hugging Face: {reason}\n---> HINT: -e d12 needs no "
                         "network: random weights") from None
    return model_from_state_dict(Config(1024, 50257, *PRETRAINED[name][1:]), weights)


@torch.no_grad()
def model_from_state_dict(config, weights):
    """A model from Hugging Face's names; its Conv1D layers store (in, out) where we store (out, in)."""
    model = empty_model(config)
    for name, theirs, p in tensors_in_file_order(model):
        p.copy_(weights[theirs].T if name in ("qkvw", "attprojw", "fcw", "fcprojw") else weights[theirs])
    return model


def build_model(source):
    """A checkpoint, a run's folder, a Hugging Face name or a descriptor -> (the name of its files, model)."""
    source = model_file(source)
    if source.endswith(".bin"):
        return os.path.basename(source)[: -len(".bin")], load_checkpoint(source)
    if source in PRETRAINED:
        return PRETRAINED[source][0], load_pretrained(source)
    name, config = config_from_descriptor(source)
    model = random_weights(config)
    if config is TINY:
        unsettle(model)
    return name, model


# -----------------------------------------------------------------------------
# Files


def read_header(f, path, kind, magic, versions):
    """The 256 int32 that every file begins with, checked."""
    header = np.frombuffer(f.read(1024), "<i4").tolist() if os.path.getsize(path) >= 1024 else [None, None]
    if header[0] != magic or header[1] not in versions:
        raise ValueError(f"{path} is no {kind}: magic {header[0]}, version {header[1]}, expected magic {magic}, "
                         f"version {' or '.join(map(str, versions))}")
    return header


def write_header(f, *words):
    f.write(np.array(words + (0,) * (256 - len(words)), "<i4").tobytes())


def write_tensors(f, model, dtype, grads=False):
    """All weights, or their gradients, in file order. bfloat16 is rounded to nearest, ties to even."""
    config = model.config
    for name, _, p in tensors_in_file_order(model):
        words = (p.grad if grads else p.data).to(dtype).contiguous().view(torch.int16)  # NumPy knows no bfloat16
        f.write(words.numpy().astype("<i2", copy=False).tobytes())
        if name == "wte":
            f.write(bytes((config.Vp - config.V) * config.C * dtype.itemsize))


def write_model(path, model, dtype):
    config = model.config
    with NewFile(path) as f:
        version = 3 if dtype == torch.float32 else 5
        write_header(f, 20240326, version, config.maxT, config.V, config.L, config.NH, config.C, config.Vp)
        write_tensors(f, model, dtype)
    print(f"wrote {path}")


def write_debug_state(path, model, x, y, logits, loss):
    with NewFile(path) as f:
        write_header(f, 20240327, 2, *x.shape)
        f.write(x.numpy().astype("<i4").tobytes())
        f.write(y.numpy().astype("<i4").tobytes())
        f.write(logits.detach().numpy().astype("<f4").tobytes())  # [B, T, V], without the padding
        f.write(np.float32(loss.item()).astype("<f4").tobytes())
        write_tensors(f, model, torch.float32, grads=True)
    print(f"wrote {path}")


class DataLoader:
    """
    Batches of tokens from the shards that match a pattern, in llm.c's order.

    Shuffled, an epoch visits the shards in a random order, and each shard's batches in a random order.
    The validation loader does not shuffle.
    """

    def __init__(self, pattern, B, T, V, shuffle):
        self.B, self.T, self.V, self.shuffle = B, T, V, shuffle
        self.shards = [self.open_shard(path) for path in sorted(glob.glob(pattern))]
        if not self.shards:
            raise FileNotFoundError(f"no file matches {pattern}\n---> HINT: python dev/data/tinyshakespeare.py")
        self.num_batches = sum(map(self.batches_in, self.shards))
        if self.num_batches == 0:
            raise ValueError(f"{pattern}: too few tokens for one batch of B*T+1 = {B * T + 1}")
        self.rng = np.random.RandomState(42)
        self.shard_order = np.arange(len(self.shards))
        self.reset()

    @staticmethod
    def open_shard(path):
        with open(path, "rb") as f:
            ntok = read_header(f, path, "token shard", 20240520, (1,))[2]
        size, expected = os.path.getsize(path), 1024 + 2 * ntok
        if size != expected or ntok <= 0:
            raise ValueError(f"{path}: {size:,} bytes, its header says {expected:,}\n---> HINT: make it again")
        return np.memmap(path, "<u2", mode="r", offset=1024)

    def batches_in(self, shard):
        return (len(shard) - 1) // (self.B * self.T)  # -1: the last target is one token further

    def permute(self, a):
        draws = self.rng.randint(0, 2**32, size=max(len(a) - 1, 0), dtype=np.uint32).tolist()
        for i, draw in zip(range(len(a) - 1, 0, -1), draws, strict=True):
            j = draw % (i + 1)
            a[i], a[j] = a[j], a[i]

    def reset(self):
        if self.shuffle:
            self.permute(self.shard_order)  # goes on from the order of the last epoch
        self.enter_shard(0)

    def enter_shard(self, i):
        self.shard_index = i
        self.shard = self.shards[self.shard_order[i]]
        self.batch_order = np.arange(self.batches_in(self.shard))
        self.batch_index = 0
        if self.shuffle:
            self.permute(self.batch_order)

    def next_batch(self):
        """Inputs and targets, int64 [B, T] each; the targets are the inputs one token later."""
        while self.batch_index == len(self.batch_order):  # a shard shorter than a batch has none
            if self.shard_index + 1 < len(self.shards):
                self.enter_shard(self.shard_index + 1)
            else:
                self.reset()
        n = self.B * self.T
        start = int(self.batch_order[self.batch_index]) * n
        self.batch_index += 1
        tokens = torch.from_numpy(self.shard[start : start + n + 1].astype(np.int64))
        if tokens.max() >= self.V:
            raise ValueError(f"the data holds token {tokens.max()}, the model's vocabulary ends at {self.V - 1}")
        return tokens[:-1].view(self.B, self.T), tokens[1:].view(self.B, self.T)


# -----------------------------------------------------------------------------
# Training


def make_optimizer(model, learning_rate, beta1, beta2, eps, weight_decay):
    """AdamW that decays matrices and embeddings, not biases nor LayerNorm's vectors."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": learning_rate, "betas": (beta1, beta2), "eps": eps}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)
    except RuntimeError:  # PyTorch before 2.4 has no fused AdamW for the CPU
        return torch.optim.AdamW(groups, **settings)


def write_reference(name, model, x, y, directory, weights):
    """Everything that --write_dir promises, for one batch."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    torch.use_deterministic_algorithms(True)
    if weights:
        write_model(f"{path}.bin", model, torch.float32)
        write_model(f"{path}_bf16.bin", model, torch.bfloat16)
    settings = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    optimizer = make_optimizer(model, **settings)
    losses = []  # losses[i] is the loss after i updates
    for step in range(10):
        optimizer.zero_grad()
        logits, loss = model(x, y)
        loss.backward()
        if step == 0:
            write_debug_state(f"{path}_debug_state.bin", model, x, y, logits, loss)
        optimizer.step()
        losses.append(loss.item())
    summary = {"model": name, "torch": torch.__version__, "B": x.shape[0], "T": x.shape[1], **settings}
    with NewFile(f"{path}_debug_state.json") as f:
        f.write(json.dumps({**summary, "losses": losses}, indent=1).encode() + b"\n")
    print(f"wrote {path}_debug_state.json")
    tokenizer_path = os.path.join(directory, "gpt2_tokenizer.bin")
    if model.config.V == 50257 and not os.path.exists(tokenizer_path):
        from dev.data.vocabulary import write_tokenizer  # needs tiktoken, so only where it is used

        write_tokenizer(directory)


@torch.no_grad()
def validate(model, loader, max_steps):
    steps = loader.num_batches if max_steps == -1 else max_steps
    loader.reset()
    return sum(model(*loader.next_batch())[1].item() for _ in range(steps)) / steps


def train(model, args):
    B, T, config = args.batch_size, args.sequence_length, model.config
    overfit = bool(args.overfit_single_batch)
    train_loader = DataLoader(args.input_val_bin if overfit else args.input_bin, B, T, config.V, not overfit)
    val_loader = DataLoader(args.input_val_bin, B, T, config.V, False) if args.val_loss_every else None
    total = args.total_batch_size or B * T
    if total < B * T or total % (B * T) != 0:
        raise ValueError(f"-d {total} is no multiple of B*T = {B * T}")
    accumulation = total // (B * T)
    num_iterations = train_loader.num_batches // accumulation if args.num_iterations == -1 else args.num_iterations
    print(f"train dataset num_batches: {train_loader.num_batches}")
    if val_loader is not None:
        print(f"val dataset num_batches: {val_loader.num_batches}")
    optimizer = make_optimizer(model, args.learning_rate, args.beta1, args.beta2, args.eps, args.weight_decay)
    forward = torch.compile(model) if args.compile else model

    val_loss, train_loss, times = None, None, []
    for step in range(num_iterations + 1):
        # once in a while, and at the end, the validation loss
        if val_loader is not None and (step % args.val_loss_every == 0 or step == num_iterations):
            val_loss = validate(forward, val_loader, args.val_max_steps)
            print(f"val loss {val_loss:.6f}", flush=True)
        if step == num_iterations:
            break

        # one training step
        start = time.perf_counter()
        optimizer.zero_grad()
        train_loss = 0.0
        for _ in range(accumulation):
            if overfit:
                train_loader.reset()
            loss = forward(*train_loader.next_batch())[1]  # no name for the logits: it would keep them in memory
            (loss / accumulation).backward()
            train_loss += loss.item() / accumulation
        if not math.isfinite(train_loss):
            raise ValueError(f"the loss is {train_loss} at step {step}\n---> HINT: a lower learning rate: -l")
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        if args.grad_clip > 0 and norm > args.grad_clip:
            torch._foreach_mul_([p.grad for p in model.parameters()], args.grad_clip / norm)
        optimizer.step()
        seconds = time.perf_counter() - start

        times.append(1000 * seconds)
        print(f"step {step}: train loss {train_loss:.6f} (took {times[-1]:.6f} ms) | norm {norm:.4f} | "
              f"lr {args.learning_rate:.2e} | {total / seconds:.0f} tok/s", flush=True)

    print(f"---\nsteps: {num_iterations}\ntokens: {num_iterations * total}")
    if val_loss is not None:
        print(f"final_val_loss: {val_loss:.6f}")
    if times:
        print(f"final_train_loss: {train_loss:.6f}\nmean_ms: {np.mean(times):.3f}\nbest_ms: {min(times):.3f}")


def parse_args(argv):
    # --help only: in train_gpt2.py, as in llm.c, -h is HellaSwag
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("--help", action="help")
    # what to read
    add("-e", "--model", default="data/gpt2_124M.bin",
        help="a .bin, a run's folder, d6 gpt3:c768 gpt2:l4c256h4 tiny ..., or gpt2-xl")
    add("-i", "--input_bin", default="data/tinyshakespeare/tiny_shakespeare_train.bin", help="training shards, a glob")
    add("-j", "--input_val_bin", default="data/tinyshakespeare/tiny_shakespeare_val.bin", help="validation shards")
    # what to write instead of training
    add("--write_dir", help="write checkpoints and debug state to this folder, do not train")
    # the batch
    add("-b", "--batch_size", type=int, help="B (default 4; tiny 2)")
    add("-t", "--sequence_length", type=int, help="T (default 64; tiny 21, so that no loop comes out even)")
    add("-d", "--total_batch_size", type=int, default=0, help="tokens per step, by accumulation; 0 = B*T")
    add("-a", "--overfit_single_batch", type=int, default=0, help="1: only the first validation batch")
    # the optimiser
    add("-x", "--num_iterations", type=int, default=40, help="steps; -1 = one epoch")
    add("-l", "--learning_rate", type=float, default=1e-4, help="constant: there are no schedules here")
    add("-c", "--weight_decay", type=float, default=0.0)
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.999)
    add("--eps", type=float, default=1e-8)
    add("--grad_clip", type=float, default=0.0, help="0 = off")
    # validation
    add("-v", "--val_loss_every", type=int, default=10, help="0 = never")
    add("-m", "--val_max_steps", type=int, default=5, help="batches; -1 = all")
    # speed
    add("--compile", type=int, default=0, help="1: torch.compile")
    parser.set_defaults(batch_size=4, sequence_length=64)
    if parser.parse_args(argv).model == "tiny":
        parser.set_defaults(batch_size=2, sequence_length=21)
    return parser.parse_args(argv)


def run(args):
    B, T = args.batch_size, args.sequence_length
    if B <= 0 or T <= 0:
        raise ValueError(f"batch size {B} and sequence length {T} must be positive")
    if args.num_iterations < -1 or args.val_loss_every < 0 or (args.val_max_steps < 1 and args.val_max_steps != -1):
        raise ValueError("the least for -x is -1, for -v 0, for -m 1 (or -1, for all)")
    if args.model == "tiny":
        torch.set_num_threads(1)  # so that the bytes do not depend on the number of cores
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, compile: {args.compile}")
    name, model = build_model(args.model)
    config = model.config
    if T > config.maxT:
        raise ValueError(f"sequence length {T} is more than the model's {config.maxT}")
    print("[GPT-2]")
    print(f"max_seq_len: {config.maxT}\nvocab_size: {config.V}\npadded_vocab_size: {config.Vp}\n"
          f"num_layers: {config.L}\nnum_heads: {config.NH}\nchannels: {config.C}\n"
          f"num_parameters: {config.num_parameters}")
    if args.write_dir is None:
        train(model, args)
        return
    if args.model == "tiny":  # no text has so few tokens
        tokens = torch.randint(config.V, (B * T + 1,), generator=torch.Generator().manual_seed(42))
        x, y = tokens[:-1].view(B, T), tokens[1:].view(B, T)
    else:
        x, y = DataLoader(args.input_bin, B, T, config.V, shuffle=False).next_batch()
    write_reference(name, model, x, y, args.write_dir, weights=not args.model.endswith(".bin"))


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
