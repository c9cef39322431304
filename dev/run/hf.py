"""
Models in Hugging Face's folders, config.json and model.safetensors, in one file or in several: their names for our
tensors, and how they become a checkpoint (.bin). Neither PyTorch nor transformers is needed.
"""
import contextlib
import math
import os
import re
import shlex
import sys

import numpy as np

from dev.run.config import GPT2Config, model_header, parameter_table
from dev.run.console import shown
from dev.run.files import NewFile, as_float32, from_float32, plain_file, require_numbers
from dev.run.processes import launched
from dev.run.reading import brief, is_a, misfit, parse_json, read_json, reading
from dev.run.vocabulary import TOKENIZER_FILES, is_gpt2s, keep_tokenizer, own_vocabulary

VERSIONS = {"fp32": 3, "bf16": 5}  # of a .bin
NAMES = {  # our tensors, and how Hugging Face calls those of layer {}
    "wte": "wte.weight", "wpe": "wpe.weight",
    "ln1w": "h.{}.ln_1.weight", "ln1b": "h.{}.ln_1.bias",
    "qkvw": "h.{}.attn.c_attn.weight", "qkvb": "h.{}.attn.c_attn.bias",
    "attprojw": "h.{}.attn.c_proj.weight", "attprojb": "h.{}.attn.c_proj.bias",
    "ln2w": "h.{}.ln_2.weight", "ln2b": "h.{}.ln_2.bias",
    "fcw": "h.{}.mlp.c_fc.weight", "fcb": "h.{}.mlp.c_fc.bias",
    "fcprojw": "h.{}.mlp.c_proj.weight", "fcprojb": "h.{}.mlp.c_proj.bias",
    "lnfw": "ln_f.weight", "lnfb": "ln_f.bias",
}  # fmt: skip
CONV1D = {"qkvw", "attprojw", "fcw", "fcprojw"}  # stored (in, out) there, (out, in) here
PREFIX = "transformer."  # of a GPT2LMHeadModel's tensors; a GPT2Model's have none
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old versions stored with the weights

# what decides what a GPT2LMHeadModel computes, and the only values for which our model computes the same
OURS = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names for one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
OLD_FORMAT = ("---> HINT: transformers rewrites older formats: "
              "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)")
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # its types that weights can have
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
        "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
        "F6_E2M3": 6, "F6_E3M2": 6}  # of a number, of all its types
LONGEST_HEADER = 100_000_000  # bytes, as in the format's own library


def tensor_table(config):
    """(our name, layer or None, Hugging Face's name, its shape there) of every tensor, in the order of a .bin"""
    for name, shape in parameter_table(config):
        layered = "{}" in NAMES[name]
        shape = (config.vocab_size, config.channels) if name == "wte" else shape[1:] if layered else shape
        for layer in range(config.num_layers) if layered else (None,):
            yield name, layer, NAMES[name].format(layer), shape[::-1] if name in CONV1D else shape


def read_config(path):
    """config.json as a GPT2Config. ValueError for a model that is not our GPT-2."""
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}\n---> HINT: the folder of a model has one")
    found = read_json(path)
    for key, values in OURS.items():
        value = found.get(key, None if key == "model_type" else values[0])
        if value not in values:
            raise ValueError(f"{path}: this is no GPT-2 that train_gpt2.py could run: {key} is "
                             f"{shown(repr(value), 60)}, expected {' or '.join(map(repr, values))}")
    sizes = [found.get(key) for key in ("n_embd", "n_layer", "n_head", "vocab_size")]
    sizes.append(found.get("n_positions", found.get("n_ctx")))
    if not all(is_a(size, int) and 0 < size < 1 << 24 for size in sizes) or sizes[0] % sizes[2]:
        raise ValueError(f"{path}: n_embd, n_layer, n_head, vocab_size and n_positions make no sense: "
                         f"{' '.join(map(brief, sizes))}")
    C, L, NH, V, maxT = sizes
    if found.get("n_inner") not in (None, 4 * C):
        raise ValueError(f"{path}: n_inner is {brief(found['n_inner'])}, expected 4 * n_embd = {4 * C}")
    return GPT2Config(maxT, V, (V + 127) // 128 * 128, L, NH, C)


def read_safetensors(path):
    """
    {name: array} of a file, memory-mapped; bfloat16 as uint16. Tensors of integers and booleans are left out.
    The format (https://github.com/huggingface/safetensors): 8 bytes, the length of a JSON text; the text; the numbers.
    As the format says, tensors may neither overlap nor leave bytes that belong to none.
    """
    with reading(path):
        return safetensors(path, plain_file(path))


def safetensors(path, size):
    length = int.from_bytes(np.fromfile(path, np.uint8, 8).tobytes(), "little")
    start = 8 + length
    if size < 8 or start > min(size, 8 + LONGEST_HEADER):
        raise ValueError(f"truncated, or no safetensors file: it has {size:,} bytes, and begins with a header of "
                         f"{length:,}")
    data = np.memmap(path, np.uint8, "r")
    tensors, filled = {}, 0
    header = parse_json(data[8:start].tobytes(), {str: dict}, unique=True)
    header.pop("__metadata__", None)
    for name, about in sorted(header.items(), key=lambda item: offsets(*item)):
        begin, end = offsets(name, about)
        kind, shape = about["dtype"], about["shape"]
        if kind not in BITS:
            raise ValueError(f"{shown(name)} has the unknown type {shown(kind)}")
        if begin != filled or end < begin or start + end > size:
            raise ValueError(f"{shown(name)} is at bytes {begin:,} to {end:,} of {size - start:,}, expected to begin "
                             f"at {filled:,}: tensors overlap, leave bytes out, or the file is truncated")
        if min(shape, default=0) < 0 or BITS[kind] * math.prod(shape) != 8 * (end - begin):
            raise ValueError(f"{shown(name)} has the shape {shown(shape, 60)} and {end - begin:,} bytes")
        filled = end
        if kind in SAFETENSORS:
            tensors[name] = data[start + begin : start + end].view(SAFETENSORS[kind]).reshape(shape)
    if start + filled != size:
        raise ValueError(f"{size - start - filled:,} bytes at its end belong to no tensor")
    return tensors


def offsets(name, about):
    """[begin, end] of a tensor, of which a header says `about`. ValueError where it says something else"""
    if problem := misfit(about, {"dtype": str, "shape": [int], "data_offsets": [int, int]}, shown(name)):
        raise ValueError(problem)
    return about["data_offsets"]


def shards(index):
    """The files that model.safetensors.index.json names"""
    files = read_json(index).get("weight_map")
    files = list(files.values()) if isinstance(files, dict) and files else [None]
    if not all(isinstance(file, str) and re.fullmatch(r"[\w.-]+", file) for file in files):
        raise ValueError(f"{index} has no weight_map from tensors to files beside it")
    return sorted(set(files))


def read_weights(folder, config):
    """{Hugging Face's name without prefix: array}. ValueError unless these are our GPT-2's tensors and no others."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        files = [folder / name for name in shards(index)]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}\n{OLD_FORMAT}")
        tensors.update({name.removeprefix(PREFIX): x for name, x in read_safetensors(file).items()})
    tensors = {name: x for name, x in tensors.items() if not name.endswith(BUFFERS)}

    head = tensors.pop("lm_head.weight", None)
    if config.num_layers > len(tensors):  # before there is a list of what so many layers have
        raise ValueError(f"{folder}: config.json says {config.num_layers:,} layers, for which {len(tensors)} tensors "
                         "of floats are too few")
    expected = {name: shape for _, _, name, shape in tensor_table(config)}
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder}: there is no tensor {name} of floats in {', '.join(f.name for f in files)}")
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: {name} has the shape {shown(tensors[name].shape, 60)}, by config.json it is "
                             f"{shape}")
    if other := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{folder}: {len(other)} tensors that no GPT-2 of {config.num_layers} layers has: "
                         f"{' '.join(map(shown, other[:3]))} …")
    if head is not None and not np.array_equal(head, tensors["wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight is not wte.weight; in our GPT-2 the two are one")
    return tensors


def write_checkpoint(path, config, dtype, arrays):
    """Write a .bin; arrays: all of its tensors, in pieces of any size"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(path) as f:
        f.write(model_header(config, VERSIONS[dtype]))
        for x in arrays:
            f.write(from_float32(x, dtype).tobytes())
    print(f"wrote {shown(path)} ({path.stat().st_size:,} bytes, {dtype})")


def in_our_order(config, tensors):
    """The tensors one after another as a .bin has them"""
    for name, _, theirs, _ in tensor_table(config):
        x = as_float32(tensors[theirs])
        yield x.T if name in CONV1D else x
        if name == "wte":
            yield np.zeros((config.padded_vocab_size - config.vocab_size, config.channels), np.float32)


def import_model(folder, path, dtype):
    """Write the model of a folder to `path`, or raise ValueError or FileNotFoundError and write nothing."""
    config = read_config(folder / "config.json")
    weights = read_weights(folder, config)
    for name, x in weights.items():
        require_numbers(folder, name, as_float32(x))
    print(f"{shown(folder)}: {config}")
    write_checkpoint(path, config, dtype, in_our_order(config, weights))
    if is_gpt2s(folder, config.vocab_size):
        keep_tokenizer(None, path)  # removes that of another model of this name
        return
    keep_tokenizer(folder, path)
    own = own_vocabulary(path)
    if own.tokens is None:
        print(f"note: its texts cannot be read or written here, only its token numbers: {own.problem}")


def imported(folder):
    """The path of a .bin with the model of a folder, gpt2.bin in there: it is made where it is missing, or older than
    what it is made of, which standard error is told. ValueError where that cannot be, or the model is not our GPT-2"""
    path, sources = folder / "gpt2.bin", [*folder.glob("*.safetensors"), *map(folder.joinpath, TOKENIZER_FILES)]
    states = [file.stat() for file in sources if file.exists()]
    changed = max(max(state.st_mtime_ns, state.st_ctime_ns) for state in states)  # ctime: an older file came since
    if path.is_file() and path.stat().st_mtime_ns >= changed:
        return str(path)
    problem = "several processes cannot import it at once" if launched() > 1 else \
              "nothing can be written there" if not os.access(folder, os.W_OK) else None
    if problem:
        new = f"data/{folder.resolve().name}.bin"
        command = shlex.join(["python", "-m", "dev.eval.import_hf", "-i", str(folder), "-o", new])
        raise ValueError(f"{shown(folder)} is a model of Hugging Face's, and {problem}\n---> HINT: {command}, then -e "
                         f"{shlex.quote(new)}")
    with contextlib.redirect_stdout(sys.stderr):
        import_model(folder, path, "fp32")
    return str(path)
