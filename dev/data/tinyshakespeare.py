"""
Tiny Shakespeare: 1.1 MB of plays, the data that training starts with.

    python dev/data/tinyshakespeare.py                  # download and tokenise
    python dev/data/tinyshakespeare.py --input FILE     # tokenise a copy of the text that is already here

Writes data/tinyshakespeare/tiny_shakespeare_{val,train}.bin: the first 32,768 tokens, and the other 305,260.
With --tokenizer bytes: data/tinyshakespeare_bytes/, the first tenth and the rest. Also writes data/gpt2_tokenizer.bin
or bytes_tokenizer.bin.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

from pathlib import Path

from dev.data.command_line import add_common_flags, folder_name, run
from dev.data.download import download
from dev.data.shards import write_datafile
from dev.data.vocabulary import get_encoder, header_word, write_tokenizer
from dev.run.arguments import Parser

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tokenize(text, encoder):
    """
    Ids of the text, cut into "documents" at blank lines; end-of-text comes before each. As llm.c does it, the blank
    line stays at the end of a document, so that token streams are identical.
    """
    sections = text.split("\n\n")
    tokens = []
    for i, section in enumerate(sections):
        tokens.append(encoder.eot_token)
        tokens.extend(encoder.encode_ordinary(section if i == len(sections) - 1 else section + "\n\n"))
    return tokens


def main():
    parser = Parser(description="Tiny Shakespeare into token shards")
    parser.add_argument("--input", type=Path, help="a local copy of the text, instead of downloading it")
    add_common_flags(parser)
    args = parser.parse_args()
    folder = args.data_dir / folder_name("tinyshakespeare", args.tokenizer)

    source = args.input or download(URL, folder / "tiny_shakespeare.txt", sha256=SHA256)
    text = source.read_text(encoding="utf-8")
    tokens = tokenize(text, get_encoder(args.tokenizer))
    n, word = 32768 if args.tokenizer != "bytes" else len(tokens) // 10, header_word(args.tokenizer)
    if len(tokens) <= 32768:
        raise ValueError(f"{source} has {len(tokens):,} tokens; more than 32,768 are needed to split some off")
    write_datafile(folder / "tiny_shakespeare_val.bin", tokens[:n], word)
    write_datafile(folder / "tiny_shakespeare_train.bin", tokens[n:], word)
    write_tokenizer(args.data_dir, args.tokenizer)


if __name__ == "__main__":
    run(main)
