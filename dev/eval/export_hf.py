"""
A checkpoint (.bin) into a folder that Hugging Face's transformers loads, offline and with the tokenizer.

    python -m dev.eval.export_hf -i log124M/model_00018865.bin -o my_model        # -d bf16 makes it half as large

    >>> tokenizer, model = AutoTokenizer.from_pretrained("my_model"), AutoModelForCausalLM.from_pretrained("my_model")
    >>> tokenizer.decode(model.generate(**tokenizer("Once upon a time", return_tensors="pt"))[0])

Neither PyTorch nor transformers is needed to write it.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import json
import math
from pathlib import Path

from dev.data.command_line import run, show
from dev.data.vocabulary import EOT, VOCAB_SIZE, vocabulary_file
from dev.eval.convert_bin import Checkpoint, converter
from dev.run.files import NewFile, from_float32
from dev.run.hf import CONV1D, PREFIX, VERSIONS, tensor_table
from dev.run.reading import read_json
from dev.run.vocabulary import TOKENIZER_FILES, beside

SAFETENSORS = {"fp32": "F32", "bf16": "BF16"}
TORCH = {"fp32": "float32", "bf16": "bfloat16"}


def end_of_text(config):
    token = EOT if config.vocab_size > EOT else None
    return {"bos_token_id": token, "eos_token_id": token}


def hf_config(config, dtype):
    """config.json"""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.channels,
        "resid_pdrop": 0.0,  # like our model, but not like GPT2Config's default
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": TORCH[dtype],
        **end_of_text(config),
    }


def write_safetensors(path, checkpoint, dtype):
    table, end = list(tensor_table(checkpoint.config)), 0
    header = {"__metadata__": {"format": "pt"}}
    for _, _, name, shape in table:
        begin, end = end, end + (4 if dtype == "fp32" else 2) * math.prod(shape)
        header[PREFIX + name] = {"dtype": SAFETENSORS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with NewFile(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, layer, _, _ in table:
            x = checkpoint.tensor(name, layer)
            f.write(from_float32(x.T if name in CONV1D else x, dtype).tobytes())


def export(checkpoint, folder, dtype):
    config = checkpoint.config
    files, ends, kept = {}, end_of_text(config), Path(beside(checkpoint.path))
    if kept.is_dir():
        files.update((name, (kept / name).read_bytes()) for name in TOKENIZER_FILES[:-1] if (kept / name).is_file())
        said = read_json(kept / "config.json") if (kept / "config.json").is_file() else {}
        ends = {name: said.get(name) for name in ends}
    elif config.vocab_size >= VOCAB_SIZE:
        files["vocab.json"], files["merges.txt"] = vocabulary_file("encoder.json"), vocabulary_file("vocab.bpe")
        files["tokenizer_config.json"] = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": config.max_seq_len,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        }
    else:
        print(f"a vocabulary of {config.vocab_size} is not GPT-2's: the model gets no tokenizer")
    files.setdefault("generation_config.json", ends)
    files["config.json"] = {**hf_config(config, dtype), **ends}

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # without it a folder is no model: it comes when all else is there
    write_safetensors(folder / "model.safetensors", checkpoint, dtype)
    for name, content in files.items():
        with NewFile(folder / name) as f:
            f.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode() + b"\n")
    print(f"wrote {show(folder)} ({dtype}): model.safetensors {' '.join(files)}")


def main():
    parser = converter("A checkpoint into a Hugging Face folder", "a .bin, or a run's folder", "a folder")
    parser.add_argument("-d", "--dtype", choices=VERSIONS, help="of the weights (default: as in the checkpoint)")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.input)
    export(checkpoint, args.output, args.dtype or checkpoint.dtype)


if __name__ == "__main__":
    run(main)
