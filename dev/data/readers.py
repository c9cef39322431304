"""
Readers of formats: a file in, its documents out, each an iterable of blocks of text.

A file is unpacked (.gz .zst .xz .bz2, and the members of a .zip), looked at (which encoding? is it text at all?) and
read by its form. All of it is a stream: in memory is a block, a line of .jsonl, an item of .json, a row of .csv.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

from dev.run.console import shown
from dev.run.files import open_file
from dev.run.reading import brief, reading, reason

try:
    import lzma
except ImportError:  # a Python that was built where its library was not
    lzma = None

PACKED = ".gz", ".zst", ".xz", ".bz2"
FORMS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
EXTENSIONS = """
    .txt .text .md .rst .tex .html .xml .csv .tsv .jsonl .ndjson .parquet
    .py .ipynb .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .sh .sql .lua .jl .r .scala .swift .kt .cs .css
    .toml .yaml .yml
""".split()  # of the files that are taken from a folder; .json, which is settings more often than text, is to be named
HEAD = 4096  # bytes that tell what a file is
LONGEST = 1 << 24  # characters of a line or an item: a damaged file is no reason to fill the memory
UNPACKED = 1000  # times its size that a packed file, or one of columns, may hold; and 64 MB
BOMS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
STARTS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ", ".bz2": b"BZh"}  # of what is packed
BINARY = {  # what files begin with that are no text
    b"%PDF-": "PDF", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip, or an office document", b"7z\xbc\xaf": "7-Zip", b"Rar!\x1a": "RAR", b"PAR1": "Parquet",
    b"ARROW1": "Arrow", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"\x7fELF": "a program",
    b"SQLite format 3": "SQLite", b"\x93NUMPY": "NumPy", b"\xd0\xcf\x11\xe0": "an old office document",
}  # fmt: skip
DAMAGED = (EOFError, RuntimeError, zlib.error, csv.Error, zipfile.BadZipFile, tarfile.TarError,
           *([lzma.LZMAError] if lzma else []))  # what reading raises; a RuntimeError is a zip's password
AGAIN = "is it damaged? Fetch it again, or leave it out"
AS_TEXT = "--format text takes the file as it is"


def named_like_text(name):
    """Is a file of this name taken from a folder?"""
    path = Path(name.lower())
    return (Path(path.stem) if path.suffix in PACKED else path).suffix in EXTENSIONS or path.suffix == ".zip"


class Reader:
    """
    field: the name in .jsonl and .json, the column of .csv, .tsv and .parquet, that holds the text. form: that of all
    files, where it is not "auto". separator: a mark between the documents of a plain text.

    replaced: characters that could not be read so far; marks: separators that were found; left_out: members of .zip
    files that are not named like text.
    """

    def __init__(self, field="text", form="auto", separator=None):
        self.field, self.form, self.separator = field, form, separator
        self.replaced = self.marks = self.left_out = 0

    def documents(self, file, path):
        """The documents of an open file, whose form is told by the suffix of its path"""
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from ([self.clean(text)] for text in guarded(read_parquet(file, self.field, path), path))
        elif suffix == ".zip":
            yield from self.members(file, path)
        else:
            kind = Path(path.stem).suffix.lower() if suffix in PACKED else suffix
            yield from self.read(unpack(file, suffix, path), path, FORMS.get(kind, "text"))

    def members(self, file, path):
        """What is in a .zip, in its order; without what is hidden in it"""
        def read():
            with zipfile.ZipFile(file) as archive:
                files = [member for member in archive.infolist() if not member.is_dir()
                         and not any(part.startswith((".", "__MACOSX")) for part in Path(member.filename).parts)]
                for member in files:
                    if not named_like_text(member.filename) and len(files) > 1:
                        self.left_out += 1
                        continue
                    with archive.open(member) as stream:
                        name = path / shown(member.filename)
                        yield from self.documents(Bounded(stream, limit(file), name), name)
        return guarded(read(), path)

    def read(self, stream, name, form="text"):
        """The documents of a stream of bytes. ValueError, with its name, for what is no text."""
        form = form if self.form == "auto" else self.form
        head = b"".join(guarded(read_head(stream), name))
        encoding = next((encoding for bom, encoding in BOMS.items() if head.startswith(bom)), "utf-8-sig")
        refuse_binary(head, encoding, name)
        codecs.register_error("replace and count", self.replace)
        text = io.TextIOWrapper(io.BufferedReader(Begun(head, stream), 1 << 16), encoding, "replace and count",
                                "" if form in ("csv", "tsv") else None)
        if form == "text":
            blocks = guarded(iter(lambda: text.read(1 << 18), ""), name)
            yield from self.separated(blocks) if self.separator else [blocks]
        elif form in ("csv", "tsv"):
            yield from ([self.clean(value)] for value in guarded(read_column(text, name, form, self.field), name))
        else:
            items = json_lines(text, name) if form == "jsonl" else json_items(text, name)
            for where, value in guarded(items, name):
                yield [self.clean(self.value(value, f"{name}, {where}"))]

    def value(self, item, where):
        """The text of an item of JSON: of its field, or the item itself"""
        try:
            text = item if isinstance(item, str) else item[self.field]
            if not isinstance(text, (str, type(None))):
                raise TypeError(f"it is {brief(text)}")
            return text or ""
        except (KeyError, TypeError) as e:
            raise not_json(where, e, self.field) from None

    def clean(self, text):
        """A text of JSON, a table …, None included: line ends as in files, and no halves of surrogate pairs"""
        text, count = re.subn("[\ud800-\udfff]", "\ufffd", (text or "").replace("\r\n", "\n"))
        self.replaced += count
        return text

    def replace(self, error):
        """What codecs calls for bytes that are no character"""
        self.replaced += 1
        return "\ufffd", error.end

    def separated(self, blocks):
        """The documents between the marks of a text. A mark may lie across two blocks."""
        rest = ""

        def document():
            nonlocal rest
            while True:
                before, mark, after = rest.partition(self.separator)
                if mark:
                    self.marks, rest = self.marks + 1, after
                    yield before
                    return
                done = max(0, len(rest) - len(self.separator) + 1)  # what comes after it may be the start of a mark
                yield rest[:done]
                rest, block = rest[done:], next(blocks, None)
                if block is None:
                    yield rest
                    rest = None
                    return
                rest += block

        while rest is not None:
            yield document()


class Begun(io.RawIOBase):
    """A stream whose beginning has been read already"""

    def __init__(self, head, stream):
        self.head, self.stream = head, stream

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.head[:len(buffer)] or self.stream.read(len(buffer))
        self.head = self.head[len(buffer):]
        buffer[:len(data)] = data
        return len(data)


class Bounded(io.RawIOBase):
    """A stream of which at most `most` bytes are read: a file that unpacks to more is meant to do harm"""

    def __init__(self, stream, most, name):
        self.stream, self.left, self.name = stream, most, name

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"{shown(self.name)}: unpacks to more than {UNPACKED} times its size\n"
                             "---> HINT: if that is right, unpack it and name what comes out")
        buffer[:len(data)] = data
        return len(data)


def limit(file):
    """The most bytes that may come out of a packed file"""
    try:
        return UNPACKED * os.fstat(file.fileno()).st_size + (1 << 26)
    except (AttributeError, OSError):  # a member of another packed file, which has its own limit
        return 1 << 62


def guarded(iterable, name):
    """The same things; trouble with reading them (truncated, not packed at all) names the file."""
    with reading(name, AGAIN):
        try:
            yield from iterable
        except DAMAGED as e:
            raise ValueError(reason(e)) from None


def unpack(file, suffix, name):
    """What is in a packed file, as a stream; the file itself where the suffix is none of a packer"""
    return file if suffix not in PACKED else Bounded(unpacked(file, suffix, name), limit(file), name)


def unpacked(file, suffix, name):
    """What is in a packed file, as a stream, however much it is"""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".bz2":
        return bz2.BZ2File(file)
    if suffix == ".xz":
        if lzma is None:
            raise ValueError(f"{name}: this Python cannot unpack .xz\n---> HINT: unpack it with xz -d")
        return lzma.LZMAFile(file)
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{name} needs a package\n---> HINT: pip install pyarrow") from None
    return pyarrow.CompressedInputStream(file, "zstd")


# -----------------------------------------------------------------------------
# is it text?


def read_head(stream):
    """The first HEAD bytes of a stream, or all that there are, in pieces"""
    count = 0
    while count < HEAD and (block := stream.read(HEAD - count)):
        count += len(block)
        yield block


def refuse_binary(head, encoding, name):
    """ValueError, with what it is, where the first bytes of a file are no text."""
    kind = next((kind for start, kind in BINARY.items() if head.startswith(start)), "binary data")
    kind = "a tar archive" if head[257:262] == b"ustar" else kind
    text = head.decode(encoding, "ignore")
    odd = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\n\r\f\b\x1b" for c in text)
    if "\0" in text or odd > len(text) / 20 or kind == "PDF":
        hint = "UTF-16 and UTF-32 are read where a byte-order mark begins them" if b"\0" in head[:4] else \
               "unpack it, or convert it to text, or leave it out"
        raise ValueError(f"{name} is no text: {kind}\n---> HINT: {hint}")


# -----------------------------------------------------------------------------
# JSON


def not_json(where, problem, field):
    return ValueError(f"{shown(where)}: not a JSON object with text in {field!r} ({shown(repr(problem))})\n"
                      f"---> HINT: --field names the field that holds the text; {AS_TEXT}")


def json_lines(text, name):
    """(where it is, value) of each line"""
    for number, line in enumerate(iter(lambda: text.readline(LONGEST), ""), 1):
        where = f"line {number}"
        if len(line) == LONGEST:
            raise ValueError(f"{shown(name)}, {where}: more than {LONGEST:,} characters\n---> HINT: is it damaged?")
        if line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{shown(name)}, {where}: not JSON ({reason(e)})\n"
                                 f"---> HINT: --format json reads values of several lines; {AS_TEXT}") from None


def json_items(text, name):
    """(where it is, value) of each item of an array, or of values one after another: lines, or spread over lines"""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    rest, at, number, inside = "", 0, 0, None  # inside: of the array; None before anything has come
    while True:
        at = gap.match(rest, at).end()
        block = "" if at < len(rest) else text.read(1 << 16)
        if block:
            rest, at = block, 0
        elif at == len(rest):
            if inside:
                raise ValueError(f"{shown(name)}: the array has no end after {number} items\n---> HINT: is it cut off?")
            return
        elif inside is None and rest[at] == "[":
            inside, at = True, at + 1
        elif inside and rest[at] == "]":
            inside, at = False, at + 1
        else:
            inside = bool(inside)
            try:
                value, at = decode(rest, at)
            except (ValueError, RecursionError) as e:
                rest, at = rest[at:], 0
                block = text.read(max(1 << 16, len(rest))) if len(rest) < LONGEST else ""  # doubled: linear time
                if not block:
                    raise ValueError(f"{shown(name)}, item {number + 1}: not JSON, or cut off ({reason(e)})\n"
                                     f"---> HINT: {AS_TEXT}") from None
                rest += block
                continue
            number += 1
            yield f"item {number}", value


# -----------------------------------------------------------------------------
# tables


def read_column(text, name, form, column):
    """The texts of a column of a .csv or .tsv, whose first row names the columns"""
    csv.field_size_limit(LONGEST)
    table = csv.reader(text, delimiter="\t" if form == "tsv" else ",", strict=True)
    names = next(table, None)
    if names is None:
        return
    if column not in names:
        raise ValueError(f"{shown(name)}: no column {column!r}; there are: {shown(' '.join(names), 200)}\n"
                         f"---> HINT: --field names the column that holds the text; {AS_TEXT}")
    place = names.index(column)
    try:
        for row in table:
            if row and len(row) <= place:
                raise csv.Error(f"there are {len(row)} columns instead of {len(names)}")
            if row:
                yield row[place]
    except csv.Error as e:
        raise ValueError(f"{shown(name)}, line {table.line_num}: {e}\n---> HINT: {AS_TEXT}") from None


def is_text(kind):
    """Is a column of this Arrow type text, or nothing at all?"""
    kind = kind.value_type if str(kind).startswith("dictionary") else kind
    return str(kind) in ("string", "large_string", "string_view", "null")


def read_parquet(file, column, name):
    """The texts of a column, row group by row group. ValueError, with its name, for a damaged file"""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading .parquet needs a package\n---> HINT: pip install pyarrow") from None
    with reading(name, AGAIN):
        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
        columns = {field.name: field.type for field in parquet.schema_arrow}
    if column not in columns:
        raise ValueError(f"no column {column!r} in {shown(name)}; there are: {shown(' '.join(columns))}")
    if not is_text(columns[column]):
        texts = " ".join(name for name, kind in columns.items() if is_text(kind)) or "none"
        raise ValueError(f"{shown(name)}: the column {column!r} holds {shown(columns[column])}, no text\n"
                         f"---> HINT: --field names the column; with text there are: {shown(texts)}")
    if parquet.metadata.num_rows > limit(file):
        raise ValueError(f"{shown(name)}: it says {parquet.metadata.num_rows:,} rows, too many for its size")
    with reading(name, AGAIN):
        for rows in parquet.iter_batches(batch_size=256, columns=[column], use_threads=False):
            yield from rows.column(0).to_pylist()


# -----------------------------------------------------------------------------
# archives


@contextlib.contextmanager
def unpacking(path):
    """A context in which what is wrong with an archive is said with its name"""
    with reading(path, "delete it and run again"):
        try:
            yield
        except DAMAGED as e:
            raise ValueError(f"{shown(path)} cannot be unpacked: {reason(e)}") from None


@contextlib.contextmanager
def open_tar(path):
    """A .tar, packed or not, as a stream of members; it has no more bytes than UNPACKED says."""
    with open_file(path) as file:
        head = file.read(6)
        file.seek(0)
        packed = next((suffix for suffix in PACKED if head.startswith(STARTS[suffix])), "")
        stream = io.BufferedReader(unpack(file, packed, path), 1 << 16) if packed else file
        with tarfile.open(fileobj=stream, mode="r|" if packed else "r:") as tar:
            yield tar
