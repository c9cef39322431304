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
import tarfile

from dev.data.command_line import add_common_flags, run
from dev.data.download import download
from dev.data.shards import write_evalfile
from dev.data.vocabulary import get_encoder
from dev.run.arguments import Parser

URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


def examples(path, split, encoder):
    """(context ids, ids of the four answers, which one is right) of every question in data/<split>/*.csv."""
    try:
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar if m.isfile() and f"/{split}/" in m.name and m.name.endswith(".csv")}
            files = {name: tar.extractfile(members[name]).read().decode() for name in sorted(members)}
    except (tarfile.TarError, EOFError) as e:
        raise ValueError(f"{path} cannot be unpacked: {e}\n---> HINT: delete it and run again") from None
    for name, content in files.items():
        for row in csv.reader(io.StringIO(content, newline="")):
            if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                raise ValueError(f"{name} in {path}: a question has 6 columns, the last one A, B, C or D; found {row}")
            answers = [list(encoder.encode_ordinary(" " + answer)) for answer in row[1:5]]
            yield list(encoder.encode_ordinary(f"Question: {row[0]}\n\nAnswer:")), answers, "ABCD".index(row[5])


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
