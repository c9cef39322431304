"""Text: the sampler's coins and draws, reading token by token, the tokenizer."""
import numpy as np
import pytest
from formulas import F32, close
from models import ODD, batch, unsettled

from dev.run.text import Sampler, Tokenizer, generate
from train_gpt2 import GPT2

# ---------------------------------------------------------------------------------------------------------------------
# sampler

COINS = [0.230317235, 0.19051826, 0.310865164, 0.902659476, 0.684917867]


def test_coins():
    sampler = Sampler()
    assert [sampler.coin() for _ in COINS] == pytest.approx(COINS, rel=1e-8)


def test_draws_follow_the_coins():
    probs = np.array([0.2, 0.0, 0.05, 0.25, 0.3, 0.2])  # cumulative: 0.2 0.2 0.25 0.5 0.8 1
    with np.errstate(divide="ignore"):
        logits = (np.log(probs) - 20000).astype(F32)
    sampler = Sampler()
    assert [sampler.draw(logits) for _ in COINS] == [2, 0, 3, 5, 4]


def test_a_draw_exceeds_the_coin(monkeypatch):
    sampler = Sampler()
    for coin, token in (0.0, 1), (0.5 - 2**-24, 1), (0.5, 2), (1 - 2**-24, 2):
        monkeypatch.setattr(sampler, "coin", lambda coin=coin: coin)
        assert sampler.draw(np.array([-1e30, 3, 3, -1e30], F32)) == token


# ---------------------------------------------------------------------------------------------------------------------
# reading

def test_reading_token_by_token_equals_reading_at_once():
    model, tokens = unsettled(ODD), batch(ODD, 1, 9)[0]
    for first in 1, 4:
        model.rewind()
        logits = []
        for part in [tokens[0, :first], *tokens[0, first:, None]]:
            logits.append(model.read(part).copy())
        model.forward(tokens)
        for row, expected in enumerate(logits, first - 1):
            close(model.logits(row), expected)
        with pytest.raises(ValueError):  # no position left
            model.read([1])


def test_generate_draws_from_the_model(tiny):
    model, sampler, tokens, start = GPT2.build(tiny), Sampler(), [3, 14], 0
    generated = list(generate(model, Sampler(), [3, 14], 150))
    for token in generated:
        if len(tokens) - start > 64:  # no position left: the second half goes on
            start = len(tokens) - 32
        model.forward(np.array([tokens[start:]], np.int32))
        assert token == sampler.draw(model.logits(len(tokens) - start - 1))
        tokens.append(token)
    assert len(generated) == 150 and max(generated) < 300


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer

@pytest.fixture
def write_tokenizer(tmp_path):
    def write_tokenizer(words, version=2, eot=3, magic=20240328, count=None, cut=0):
        header = np.zeros(256, "<u4")
        header[:3] = magic, version, len(words) if count is None else count
        if version == 2:
            header[3] = eot
        content = header.tobytes() + b"".join(bytes([len(word)]) + word for word in words)
        path = tmp_path / "tokenizer.bin"
        path.write_bytes(content[:len(content) - cut])
        return str(path)
    return write_tokenizer


WORDS = [b"caf", "é".encode()[:1], "é".encode()[1:], b"<|endoftext|>", "😀".encode()[:3], "😀".encode()[3:], b"\n",
         b"\x1b[2J"]


def test_tokenizer(write_tokenizer):
    tokenizer = Tokenizer(write_tokenizer(WORDS))
    assert tokenizer.eot_token == 3
    assert [tokenizer.decode(i) for i in (0, 1, 2, 6, 4, 5)] == ["caf", "", "é", "\n", "", "😀"]
    assert "\x1b" not in tokenizer.decode(7)
    assert tokenizer.decode(1) == "" and tokenizer.decode(0) == "\ufffdcaf"  # half a character, then another one
    assert Tokenizer(write_tokenizer(WORDS, version=1)).eot_token == 50256


def test_tokenizer_without_its_file(tmp_path):
    tokenizer = Tokenizer(str(tmp_path / "missing.bin"))
    assert tokenizer.eot_token == 50256 and tokenizer.decode(5) + tokenizer.decode(50256) == "5 50256 "


@pytest.mark.parametrize("damage", [{"cut": 1}, {"cut": 3000}, {"count": 9}, {"magic": 5}, {"version": 3}])
def test_damaged_tokenizer(write_tokenizer, damage):
    with pytest.raises(ValueError, match=r"tokenizer\.bin"):
        Tokenizer(write_tokenizer(WORDS, **damage))
