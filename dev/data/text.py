"""
Your own text into token shards.

    python dev/data/text.py book.txt                            # one file: data/book/book_{train,val}_000000.bin
    python dev/data/text.py ~/notes ~/src --name mine           # folders, recursively
    python dev/data/text.py corpus.jsonl.gz --field content     # one document a line
    zcat logs.gz | python dev/data/text.py - --name logs        # standard input

A plain text file is one document; a line of .jsonl and a row of .parquet (needs pyarrow) is one, too. Any file but
.parquet may be packed with gzip (.gz) or Zstandard (.zst, needs pyarrow). Bytes that are not UTF-8 become U+FFFD,
Windows line ends become "\\n", empty documents are left out. Every k-th piece (a document, or 64 K characters of a
long one) is held out for validation.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import gzip
import io
import json
import os
import sys
import zlib
from pathlib import Path

from dev.data.command_line import add_common_flags, run, show
from dev.data.shards import ShardWriter
from dev.data.tokenising import pieces, read_parquet, tokenize

EXTENSIONS = """
    .txt .text .md .rst .tex .html .xml .csv .jsonl .ndjson .parquet
    .py .ipynb .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .sh .sql .lua .jl .r .scala .swift .kt .cs .css
    .toml .yaml .yml
"""


class Corpus:
    """The documents of some files, each as an iterable of blocks of text; knows how much of them has been read."""

    def __init__(self, paths, field="text", form="auto"):
        self.paths, self.field, self.form = paths, field, form
        self.total = None if "-" in map(str, paths) else sum(p.stat().st_size for p in paths)
        self.before, self.file = 0, None  # bytes of the files before this one

    def fraction(self):
        position = 0 if self.file is None or self.file.closed else self.file.tell()
        return (self.before + position) / self.total if self.total else None

    def documents(self):
        for path in self.paths:
            yield from self.read(path)
            if self.total is not None:
                self.before += path.stat().st_size

    def read(self, path):
        if str(path) == "-":
            yield from self.read_stream(sys.stdin.buffer, self.form, "standard input")
            return
        with open(path, "rb") as self.file:
            suffixes = [s.lower() for s in path.suffixes] or [""]
            if suffixes[-1] == ".parquet":
                for text in read_parquet(self.file, self.field):
                    yield [(text or "").replace("\r\n", "\n")]
                return
            packed = suffixes[-1] in (".gz", ".zst")
            kind = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1]
            form = self.form if self.form != "auto" else "jsonl" if kind in (".jsonl", ".ndjson") else "text"
            yield from self.read_stream(unpack(self.file, suffixes[-1]), form, path)

    def read_stream(self, stream, form, name):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=None)
        if form != "jsonl":
            yield guarded(iter(lambda: text.read(1 << 18), ""), name)
            return
        for number, line in enumerate(guarded(text, name), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)[self.field] or ""
                yield [value.replace("\r\n", "\n")]
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{name}, line {number}: not a JSON object with text in {self.field!r} ({e!r})"
                                 "\n---> HINT: --field names the field that holds the text") from None


def guarded(iterable, name):
    """The same things; trouble with reading them (truncated, not packed at all) names the file."""
    try:
        yield from iterable
    except (EOFError, OSError, zlib.error) as e:
        raise ValueError(f"{name}: {e}") from None


def unpack(file, suffix):
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise ValueError(f"{file.name} needs a package\n---> HINT: pip install pyarrow") from None
        return pyarrow.CompressedInputStream(file, "zstd")
    return file


def find_files(paths):
    """The files that the paths name, those in folders (hidden ones left out) in the order of their names."""
    for path in paths:
        if str(path) == "-" or path.is_file():
            yield path
            continue
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        found = 0
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(names):
                plain = name.lower().removesuffix(".gz").removesuffix(".zst")
                if not name.startswith(".") and plain.endswith(tuple(EXTENSIONS.split())):
                    found += 1
                    yield Path(folder) / name
        if not found:
            looked_for = " ".join(EXTENSIONS.split())
            raise ValueError(f"no text files in {path}\n---> HINT: looked for {looked_for}, also with .gz and .zst")


def default_name(path):
    name = path.resolve().name
    return (Path(name.removesuffix(".gz").removesuffix(".zst")).stem if path.is_file() else name) or "text"


def with_splits(documents, val_fraction):
    """The stream of pieces for tokenize(), with every k-th piece in "val"."""
    every = round(1 / val_fraction) if val_fraction else 0
    count, previous = 0, None
    for document in documents:
        for begins, text in pieces(document):
            if not text and begins:
                continue
            split = "val" if every and count % every == 1 else "train"
            # where a long document goes on after a part that went into the other split, it begins anew
            yield split, begins or split != previous, text
            count, previous = count + 1, split


def main():
    parser = argparse.ArgumentParser(description="Your own text into token shards")
    parser.add_argument("paths", nargs="+", type=Path, help="files, folders, or - for standard input")
    parser.add_argument("--name", help="name of the result (default: of the first path)")
    parser.add_argument("--field", default="text", help="field of .jsonl, column of .parquet, that holds the text")
    parser.add_argument("--format", choices=("auto", "text", "jsonl"), default="auto", help="auto: by the file's name")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="held out for validation (0: nothing)")
    add_common_flags(parser, workers=True, shard_size=10**8)
    args = parser.parse_args()
    if not 0 <= args.val_fraction <= 0.5:
        raise ValueError(f"--val_fraction is between 0 and 0.5, not {args.val_fraction}")

    files = list(find_files(args.paths))
    from_stdin = "-" in map(str, files)
    name = args.name or ("stdin" if from_stdin else default_name(args.paths[0]))
    folder = args.data_dir / name
    writers = {split: ShardWriter(folder, name, split, args.shard_size) for split in ("train", "val")}
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if not from_stdin]
    job = None if from_stdin else [stats, args.field, args.format, args.val_fraction, args.shard_size]

    corpus = Corpus(files, args.field, args.format)
    print(f"tokenising {len(files):,} inputs into {show(folder)}")
    stream = with_splits(corpus.documents(), args.val_fraction)
    tokenize(stream, writers, job, args.tokenizer, args.workers, corpus.fraction)
    if writers["train"].shards == 0:
        raise ValueError("no text at all")
    if args.val_fraction and writers["val"].shards == 0:
        print("note: the text is too short to hold out anything for validation")


if __name__ == "__main__":
    run(main)
