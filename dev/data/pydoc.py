"""
Python's language reference as training text: 0.5 MB of English about programming that comes with every Python, so
that there is something to train on without any network.

    python dev/data/pydoc.py

Writes data/pydoc/pydoc_{val,train}.bin: every tenth topic is for validation. Also writes data/gpt2_tokenizer.bin.
"""

import argparse

import numpy as np


def tokenize(topics, encoder):
    """Ids of the topics in the order of their names, end-of-text before each: {"val": ids, "train": ids}."""
    parts = {"val": [], "train": []}
    for i, name in enumerate(sorted(topics)):
        parts["val" if i % 10 == 5 else "train"] += [[encoder.eot_token], encoder.encode_ordinary(topics[name])]
    return {split: np.concatenate(ids) for split, ids in parts.items()}


def main():
    from pydoc_data.topics import topics

    from data_common import add_common_flags, get_encoder, write_datafile, write_tokenizer

    parser = argparse.ArgumentParser(description="Python's language reference into token shards")
    add_common_flags(parser)
    args = parser.parse_args()
    for split, tokens in tokenize(topics, get_encoder(args.tokenizer)).items():
        write_datafile(args.data_dir / "pydoc" / f"pydoc_{split}.bin", tokens)
    if args.tokenizer == "gpt2":
        write_tokenizer(args.data_dir / "gpt2_tokenizer.bin")


def __getattr__(name):
    """
    This file hides Python's own pydoc from the scripts beside it, and pdb, among others, imports that: hand over
    whatever is looked up here and is not ours.
    """
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location("_pydoc", sysconfig.get_path("stdlib") + "/pydoc.py")
    standard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standard)
    globals().update({k: v for k, v in vars(standard).items() if k not in globals()})
    return getattr(standard, name)


if __name__ == "__main__":
    from data_common import run

    run(main)
