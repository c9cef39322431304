"""
What every Python carries as training text: 0.9 MB of English about programming, with no network.

    python dev/data/pydoc.py                      # data/pydoc/pydoc_{val,train}.bin, and data/gpt2_tokenizer.bin
    python dev/data/pydoc.py --tokenizer bytes    # data/pydoc_bytes/…, and data/bytes_tokenizer.bin

It is the docstrings of the standard library and the language reference; of these the paragraphs that are sentences, not
tables, signatures and code, each once. Every tenth file or topic is for validation.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import ast
import re
import sysconfig
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from dev.data.command_line import add_common_flags, folder_name, run
from dev.data.shards import write_datafile
from dev.data.vocabulary import get_encoder, header_word, write_tokenizer
from dev.run.arguments import Parser

OTHERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "ensurepip"}
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def docstrings(path):
    """Those of a Python file, one after another"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in its strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""
    return "\n\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DOCUMENTED))


def sources():
    """The text of every file of the standard library, in the order of their names, and of every topic"""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not OTHERS & set(path.relative_to(root).parts):
            yield docstrings(path)
    yield from (topics[name] for name in sorted(topics))


def sentences(text, seen):
    """The paragraphs of a text that read like sentences and are not in `seen`, a set to which they are added; a blank
    line after each"""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        whole = len(paragraph) > 60 and paragraph.isascii() and paragraph[0].isupper() and paragraph[-1] in ".:"
        if whole and letters > 0.93 * len(paragraph) and paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph + "\n\n")
    return "".join(kept)


def tokenize(texts, encoder):
    """Ids of the texts, end-of-text before each: {"val": ids, "train": ids}."""
    parts = {"val": [], "train": []}
    for i, text in enumerate(texts):
        parts["val" if i % 10 == 5 else "train"] += [[encoder.eot_token], encoder.encode_ordinary(text)]
    return {split: np.concatenate(ids) for split, ids in parts.items()}


def main():
    parser = Parser(description="The texts that every Python carries into token shards")
    add_common_flags(parser)
    args = parser.parse_args()
    seen, folder = set(), args.data_dir / folder_name("pydoc", args.tokenizer)
    encoder = get_encoder(args.tokenizer)
    texts = filter(None, (sentences(text, seen) for text in sources()))
    for split, tokens in tokenize(texts, encoder).items():
        write_datafile(folder / f"pydoc_{split}.bin", tokens, header_word(args.tokenizer))
    write_tokenizer(args.data_dir, args.tokenizer)


if __name__ == "__main__":
    run(main)
