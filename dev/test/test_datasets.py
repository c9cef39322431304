"""The engine that turns text into shards, and the dataset scripts on it, on small made-up data from a local server."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer
from fuzz_seeds import archive

from dev.data import download, fineweb, hellaswag, inspect_bin, mmlu, text, tinystories, tokenising
from dev.data.shards import ShardWriter, write_datafile, write_evalfile
from dev.data.tokenising import pieces, tokenize
from dev.data.vocabulary import EOT, TinyEncoding, get_encoder
from dev.run import files
from dev.run.multiple_choice import read_examples

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = None

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="no ../shared/data")
WORDS = ["the", "of", "and", "to", "in", "'s", "I’d", "naïve", "字", "42", "—", "\n", "\n\n", "\t", "", "\n", "", "x"]


def random_text(seed, length):
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + " " * rng.choice((0, 1, 1, 1, 2)) for _ in range(length))


def byte_ids(documents):
    """The independent way: end-of-text, 256, and the bytes, one after another."""
    return [i for document in documents for i in [256, *document.encode()]]


def tokens(*paths):
    """The tokens of some shards, one after another, each checked against the format."""
    result = []
    for path in paths:
        content = Path(path).read_bytes()
        header = np.frombuffer(content[:1024], "<i4")
        assert header[0] == 20240520 and header[1] == 1 and header[3] in (0, 257) and not header[4:].any()
        assert len(content) == 1024 + 2 * header[2]
        result += np.frombuffer(content[1024:], "<u2").tolist()
    return result


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.bin")}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    with FlakyServer() as s:
        yield s


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Call a script's main() with flags; the results go below tmp_path."""

    def call(module, *flags):
        workers = () if module in (hellaswag, mmlu) or "--workers" in flags else ("--workers", "1")
        tokenizer = () if "--tokenizer" in flags else ("--tokenizer", "bytes")
        monkeypatch.setattr(sys, "argv", ["", *map(str, flags), "--data_dir", str(tmp_path), *workers, *tokenizer])
        module.main()

    return call


def command(name, *args):
    return [sys.executable, str(ROOT / "dev" / "data" / name), *map(str, args)]


def script(name, *args, **kwargs):
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache")}
    return subprocess.run(command(name, *args), check=False, capture_output=True, env=env, cwd="/", **kwargs)


# -----------------------------------------------------------------------------
# cutting long documents


@needs_shared
def test_pieces_do_not_change_the_tokens(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    monkeypatch.setattr(tokenising, "PIECE", 60)
    encode = get_encoder().encode_ordinary
    for seed in range(300):
        document = random_text(seed, 200)
        cut = list(pieces([document]))
        assert [i for _, piece in cut for i in encode(piece)] == encode(document)
        assert len(cut) > 5 and max(len(piece) for _, piece in cut) <= 60
        assert [begins for begins, _ in cut] == [True] + [False] * (len(cut) - 1)


def test_pieces_do_not_depend_on_blocks(monkeypatch):
    monkeypatch.setattr(tokenising, "PIECE", 60)
    document = random_text(0, 500)
    for size in (1, 7, 59, 60, 61, 1000):
        blocks = [document[i : i + size] for i in range(0, len(document), size)]
        assert list(pieces(blocks)) == list(pieces([document]))


@pytest.mark.parametrize("document", ["", "x", "x" * 1000, " " * 1000, "字" * 61, "x" * 59 + " y", "x" * 60, "x" * 61])
def test_pieces_of_odd_documents(monkeypatch, document):
    monkeypatch.setattr(tokenising, "PIECE", 60)
    cut = list(pieces([document]))
    assert "".join(piece for _, piece in cut) == document
    assert all(len(piece) <= 60 for _, piece in cut) and cut[0][0]


# -----------------------------------------------------------------------------
# shards


def write_all(writer, *arrays):
    for array in arrays:
        for _ in writer.write(np.array(array, dtype=np.uint16)):
            pass
    writer.finish()


@pytest.mark.parametrize("size", [1, 3, 10, 11, 50])
def test_shard_writer(tmp_path, size):
    writer = ShardWriter(tmp_path, "x", "", size)
    write_all(writer, range(4), [], range(4, 33))
    paths = sorted(tmp_path.iterdir(), key=lambda p: p.name[-10:])
    assert tokens(*paths) == list(range(33))
    assert len(paths) == -(-33 // size) == writer.shards
    assert [p.name for p in paths[:2]] == ["x_val_000000.bin", "x_train_000001.bin"][: len(paths)]


def test_shard_writer_without_numbers(tmp_path):
    write_all(ShardWriter(tmp_path, "x", "train"), range(5))
    assert os.listdir(tmp_path) == ["x_train.bin"] and tokens(tmp_path / "x_train.bin") == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="2\\^31"):
        ShardWriter(tmp_path, "x", "train", 2**31)


def test_shard_that_is_interrupted_as_it_begins(tmp_path, monkeypatch):
    def interrupted(path, mode):
        open(path, mode).close()
        raise KeyboardInterrupt
    monkeypatch.setattr(files, "open", interrupted, raising=False)
    writer = ShardWriter(tmp_path, "x", "train")
    with pytest.raises(KeyboardInterrupt):
        next(writer.write(np.arange(3, dtype=np.uint16)))
    assert [re.sub("[0-9a-f]{16}", "*", name) for name in os.listdir(tmp_path)] == ["x_train.bin.*.tmp"]
    writer.discard()
    assert not os.listdir(tmp_path)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Tokenise 40 documents into small shards; `stop_at` interrupts it after that many of them."""
    monkeypatch.setattr(tokenising, "BATCH", 400)
    monkeypatch.setattr(tokenising, "PIECE", 100)
    documents = [random_text(seed, seed % 7 * 30) for seed in range(40)]
    encoded = []

    def stream(stop_at):
        for i, document in enumerate(documents):
            if i == stop_at:
                raise KeyboardInterrupt
            for begins, piece in pieces([document]):
                yield ("val" if i % 5 == 1 else "train"), begins, piece

    def call(folder, stop_at=None, description="job", **kwargs):
        writers = {split: ShardWriter(tmp_path / folder, "x", split, 700) for split in ("train", "val")}
        encoded.clear()
        before = tokenising._encode_batch
        monkeypatch.setattr(tokenising, "_encode_batch", lambda batch: encoded.append(batch) or before(batch))
        try:
            tokenize(stream(stop_at), writers, description, "bytes", workers=1, **kwargs)
        finally:
            monkeypatch.setattr(tokenising, "_encode_batch", before)
        assert not list((tmp_path / folder).glob("*.tmp"))
        return tmp_path / folder

    call.documents, call.encoded, call.root = documents, encoded, tmp_path
    return call


def test_tokenize(job):
    folder = job("a")
    for split in ("train", "val"):
        expected = byte_ids([d for i, d in enumerate(job.documents) if (i % 5 == 1) == (split == "val")])
        assert tokens(*sorted(folder.glob(f"x_{split}_*.bin"))) == expected
    batches = len(job.encoded)
    job("a")
    assert len(job.encoded) == 0 and batches > 30  # it is all there


@pytest.mark.parametrize("stop_at", [0, 3, 17, 25, 39])
def test_tokenize_goes_on_after_an_interruption(job, stop_at):
    whole = contents(job("a"))
    batches = len(job.encoded)
    with pytest.raises(KeyboardInterrupt):
        job("b", stop_at)
    left = contents(job.root / "b")
    assert left.items() <= whole.items()  # whole shards and nothing else
    assert contents(job("b")) == whole
    assert len(job.encoded) <= batches - 2 * len(left)  # a shard is more than two batches; they are not made again


def test_tokenize_starts_afresh(job):
    """For another job, where a shard is gone, and without a job; what the earlier run left is removed."""
    whole = contents(job("a"))
    batches = len(job.encoded)
    for description in ("another job", None, "job"):
        with pytest.raises(KeyboardInterrupt):
            job("b", 30, description)
        if description == "job":
            (job.root / "b" / "x_train_000001.bin").unlink()
        (job.root / "b" / "x_train_000099.bin").write_bytes(b"of a longer run")
        assert contents(job("b", None, description and "job")) == whole
        assert len(job.encoded) == batches
        (job.root / "b" / "x.progress.json").unlink(missing_ok=True)


def test_tokenize_spares_files_of_the_users(job):
    """A new run removes what an earlier one left under exactly its names; one that goes on, what was half written."""
    theirs = ["x_train_000000.bin.bak", "x_train_000000.bin.gz", "x_train_000000.bin.tmp.bak", "x_train_0000001.bin",
              "y_train_000000.bin", "my_x_train_000000.bin"]
    whole = contents(job("a"))
    (job.root / "b").mkdir()
    for name in theirs:
        (job.root / "b" / name).write_text(name)
    with pytest.raises(KeyboardInterrupt):
        job("b", 30)
    (job.root / "b" / "x_train_000007.bin.0123456789abcdef.tmp").write_text("half")
    left = contents(job("b"))
    assert {name: left[name] for name in whole} == whole
    assert all((job.root / "b" / name).read_text() == name for name in theirs)


def test_tokenize_stops_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "BATCH", 400)
    stream = [("", True, random_text(seed, 20)) for seed in range(100)]

    def call(folder, shards):
        tokenize(iter(stream), {"": ShardWriter(tmp_path / folder, "x", "", 500)}, "job", "bytes", 1, max_shards=shards)
        return contents(tmp_path / folder)

    whole = call("a", None)
    assert len(call("b", 3)) == 3
    assert len(call("b", 3)) == 3
    assert len(call("b", 5)) == 5
    assert call("b", None) == whole
    assert len(whole) > 6


# -----------------------------------------------------------------------------
# text.py


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def corpus(tmp_path):
    """A folder of everything that text.py reads; in `expected` the documents in their order."""
    if not pa:
        pytest.skip("needs pyarrow: pip install -r dev/requirements.txt")
    folder = tmp_path / "corpus"
    (folder / "b.d").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    lines = [json.dumps({"text": t, "id": 1}) for t in ("one", "", "zwei ü\r\nx", None, "\ud800", "three")]
    table = pa.table({"text": ["p1", None, "p2\r\n", ""] * 300, "n": range(1200)})
    files = {
        "a.txt": b"\xef\xbb\xbfdos\r\nline\rmac\n",
        "a1.md": b"bad \xff\xfe bytes \xc3",
        "b.d/empty.txt": b"",
        "b.d/inner.PY": "print('ü')\n".encode(),
        "b.d/picture.png": b"\x89PNG",
        ".hidden/secret.txt": b"secret",
        ".secret.txt": b"secret",
        "c.jsonl": ("\n".join(lines) + "\n\n").encode(),
        "d.jsonl.gz": gzip.compress(lines[0].encode()) + gzip.compress(b"\n" + lines[2].encode()),
        "e.txt.zst": zstd(b"packed ") + zstd(b"twice"),
        "f.parquet": None,
        "g.txt.gz": gzip.compress(b"x" * 70_000),
    }
    for name, content in files.items():
        if content is None:
            pq.write_table(table, folder / name, row_group_size=100)
        else:
            (folder / name).write_bytes(content)
    expected = [
        "dos\nline\nmac\n", "bad \ufffd\ufffd bytes \ufffd", "one", "zwei ü\nx", "\ufffd", "three", "one", "zwei ü\nx",
        "packed twice", *["p1", "p2\n"] * 300, "x" * 70_000, "print('ü')\n",
    ]  # fmt: skip
    return folder, expected


def test_text_reads_everything(corpus, main, tmp_path):
    folder, expected = corpus
    main(text, folder, "--val_fraction", 0, "-s", 20_000)
    assert tokens(*sorted((tmp_path / "corpus").glob("corpus_train_*.bin"))) == byte_ids(expected)
    assert not list((tmp_path / "corpus").glob("*_val_*"))


def test_text_holds_out(corpus, main, tmp_path):
    folder, expected = corpus
    main(text, folder, "--val_fraction", 0.25, "--name", "my text")
    train, val = (tokens(tmp_path / "my text" / f"my text_{split}_000000.bin") for split in ("train", "val"))
    assert abs(len(val) - (len(train) + len(val)) / 4) < 3
    assert val[: len(byte_ids(expected[1:2]))] == byte_ids(expected[1:2])  # the second document, and then …
    assert sorted(t for t in train + val if t != 256) == sorted(t for t in byte_ids(expected) if t != 256)


def test_text_workers_and_runs_give_the_same_bytes(corpus, tmp_path):
    folder, _ = corpus
    for i in range(5):
        (folder / f"long{i}.txt").write_text(random_text(i, 2000) * 100)  # enough for several batches
    tokenizer = "gpt2" if (SHARED / "tiktoken_cache").is_dir() else "bytes"
    results = []
    for run, workers in (("a", 1), ("b", 2), ("c", 2)):
        done = script("text.py", folder, "--data_dir", tmp_path / run, "--workers", workers, "-s", 300_000,
                      "--tokenizer", tokenizer)
        assert done.returncode == 0, done.stderr
        results.append(contents(tmp_path / run / "corpus"))
    assert len(results[0]) > 3 and all(r == results[0] for r in results)


def test_text_from_standard_input(tmp_path):
    done = script("text.py", "-", "--data_dir", tmp_path, "--tokenizer", "bytes", "--name", "in", input=b"a\r\nb\xff")
    assert done.returncode == 0, done.stderr
    shards = [tmp_path / "in" / f"in_{split}_000000.bin" for split in ("train", "val")]
    ids = byte_ids(["a\nb\ufffd"])
    assert tokens(*shards) == [*ids[:-2], 256, *ids[-2:]]
    assert b"1 characters could not be read" in done.stdout
    lines = b"".join(json.dumps({"body": str(i)}).encode() + b"\r\n" for i in range(100))
    done = script("text.py", "-", "--data_dir", tmp_path, "--tokenizer", "bytes", "--name", "in", "--format", "jsonl",
                  "--field", "body", input=lines)
    assert done.returncode == 0, done.stderr
    train, val = map(tokens, shards)
    assert abs(len(val) - 0.05 * (len(train) + len(val))) < 2 and val[:2] == byte_ids(["1"])


@pytest.mark.parametrize("name, content, problem", [
    ("none", None, "no file or folder"),
    (".", None, "no text files in"),
    ("empty.txt", b"", "no text at all"),
    ("x.jsonl", b'{"text": "ok"}\n{"text": ', "x.jsonl, line 2"),
    ("x.jsonl", b'{"other": "ok"}', "--field"),
    ("x.jsonl", b'{"text": 5}', "line 1"),
    ("x.jsonl", b"[1]", "line 1"),
    ("x.txt.gz", gzip.compress(b"x" * 1000)[:-10], "x.txt.gz: "),
    ("x.txt.gz", b"not gzip at all", "gzip"),
    ("x.txt.zst", "truncated", "x.txt.zst: Truncated"),
    ("x.txt.zst", b"not zstd at all", "x.txt.zst"),
    ("x.parquet", b"not parquet at all", "arquet"),
], ids=lambda x: str(x)[:12])  # fmt: skip
def test_text_bad_input(tmp_path, name, content, problem):
    if name.endswith((".zst", ".parquet")) and not pa:
        pytest.skip("needs pyarrow: pip install -r dev/requirements.txt")
    if content == "truncated":
        content = zstd(os.urandom(1000))[:-10]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = script("text.py", tmp_path / name, "--data_dir", tmp_path / "data", "--tokenizer", "bytes", "--workers", 1)
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and problem in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert not list((tmp_path / "data").rglob("*.bin*"))


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_text_stopped_from_outside(tmp_path, how):
    """Ctrl-C leaves whole shards only; even after kill -9 no worker is left, and the next run makes the same bytes."""
    (tmp_path / "long.txt").write_text(random_text(0, 2000) * 1200)
    args = [tmp_path / "long.txt", "--data_dir", tmp_path / "data", "--tokenizer", "bytes", "--workers", 2, "-s", 10**5]
    process = subprocess.Popen(command("text.py", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
                               # a shell's background jobs ignore Ctrl-C, and their children inherit that
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    folder = tmp_path / "data" / "long"
    while process.poll() is None and len(list(folder.glob("*_00000?.bin"))) < 4:  # the first of many shards
        time.sleep(0.001)
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)  # ends when the workers, who share the pipe, have ended, too
    if how == signal.SIGINT:
        assert process.returncode == 1 and b"interrupted" in errors and b"Traceback" not in errors
        assert not list(folder.glob("*.tmp"))
    left = contents(folder)
    done = script("text.py", *args)
    assert done.returncode == 0 and b"going on after" in done.stdout, done.stderr
    assert not list(folder.glob("*.tmp"))
    again = contents(folder)
    assert left.items() < again.items()
    (folder / "long.progress.json").unlink()
    assert script("text.py", *args).returncode == 0
    assert contents(folder) == again


# -----------------------------------------------------------------------------
# TinyStories, FineWeb


def test_tinystories(server, main, tmp_path):
    files = {}
    for i in (2, 0, 1):
        stories = [{"story": f"  Story {i}.{j} \n" if j != 7 else " ", "source": "x"} for j in range(50)]
        files[f"./data{i:02}.json"] = json.dumps(stories, indent=i or None).encode()
    server.files["/stories.tar.gz"] = archive("w:gz", {**files, "./._data00.json": b"Mac"})
    server.faults["/stories.tar.gz"] = ["truncate", "500"]
    main(tinystories, "--url", server.url + "/stories.tar.gz")

    def shuffled(name, seed):
        items = json.loads(files["./" + name])
        random.Random(seed).shuffle(items)
        return [item["story"].strip() for item in items]

    folder = tmp_path / "tinystories"
    assert tokens(folder / "TinyStories_val.bin") == byte_ids(shuffled("data00.json", 1337))
    expected = byte_ids(shuffled("data01.json", 1337) + shuffled("data02.json", 1338))
    assert tokens(folder / "TinyStories_train.bin") == expected
    assert expected.count(256) == 100  # an empty story, too, as in llm.c


@pytest.mark.parametrize("content", ["", "[", '[{"story": "a"}', '[{"story": "a"}, {"no": 1}]', '{"a": 1}', '[{"story'])
def test_tinystories_bad_file(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="no JSON list of stories"):
        tinystories.stories(tmp_path / "x.json")


def test_tinystories_bad_archive(server, main, tmp_path):
    server.files["/x"] = archive("w:gz", {"a.json": os.urandom(100_000)})[:50_000]
    with pytest.raises(ValueError, match="cannot be unpacked"):
        main(tinystories, "--url", server.url + "/x")
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.json"))


@pytest.fixture
def hub(server):
    """Hugging Face's answers for a tiny FineWeb-Edu of two parquet files. Returns the server and the documents."""
    if not pa:
        pytest.skip("needs pyarrow: pip install -r dev/requirements.txt")
    repository, documents, listing = "HuggingFaceFW/fineweb-edu", [], []
    for i in (1, 0):
        texts = [random_text(100 * i + j, j % 40) for j in range(60)] + [random_text(i, 5000), ""]
        documents = texts + documents
        buffer = io.BytesIO()
        pq.write_table(pa.table({"id": list(range(62)), "text": texts}), buffer, row_group_size=10)
        content, name = buffer.getvalue(), f"sample/10BT/00{i}_00000.parquet"
        server.files[f"/datasets/{repository}/resolve/main/{name}"] = content
        oid = hashlib.sha256(content).hexdigest()
        listing.append({"type": "file", "path": name, "size": len(content), "lfs": {"oid": oid}})
    server.files[f"/api/datasets/{repository}/tree/main/sample/10BT"] = json.dumps(listing).encode()
    return server, documents


def test_fineweb(hub, main, tmp_path, monkeypatch):
    server, documents = hub
    monkeypatch.setattr(tokenising, "BATCH", 2000)
    for path in server.files:
        server.faults[path] = ["500", "truncate"]
    flags = ("-t", "edu", "--base_url", server.url, "-s", 5000)
    main(fineweb, *flags, "-n", 2)
    folder, expected = tmp_path / "edu_fineweb10B", byte_ids(documents)
    names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in range(1, 3)]
    assert sorted(contents(folder)) == sorted(names)
    assert tokens(*(folder / n for n in names)) == expected[:15000]
    assert not any("001_00000" in path for path, _ in server.requests)  # the second file was not needed
    main(fineweb, *flags)
    shards = sorted(folder.glob("*.bin"), key=lambda p: p.name[-10:])
    assert tokens(*shards) == expected and len(shards) == -(-len(expected) // 5000)
    requests = len(server.requests)
    main(fineweb, *flags)
    assert len(server.requests) == requests


def test_fineweb_workers_give_the_same_bytes(hub, tmp_path):
    server, _ = hub
    for workers in (1, 2):
        done = script("fineweb.py", "-t", "edu", "--base_url", server.url, "-s", 7000, "--tokenizer", "bytes",
                      "--workers", workers, "--data_dir", tmp_path / str(workers))
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1" / "edu_fineweb10B") == contents(tmp_path / "2" / "edu_fineweb10B")


def test_fineweb_wrong_files(hub, main, tmp_path):
    server, _ = hub
    for path in list(server.files):
        if path.endswith("000_00000.parquet"):
            server.files[path] = server.files[path][::-1]
    with pytest.raises(ValueError, match="sha256"):
        main(fineweb, "-t", "edu", "--base_url", server.url)
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.bin"))
    server.files = {path: b"<html>" for path in server.files}
    with pytest.raises(ValueError, match="list of files"):
        fineweb.list_parquet(server.url + next(iter(server.files)), tmp_path / "files.json")
    assert not (tmp_path / "files.json").exists()


def test_fineweb_ready(server, main, tmp_path):
    for i, name in enumerate(["val_000000", "train_000001", "train_000002"]):
        write_datafile(tmp_path / "shard.bin", np.arange(1000 + i))
        address = f"/datasets/{fineweb.READY}/resolve/main/edu_fineweb_{name}.bin"
        server.files[address] = (tmp_path / "shard.bin").read_bytes()
        server.faults[address] = ["truncate", "503"]
    main(fineweb, "--ready", "-n", 2, "--base_url", server.url)
    folder = tmp_path / "edu_fineweb100B"
    assert len(contents(folder)) == 3 and tokens(folder / "edu_fineweb_train_000002.bin") == list(range(1002))
    (folder / "edu_fineweb_train_000002.bin").unlink()
    server.files[address] = server.files[address][:-2]
    with pytest.raises(ValueError, match="3,026 bytes"):
        main(fineweb, "--ready", "-n", 2, "--base_url", server.url)
    assert len(contents(folder)) == 2


# -----------------------------------------------------------------------------
# evaluation sets


def examples(path):
    """(context, completions, label) of every example of an evaluation set."""
    content = Path(path).read_bytes()
    header, words = np.frombuffer(content[:1024], "<i4"), np.frombuffer(content[1024:], "<u2").tolist()
    assert header[0] == 20240522 and header[1] == 1
    result, sizes = [], []
    while words:
        start, size, index, label, completions = words[:5]
        assert start == 65535 and index == len(result) and completions == 4
        example, words, parts = words[5 : size // 2], words[size // 2 :], []
        while example:
            parts.append(example[1 : 1 + example[0]])
            example = example[1 + example[0] :]
        assert len(parts) == 5
        result.append((parts[0], parts[1:], label))
        sizes.append(size)
    assert header[2] == len(result) and header[3] == max(sizes)
    return result


def ids(text):
    return byte_ids([text])[1:]


def test_hellaswag(server, main, tmp_path):
    items = [{"ctx": f"A man {i}.", "endings": [f"does {j}" for j in range(4)], "label": i % 4} for i in range(9)]
    server.files["/hellaswag_val.jsonl"] = "\n".join(map(json.dumps, items)).encode()
    server.faults["/hellaswag_val.jsonl"] = ["500", "truncate"]
    main(hellaswag, "--base_url", server.url)
    expected = [(ids(f"A man {i}."), [ids(f" does {j}") for j in range(4)], i % 4) for i in range(9)]
    assert examples(tmp_path / "hellaswag" / "hellaswag_val.bin") == expected


def test_hellaswag_without_a_context(server, main, tmp_path):
    """What is written is read again: an ending alone goes on after the end of another text."""
    items = [{"ctx": ctx, "endings": ["a", "", " ", "b"], "label": 3} for ctx in ("", " ", "x")]
    server.files["/hellaswag_val.jsonl"] = "\n".join(map(json.dumps, items)).encode()
    main(hellaswag, "--base_url", server.url)
    contexts = [context for context, _, _ in read_examples(tmp_path / "hellaswag" / "hellaswag_val.bin")]
    assert contexts == [[256], ids(" "), ids("x")]


def test_hellaswag_bad_line(server, main, tmp_path):
    server.files["/hellaswag_val.jsonl"] = b'{"ctx": "A man"}'
    with pytest.raises(ValueError, match="line 1"):
        main(hellaswag, "--base_url", server.url)
    assert not list(tmp_path.rglob("*.bin"))


def test_mmlu(server, main, tmp_path):
    rows = {"b": '"Is it\n""quoted""?",1,0.50,n/a,"None, of it",C\r\n', "a": "Q,w,x,y,z,A\nQ2,w,x,y,z,D\n"}
    server.files["/data.tar"] = archive(
        "w", {f"data/test/{n}_test.csv": r.encode() for n, r in rows.items()}
        | {"data/val/a_val.csv": b"V,w,x,y,z,B\n", "data/README.txt": b"x"})
    main(mmlu, "--url", server.url + "/data.tar")
    four = [ids(f" {c}") for c in "wxyz"]
    assert examples(tmp_path / "mmlu" / "mmlu_test.bin") == [
        (ids("Question: Q\n\nAnswer:"), four, 0),
        (ids("Question: Q2\n\nAnswer:"), four, 3),
        (ids('Question: Is it\n"quoted"?\n\nAnswer:'), [ids(t) for t in (" 1", " 0.50", " n/a", " None, of it")], 2),
    ]
    main(mmlu, "--url", server.url + "/data.tar", "--split", "val")
    assert examples(tmp_path / "mmlu" / "mmlu_val.bin") == [(ids("Question: V\n\nAnswer:"), four, 1)]


@pytest.mark.parametrize("example", [
    ([1], [[1], [2]], 2), ([1], [[1], []], 0), ([65535], [[1]], 0), ([1] * 40000, [[1]], 0),
    ([], [[1]], 0),
], ids=["label", "empty", "token", "long", "no context"])  # fmt: skip
def test_evalfile_refuses(tmp_path, example):
    with pytest.raises(ValueError, match="example 1 "):
        write_evalfile(tmp_path / "x.bin", [([1], [[1]], 0), example])
    assert not os.listdir(tmp_path)


# -----------------------------------------------------------------------------
# inspect_bin.py


@pytest.fixture
def bins(tmp_path):
    """One small file of every kind."""
    def header(*words, **at):
        h = np.zeros(256, "<i4")
        h[: len(words)] = words
        for word, value in at.items():
            h[int(word[1:])] = value
        return h.tobytes()

    folder = tmp_path / "bins"
    write_datafile(folder / "shard.bin", [EOT, *gpt2_ids("Hello"), EOT, *gpt2_ids("you")])
    write_datafile(folder / "bytes.bin", [256, *b"Hello", 256, *b"you"], 257)
    write_evalfile(folder / "eval.bin", [([1, 2], [[3], [4], [5], [6]], 2)])
    n = sum(int(np.prod(s)) for s in inspect_bin.tensor_table(8, 2, 4, 128).values())
    model = np.random.default_rng(0).standard_normal(n).astype("<f4")
    model[100 * 4 : 128 * 4] = 0
    (folder / "model.bin").write_bytes(header(20240326, 3, 8, 100, 2, 2, 4, 128) + model.tobytes())
    bf16 = (model.view("<u4") >> 16).astype("<u2")
    (folder / "bf16.bin").write_bytes(header(20240326, 5, 8, 100, 2, 2, 4, 128) + bf16.tobytes())
    batch = np.arange(8, dtype="<i4").tobytes()
    (folder / "debug.bin").write_bytes(header(20240327, 2, 1, 4) + batch + bytes(4 * (400 + 1 + n)))
    (folder / "state.bin").write_bytes(header(20240527, 1, 1, 0, w10=40, w20=1337) + bytes(8 * n))
    vocabulary = [bytes([TinyEncoding.order[i]]) if i < 256 else b"?" for i in range(EOT)] + [b"<|endoftext|>"]
    body = b"".join(bytes([len(t)]) + t for t in vocabulary)
    (folder / "gpt2_tokenizer.bin").write_bytes(header(20240328, 2, 50257, EOT) + body)
    return folder


def gpt2_ids(text):
    return TinyEncoding().encode_ordinary(text).tolist()


def test_inspect(bins, capsys):
    tokenizer = inspect_bin.read_tokenizer(bins / "gpt2_tokenizer.bin")[0]
    expected = {
        "shard": ["tokens           10", "documents        2", "<|endoftext|>Hello<|endoftext|>you"],
        "bytes": ["vocabulary       bytes, 257 tokens", "documents        2", "<|endoftext|>Hello<|endoftext|>you"],
        "eval": ["examples         1", "labels           2: 1"],
        "model": ["float32", "padded vocab     128", "parameters       1,040", "qkvw           2x12x4"],
        "bf16": ["bfloat16", "parameters       1,040"],
        "debug": ["B=1, T=4"],
        "state": ["step             40", "sampler          1337", "parameters       1,040"],
        "gpt2_tokenizer": ["50,257", "b'<|endoftext|>'"],
    }
    for name, texts in expected.items():
        assert inspect_bin.inspect(bins / f"{name}.bin", tokenizer), capsys.readouterr().out
        out = capsys.readouterr().out
        assert all(t in out for t in texts) and out.endswith("OK\n"), out
    assert inspect_bin.inspect(bins / "shard.bin", None)
    assert "[50256, " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shard", "eval", "model", "bf16", "state", "gpt2_tokenizer"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "version", "magic", "tiny", "empty"])
def test_inspect_damaged(bins, name, damage, capsys):
    path = bins / f"{name}.bin"
    good = path.read_bytes()
    bad = {"truncated": good[:-3], "longer": good + b"xyz", "version": good[:4] + b"\x09" + good[5:],
           "magic": b"?" + good[1:], "tiny": good[:500], "empty": b""}  # fmt: skip
    path.write_bytes(bad[damage])
    assert not inspect_bin.inspect(path, None)
    assert "PROBLEM" in capsys.readouterr().out


def test_inspect_values(bins):
    content = bytearray((bins / "model.bin").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    (bins / "model.bin").write_bytes(content)
    assert not inspect_bin.inspect(bins / "model.bin", None)
    write_datafile(bins / "shard.bin", [EOT + 1])
    assert not inspect_bin.inspect(bins / "shard.bin", None)


def test_inspect_command(bins):
    done = script("inspect_bin.py", *bins.glob("*.bin"), "--data_dir", bins, "--sha256")
    many = len(list(bins.glob("*.bin")))
    assert many > 6 and done.stdout.count(b"  OK\n") == many == done.stdout.count(b"sha256  "), done.stdout
    assert done.returncode == 0
    done = script("inspect_bin.py", bins / "shard.bin", bins / "none.bin", "--data_dir", bins)
    assert done.returncode == 1 and b"error: " in done.stderr and b"Traceback" not in done.stderr
