"""
MMLU, https://github.com/hendrycks/test: questions from 57 subjects, each with four answers.

    python dev/data/mmlu.py                     # data/mmlu/mmlu_test.bin, 14,042 examples
    python dev/data/mmlu.py --split val         # 1,531 examples

The subjects come in the order of their names. The context is "Question: …\\n\\nAnswer:", a completion is a space and
the answer.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import csv
import io

from dev.data.command_line import add_common_flags, run
from dev.data.download import download
from dev.data.readers import open_tar, unpacking
from dev.data.shards import write_evalfile
from dev.data.vocabulary import get_encoder
from dev.run.arguments import Parser
from dev.run.console import shown
from dev.run.reading import reason

LARGEST = 1 << 24  # bytes of a subject's questions: the largest has 2 million
URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


def examples(path, split, encoder):
    """(context ids, ids of the four answers, which one is right) of every question in data/<split>/*.csv."""
    with unpacking(path), open_tar(path) as tar:
        files = {m.name: read_member(tar, m) for m in tar
                 if m.isfile() and f"/{split}/" in m.name and m.name.endswith(".csv")}
    for name, content in sorted(files.items()):
        where = f"{shown(name)} in {shown(path)}"
        for row in read_rows(content, where):
            if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                raise ValueError(f"{where}: a question has 6 columns, the last one A, B, C or D; found {shown(row)}")
            answers = [list(encoder.encode_ordinary(" " + answer)) for answer in row[1:5]]
            yield list(encoder.encode_ordinary(f"Question: {row[0]}\n\nAnswer:")), answers, "ABCD".index(row[5])


def read_member(tar, member):
    """The text of a member. ValueError where it is none, or too large to be questions"""
    if member.size > LARGEST or member.issparse():
        raise ValueError(f"{shown(member.name)} has {member.size:,} bytes, expected at most {LARGEST:,}")
    try:
        return tar.extractfile(member).read().decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{shown(member.name)}: {reason(e)}") from None


def read_rows(content, where):
    """The rows of a CSV text. ValueError where it is none"""
    try:
        yield from csv.reader(io.StringIO(content, newline=""))
    except csv.Error as e:
        raise ValueError(f"{where}: {e}") from None


def main():
    parser = Parser(description="MMLU into an evaluation set")
    parser.add_argument("--split", choices=("test", "val", "dev"), default="test")
    parser.add_argument("--url", default=URL, help="where data.tar comes from")
    add_common_flags(parser)
    args = parser.parse_args()
    folder = args.data_dir / "mmlu"
    source = download(args.url, folder / "data.tar")
    write_evalfile(folder / f"mmlu_{args.split}.bin", examples(source, args.split, get_encoder(args.tokenizer)))


if __name__ == "__main__":
    run(main)
