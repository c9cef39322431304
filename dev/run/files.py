"""
What llm.c's files have in common, and writing that leaves either the old file or the whole new one.

A file is a header of 256 int32, which begins with a magic number and a version, and then the data.
"""
import os

import numpy as np

HEADER_BYTES = 1024
SHARD_MAGIC, EVAL_MAGIC, MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC = 20240520, 20240522, 20240326, 20240527, 20240328


def read_header(file, path, magic, versions):
    """The 256 int32 at the start of a file; ValueError unless they begin with the magic number and a known version."""
    header = np.frombuffer(file.read(HEADER_BYTES), np.int32, -1) if os.path.getsize(path) >= HEADER_BYTES else []
    if len(header) < 256 or header[0] != magic:
        raise ValueError(f"{path}: not the right kind of file: its magic number is "
                         f"{header[0] if len(header) else 'missing'}, expected {magic}")
    if header[1] not in versions:
        raise ValueError(f"{path}: version {header[1]}, expected {' or '.join(map(str, versions))}\n"
                         "---> HINT: write the file again with the scripts in dev/")
    return header


def check_size(path, expected):
    """ValueError unless the file has the size that its header implies"""
    size = os.path.getsize(path)
    if size != expected:
        raise ValueError(f"{path}: {'truncated' if size < expected else 'too long'}: it has {size:,} bytes, its header "
                         f"implies {expected:,}\n---> HINT: fetch or write it again")


def write_file(path, *arrays):
    """Write arrays to a file under a temporary name, flush it to the disk, then rename it."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines(memoryview(array).cast("B") for array in arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror}\n---> HINT: what was there before is unchanged; free "
                          "some space or name another folder, then go on (-y 1: from the last checkpoint)") from error
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def sync_folder(folder):
    """Make names in a folder last through a power failure"""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
