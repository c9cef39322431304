"""
The files of llm.c's kind that everything here reads and writes (data/README.md describes each), and writing that leaves
either the old file or the whole new one.

A file is a header of 256 int32, which begins with a magic number and a version, and then the data.
"""
import hashlib
import os
import re
import secrets
import stat
import zlib

import numpy as np

from dev.run import TOP
from dev.run.console import shown

HEADER_BYTES = 1024
SHARD_MAGIC = 20240520        # tokens
EVAL_MAGIC = 20240522         # multiple-choice examples
MODEL_MAGIC = 20240326        # weights
STATE_MAGIC = 20240527        # of a run that is to go on: AdamW's moments, where the data loader is
DEBUG_STATE_MAGIC = 20240327  # for test_gpt2.py: a batch, and what PyTorch makes of it
TOKENIZER_MAGIC = 20240328    # the bytes of each token


def kind_of(found):
    """What a path is, of which os.stat() says `found`, in a word: file, folder, pipe or device"""
    mode = found.st_mode
    return ("file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode)
            else "device")


def plain_file(path):
    """The size of a file in bytes. ValueError where the path is no plain file: a pipe would be waited for, and a device
    has no end."""
    found = os.stat(path)
    if kind_of(found) != "file":
        raise ValueError(f"{shown(path)} is a {kind_of(found)}, expected a file")
    return found.st_size


def there(path):
    """A path in data/, where the scripts put what they make: in the project where the current folder has no data/"""
    at_home = not str(path).startswith("data/") or os.path.exists("data")
    return path if at_home else os.path.join(TOP, path)


def open_file(path):
    """A plain file, opened to read bytes"""
    plain_file(path)
    return open(path, "rb")


def new_header(magic, version, *words):
    """A header, int32 (256,): the words follow the version, the others are 0."""
    header = np.zeros(HEADER_BYTES // 4, np.int32)
    header[:2 + len(words)] = magic, version, *words
    return header


def read_header(file, path, magic, versions):
    """The 256 int32 at the start of a file; ValueError unless they begin with the magic number and a known version."""
    header = np.frombuffer(file.read(HEADER_BYTES), np.int32, -1) if os.path.getsize(path) >= HEADER_BYTES else []
    if len(header) < 256 or header[0] != magic:
        raise ValueError(f"{shown(path)}: not the right kind of file: its magic number is "
                         f"{header[0] if len(header) else 'missing'}, expected {magic}")
    if header[1] not in versions:
        raise ValueError(f"{shown(path)}: version {header[1]}, expected {' or '.join(map(str, versions))}\n"
                         "---> HINT: write the file again with the scripts in dev/")
    return header


def check_size(path, expected):
    """ValueError unless the file has the size that its header implies"""
    size = os.path.getsize(path)
    if size != expected:
        raise ValueError(f"{shown(path)}: {'truncated' if size < expected else 'too long'}: it has {size:,} bytes, "
                         f"its header implies {expected:,}\n---> HINT: fetch or write it again")


def require_numbers(path, name, x):
    """ValueError, with the names of a model and of a part of it, where not all of an array are finite numbers"""
    with np.errstate(all="ignore"):
        sound = x.size == 0 or np.isfinite(x.min()) and np.isfinite(x.max())
    if not sound:
        raise ValueError(f"{shown(path)}: {shown(name)} has values that are no finite numbers: it is damaged, or "
                         "training has diverged\n---> HINT: take an earlier checkpoint, or fetch the model again")


def to_bfloat16(x):
    """float32 numbers, rounded to the nearest bfloat16, ties to even: the uint16 of its bits, since NumPy has no such
    type"""
    out = np.empty(np.shape(x), "<u2")
    pieces = 1 + (out.size >> 22)  # of 16 MB, since a model's weights may be half of the memory
    for rounded, part in zip(*(np.array_split(flat, pieces) for flat in (out.reshape(-1), np.reshape(x, -1)))):
        bits = np.ascontiguousarray(part, np.float32).view(np.uint32)
        rounded[:] = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16  # the carry goes into the exponent
        rounded[np.isnan(part)] = 0x7FC0
    return out


def from_float32(x, dtype):
    """An array as it is stored: float32, or bfloat16 as to_bfloat16() makes it"""
    return np.asarray(x, "<f4") if dtype == "fp32" else to_bfloat16(x)


def as_float32(x):
    """The way back; float16 and float64 are welcome, too."""
    with np.errstate(all="ignore"):  # what is too large for a float32 is not finite then
        bfloat16 = x.dtype == np.uint16
        return (x.astype(np.uint32) << 16).view(np.float32) if bfloat16 else x.astype(np.float32, copy=False)


def destination(path):
    """Where a file is to be written: at the end of the user's links. ValueError where something is there that is no
    plain file and would be replaced, such as a device; or a link that a stranger put into a folder for all."""
    try:
        link, folder = os.lstat(path), os.stat(os.path.dirname(os.path.abspath(path)))
    except FileNotFoundError:
        return os.path.realpath(path)
    shared = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH  # as /tmp: the rule of Linux' own
    if stat.S_ISLNK(link.st_mode) and shared and link.st_uid not in (os.geteuid(), folder.st_uid):
        raise ValueError(f"{path} is another user's link in a folder that all may write to\n"
                         "---> HINT: name another file")
    end = os.path.realpath(path)
    kind = kind_of(os.stat(end)) if os.path.exists(end) else "file"
    if kind != "file":
        raise ValueError(f"{path} is a {kind}, expected the name of a file, which could be replaced\n"
                         "---> HINT: name another file")
    return end


def remove_temporary(folder, names):
    """Remove what NewFile has left in a folder where it was killed: of files whose names match a regular expression."""
    for name in os.listdir(folder):
        if re.fullmatch(rf"(?:{names})(?:\.[0-9a-f]{{16}})?\.tmp", name):
            os.unlink(os.path.join(folder, name))


class NewFile:
    """
    A binary file that is written under a temporary name, path.<16 random digits>.tmp, and gets its own, for good, when
    it is complete. Nobody can have put anything there before: the temporary file is made anew, through no link.

        with NewFile(path) as file:  # what was at `path` before stays there when the block ends with an exception
            file.write(...)

    Where a block is no place for it, open(), finish() and discard() are the same in three steps. A link at `path`
    stays, and what it points to is replaced. ValueError where `path` is a device, a pipe or a folder.
    """

    def __init__(self, path):
        self.path, self.target, self.file = path, destination(path), None
        self.temporary = f"{self.target}.{secrets.token_hex(8)}.tmp"

    def open(self):
        """Begin the file; returns what to write to. The folder must be there."""
        self.file = open(self.temporary, "xb")
        return self.file

    def finish(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.target)
        sync_folder(os.path.dirname(self.target))

    def discard(self):
        """Remove what there is of it, also where an interruption came just after the file was made."""
        try:
            if self.file is not None:
                self.file.close()
        finally:
            if os.path.exists(self.temporary):
                os.unlink(self.temporary)

    def __enter__(self):
        try:
            return self.open()
        except BaseException:
            self.discard()
            raise

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()


def write_file(path, *arrays):
    """Write a file of these arrays, in one go. Returns its checksum, see sum_of()"""
    total = 0
    try:
        with NewFile(path) as file:
            for data in (memoryview(array).cast("B") for array in arrays):
                file.write(data)
                total = zlib.crc32(data, total)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}\n---> HINT: what was there before is unchanged; free "
                      "some space or name another folder, then go on (-y 1: from the last checkpoint)") from error
    return total


def sum_of(path):
    """A file's checksum, CRC-32, which flipped bits change: 2.7 GB/s, where blake2b takes in 1.0 and sha256 1.6"""
    total = 0
    with open_file(path) as file:
        while data := file.read(1 << 22):
            total = zlib.crc32(data, total)
    return total


def file_sha256(path):
    """A file's sha256, by which it is known wherever it comes from"""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder):
    """Make names in a folder last through a power failure"""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
