"""Multiple choice: the answer is the completion with the lowest mean loss; the command line counts the right ones."""
import math
from pathlib import Path

import numpy as np
import pytest

from dev.data.shards import write_evalfile
from dev.eval import multiple_choice
from dev.run.multiple_choice import accuracy, read_examples, score
from train_gpt2 import GPT2


@pytest.fixture
def model(tiny):
    return GPT2.build(tiny)


def random_examples(rng, count, longest_context=20, longest=20):
    def text(longest):
        return rng.integers(0, 300, rng.integers(1, longest + 1)).tolist()
    return [(text(longest_context), [text(longest) for _ in range(4)], int(rng.integers(4))) for _ in range(count)]


def mean_loss(model, context, completion, T):
    """In float64, from the logits of one row without padding"""
    tokens = (context + completion)[-T - 1:]
    model.forward(np.array([tokens[:-1]], np.int32))
    rows, targets = range(len(tokens) - 1 - len(completion), len(tokens) - 1), np.array(completion)
    logits = np.array([model.logits(max(0, row)).astype(np.float64) for row in rows])
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets])


def label(choice, model, examples, T=64):
    """The examples labelled with np.argmin or np.argmax of their completions' mean losses"""
    return [(context, completions, int(choice([mean_loss(model, context, c, T) for c in completions])))
            for context, completions, _ in examples]


def write(path, examples):
    write_evalfile(path, examples)
    return str(path)


def test_evaluation_set_is_read_as_it_was_written(rng, tmp_path):
    examples = random_examples(rng, 30)
    assert read_examples(write(tmp_path / "set.bin", examples)) == examples


def test_answer_is_the_completion_with_the_lowest_mean_loss(model, rng):
    examples = random_examples(rng, 10)
    assert score(model, label(np.argmin, model, examples)) == (10, 10)
    assert score(model, label(np.argmax, model, examples)) == (0, 10)


def test_context_that_is_too_long_loses_its_beginning(model, rng):
    examples = [(context + 8 * context, completions, 0) for context, completions, _ in random_examples(rng, 10)]
    assert sum(len(context) > 64 for context, _, _ in examples) > 5
    assert score(model, label(np.argmin, model, examples))[0] == 10


def test_standard_error(model, rng):
    examples = random_examples(rng, 8)
    examples = label(np.argmin, model, examples[:2]) + label(np.argmax, model, examples[2:])
    assert score(model, examples) == (2, 8)
    assert accuracy(2, 8) == (0.25, pytest.approx(math.sqrt(0.25 * 0.75 / 8)))
    assert accuracy(8, 8) == (1, 0) and accuracy(0, 3) == (0, 0)


def damaged(content, position, word):
    return content[:position] + np.uint16(word).tobytes() + content[position + 2:]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda c: c[:-2], "example 2 of 3"), (lambda c: c[:1030], "example 0 of 3"),
    (lambda c: c[:1024], "example 0 of 3"),
    (lambda c: c[:500], "not the right kind of file"), (lambda c: damaged(c, 0, 7), "not the right kind of file"),
    (lambda c: damaged(c, 1024, 7), "example 0 of 3"), (lambda c: damaged(c, 1026, 0), "example 0 of 3"),
    (lambda c: damaged(c, 1030, 4), "example 0 of 3"), (lambda c: damaged(c, 1034, 60000), "example 0 of 3"),
    (lambda c: damaged(c, 1034, 0), "example 0 of 3"),
])  # fmt: skip
def test_damaged_evaluation_set(damage, message, rng, tmp_path):
    path = Path(write(tmp_path / "set.bin", random_examples(rng, 3)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_examples(path)


@pytest.mark.parametrize(("script", "name"), [("hellaswag", "HellaSwag"), ("mmlu", "MMLU")])
def test_command_line(script, name, model, tiny, rng, tmp_path, python):
    examples = random_examples(rng, 10)
    examples[0] = [1] * 80, *examples[0][1:]
    examples = label(np.argmin, model, examples[:2]) + label(np.argmax, model, examples[2:])
    path = write(tmp_path / "set.bin", examples)
    out, err = python("-m", f"dev.eval.{script}", "-e", tiny, "-i", path, "--limit", 8).communicate()
    long, kernels, result = out.splitlines()
    assert result == f"{name}: 2/8 = 0.250000 | standard error 0.153093" and not err
    assert long.startswith("1 examples have more than 64 tokens") and kernels.startswith("kernels: ready")


def test_progress_is_shown(tiny, rng, tmp_path, monkeypatch):
    calls, path = [], write(tmp_path / "set.bin", random_examples(rng, 4))
    monkeypatch.setattr(multiple_choice.Progress, "update", lambda self, *args: calls.append(args))
    monkeypatch.setattr("sys.argv", ["hellaswag.py", "-e", tiny, "-i", path])
    multiple_choice.main("HellaSwag", "")
    assert calls == [(i, "examples", i / 4) for i in range(4)]


@pytest.mark.parametrize(("flags", "error"), [
    (["-i", "nothing.bin"], "error: no evaluation set nothing.bin\n---> HINT: python dev/data/mmlu.py writes it\n"),
    (["--limit", -1], "error: --limit must be 1 or more, or 0 for all, not -1\n"),
    (["-e", "nothing.bin"], "error: no such checkpoint: nothing.bin\n---> HINT: "),
])  # fmt: skip
def test_command_line_errors(flags, error, tiny, rng, tmp_path, python):
    path = write(tmp_path / "set.bin", random_examples(rng, 3))
    process = python("-m", "dev.eval.mmlu", "-e", tiny, "-i", path, *flags)
    out, err = process.communicate()
    assert process.returncode == 1 and err.startswith(error) and not out
