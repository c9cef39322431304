"""
A model's shape: what a name says about it, and the table of its tensors.
"""
import glob
import os
import re
from dataclasses import dataclass, replace

from dev.run.engine import size_of
from dev.run.files import HEADER_BYTES, MODEL_MAGIC, check_size, new_header, read_header


@dataclass(frozen=True)
class GPT2Config:
    max_seq_len: int
    vocab_size: int
    padded_vocab_size: int  # a multiple of 128: the classifier's product has no ragged edge
    num_layers: int
    num_heads: int
    channels: int


def parameter_table(config):
    """(name, shape) of the 16 parameter tensors, in the order in which every file holds them; weights are (out, in)."""
    Vp, maxT, L, C = config.padded_vocab_size, config.max_seq_len, config.num_layers, config.channels
    return [
        ("wte", (Vp, C)), ("wpe", (maxT, C)),
        ("ln1w", (L, C)), ("ln1b", (L, C)), ("qkvw", (L, 3 * C, C)), ("qkvb", (L, 3 * C)),
        ("attprojw", (L, C, C)), ("attprojb", (L, C)), ("ln2w", (L, C)), ("ln2b", (L, C)),
        ("fcw", (L, 4 * C, C)), ("fcb", (L, 4 * C)), ("fcprojw", (L, C, 4 * C)), ("fcprojb", (L, C)),
        ("lnfw", (C,)), ("lnfb", (C,)),
    ]


GPT2_DEPTHS = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25), 60: (1920, 30),
               72: (2880, 30), 84: (3456, 36)}  # layers: (channels, heads)
GPT3_CHANNELS = {384: (6, 64), 768: (12, 64), 1024: (24, 64), 1536: (24, 96), 2048: (24, 128), 2560: (32, 80),
                 4096: (32, 128), 12288: (96, 128)}  # channels: (layers, head size)


def descriptor_config(descriptor):
    """The GPT2Config that a descriptor names: d12, gpt2:d12, gpt3:c768, of any shape gpt2:l4c256h4, with another
    longest sequence or vocabulary gpt2:l4c256h4t512v257. ValueError for an unknown one."""
    shape = re.fullmatch(r"(.*?)(?:(?<=\d)t(\d+))?(?:(?<=\d)v(\d+))?", descriptor)
    config = named_config(shape[1])
    maxT, V = int(shape[2] or config.max_seq_len), int(shape[3] or 50257)
    if maxT < 1 or V < 1:
        raise ValueError(f"{descriptor}: the longest sequence and the vocabulary must be at least 1")
    return replace(config, max_seq_len=maxT, vocab_size=V, padded_vocab_size=-(-V // 128) * 128)


def named_config(descriptor):
    """That of a descriptor without t and v"""
    family, _, name = descriptor.rpartition(":")
    shape = re.fullmatch(r"l(\d+)c(\d+)h(\d+)", name)
    if shape and family in ("", "gpt2"):
        L, C, NH = map(int, shape.groups())
        if min(L, C, NH) < 1 or C % NH:
            raise ValueError(f"{descriptor}: there must be layers, channels and heads, and {NH} heads divide {C} "
                             "channels")
        return GPT2Config(1024, 50257, 50304, L, NH, C)
    kind, number = name[:1], int(name[1:]) if name[1:].isdigit() else 0
    if kind == "d" and family in ("", "gpt2") and number in GPT2_DEPTHS:
        (C, NH), L, maxT = GPT2_DEPTHS[number], number, 1024
    elif kind == "c" and family == "gpt3" and number in GPT3_CHANNELS:
        (L, hs), C, maxT = GPT3_CHANNELS[number], number, 2048
        NH = C // hs
    else:
        known = [f"d{d}" for d in GPT2_DEPTHS] + [f"gpt3:c{c}" for c in GPT3_CHANNELS]
        raise ValueError(f"unknown model descriptor {descriptor!r}\n{hub(descriptor)}"
                         f"---> HINT: known are {' '.join(known)}\n"
                         "---> HINT: any other shape is like gpt2:l4c256h4 (layers, channels, heads) or "
                         "gpt2:l4c256h4t512v300 (and sequences of up to 512, of 300 tokens)")
    return GPT2Config(maxT, 50257, 50304, L, NH, C)


def model_config(name):
    """The GPT2Config of a checkpoint file or of a descriptor, without reading or drawing any weights.

    Raises FileNotFoundError, or ValueError where the file is not a whole checkpoint or the descriptor is unknown.
    """
    if not is_checkpoint(name):
        return descriptor_config(name)
    if not os.path.isfile(name):
        there = sorted(glob.glob("data/gpt2_124M*.bin") + glob.glob("data/runs/*/model_*.bin"), key=os.path.getmtime)
        found = "".join(f"---> HINT: -e {path} is there\n" for path in there[-1:])
        raise FileNotFoundError(f"no such checkpoint: {name}\n{hub(name)}{found}"
                                "---> HINT: -e d6 (or d12 …) starts from random weights and needs no file\n"
                                "---> HINT: python dev/start.py fetches GPT-2's weights and trains them, or a small "
                                "model where it cannot")
    with open(name, "rb") as file:
        header = [int(x) for x in read_header(file, name, MODEL_MAGIC, (3, 5))]
    version, (maxT, V, L, NH, C, Vp) = header[1], header[2:8]
    config = GPT2Config(maxT, V, Vp, L, NH, C)
    if min(header[2:8]) < 1 or max(header[2:8]) >= 1 << 24 or Vp < V:
        raise ValueError(f"{name}: the sizes in its header make no sense: {config}")
    if C % NH:
        raise ValueError(f"{name}: its header says {C} channels and {NH} heads, but {NH} does not divide {C}")
    check_size(name, HEADER_BYTES + (4 if version == 3 else 2) * size_of(parameter_table(config)))
    return config


def model_header(config, version):
    """The header of a checkpoint: version 3 is float32, 5 bfloat16"""
    c = config
    return new_header(MODEL_MAGIC, version, c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels,
                      c.padded_vocab_size)


def is_checkpoint(name):
    """Is it a file's or a folder's name, there or not, and no descriptor?"""
    return bool(name.endswith(".bin") or os.path.dirname(name) or os.path.exists(name))


def hub(name):
    """The hint for what may be a name at Hugging Face's hub: gpt2, gpt2-medium, openai-community/gpt2 ..."""
    if not re.fullmatch(r"(openai-community/)?gpt2(-\w+)?", name):
        return ""
    return f"---> HINT: python -m dev.eval.import_hf -i {name} -o data/{os.path.basename(name)}.bin fetches it\n"
