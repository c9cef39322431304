"""The vocabulary of bytes: shards, models and tokenizers that know that they belong together; the end of a run."""
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from dev.data.shards import write_datafile
from dev.data.vocabulary import write_tokenizer
from dev.run import verdict
from dev.run.data import BYTES, choose_data, tokens_in
from dev.run.flags import parse_flags
from dev.run.text import Bytes, Tokenizer
from train_gpt2 import main, model_config

SMALL = "gpt2:l1c16h2t16"
TEXT = b"to be or not to be, that is the question; " * 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with shards of bytes where `make train` puts them"""
    for split in "train", "val":
        write_datafile(tmp_path / f"data/pydoc_bytes/pydoc_{split}.bin", [256, *TEXT], 257)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_header(folder):
    """Word 3 is the vocabulary, 0 for GPT-2's, whose files are llm.c's to the last byte."""
    write_datafile("gpt2.bin", [50256, 1, 2])
    old = np.zeros(256, "<i4")
    old[:3] = 20240520, 1, 3
    assert (folder / "gpt2.bin").read_bytes() == old.tobytes() + np.array([50256, 1, 2], "<u2").tobytes()
    content = (folder / "data/pydoc_bytes/pydoc_val.bin").read_bytes()
    assert np.frombuffer(content[:16], "<i4").tolist() == [20240520, 1, len(TEXT) + 1, 257]
    assert np.frombuffer(content[1024:], "<u2").tolist() == [256, *TEXT]


def test_tokenizer(folder):
    """The file is llm.c's kind, and says what the trainer knows without it."""
    write_tokenizer(folder, "bytes")
    read = Tokenizer("bytes_tokenizer.bin")
    assert read.tokens == Bytes().tokens == [*(bytes([b]) for b in range(256)), b"<|endoftext|>"]
    assert read.eot_token == Bytes().eot_token == 256 and BYTES == 257
    assert Bytes().encode("é\n") == [0xc3, 0xa9, 10]
    ours = Bytes()
    assert [ours.decode(token) for token in (0xc3, 0xa9, 10)] == ["", "é", "\n"]


@pytest.mark.parametrize("word, vocab_size, fits", [
    (0, 50257, True), (0, 300, True), (0, None, True), (257, 257, True), (257, None, True), (300, 300, True),
    (257, 50257, False), (0, 257, False), (300, 257, False), (257, 300, False)])
def test_model_and_data(folder, word, vocab_size, fits):
    write_datafile("a.bin", [1, 2, 3], word)
    if fits:
        assert tokens_in("a.bin", vocab_size) == 3
    else:
        with pytest.raises(ValueError, match=r"a\.bin has a vocabulary of .*, the model has (?s:.*)---> HINT: "):
            tokens_in("a.bin", vocab_size)


def test_shapes_take_the_vocabulary_of_the_data(folder):
    flags = parse_flags([])
    assert model_config(choose_data(flags, SMALL)).vocab_size == 257
    assert flags.input_bin == "data/pydoc_bytes/pydoc_train.bin" and flags.input_bin in flags.note
    assert choose_data(parse_flags([]), SMALL + "v300") == SMALL + "v300"
    write_datafile("gpt2.bin", [50256, 1, 2])
    flags = parse_flags(["-i", "gpt2.bin"])
    assert choose_data(flags, SMALL) == SMALL and flags.note is None


def test_any_shape():
    config = model_config("gpt2:l4c256h4t512v257")
    assert tuple(vars(config).values()) == (512, 257, 384, 4, 4, 256)
    assert model_config("d6v257").padded_vocab_size == 384 and model_config("d6").vocab_size == 50257
    for wrong in "gpt2:l4c256h3", "l0c8h1", "d7v257", "gpt2", "gpt3:l1c8h1":
        with pytest.raises(ValueError, match=re.escape(wrong.removesuffix("v257"))):
            model_config(wrong)


def test_a_run_ends_with_commands_that_work(folder, capfd):
    """Its data is found, its end saved without -n, its text is text, and what it says to type goes on."""
    assert main(f"-e {SMALL} -o out -b 2 -t 16 -x 3 -v 3 -s 3 -g 20 -l 1e-2 --prompt to".split()) == 0
    out = capfd.readouterr().out
    assert "data: data/pydoc_bytes/pydoc_train.bin" in out and "checkpoint of step 3 written" in out
    assert re.search(r"verdict: val loss 5\.\d\d → [345]\.\d\d: it ", out)
    sample = out.split("generating:\n---\n")[1].split("\n---\n")[0]
    assert not re.fullmatch(r"(\d+ )+", sample)
    commands = dict(re.findall(r"^(go on|write text|plot): +(.*)$", out, re.M))
    assert set(commands) == {"go on", "write text", "plot"} and "-x 6" in commands["go on"]
    done = subprocess.run(commands["go on"], shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "checkpoint of step 6 written" in done.stdout, done.stderr
    done = subprocess.run(commands["write text"] + " -n 5", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "5 tokens" in done.stderr, done.stderr


def test_nothing_is_kept_without_a_folder(folder, capfd):
    assert main(f"-e {SMALL} -b 2 -t 16 -x 1 -v 0 -s 0".split()) == 0
    assert "nothing of this run is kept: -o" in capfd.readouterr().out


@pytest.mark.parametrize("losses, vocab_size, words", [
    ((5.5, 1.6, 1.6), 257, "words and half sentences"), ((10.9, 5.4, 5.3), 50257, "words, not yet grammar"),
    ((5.5, 5.6, 5), 257, "not learnt"), ((5.5, 1.6, 1.0), 257, "by heart"), ((5.5, 2.5, 2.5), 257, "letters")])
def test_verdict(losses, vocab_size, words):
    assert words in verdict.verdict(*losses, vocab_size)
    assert verdict.verdict(float("nan"), *losses[1:], vocab_size) is None


def test_a_missing_package_is_one_line():
    done = subprocess.run([sys.executable, "-S", "train_gpt2.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "has no package numpy" in done.stderr and "Traceback" not in done.stderr
