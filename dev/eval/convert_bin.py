"""
A checkpoint from float32 (.bin version 3) to bfloat16 (version 5), rounded to the nearest, ties to even; or back.

    python -m dev.eval.convert_bin -i data/gpt2_124M.bin -o data/gpt2_124M_bf16.bin -d bf16

Here is also what the other converters share. All of them read and write one tensor at a time: the largest GPT-2 takes
6 GB, and need not fit into memory to be converted.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import os
from pathlib import Path

import numpy as np

from dev.data.command_line import run
from dev.run.arguments import Parser
from dev.run.files import HEADER_BYTES, MODEL_MAGIC, as_float32, open_file, read_header, require_numbers
from dev.run.found import model_file
from dev.run.hf import VERSIONS, write_checkpoint
from dev.run.vocabulary import beside, keep_tokenizer
from train_gpt2 import Tensors, model_config, parameter_table


class Checkpoint:
    """A .bin on disk, of a run's folder the newest. FileNotFoundError or ValueError where it is no whole checkpoint, or
    its weights no numbers"""

    def __init__(self, path):
        self.path = path = model_file(str(path))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no such checkpoint: {path}\n---> HINT: name a .bin, or a run's folder")
        self.config = model_config(path)
        with open_file(path) as f:
            version = read_header(f, path, MODEL_MAGIC, tuple(VERSIONS.values()))[1]
        self.dtype = "fp32" if version == 3 else "bf16"
        memory = np.memmap(path, "<f4" if version == 3 else "<u2", "r", HEADER_BYTES)
        for piece in np.array_split(memory, 1 + (memory.size >> 22)):
            require_numbers(path, "the model", as_float32(piece))
        self.params = Tensors(memory, parameter_table(self.config))

    def tensor(self, name, layer=None):
        """A tensor, or one layer of it, in float32; wte without the rows that are padding."""
        x = getattr(self.params, name)
        return as_float32(x[: self.config.vocab_size] if name == "wte" else x if layer is None else x[layer])


def converter(description, source, result):
    """A parser with the flags that all converters have; -d is theirs to add."""
    parser = Parser(description=description)
    parser.add_argument("-i", "--input", required=True, help=source)
    parser.add_argument("-o", "--output", required=True, type=Path, help=result)
    return parser


def main():
    parser = converter("Convert a checkpoint to float32 or bfloat16", "a .bin, or a run's folder", "a .bin")
    parser.add_argument("-d", "--dtype", required=True, choices=VERSIONS)
    args = parser.parse_args()
    checkpoint = Checkpoint(args.input)
    memory = checkpoint.params.memory
    pieces = np.array_split(memory, 1 + (memory.size >> 22))
    write_checkpoint(args.output, checkpoint.config, args.dtype, map(as_float32, pieces))
    keep_tokenizer(beside(checkpoint.path), args.output)


if __name__ == "__main__":
    run(main)
