"""
Your own text into token shards.

    python dev/data/text.py book.txt                            # one file: data/book/book_{train,val}_000000.bin
    python dev/data/text.py ~/notes ~/src --name mine           # folders, recursively
    python dev/data/text.py corpus.jsonl.gz --field content     # one document a line
    python dev/data/text.py all.txt --separator "<|endoftext|>" # a mark between documents
    zcat logs.gz | python dev/data/text.py - --name logs        # standard input

A plain text file is one document; a line of .jsonl, an item of .json, a row of .csv, .tsv and .parquet (needs pyarrow)
is one, too. Any file but .parquet may be packed: .gz, .zst (needs pyarrow), .xz, .bz2; a .zip holds files. Text is
UTF-8, or UTF-16 or UTF-32 with a byte-order mark; bytes that are no character become U+FFFD and are counted, Windows
line ends become "\\n", empty documents are left out. What is no text is refused.

Of all tokens --val_fraction are held out for validation: a document every now and then, and as much of another as the
number asks for.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import glob
import os
import shlex
import sys
from pathlib import Path

from dev.data.command_line import add_common_flags, run, say, show
from dev.data.readers import EXTENSIONS, PACKED, Reader, named_like_text
from dev.data.shards import ShardWriter
from dev.data.tokenising import HoldOut, pieces, tokenize
from dev.data.vocabulary import end_of_text
from dev.run.arguments import Parser
from dev.run.console import shown


class Corpus:
    """The documents of some files, each as an iterable of blocks of text; knows how much of them has been read."""

    def __init__(self, paths, reader):
        self.paths, self.reader = paths, reader
        self.total = sum(p.stat().st_size for p in paths) if all(map(Path.is_file, paths)) else None
        self.before, self.file = 0, None  # bytes of the files before this one

    def fraction(self):
        position = 0 if self.file is None or self.file.closed else self.file.tell()
        return (self.before + position) / self.total if self.total else None

    def documents(self):
        for path in self.paths:
            if str(path) == "-":
                yield from self.reader.read(sys.stdin.buffer, "standard input")
                continue
            if not path.is_file():  # <(…), whose end one waits for
                say(f"reading {shown(path)}, which is no plain file, to its end")
            with open(path, "rb") as self.file:
                yield from self.reader.documents(self.file, path)
            if self.total is not None:
                self.before += path.stat().st_size

    def pieces(self):
        """The stream for tokenize()"""
        for document in self.documents():
            for begins, text in pieces(document):
                if text or not begins:
                    yield "", begins, text


def find_files(paths):
    """The files that the paths name, each once."""
    seen = set()
    for path in paths:
        for file in files_of(path):
            identity = file if str(file) == "-" else (file.stat().st_dev, file.stat().st_ino)
            if identity in seen:
                say(f"{file} is named twice; it is taken once")
            else:
                yield file
            seen.add(identity)


def files_of(path):
    """The file that a path names, or the files in a folder (hidden ones left out) in the order of their names."""
    if str(path) == "-" or path.exists() and not path.is_dir():  # standard input, a file, or a pipe: <(…)
        yield path
        return
    if not path.exists():
        where = f": it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise FileNotFoundError(f"no file or folder {path}{where}")
    found, others = 0, []
    unread = lambda error: say(f"left out: {error.filename} ({error.strerror})")  # noqa: E731
    for folder, folders, names in os.walk(path, onerror=unread):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for linked in filter(os.path.islink, (os.path.join(folder, f) for f in folders)):
            say(f"left out: {linked} (a link to a folder; name it, too, if it is meant)")
        for name in sorted(n for n in names if not n.startswith(".")):
            file = Path(folder) / name
            if not named_like_text(name):
                others.append(os.path.relpath(file, path))
            elif not file.is_file():
                say(f"left out: {file} ({'a link to nothing' if file.is_symlink() else 'no file'})")
            else:
                found += 1
                yield file
    if not found:
        raise ValueError(f"no text files in {path}\n---> HINT: looked for {' '.join(EXTENSIONS)} .zip, also with "
                         f"{' '.join(PACKED)}; a file that is named is read whatever its ending")
    if others:
        some = ", ".join(shown(name) for name in others[:5]) + ", …" * (len(others) > 5)
        say(f"left out: {len(others):,} files in {path} that are not named like text: {some} (name those "
            "that are meant)")


def default_name(path):
    name = path.resolve().name
    if path.is_file():
        return Path(Path(name).stem if Path(name).suffix.lower() in PACKED else name).stem or "text"
    return (name if path.is_dir() else "stdin") or "text"


def shard_name(name):
    """What shards are called: by their own name, unless it could be taken for a split's in a pattern like *train*."""
    return "text" if "train" in name.lower() or "val" in name.lower() else name


def flags_for_training(writers):
    """-i and -j as one types them. The patterns cannot match the other split, whatever the name is."""
    flags = []
    for flag, writer in zip(("-i", "-j"), writers, strict=True):
        pattern = glob.escape(show(writer.folder)) + f"/{glob.escape(writer.name)}_{writer.split}_??????.bin"
        flags.append(f"{flag} {shlex.quote(pattern)}" if writer.shards else "-v 0")
    return " ".join(flags)


def main():
    parser = Parser(description="Your own text into token shards")
    parser.add_argument("paths", nargs="+", type=Path, help="files, folders, or - for standard input")
    parser.add_argument("--name", help="name of the result (default: of the first path)")
    parser.add_argument("--field", default="text", help="name in .jsonl and .json, or column of .csv, .tsv and "
                                                        ".parquet, that holds the text")
    parser.add_argument("--format", choices=("auto", "text", "jsonl", "json", "csv", "tsv"), default="auto",
                        help="auto: by the file's name")
    parser.add_argument("--separator", help="what stands between the documents of a plain text, as <|endoftext|>")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="held out for validation (0: nothing)")
    add_common_flags(parser, workers=True, shard_size=10**8)
    args = parser.parse_args()
    if not 0 <= args.val_fraction <= 0.5:
        raise ValueError(f"--val_fraction is between 0 and 0.5, not {args.val_fraction}")
    if args.separator == "":
        raise ValueError("--separator is at least one character\n---> HINT: without it a file is one document")

    files = list(find_files(args.paths))
    stream = not all(map(Path.is_file, files))
    name = args.name or ("stdin" if "-" in map(str, files) else default_name(args.paths[0]))
    folder = args.data_dir / name
    writers = {split: ShardWriter(folder, shard_name(name), split, args.shard_size) for split in ("train", "val")}
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if not stream]
    flags = [args.field, args.format, args.separator, args.val_fraction, args.shard_size]
    job = None if stream else ["held out by tokens", stats, *flags]

    if shard_name(name) != name:  # as they were called by earlier versions: old and new ones never mix
        for split in writers:
            ShardWriter(folder, name, split, args.shard_size).remove_shards()
    reader = Reader(args.field, args.format, args.separator)
    corpus = Corpus(files, reader)
    deal = HoldOut(args.val_fraction, end_of_text(args.tokenizer))
    print(f"tokenising {len(files):,} inputs into {show(folder)}")
    tokenize(corpus.pieces(), writers, job, args.tokenizer, args.workers, corpus.fraction, deal=deal)
    if reader.replaced:
        say(f"{reader.replaced:,} characters could not be read and became U+FFFD; is the text UTF-8?")
    if reader.left_out:
        say(f"left out: {reader.left_out:,} files in .zip files that are not named like text")
    if writers["train"].shards == 0:
        raise ValueError(f"no text at all in {' '.join(shown(show(path)) for path in args.paths[:3])}")
    if args.val_fraction and writers["val"].shards == 0:
        print("note: the text is too short to hold out anything for validation")
    say(f"train with: {flags_for_training(writers.values())}")


if __name__ == "__main__":
    run(main)
