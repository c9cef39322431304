"""
Files that are meant to do harm, or that no program of ours wrote: one clear line, bounded memory, nothing forged. What
fuzz.py tries at random; here is one case of each kind that once fell.
"""
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from flaky_server import answering
from fuzz_seeds import (
    FORGED,
    SHAPE,
    archive,
    debug_json,
    debug_state,
    evaluation_set,
    http,
    hugging_face,
    parquet,
    tiny_model,
)
from null_engine import NullEngine

import test_gpt2
import train_gpt2
from dev import generate
from dev.data import download, fineweb, hellaswag, inspect_bin, mmlu, readers, tinystories, tokenising
from dev.data.readers import Reader
from dev.data.shards import ShardWriter
from dev.data.vocabulary import ByteEncoding
from dev.eval import convert_bin, export_gguf, export_hf, import_hf
from dev.run import hf, multiple_choice
from dev.run.config import model_config, parameter_table
from dev.run.console import program
from dev.run.text import Sampler
from dev.run.vocabulary import own_vocabulary

DEEP = b"[" * 100_000 + b"]" * 100_000
unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Unix only")


@pytest.fixture
def fails(capfd, monkeypatch):
    """fails(main, *words): the one line `error: …` with which a program ends; words: its arguments"""
    monkeypatch.setattr(train_gpt2, "GPT2", NullEngine)

    def fails(main, *words):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        capfd.readouterr()
        status = program(main)
        _, err = capfd.readouterr()
        assert status == 1 and re.fullmatch(r"error: .+\n(---> HINT: .+\n)*", err) and "forged\n" not in err, err
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", err)
        return err.splitlines()[0]
    return fails


@pytest.fixture
def model(tmp_path):
    """The path of a small model"""
    (tmp_path / "m.bin").write_bytes(tiny_model(3, *SHAPE))
    return tmp_path / "m.bin"


def engine_of(path):
    config = model_config(str(path))
    return NullEngine(config, parameter_table(config))


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# pipes

@unix
@pytest.mark.parametrize("flag", ["-i", "-j", "-e"])
def test_a_pipe_is_not_waited_for(train, tmp_path, flag):
    os.mkfifo(tmp_path / "pipe.bin")
    printed = train(f"-x 1 -v 1 {flag} {tmp_path}/pipe.bin", status=1)
    assert "pipe.bin" in printed


@unix
def test_pipes_of_other_programs(fails, model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is a pipe" in fails(inspect_bin.main, pipe)
    assert "is a pipe" in fails(lambda: test_gpt2.check(str(model), str(pipe)))
    write_folder(tmp_path, hugging_face(False))
    (tmp_path / "hf/config.json").unlink()
    os.mkfifo(tmp_path / "hf/config.json")
    assert "is a pipe" in fails(import_hf.main, "-i", tmp_path / "hf", "-o", tmp_path / "o.bin")


# ---------------------------------------------------------------------------------------------------------------------
# JSON that is too deep, or of the wrong shape

def test_json_that_is_too_deep(fails, model, tmp_path):
    def written(name):
        (tmp_path / name).write_bytes(DEEP)
        return tmp_path / name
    write_folder(tmp_path, {"s.bin": debug_state(), "s.json": DEEP, "hf/config.json": DEEP})
    encoder = ByteEncoding()
    for name, line in {
        "s.json": fails(lambda: test_gpt2.check(str(model), str(tmp_path / "s.bin"))),
        "config.json": fails(import_hf.main, "-i", tmp_path / "hf", "-o", tmp_path / "o.bin"),
        "h.jsonl": fails(lambda: list(hellaswag.examples(written("h.jsonl"), encoder))),
        "a.jsonl": fails(lambda: [*documents(written("a.jsonl"))]),
        "a.json": fails(lambda: [*documents(written("a.json"))]),
        "stories.json": fails(lambda: tinystories.stories(written("stories.json"))),
        "127.0.0.1": fails(lambda: fineweb.list_parquet("http://127.0.0.1:9/", written("files.json"))),
        "p.progress.json": fails(lambda: tokenising._load_state(written("p.progress.json"), 1, {})),
    }.items():
        assert name in line and "nested too deeply" in line


def documents(path):
    with open(path, "rb") as file:
        for document in Reader().documents(file, path):
            yield "".join(document)


@pytest.mark.parametrize("change, words", [
    ({"losses": "x"}, "losses is"), ({"losses": [1, None]}, "losses[1] is null"), ({"beta1": 10**400}, "beta1"),
    ({"eps": True}, "eps is true"), ({"learning_rate": 1e308}, "expected 0 to 1"), ({"eps": -1}, "expected 0 to 1"),
])
def test_debug_json(fails, model, tmp_path, change, words):
    (tmp_path / "s.bin").write_bytes(debug_state())
    (tmp_path / "s.json").write_text(json.dumps({**json.loads(debug_json()), **change}))
    line = fails(lambda: test_gpt2.check(str(model), str(tmp_path / "s.bin")))
    assert "s.json" in line and words in line


@pytest.mark.parametrize("words, problem", [((2, 0, 8), "batch of 0"), ((2, 2, 0), "batch of"),
                                            ((2, 2, 10**6), "batch")])
def test_debug_state_without_a_batch(fails, model, tmp_path, words, problem):
    state = bytearray(debug_state())
    state[4:16] = np.array(words, "<i4").tobytes()
    (tmp_path / "s.bin").write_bytes(state)
    assert problem in fails(lambda: test_gpt2.check(str(model), str(tmp_path / "s.bin")))


@pytest.mark.parametrize("token", [-1, 300])
def test_debug_state_with_unknown_tokens(fails, model, tmp_path, token):
    state = bytearray(debug_state())
    state[1100:1104] = np.array([token], "<i4").tobytes()
    (tmp_path / "s.bin").write_bytes(state)
    line = fails(lambda: test_gpt2.check(str(model), str(tmp_path / "s.bin")))
    assert "s.bin" in line and "vocabulary is 0 to 299" in line


@pytest.mark.parametrize("state", [
    [], {}, {"job": 1}, {"done": {"train": [1]}}, {"done": {"train": [1, 0, "x"]}}, {"done": {"train": [-1, 0, 0]}},
    {"done": {"train": [0, 0, 0]}, "dealt": {"train": 3}},
])
def test_progress_of_the_wrong_shape(fails, tmp_path, state):
    state = {"job": "j", "complete": False} | state if state else state
    (tmp_path / "p.progress.json").write_text(json.dumps(state))
    writers = {"train": ShardWriter(tmp_path, "p", "train", 10)}
    line = fails(lambda: tokenising._load_state(tmp_path / "p.progress.json", "j", writers))
    assert "p.progress.json" in line


def test_progress_that_does_not_say_what_is_held_out(fails, tmp_path):
    job = ["j", "bytes", tokenising.PIECE, tokenising.BATCH, ["train", "val"]]
    state = {"job": job, "complete": False, "done": dict.fromkeys(("train", "val"), [0, 0, 0]),
             "dealt": dict.fromkeys(("train", "val"))}
    (tmp_path / "p.progress.json").write_text(json.dumps(state))
    writers = {split: ShardWriter(tmp_path, "p", split, 10) for split in ("train", "val")}
    deal = tokenising.HoldOut(0.1, 256)
    line = fails(lambda: tokenising.tokenize(iter([("", True, "a")]), writers, "j", "bytes", 1, deal=deal))
    assert "p.progress.json does not say" in line and (tmp_path / "p.progress.json").exists()


def test_progress_of_a_thousand_million_shards(tmp_path):
    state = {"job": "j", "complete": False, "done": {"train": [10**9, 0, 0]}}
    (tmp_path / "p.progress.json").write_text(json.dumps(state))
    writers = {"train": ShardWriter(tmp_path, "p", "train", 10)}
    assert tokenising._load_state(tmp_path / "p.progress.json", "j", writers)["done"] == {"train": [0, 0, 0]}


# ---------------------------------------------------------------------------------------------------------------------
# counts that are believed, one thing that is too large

def test_a_thousand_million_layers(fails, tmp_path):
    write_folder(tmp_path, hugging_face(False))
    path = tmp_path / "hf/config.json"
    for layers in 10**7, 10**9:
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "n_layer": layers}))
        line = fails(import_hf.main, "-i", tmp_path / "hf", "-o", tmp_path / "o.bin")
        assert str(layers)[:2] in line and ("too few" in line or "make no sense" in line)


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_small_packed_file_that_is_one_long_line(fails, tmp_path, form):
    content = b'{"text": "' + b"x" * (readers.LONGEST + 100)
    (tmp_path / f"a.{form}.gz").write_bytes(gzip.compress(content))
    line = fails(lambda: [*documents(tmp_path / f"a.{form}.gz")])
    assert f"a.{form}.gz" in line and ("more than 16,777,216" in line or "not JSON" in line)


def test_what_unpacks_to_too_much(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "limit", lambda file: 10**6)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"word " * 10**6))
    assert "unpacks to more than" in fails(lambda: [*documents(tmp_path / "a.txt.gz")])
    (tmp_path / "a.tar.gz").write_bytes(archive("w:gz", {"x.json": b" " * 10**7}))
    assert "unpacks to more than" in fails(lambda: tinystories.unpack(tmp_path / "a.tar.gz", tmp_path / "f"))
    assert not list((tmp_path / "f").iterdir())


def test_the_limit_follows_the_size_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(5000))
    with open(tmp_path / "a", "rb") as file:
        assert readers.limit(file) == 1000 * 5000 + (1 << 26)


def test_many_completions_are_not_one_batch(model, tmp_path):
    class Rows(NullEngine):
        def forward(self, inputs, targets=None, train=True):
            rows.append(len(inputs))
            return super().forward(inputs, targets, train)
    config, rows, rng = model_config(str(model)), [], np.random.default_rng(0)
    completions = [rng.integers(0, 300, 1 + i % 5).tolist() for i in range(1000)]
    (tmp_path / "e.bin").write_bytes(evaluation_set(([1, 2], completions, 0)))
    examples = multiple_choice.read_examples(str(tmp_path / "e.bin"))
    engine = Rows(config, parameter_table(config))
    engine.host("params").memory[:] = 0.1
    best = multiple_choice.answer(engine, *examples[0][:2])
    assert max(rows) == multiple_choice.TOGETHER and sum(rows) == 1000
    means = [multiple_choice.mean_losses(engine, [1, 2], [completion])[0] for completion in completions]
    assert best == int(np.argmin(means))


def test_a_model_of_one_position(tmp_path):
    (tmp_path / "m.bin").write_bytes(tiny_model(3, 1, 300, 1, 2, 16, 384))
    tokens = train_gpt2.generate(engine_of(tmp_path / "m.bin"), Sampler(), [1], 5)
    assert len(list(tokens)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# evaluation sets, and what they are made of

def test_evaluation_sets_without_examples_or_with_unknown_tokens(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/hellaswag").mkdir(parents=True)
    path = tmp_path / multiple_choice.HELLASWAG
    path.write_bytes(evaluation_set())
    assert "hellaswag_val.bin has no examples" in train("-x 1 -v 1 -h 1", status=1)
    path.write_bytes(evaluation_set(([1, 2], [[3], [4]], 0), ([1, 2], [[3], [300]], 0)))
    assert "hellaswag_val.bin: example 1 has the token 300" in train("-x 1 -v 1 -h 1", status=1)


@pytest.mark.parametrize("change", [{"label": 1e400}, {"label": "x"}, {"label": 4}, {"label": -1}, {"label": None},
                                    {"ctx": 3}, {"endings": "abcd"}, {"endings": [1, 2, 3, 4]}, {"endings": []}])
def test_hellaswag_lines(fails, tmp_path, change):
    item = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}
    (tmp_path / "h.jsonl").write_text(json.dumps(item) + "\n" + json.dumps(item | change))
    line = fails(lambda: list(hellaswag.examples(tmp_path / "h.jsonl", ByteEncoding())))
    assert "h.jsonl, line 2 is no HellaSwag example" in line


@pytest.mark.parametrize("content", [b"q,a,b,c,d,A\n" + b"x" * 200_000, b"\xff", b"q,a,b,c,d,E\n", b'"q\n' * 3])
def test_mmlu_rows(fails, tmp_path, content):
    (tmp_path / "d.tar").write_bytes(archive("w", {f"data/test/{FORGED}.csv": content}))
    assert "d.tar" in fails(lambda: list(mmlu.examples(tmp_path / "d.tar", "test", ByteEncoding())))


def test_mmlu_member_that_is_too_large(fails, tmp_path):
    member = tarfile.TarInfo("data/test/a.csv")
    member.size = 10**12
    (tmp_path / "d.tar").write_bytes(member.tobuf() + bytes(1024))
    assert "1,000,000,000,000 bytes" in fails(lambda: list(mmlu.examples(tmp_path / "d.tar", "test", ByteEncoding())))


@pytest.mark.parametrize("story", [3, None, ["a"], {"a": 1}])
def test_stories(fails, tmp_path, story):
    (tmp_path / "s.json").write_text(json.dumps([{"story": "a"}, {"story": story}]))
    assert "s.json is no JSON list of stories" in fails(lambda: tinystories.stories(tmp_path / "s.json"))


def test_stories_that_are_cut_off(fails, tmp_path):
    """The error names no flag of another program."""
    (tmp_path / "s.json").write_text('[{"story": "a"}, {"story')
    line = fails(lambda: tinystories.stories(tmp_path / "s.json"))
    assert "s.json is no JSON list of stories" in line and "cut off" in line and "HINT" not in line


@pytest.mark.parametrize("entry", [
    {"path": 3, "size": 1}, {"path": "a.parquet", "size": "1"}, {"path": "a.parquet", "size": -1},
    {"path": "a.parquet", "size": {}}, {"path": f"{FORGED}.parquet", "size": 1},
    {"path": "a.parquet", "size": 1, "lfs": 2}, {"path": "a.parquet", "size": 1, "lfs": {"oid": 7}}])
def test_listings_of_fineweb(fails, tmp_path, entry):
    (tmp_path / "files.json").write_text(json.dumps([{"path": "b.parquet", "size": 7}, entry]))
    line = fails(lambda: fineweb.list_parquet("http://127.0.0.1:9/x", tmp_path / "files.json"))
    assert "http://127.0.0.1:9/x" in line and not (tmp_path / "files.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# safetensors, beside the format's own library

def safetensors_file(path, entries, data, metadata=None):
    header = {"__metadata__": metadata} if metadata else {}
    for name, (dtype, shape, begin, end) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


FOUR = ("F32", [4], 0, 16)


@pytest.mark.parametrize("sound, entries, size", [
    (True, {"a": FOUR, "b": ("F32", [2, 2], 16, 32)}, 32), (True, {"b": ("BF16", [2], 16, 20), "a": FOUR}, 20),
    (True, {"a": FOUR, "mask": ("BOOL", [3], 16, 19)}, 19), (True, {"a": FOUR, "none": ("F32", [0], 16, 16)}, 16),
    (False, {"a": FOUR, "b": ("F32", [4], 0, 16)}, 16), (False, {"a": FOUR, "b": ("F32", [4], 8, 24)}, 24),
    (False, {"a": FOUR, "b": ("F32", [4], 20, 36)}, 36), (False, {"a": FOUR}, 20), (False, {"a": FOUR}, 12),
    (False, {"a": ("F32", [4], 4, 20)}, 20), (False, {"a": ("F32", [5], 0, 16)}, 16),
    (False, {"a": ("X9", [4], 0, 16)}, 16),
    (False, {"a": ("F32", [-4], 0, 16)}, 16), (False, {"a": FOUR, "mask": ("I64", [3], 16, 19)}, 19),
    (False, {"a": ("F32", [2**62, 4], 0, 16)}, 16), (False, {"a": ("F32", [4], 16, 0)}, 16),
])
def test_as_strict_as_the_formats_own_library(fails, tmp_path, sound, entries, size):
    path = safetensors_file(tmp_path / "a.safetensors", entries, bytes(range(size)))
    if sound:
        assert set(hf.read_safetensors(path)) == {name for name in entries if name != "mask"}
    else:
        assert "a.safetensors" in fails(lambda: hf.read_safetensors(path))
    library = pytest.importorskip("safetensors", reason="not installed: pip install -r dev/requirements.txt")
    try:
        with library.safe_open(path, "numpy") as file:
            assert sound and set(file.keys()) == set(entries)
    except (library.SafetensorError, OverflowError):
        assert not sound


# ---------------------------------------------------------------------------------------------------------------------
# weights that are no numbers

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("version", [3, 5])
def test_weights_that_are_no_numbers(fails, train, tmp_path, monkeypatch, capfd, value, version):
    data = bytearray(tiny_model(version, *SHAPE))
    bits = np.array([value], "<f4").tobytes()
    data[-4:] = bits if version == 3 else bits[2:] * 2
    model, out = tmp_path / "m.bin", tmp_path / "o.bin"
    model.write_bytes(data)
    assert "m.bin: the model has values that are no finite" in train(f"-x 1 -e {model}", status=1)
    assert generate.main(["-e", str(model)]) == 1 and "m.bin: the model has values" in capfd.readouterr().err
    for main, more in (convert_bin.main, ["-d", "fp32"]), (export_hf.main, []):
        assert "m.bin: " in fails(main, "-i", model, "-o", out, *more) and not out.exists()
    if export_gguf.gguf:
        assert "no finite numbers" in fails(export_gguf.main, "-i", model, "-o", out) and not out.exists()
    write_folder(tmp_path, hugging_face(False))
    path = tmp_path / "hf/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bits)
    assert "has values that are no finite" in fails(import_hf.main, "-i", tmp_path / "hf", "-o", out)
    assert not out.exists()


def test_losses_that_are_no_numbers(model):
    engine = engine_of(model)
    engine.host("params").memory[:] = np.nan
    with pytest.raises(ValueError, match="losses are not all finite"):
        multiple_choice.answer(engine, [1, 2], [[3], [4]])


# ---------------------------------------------------------------------------------------------------------------------
# names that would pass for lines of ours

def test_names_of_tensors(fails, tmp_path):
    write_folder(tmp_path, hugging_face(False))
    path = tmp_path / "hf/model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header[FORGED] = header.pop("transformer.ln_f.bias")
    safetensors = json.dumps(header).encode()
    path.write_bytes(len(safetensors).to_bytes(8, "little") + safetensors + data[8 + length:])
    assert "hf" in fails(import_hf.main, "-i", tmp_path / "hf", "-o", tmp_path / "o.bin")
    header[FORGED] |= {"shape": [7]}
    safetensors = json.dumps(header).encode()
    path.write_bytes(len(safetensors).to_bytes(8, "little") + safetensors + data[8 + length:])
    assert r"forged\n---> HINT: forged" in fails(import_hf.main, "-i", tmp_path / "hf", "-o", tmp_path / "o.bin")


def test_names_of_columns_and_shards(fails, train, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquets = pytest.importorskip("pyarrow.parquet")
    parquets.write_table(pyarrow.table({FORGED: ["a"]}), tmp_path / "a.parquet")
    assert "a.parquet" in fails(lambda: [*documents(tmp_path / "a.parquet")])
    (tmp_path / "b.parquet").write_bytes(parquet()[:-20])
    assert "b.parquet" in fails(lambda: [*documents(tmp_path / "b.parquet")])  # not in Thrift's words alone
    (tmp_path / f"train{FORGED}.bin").write_bytes(b"x" * 2000)
    assert r"forged\n---> HINT: forged" in train(f"-x 1 -i {tmp_path}/train*.bin", status=1)


def test_entries_of_a_tokenizer(capfd, tmp_path):
    words = [b"a"] * 256 + [FORGED.encode()] + [b"b"] * 43
    header = np.zeros(256, "<i4")
    header[:4] = 20240328, 2, 300, 299
    path = tmp_path / "t.bin"
    path.write_bytes(header.tobytes() + b"".join(bytes([len(word)]) + word for word in words))
    assert inspect_bin.inspect(path, None)
    out = capfd.readouterr().out
    assert "\nerror:" not in out and "\x1b" not in out and r"\x1b[31m\u202e\r" in out


def test_the_model_of_a_run(train, out):
    train("-x 4 -n 2")
    path = out / "run_00000004.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"flags": run["flags"] | {"-e": 3}}))
    assert "flags -e is 3, expected a text" in train("-x 5 -n 2 -y 1", status=1)
    path.write_text(json.dumps(run | {"flags": run["flags"] | {"-e": FORGED}}))
    printed = train("-x 5 -n 2 -y 1")
    assert "\nerror: forged" not in printed and "\x1b" not in printed and "resuming x\\nerror: forged" in printed


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies

@pytest.mark.parametrize("change, words", [
    ({"added_tokens": [{"content": "x", "id": 10**12}]}, "10000000"), ({"added_tokens": 3}, "added_tokens is 3"),
    ({"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, "no vocabulary of names"),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "-1"),
    ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [3]}}, "no vocabulary of names"),
    ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a \ud800"]}}, "m.tokenizer: 'utf-8' codec can't"),
])
def test_vocabularies(tmp_path, change, words):
    whole = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "normalizer": None,
             "pre_tokenizer": {"type": "ByteLevel"}}
    (tmp_path / "m.tokenizer").mkdir()
    path = tmp_path / "m.tokenizer/tokenizer.json"
    path.write_text(json.dumps(whole))
    assert own_vocabulary(tmp_path / "m.bin").tokens == [b"a", b"b"]
    path.write_text(json.dumps(whole | change))
    found = own_vocabulary(tmp_path / "m.bin")
    assert found.tokens is None and words in found.problem


# ---------------------------------------------------------------------------------------------------------------------
# servers

@pytest.fixture
def server():
    """server(bytes): the address of a server that answers every call with them"""
    with contextlib.ExitStack() as servers:
        yield lambda answer: servers.enter_context(answering(answer)) + "/x"


@pytest.mark.parametrize("head, body", [
    (b"Content-Encoding: gzip", gzip.compress(bytes(10**6))),
    (b"Transfer-Encoding: chunked", b"fff\r\n" + b"x" * 4095 + b"\r\nfff\r\n" + b"x" * 4095 + b"\r\n0\r\n\r\n"),
])
def test_a_server_that_says_no_length(fails, server, tmp_path, monkeypatch, head, body):
    url = server(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n\r\n" + body)
    assert download.download(url, tmp_path / "whole").stat().st_size in (10**6, 8190)
    monkeypatch.setattr(download, "UNKNOWN", 5000)
    line = fails(lambda: download.download(url, tmp_path / "x"))
    assert url in line and "sends more than 5,000 bytes" in line and not (tmp_path / "x").exists()


def test_a_file_without_room(fails, server, tmp_path):
    url = server(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\nx")
    free = download.shutil.disk_usage(tmp_path).free
    assert f"{free:,} bytes left"[:3] in fails(lambda: download.download(url, tmp_path / "x"))
    assert not list(tmp_path.iterdir())
    assert "at most 100 bytes" not in fails(lambda: download.download(url, tmp_path / "x", size=3))
    whole = server(http())
    assert "expected at most 100" in fails(lambda: download.download(whole, tmp_path / "x", most=100))


@pytest.mark.parametrize("status", [b"404 \x1b[31mred", b"404 a\x85error: b", b"410 " + b"x" * 5000])
def test_reasons_of_a_server(fails, server, tmp_path, status):
    url = server(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
    assert f"HTTP status {status[:3].decode()}" in fails(lambda: download.download(url, tmp_path / "x"))


@pytest.mark.parametrize("head", [b"Content-Encoding: gzip", b"Content-Length: -5", b"Content-Length: 1e3"])
def test_headers_that_are_wrong(fails, server, tmp_path, monkeypatch, head):
    monkeypatch.setattr(download, "BACKOFF", 0)
    url = server(b"HTTP/1.1 200 OK\r\n" + head + b"\r\nConnection: close\r\n\r\nabc")
    assert url in fails(lambda: download.download(url, tmp_path / "x", retries=0))


def test_a_redirect_that_is_cut_off(fails, server, tmp_path, monkeypatch):
    """and cannot be unpacked: requests then lets an error through that is none of its own."""
    monkeypatch.setattr(download, "BACKOFF", 0)
    url = server(b"HTTP/1.1 301 Moved\r\nContent-Length: 9\r\nContent-Encoding: gzip\r\nConnection: close\r\n"
                 b"Location: http://127.0.0.1:1/\r\n\r\nabc")
    assert url in fails(lambda: download.download(url, tmp_path / "x", retries=0))


def test_416_without_a_beginning(fails, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0)
    url = server(b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n")
    assert "does not fit" in fails(lambda: download.download(url, tmp_path / "x", retries=0))


# ---------------------------------------------------------------------------------------------------------------------
# the fuzzer

@unix
def test_a_short_run_of_the_fuzzer():
    run = subprocess.run([sys.executable, ROOT / "dev/test/fuzz.py", "--cases", "400", "--seed", "2"], text=True,
                         capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False)
    assert run.returncode == 0 and "400 cases, 0 fallen" in run.stdout, run.stdout + run.stderr


FALLS = '''
import sys
sys.path[:0] = [{root!r}, {root!r} + "/dev/test"]
import time
import fuzz
def bad(folder):
    content = (folder / "a.txt").read_bytes()
    if content[0] % 3 == 0: raise KeyError("x")
    if content[0] % 3 == 1: print("error: a.txt", file=sys.stderr); print("error: a.txt", file=sys.stderr); return 1
    time.sleep(60) if content[0] == 2 else bytearray(3 << 30)
fuzz.SECONDS = 2
fuzz.FORMATS = {{"x": ("a.txt", lambda rng, data: bytes([rng.randrange(6)]), {{"bad": bad}})}}
fuzz.seeds_of = lambda name: {{"a.txt": b"x"}}
sys.argv = ["fuzz", "--cases", "30"]
sys.exit(fuzz.main())
'''


@unix
def test_the_fuzzer_sees_what_falls():
    run = subprocess.run([sys.executable, "-c", FALLS.format(root=str(ROOT))], text=True, capture_output=True,
                         timeout=300, check=False)
    assert run.returncode == 1 and "30 cases, 30 fallen" in run.stdout, run.stdout + run.stderr
    for words in "traceback: KeyError", "status 1 with 2 errors", "more than 2 s", "traceback: MemoryError":
        assert words in run.stdout
