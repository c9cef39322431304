"""
A checkpoint (.bin) into a GGUF file, tokenizer included, for llama.cpp and everything that is built on it.

    python -m dev.eval.export_gguf -i log124M/model_00018865.bin -o my_model.gguf -d q8_0        # or f16, f32
    llama-completion -m my_model.gguf -p "Once upon a time"

Needs the package gguf. Biases, LayerNorm and the position embedding stay float32, as in llama.cpp's own converter. The
embedding is written once more, as the output matrix, without which programs on a llama.cpp from before March 2025
refuse the file; --tied 1 leaves it out.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import json
import math

import numpy as np

from dev.data.command_line import run, show
from dev.data.vocabulary import EOT, VOCAB_SIZE, vocabulary_file
from dev.eval.convert_bin import Checkpoint, converter
from dev.run.files import NewFile
from dev.run.hf import CONV1D, tensor_table
from dev.run.vocabulary import own_vocabulary

try:
    import gguf
except ImportError:
    gguf = None

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # of the weights, and of the file as a whole


def tensor_type(name, shape, dtype):
    """What our tensor `name` becomes in a file of `dtype`"""
    if name not in CONV1D and name not in ("wte", "output"):
        dtype = "f32"
    if dtype == "q8_0" and shape[-1] % 32:  # its rows are in blocks of 32
        dtype = "f16"
    return gguf.GGMLQuantizationType[dtype.upper()]


def add_config(writer, config, dtype):
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.channels)
    writer.add_feed_forward_length(4 * config.channels)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer, V, own):
    """The model's own vocabulary, or GPT-2's, up to V tokens"""
    if own:
        add_own_tokenizer(writer, V, own)
        return
    if V < VOCAB_SIZE:
        print(f"a vocabulary of {V} is not GPT-2's: the file gets no tokenizer")
        writer.add_tokenizer_model("no_vocab")
        return
    ids = json.loads(vocabulary_file("encoder.json"))
    unused = V - len(ids)
    types = [gguf.TokenType.NORMAL] * len(ids) + [gguf.TokenType.UNUSED] * unused
    types[EOT] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.get) + [f"[PAD{len(ids) + i}]" for i in range(unused)])
    writer.add_token_types(types)
    writer.add_token_merges(vocabulary_file("vocab.bpe").decode().splitlines()[1:])  # line 1 is the version
    writer.add_bos_token_id(EOT)
    writer.add_eos_token_id(EOT)


def add_own_tokenizer(writer, V, own):
    if own.tokens is None or len(own.names) > V:
        problem = own.problem if own.tokens is None else f"{len(own.names)} tokens, and the model has {V}"
        print(f"the file gets no tokenizer: {problem}")
        writer.add_tokenizer_model("no_vocab")
        return
    names = own.names + [None] * (V - len(own.names))
    kinds = gguf.TokenType.UNUSED, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"[PAD{i}]" if name is None else name for i, name in enumerate(names)])
    writer.add_token_types([kinds[0 if name is None else 1 if name in own.special else 2] for name in names])
    writer.add_token_merges([" ".join(pair) for pair in own.merges])
    writer.add_bos_token_id(own.eot_token)
    writer.add_eos_token_id(own.eot_token)


def export(checkpoint, path, dtype, tied=False):
    config = checkpoint.config
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.num_layers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(path) as f:  # the writer opens it by its name
        writer = gguf.GGUFWriter(f.name, "gpt2")
        writer.add_name(path.stem)
        add_config(writer, config, dtype)
        add_tokenizer(writer, config.vocab_size, own_vocabulary(checkpoint.path))
        tensors, table = [], list(tensor_table(config))
        if not tied:
            table.append(("output", None, "lm_head.weight", table[0][3]))
        for name, layer, hf_name, shape in table:
            shape = shape[::-1] if name in CONV1D else shape  # (out, in), as in a .bin
            kind = tensor_type(name, shape, dtype)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(theirs.get_name(hf_name, (".weight", ".bias")), shape, "float32",
                                   math.prod(shape) // block * size, kind)
            tensors.append((name, layer, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, layer, kind in tensors:
            weights = checkpoint.tensor("wte" if name == "output" else name, layer)
            try:
                with np.errstate(over="raise"):
                    writer.write_tensor_data(gguf.quants.quantize(weights, kind))
            except FloatingPointError:
                raise ValueError(f"{checkpoint.path}: {name} has numbers that are too large for {dtype}\n"
                                 "---> HINT: -d f32 keeps them") from None
        writer.close()
    print(f"wrote {show(path)} ({path.stat().st_size:,} bytes, {dtype})")


def main():
    parser = converter("A checkpoint into a GGUF file", "a .bin, or a run's folder", "a .gguf")
    parser.add_argument("-d", "--dtype", choices=TYPES, default="f16", help="of the weights (default: f16)")
    parser.add_argument("--tied", type=int, choices=(0, 1), default=0, help="1: the embedding once, for new llama.cpp")
    args = parser.parse_args()
    if gguf is None:
        raise ValueError("writing GGUF needs a package\n---> HINT: pip install gguf")
    export(Checkpoint(args.input), args.output, args.dtype, args.tied)


if __name__ == "__main__":
    run(main)
