"""dev/generate.py: the tokens it draws, where it stops, what it prints where."""
import io
import sys

import numpy as np
import pytest

import train_gpt2
from dev import generate
from dev.run import text
from train_gpt2 import GPT2

END = 299


def write_tokenizer(folder, words):
    header = np.zeros(256, "<u4")
    header[:4] = 20240328, 2, len(words), END
    (folder / "data").mkdir()
    content = header.tobytes() + b"".join(bytes([len(word)]) + word for word in words)
    (folder / "data/gpt2_tokenizer.bin").write_bytes(content)


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """run(flags): generate with the tiny model, in a folder of its own; returns status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "load_kernels", lambda *args: None)
    monkeypatch.setattr(text, "encode", lambda text: [ord(c) for c in text])

    def run(flags=""):
        given = flags.split()
        status = generate.main(given if "-e" in given else ["-e", tiny, *given])
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def with_words(tmp_path):
    write_tokenizer(tmp_path, [f"<{i}>".encode() for i in range(300)])


def greedy(tiny, tokens, count):
    """The most likely tokens, each from a whole forward pass"""
    model = GPT2.build(tiny)
    for _ in range(count):
        model.forward(np.array([tokens], np.int32))
        tokens = [*tokens, int(model.logits(len(tokens) - 1).argmax())]
    return tokens[-count:]


def test_greedy(run, tiny, with_words):
    status, out, err = run("--prompt abc -n 12 --temperature 0 --past_end")
    assert status == 0 and out == "abc" + "".join(f"<{token}>" for token in greedy(tiny, [97, 98, 99], 12)) + "\n"
    assert err.startswith("kernels: ready") and "12 tokens in " in err and err.endswith(" tok/s\n")


def test_without_a_prompt_it_begins_after_the_end_of_a_text(run, tiny, with_words):
    assert run("-n 5 --temperature 0")[1] == "".join(f"<{token}>" for token in greedy(tiny, [END], 5)) + "\n"


def test_samples(run, with_words):
    _, out, err = run("-n 20 --samples 3 --past_end")
    texts = out.split("\n---\n")
    assert len(texts) == 3 == len(set(texts)) and all(text.count("<") == 20 for text in texts) and "60 tokens in" in err
    assert run("-n 20 --samples 3 --past_end")[1] == out != run("-n 20 --samples 3 --past_end --seed 5")[1]
    assert run("-n 20 --past_end")[1] == texts[0] + "\n"
    assert run("-n 20 --top_k 1")[1] == run("-n 20 --temperature 0")[1] == run("-n 20 --top_p 1e-6")[1]


def drawn(monkeypatch, *tokens):
    monkeypatch.setattr(generate, "generate", lambda model, sampler, prompt, count: iter(tokens[:count]))


def test_end_of_text(run, with_words, monkeypatch):
    drawn(monkeypatch, 5, 6, END, 7)
    assert run("--samples 2")[1] == "<5><6>\n---\n<5><6>\n" and "6 tokens" in run("--samples 2")[2]
    assert run("--past_end")[1] == "<5><6><299><7>\n"


def test_characters_that_are_split_over_tokens(run, tmp_path, monkeypatch):
    write_tokenizer(tmp_path, [bytes([i]) for i in range(256)] + [b"x"] * 44)
    drawn(monkeypatch, *"né €".encode(), 0xE2, 0x82)
    assert run("--prompt so")[1] == "soné €\ufffd\n"
    assert run("--samples 2 -n 2")[1] == "n\ufffd\n---\nn\ufffd\n"


def test_every_token_is_printed_at_once(run, with_words, monkeypatch, capsys):
    printed = []

    def tokens(model, sampler, prompt, count):
        for token in range(3):
            yield token
            printed.append(capsys.readouterr().out)
    monkeypatch.setattr(generate, "generate", tokens)
    run()
    assert printed == ["<0>", "<1>", "<2>"]


def test_what_was_written_counts_when_interrupted(tiny, with_words, monkeypatch, capsys):
    def tokens(model, sampler, prompt, count):
        yield from range(3)
        raise KeyboardInterrupt
    monkeypatch.setattr(generate, "generate", tokens)
    assert generate.main(["-e", tiny]) == 1
    assert "3 tokens in" in capsys.readouterr().err


def test_standard_input(run, with_words, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    status, out, _ = run("--prompt - -n 4 --temperature 0")
    assert status == 0 and out.startswith("two\nlines<")
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 500))  # longer than the model's 64 positions
    assert run("-p - -n 3")[1].startswith("x" * 500 + "<")


def test_without_a_tokenizer(run):
    status, out, err = run("-n 3 --past_end")
    assert status == 0 and len(out.split()) == 3 and all(word.isdigit() for word in out.split())
    assert "HINT: `make data`" in err


@pytest.mark.parametrize("flags, word", [
    ("-e missing.bin", "missing.bin"), ("-e d7", "d7"), ("--temperature -1", "temperature"), ("--seed 0", "seed"),
    ("--prompt Ωmega", "vocabulary"), ("--top_p 2", "top_p"),
])
def test_bad_input(run, flags, word):
    status, _, err = run(flags)
    assert status == 1 and "error: " in err and word in err and "Traceback" not in err


@pytest.mark.parametrize("flags", ["-n 0", "--samples 0", "--tokens many", "--nonsense"])
def test_bad_flags(run, flags):
    with pytest.raises(SystemExit, match="^2$"):
        run(flags)


def test_a_reader_who_has_seen_enough(python, tiny):
    process = python("-m", "dev.generate", "-e", tiny, "-n", "100000", "--past_end", OMP_NUM_THREADS="1")
    assert process.stdout.read(1)  # long before the last token
    process.stdout.close()
    assert process.wait(60) == 0
    err = process.stderr.read()
    assert "Traceback" not in err and "error" not in err and "tok/s" in err
