"""What text.py takes for text: encodings, packed files, JSON and tables, folders with odd things in them; how much is
held out; what the shards are called."""
import bz2
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_datasets import byte_ids, random_text, tokens

from dev.data import readers, text, tokenising
from dev.data.shards import ShardWriter
from dev.data.tokenising import HoldOut
from dev.run.text import Bytes
from train_gpt2 import DataLoader, model_config

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = None

ROOT = Path(__file__).resolve().parents[2]
needs_pyarrow = pytest.mark.skipif(not pa, reason="needs pyarrow: pip install -r dev/requirements.txt")


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(flags): text.py's main(); the results go to tmp_path/data"""
    def call(*flags):
        defaults = ["--data_dir", tmp_path / "data", "--workers", "1", "--tokenizer", "bytes"]
        monkeypatch.setattr(sys, "argv", ["", *map(str, [*flags, *defaults])])
        text.main()
    return call


@pytest.fixture
def documents(call, tmp_path):
    """documents(name, content, flags): those that text.py reads in a file"""
    def documents(name, content, *flags):
        (tmp_path / name).write_bytes(content)
        call(tmp_path / name, "--name", "x", "--val_fraction", 0, *flags)
        return tokens(tmp_path / "data/x/x_train_000000.bin")
    return documents


def packed_zip(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def packed_tar(name, content):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# what is read

TEXT = "Grüße, 字 😀\nline two\n"


@pytest.mark.parametrize("encoding, bom", [
    ("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"),
    ("utf-32-le", b"\xff\xfe\0\0"), ("utf-32-be", b"\0\0\xfe\xff")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_encodings_and_packers(documents, capsys, encoding, bom, pack):
    suffix = {gzip.compress: ".gz", lzma.compress: ".xz", bz2.compress: ".bz2"}.get(pack, "")
    content = pack(bom + TEXT.replace("\n", "\r\n").encode(encoding))
    assert documents("a.txt" + suffix, content) == byte_ids([TEXT])
    assert "U+FFFD" not in capsys.readouterr().out


def test_packed_twice(documents):
    """As pbzip2 and xz -T write it, and cat puts it together"""
    assert documents("a.txt.xz", lzma.compress(b"one ") + lzma.compress(b"two")) == byte_ids(["one two"])
    assert documents("a.txt.bz2", bz2.compress(b"one ") + bz2.compress(b"two")) == byte_ids(["one two"])


def test_zip(documents, capsys):
    files = {"b.txt": "second", "a.txt": "\ufefffirst", "d/c.jsonl": '{"text": "third"}\n', ".hidden.txt": "x",
             "e.txt.gz": gzip.compress(b"fourth"), "__MACOSX/b.txt": "x", "picture.png": b"\x89PNG\0"}
    assert documents("x.zip", packed_zip(files)) == byte_ids(["second", "first", "third", "fourth"])
    assert "left out: 1 files" in capsys.readouterr().out
    assert documents("x.zip", packed_zip({"README": "only one"})) == byte_ids(["only one"])


@pytest.mark.parametrize("name, content", [
    ("a.json", '[{"text": "one"}, {"text": "zwei\\r\\n字"}, {"text": null, "x": [1]}, "three"]'),
    ("a.json", '\ufeff [\n  {\n    "text": "one"\n  },\n  {"x": {}, "text": "zwei\\n字"},\n "three" ] \n'),
    ("a.json", '{"text": "one"}\n{"text": "zwei\\n字"}\n\n{"text": "three"}'),
    ("a.json", '{"text":\n "one"}{"text": "zwei\\n字"} {"text": "three"}'),
    ("a.jsonl", '{"text": "one"}\n"zwei\\n字"\n{"text": "three"}'),
    ("a.csv", 'id,text\r\n1,one\r\n2,"zwei\r\n字"\r\n\r\n3,three\r\n'),
    ("a.csv", '\ufefftext,id\none,1\n"zwei\n字",2\n"",3\nthree,4'),
    ("a.tsv", 'id\ttext\n1\tone\n2\t"zwei\n字"\n3\tthree\n'),
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_json_and_tables(documents, name, content, encoding):
    content = content.removeprefix("\ufeff" * (encoding == "utf-16"))
    assert documents(name, content.encode(encoding)) == byte_ids(["one", "zwei\n字", "three"])
    packed = name + ".xz"
    assert documents(packed, lzma.compress(content.encode(encoding))) == byte_ids(["one", "zwei\n字", "three"])


def test_json_items_over_blocks(documents):
    """Items larger than what is read at a time, and many small ones"""
    items = ["x" * n + "]" for n in (1, 65_530, 65_535, 300_000, 1)] + [f"{i}" for i in range(30_000)]
    expected = byte_ids(items)
    for indent in None, 1:
        content = json.dumps([{"text": item} for item in items], indent=indent).encode()
        assert documents("a.json", content) == expected


def test_fields_and_columns(documents):
    assert documents("a.csv", b"text,body,t\n1,2,3", "--field", "body") == byte_ids(["2"])
    assert documents("a.json", b'[{"body": "2"}]', "--field", "body") == byte_ids(["2"])
    assert documents("a.csv", b"a,b\n1,2\n", "--format", "text") == byte_ids(["a,b\n1,2\n"])
    assert documents("a.data", b"a\tb\n1\t2\n", "--format", "tsv", "--field", "b") == byte_ids(["2"])


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
@pytest.mark.parametrize("mark", ["<|endoftext|>", "\n\n", "aab"])
def test_separator(mark, block):
    for content in ("", "one", f"one{mark}two{mark[:-1]} {mark}{mark}three{mark}", f"{mark}one", mark * 3, "aaaabaab"):
        reader = readers.Reader(separator=mark)
        blocks = iter([content[i:i + block] for i in range(0, len(content), block)])
        found = ["".join(document) for document in reader.separated(blocks)]
        assert found == content.split(mark) and reader.marks == content.count(mark)


def test_separator_of_a_file(documents):
    content = b"one\n<|endoftext|>\ntwo<|endoftext|><|endoftext|>"
    assert documents("a.txt", content, "--separator", "<|endoftext|>") == byte_ids(["one\n", "\ntwo"])
    assert documents("a.txt", content) == byte_ids([content.decode()])


@pytest.mark.parametrize("name, content, count", [
    ("a.txt", b"a\xffb\xc3(\xe2\x82", 3), ("a.txt", "é à ü".encode("latin-1"), 3), ("a.txt", TEXT.encode(), 0),
    ("a.txt", "�".encode(), 0), ("a.txt", "x\ud800y".encode("utf-16-le", "surrogatepass"), 1),
    ("a.json", b'["\\ud800 \\ud83d\\ude00 \\udc00"]', 2), ("a.csv", b"text\n\xff\n", 1)])
def test_replaced_characters_are_counted(documents, capsys, name, content, count):
    bom = b"\xff\xfe" if b"\0" in content else b""
    documents(name, bom + content)
    said = re.findall(r"^(\d+) characters could not be read", capsys.readouterr().out, re.MULTILINE)
    assert said == [str(count)] * bool(count)


# ---------------------------------------------------------------------------------------------------------------------
# what is no text

@pytest.mark.parametrize("name, content, what", [
    ("a.txt", b"%PDF-1.4\n1 0 obj <<>> endobj", "PDF"), ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG"),
    ("a.txt", packed_zip({"a": "b"}), "zip"), ("a.docx", packed_zip({"word/document.xml": "b" * 99}), "zip"),
    ("a.txt", gzip.compress(b"text" * 99), "gzip"), ("a.log", lzma.compress(b"text" * 99), "xz"),
    ("a", bz2.compress(os.urandom(99)), "bzip2"), ("a.tar", packed_tar("a.txt", b"text"), "tar"),
    ("a.tar.gz", gzip.compress(packed_tar("a.txt", b"text")), "tar"), ("a.arrow", b"ARROW1\0\0" + bytes(99), "Arrow"),
    ("a.txt", b"PAR1\x15\0\x15", "Parquet"), ("a.txt", "no mark".encode("utf-16-le"), "UTF-16"),
    ("a.txt", np.random.default_rng(0).bytes(5000), "binary"), ("a.csv", b"text\n\0\0\0\n", "binary"),
    ("a.jsonl", gzip.compress(b'{"text": "x"}' * 9), "gzip"), ("a.txt.xz", lzma.compress(b"\x7fELF\0\0"), "program"),
    ("a.zip", packed_zip({"a.txt": b"\x89PNG\0"}), "PNG"), ("a.mp3", b"\xff\xfb\x90\0" + bytes(range(256)), "binary"),
    ("a.txt", b"\xff\xfe" + np.random.default_rng(0).bytes(5000), "binary")])
def test_binary_files_are_refused(documents, tmp_path, name, content, what):
    with pytest.raises(ValueError, match=f"{re.escape(name)}.* is no text.*{what}|(?s:{re.escape(name)}.*{what})") as e:
        documents(name, content)
    assert "---> HINT: " in str(e.value) and not glob.glob(str(tmp_path / "data/*/*.bin*"))


@pytest.mark.parametrize("content", [
    b"", b"\x1b[31mred\x1b[0m of a terminal\n", b"page\x0c\n" * 9, "Ærøskøbing é".encode("latin-1") * 9,
    "日本語".encode("shift-jis") * 99, "Привет".encode("cp1251") * 9, b"a\x01" + b"b" * 99, b"BZh is no bzip2"])
def test_text_is_not_refused(documents, content):
    documents("a.txt", b"x" + content)


@pytest.mark.parametrize("name, content, problem", [
    ("a.json", b'[{"text": "one"}', "a.json: the array has no end"), ("a.json", b'[{"text": "one"', "item 1: not JSON"),
    ("a.json", b'[{"text": "one"}] x', "item 2: not JSON"), ("a.json", b'[{"no": 1}]', "item 1: .*--field"),
    ("a.json", b'{"data": [{"text": "one"}]}', "item 1: .*--field"), ("a.json", b'[["one"]]', "item 1"),
    ("a.json", b"[1, 2]", "item 1"), ("a.json", b'[{"text": ["one"]}]', "item 1"), ("a.json", b"plain", "item 1"),
    ("a.json", b"[" * 100_000, "a.json: .*recursion|item 1"),
    ("a.jsonl", b'{"a":' * 100_000, "a.jsonl, line 1: .*nested too deeply"),
    ("a.csv", b"id,body\n1,x\n", "no column 'text'; there are: id body.*--field.*--format text"),
    ("a.csv", b'text\n"open', "a.csv, line 2: .*--format text"), ("a.csv", b"a,text\n1\n", "a.csv, line 2: .*1 col"),
    ("a.tsv", b"id,text\n1,x\n", "no column"), ("a.csv", b"\n\ntext\n", "no column"),
    ("a.txt.xz", lzma.compress(b"x" * 999)[:-20], "a.txt.xz: "), ("a.txt.xz", b"no xz at all", "a.txt.xz: "),
    ("a.txt.bz2", bz2.compress(b"x" * 999)[:-9], "a.txt.bz2: "), ("a.txt.bz2", b"no bzip2", "a.txt.bz2: "),
    ("a.zip", packed_zip({"a.txt": "x" * 999})[:-30], "a.zip: "), ("a.zip", b"no zip", "a.zip: "),
    ("a.zip", packed_zip({}), "no text at all"), ("a.zip", packed_zip({"a.txt.gz": b"no gzip"}), "a.txt.gz: ")])
def test_damaged_files_are_one_error(documents, tmp_path, name, content, problem):
    with pytest.raises(ValueError, match=f"(?s){problem}"):
        documents(name, content)
    assert not glob.glob(str(tmp_path / "data/*/*.bin*"))


def test_a_line_without_end(documents, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 1000)
    with pytest.raises(ValueError, match="a.jsonl, line 2: more than 1,000 characters"):
        documents("a.jsonl", b'"one"\n"' + b"x" * 5000)
    with pytest.raises(ValueError, match="a.json, item 1: not JSON"):
        documents("a.json", b'["' + b"x" * 500_000)
    with pytest.raises(ValueError, match="a.csv, line .: field larger"):
        documents("a.csv", b'text\n"' + b"x" * 5000)


@needs_pyarrow
@pytest.mark.parametrize("kind, values", [
    ("list", [["a"], ["b"]]), ("int", [1, 2]), ("struct", [{"a": "b"}]), ("binary", [b"a"]), ("double", [1.5]),
    ("timestamp", np.array(["2020-01-01"], "datetime64[s]")), ("bool", [True])])
def test_columns_that_are_no_text(documents, kind, values):
    content = io.BytesIO()
    pq.write_table(pa.table({"text": values, "body": ["x"] * len(values)}), content)
    with pytest.raises(ValueError, match=f"column 'text' holds .*{kind}.*, no text\n---> HINT: .*: body"):
        documents("a.parquet", content.getvalue())
    assert documents("a.parquet", content.getvalue(), "--field", "body") == byte_ids(["x"] * len(values))


@needs_pyarrow
def test_columns_of_other_text(documents):
    for kind in pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.null():
        content = io.BytesIO()
        values = pa.array([None, None] if kind == pa.null() else ["x", None]).cast(kind)
        pq.write_table(pa.table({"text": values, "b": ["y", "z"]}), content)
        if kind == pa.null():
            with pytest.raises(ValueError, match="no text at all"):
                documents("a.parquet", content.getvalue())
        else:
            assert documents("a.parquet", content.getvalue()) == byte_ids(["x"])


# ---------------------------------------------------------------------------------------------------------------------
# files and folders

def test_links_and_files_that_are_named_twice(call, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("linked")
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "b.txt").write_text("b")
    (folder / "c.txt").symlink_to("nowhere")
    (folder / "d.txt").symlink_to("a.txt")
    (folder / "f").symlink_to(tmp_path / "elsewhere")
    (folder / "g.txt").symlink_to(tmp_path / "elsewhere" / "e.txt")
    os.link(folder / "a.txt", folder / "h.txt")
    call(folder, folder / "a.txt", tmp_path / "in" / ".." / "in" / "sub", "--val_fraction", 0, "--name", "x")
    assert tokens(tmp_path / "data/x/x_train_000000.bin") == byte_ids(["a", "linked", "b"])
    said = capsys.readouterr().out
    assert "c.txt (a link to nothing)" in said and f"left out: {folder}/f (a link to a folder" in said
    assert [Path(p).name for p in re.findall("(.*) is named twice", said)] == ["d.txt", "h.txt", "a.txt", "b.txt"]
    with pytest.raises(FileNotFoundError, match="c.txt: it is a link to nowhere"):
        call(folder / "c.txt")
    call(folder / "f", "--val_fraction", 0)  # named, it is read
    assert tokens(tmp_path / "data/elsewhere/elsewhere_train_000000.bin") == byte_ids(["linked"])


def test_what_is_left_out_of_a_folder_is_said(call, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in "a.txt", "b.json", "c.png", ".d.txt":
        (tmp_path / "in" / name).write_text("text")
    call(tmp_path / "in")
    said = capsys.readouterr().out
    assert "left out: 2 files in " in said and "not named like text: b.json, c.png (" in said


@pytest.mark.skipif(os.name == "nt", reason="a shell's <(…)")
def test_pipes(tmp_path):
    command = f"{sys.executable} {ROOT}/dev/data/text.py <(printf one) <(printf two) /dev/null --val_fraction 0" \
              f" --tokenizer bytes --workers 1 --data_dir {tmp_path}"
    for _ in range(2):  # what comes through a pipe is not remembered
        done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert tokens(tmp_path / "stdin/stdin_train_000000.bin") == byte_ids(["one", "two"])


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_empty_files_are_the_same_error_again(documents, tmp_path, content):
    for _ in range(3):
        with pytest.raises(ValueError, match="^no text at all in [^ ]*empty.txt$"):
            documents("empty.txt", content)
    assert not list((tmp_path / "data").rglob("*.*"))
    assert documents("empty.txt", b"no more") == byte_ids(["no more"])


# ---------------------------------------------------------------------------------------------------------------------
# what is held out

@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.25, 0.4, 0.5])
@pytest.mark.parametrize("sizes", [[60_000], [100_000], [130_000], [1_200_000], [500] * 30, [7, 3, 90_000, 20, 4] * 20,
                                   [3] * 5000, [10]], ids=lambda s: f"{s[0]}x{len(s)}")
def test_the_fraction_is_exact(call, tmp_path, fraction, sizes):
    items = [random_text(i, size)[:size].replace("\n", "_") or "x" for i, size in enumerate(sizes)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    call(tmp_path / "a.jsonl", "--val_fraction", fraction)
    train, val = (tokens(tmp_path / f"data/a/a_{split}_000000.bin") for split in ("train", "val"))
    assert abs(len(val) - fraction * (len(train) + len(val))) <= 3 and val[0] == train[0] == Bytes.eot_token
    batches = 1 + (sum(sizes) + 100 * len(sizes)) // tokenising.BATCH
    ids = [token for token in train + val if token != Bytes.eot_token]
    assert sorted(ids) == sorted(token for token in byte_ids(items) if token != Bytes.eot_token)
    assert len(train) + len(val) - len(byte_ids(items)) <= 4 * batches
    whole = {tuple(byte_ids([item])) for item in items}
    parts = [tuple(group) for split in (train, val) for group in groups(split)]
    assert sum(part not in whole for part in parts) <= 3 * batches


def groups(ids):
    """The documents of a shard, each with its end-of-text token"""
    places = [i for i, token in enumerate(ids) if token == Bytes.eot_token] + [len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(places)]


def test_documents_are_held_out_now_and_then(call, tmp_path):
    """Not those at the end alone, and not the short ones alone"""
    sizes = np.random.default_rng(0).integers(10, 400, 2000)
    items = [f"{i} " + "x" * size for i, size in enumerate(sizes)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    call(tmp_path / "a.jsonl", "--val_fraction", 0.1)
    held = groups(tokens(tmp_path / "data/a/a_val_000000.bin"))
    numbers = [items.index(i) for i in items if tuple(byte_ids([i])) in set(map(tuple, held))]
    assert len(numbers) > 150 and abs(np.mean(numbers) - 1000) < 100
    assert abs(np.mean([sizes[i] for i in numbers]) - np.mean(sizes)) < 40


@pytest.mark.parametrize("content, held", [("", None), ("a", 0), ("ab", 0), ("abc", 3), ("a b c d e", 3)])
def test_a_few_words(call, tmp_path, capsys, content, held):
    """A split that is asked for is not empty, where there are two words; otherwise it is said."""
    (tmp_path / "a.txt").write_text(content)
    if held is None:
        with pytest.raises(ValueError, match="no text at all"):
            call(tmp_path / "a.txt")
        return
    call(tmp_path / "a.txt")
    said = capsys.readouterr().out
    path = tmp_path / "data/a/a_val_000000.bin"
    assert path.exists() == bool(held) and ("too short to hold out" in said) == (not held)
    assert not held or len(tokens(path)) == held
    assert ("-v 0" in said) == (not held)


@pytest.mark.parametrize("stop_at", [1, 7, 20, 33])
def test_an_interrupted_run_holds_out_the_same(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(tokenising, "BATCH", 3000)
    items = [("", True, random_text(i, i % 9 * 30 + 1)) for i in range(80)]

    def run(folder, stop_at=None):
        def stream():
            for i, item in enumerate(items):
                if i == stop_at:
                    raise KeyboardInterrupt
                yield item
        writers = {split: tokenising_writer(tmp_path / folder, split) for split in ("train", "val")}
        tokenising.tokenize(stream(), writers, "job", "bytes", 1, deal=HoldOut(0.3, Bytes.eot_token))

    run("a")
    with pytest.raises(KeyboardInterrupt):
        run("b", stop_at)
    run("b")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / f).glob("*.bin")} for f in "ab")
    assert a == b and len(a) > 8


def tokenising_writer(folder, split):
    return ShardWriter(folder, "x", split, 2000)


# ---------------------------------------------------------------------------------------------------------------------
# what the shards are called

@pytest.mark.parametrize("name", ["plain", "my train set", "val", "Validation", "medieval_training", "[2024] a*b?",
                                  "x_train_", "it's $HOME"])
def test_patterns_match_one_split(call, tmp_path, capsys, name):
    """Those that are printed, those of README, and the old ones that people remember"""
    (tmp_path / "a.txt").write_text(random_text(0, 3000))
    call(tmp_path / "a.txt", "--name", name, "-s", 1000)
    printed = re.search("^train with: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {printed}"], capture_output=True, text=True, check=True)
    flag_i, train, flag_j, val = words.stdout.splitlines()
    assert (flag_i, flag_j) == ("-i", "-j")
    folder = glob.escape(str(tmp_path / "data" / name))
    found = [sorted(p for p in os.listdir(tmp_path / "data" / name) if f"_{split}_" in p and p.endswith(".bin"))
             for split in ("train", "val")]
    assert all(found) and not set(found[0]) & set(found[1])
    for patterns in (train, val), (f"{folder}/*_train_??????.bin", f"{folder}/*_val_??????.bin"), \
            (f"{folder}/*train*.bin", f"{folder}/*val*.bin"):
        assert [sorted(map(os.path.basename, glob.glob(pattern))) for pattern in patterns] == found


def test_shards_of_an_older_version_are_replaced(call, tmp_path):
    (tmp_path / "a.txt").write_text(random_text(0, 300))
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in "train_train_000000.bin", "train_val_000000.bin", "other_train_000000.bin":
        (tmp_path / "data" / "train" / name).touch()
    call(tmp_path / "a.txt", "--name", "train")
    names = sorted(p.name for p in (tmp_path / "data" / "train").glob("*.bin"))
    assert names == ["other_train_000000.bin", "text_train_000000.bin", "text_val_000000.bin"]


@pytest.mark.parametrize("script", ["text.py", "pydoc.py"])
def test_shards_for_the_tiny_model(script, tmp_path, tiny):
    """Tokens below 300; the end of a text is the model's last token, with which it begins to write."""
    (tmp_path / "a.txt").write_text(random_text(0, 3000))
    flags = [tmp_path / "a.txt"] if script == "text.py" else []
    done = subprocess.run([sys.executable, ROOT / "dev/data" / script, *flags, "--tokenizer", "tiny", "--data_dir",
                           tmp_path / "data"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    vocabulary = model_config(tiny).vocab_size
    for split in "train", "val":
        loader = DataLoader(str(tmp_path / f"data/*/*_{split}*.bin"), 1, 16, vocab_size=vocabulary)
        ids = [loader.next_batch()[0] for _ in range(loader.num_batches)]
        assert ids[0][0, 0] == vocabulary - 1 and {int(x.max()) for x in ids} <= set(range(vocabulary))
