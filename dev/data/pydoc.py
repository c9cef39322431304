"""
Python's language reference as training text: 0.5 MB of English about programming that comes with every Python, so
that there is something to train on without any network.

    python dev/data/pydoc.py

Writes data/pydoc/pydoc_{val,train}.bin: every tenth topic is for validation. Also writes data/gpt2_tokenizer.bin.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

from pydoc_data.topics import topics

import numpy as np

from dev.data.command_line import add_common_flags, run
from dev.data.shards import write_datafile
from dev.data.vocabulary import get_encoder, write_tokenizer
from dev.run.arguments import Parser


def tokenize(topics, encoder):
    """Ids of the topics in the order of their names, end-of-text before each: {"val": ids, "train": ids}."""
    parts = {"val": [], "train": []}
    for i, name in enumerate(sorted(topics)):
        parts["val" if i % 10 == 5 else "train"] += [[encoder.eot_token], encoder.encode_ordinary(topics[name])]
    return {split: np.concatenate(ids) for split, ids in parts.items()}


def main():
    parser = Parser(description="Python's language reference into token shards")
    add_common_flags(parser)
    args = parser.parse_args()
    for split, tokens in tokenize(topics, get_encoder(args.tokenizer)).items():
        write_datafile(args.data_dir / "pydoc" / f"pydoc_{split}.bin", tokens)
    if args.tokenizer == "gpt2":
        write_tokenizer(args.data_dir / "gpt2_tokenizer.bin")


if __name__ == "__main__":
    run(main)
