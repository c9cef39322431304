"""
A model's own vocabulary, where it is not GPT-2's: the tokenizer files that come with an import, and are kept beside its
.bin, and in the folder of a run that goes on from it.

Read is GPT-2's kind: byte-pair encoding of bytes, after GPT-2's way to cut a text into words. The files are
tokenizer.json (https://github.com/huggingface/tokenizers), or vocab.json and merges.txt.
"""
import os
import re
from pathlib import Path

from dev.run.console import say, shown
from dev.run.files import NewFile, file_sha256, plain_file
from dev.run.reading import is_a, misfit, read_json, reading
from dev.run.text import MOST_TOKENS, Bytes, Tokenizer, tokenizer_for

VOCABULARY_FILES = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "generation_config.json", "config.json")  # the last two name the end-of-text token
GPT2S = 50257  # tokens in GPT-2's
VOCABULARY = {  # GPT-2's: the two files that tiktoken makes its encoding of, and their sha256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves; others from 256 on
LETTERS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
BYTES = {letter: b for b, letter in LETTERS.items()}


def beside(path):
    """The folder with the tokenizer files of a checkpoint: one for all of a run's"""
    return re.sub(r"(?<=model)_\d{8}$", "", os.path.splitext(path)[0]) + ".tokenizer"


IDS, MERGES = {str: int}, [(str, [str, str])]
SHAPES = {  # of what is read here
    "tokenizer.json": {"model?": ({"type?": (str, None)}, None),
                       "added_tokens?": [{"content": str, "id": int}],
                       "pre_tokenizer?": ({"type?": str, "use_regex?": bool, "add_prefix_space?": bool}, None)},
    "vocab.json": IDS, "added_tokens.json": IDS,
    "tokenizer_config.json": {"tokenizer_class?": (str, None), "add_prefix_space?": (bool, None)},
}


def read(folder, name):
    """What a JSON file says, {} where it is missing. ValueError where it is damaged, or has another shape."""
    try:
        return read_json(os.path.join(folder, name), SHAPES.get(name, dict), "import the model again")
    except FileNotFoundError:
        return {}


class Vocabulary(Tokenizer):
    """
    The vocabulary in a folder. ValueError, with the reason, where it is none of GPT-2's kind.

    names: how the files spell each token; merges: pairs of names, those that are put together first come first.
    special: {text: token} of those that stand for themselves. eot_token: with which a text ends.
    """

    def __init__(self, folder):
        self.folder, whole = folder, read(folder, "tokenizer.json")
        model = whole.get("model") or {}
        ids, merges = (model.get("vocab"), model.get("merges")) if whole else self.read_old_files()
        self.prefix = self.check(whole, model)
        if not ids or misfit(ids, IDS) or misfit(merges, MERGES):
            raise ValueError(f"{shown(folder)}: no vocabulary of names and merges")
        self.merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
        with reading(self.folder, "import the model again"):  # halves of surrogate pairs are no text
            " ".join(map("".join, self.merges)).encode()
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.special = {t["content"]: t["id"] for t in whole.get("added_tokens", [])}
        self.special |= read(folder, "added_tokens.json")
        config, generation = (read(folder, name) for name in ("config.json", "generation_config.json"))
        self.ids = {**ids, **self.special}
        self.check_ids()
        if "<|endoftext|>" in ids:
            self.special["<|endoftext|>"] = ids["<|endoftext|>"]
        end = config.get("eos_token_id", generation.get("eos_token_id"))
        known = is_a(end, int) and end in self.ids.values()
        self.eot_token = end if known else self.special.get("<|endoftext|>", max(self.ids.values()))
        self.names = [None] * (1 + max(self.ids.values()))
        for name, token in self.ids.items():
            self.names[token] = name
        self.tokens = [self.spell(name) for name in self.names]
        self.reset()

    def read_old_files(self):
        ids = read(self.folder, "vocab.json")
        path = os.path.join(self.folder, "merges.txt")
        if not ids or not os.path.isfile(path):
            raise ValueError(f"{shown(self.folder)}: neither tokenizer.json nor vocab.json and merges.txt")
        size = plain_file(path)
        with reading(path, "import the model again"), open(path, encoding="utf-8") as file:
            lines = file.read(min(size, MOST_TOKENS * 256)).split("\n")
        return ids, [line for line in lines if line and not line.startswith("#version")]

    def check_ids(self):
        """ValueError where the numbers of tokens are none: a list of them would be longer than the files"""
        name, token = max(self.ids.items(), key=lambda item: abs(item[1]))
        if min(self.ids.values()) < 0 or token >= MOST_TOKENS:
            raise ValueError(f"{shown(self.folder)}: the token {shown(name)!r} has the number {token}, expected 0 to "
                             f"{MOST_TOKENS - 1:,}")

    def check(self, whole, model):
        """ValueError unless it is GPT-2's kind of BPE. Returns whether a text begins with a space."""
        if not whole:
            kind = read(self.folder, "tokenizer_config.json")
            name = kind.get("tokenizer_class") or "GPT2Tokenizer"
            if name.removesuffix("Fast") != "GPT2Tokenizer":
                raise ValueError(f"{shown(self.folder)}: its tokenizer is a {shown(name)}, not of GPT-2's kind")
            return bool(kind.get("add_prefix_space", False))
        before = whole.get("pre_tokenizer") or {}
        found = model.get("type", "BPE"), before.get("type"), before.get("use_regex", True), whole.get("normalizer")
        if found != ("BPE", "ByteLevel", True, None):
            raise ValueError(f"{shown(self.folder)}: its tokenizer is {shown(' '.join(map(str, found)))}, not of "
                             "GPT-2's kind")
        return bool(before.get("add_prefix_space", False))

    def spell(self, name):
        """The bytes of a token"""
        if name is None or name in self.special or not all(letter in BYTES for letter in name):
            return (name or "").encode()
        return bytes(BYTES[letter] for letter in name)

    def encode(self, text):
        """The tokens of a text, in which special ones may be spelt out"""
        import regex  # tiktoken's
        marks = sorted(filter(None, self.special), key=len, reverse=True)
        parts = regex.split("(" + "|".join(map(regex.escape, marks)) + ")", text) if marks else [text]
        tokens = []
        for part in parts:
            if part in self.special:
                tokens.append(self.special[part])
                continue
            part = " " + part if self.prefix and part and not part[0].isspace() else part
            for word in regex.findall(WORDS, part):
                tokens += self.encode_word(word)
        return tokens

    def encode_word(self, word):
        """Of all neighbours that may be merged those come first that are first in the list, from left to right."""
        parts = [LETTERS[b] for b in word.encode("utf-8", "replace")]
        while len(parts) > 1:
            first = min(zip(parts, parts[1:], strict=False), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if first not in self.ranks:
                break
            merged, at = [], 0
            while at < len(parts):
                step = 2 if tuple(parts[at:at + 2]) == first else 1
                merged.append("".join(parts[at:at + step]))
                at += step
            parts = merged
        unknown = [part for part in parts if part not in self.ids]
        if unknown:
            raise ValueError(f"{shown(self.folder)}: it has no token for {unknown[0]!r} in {word!r}")
        return [self.ids[part] for part in parts]


class Numbers(Tokenizer):
    """For a vocabulary that cannot be read: tokens are printed as numbers, and there is no way to write a prompt."""

    def __init__(self, problem):
        self.problem, self.tokens, self.eot_token = problem, None, 50256
        self.reset()

    def encode(self, text):
        if text:
            raise ValueError(f"a prompt cannot be made into tokens: {self.problem}\n---> HINT: leave --prompt out")
        return []


def own_vocabulary(path):
    """The vocabulary beside a checkpoint, None where it is GPT-2's"""
    if not os.path.isdir(beside(path)):
        return None
    try:
        return Vocabulary(beside(path))
    except (ValueError, OSError) as error:
        return Numbers(str(error).splitlines()[0])


def tokenizer_of(path, vocab_size):
    """The tokenizer of a checkpoint, or of random weights: its own, or else that of bytes, or GPT-2's"""
    return own_vocabulary(path) or tokenizer_for(vocab_size)


def keep_tokenizer(folder, path):
    """Copy the tokenizer files in a folder (None: there are none) to where those of the checkpoint `path` belong."""
    files = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()] if folder else []
    kept = Path(beside(path))
    if files and kept.is_dir() and kept.samefile(folder):
        return
    if kept.is_dir():
        for name in TOKENIZER_FILES:  # of another model that had this name
            (kept / name).unlink(missing_ok=True)
        if not any(kept.iterdir()):
            kept.rmdir()
    if files:
        kept.mkdir(exist_ok=True)
        for file in files:
            content = file.read_bytes()
            with NewFile(kept / file.name) as f:
                f.write(content)
        say(f"wrote {shown(kept)}: the model's own tokenizer")


def is_gpt2s(folder, vocab_size):
    """Is the vocabulary of a folder GPT-2's, or bytes? So it is taken to be where no files say something else."""
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    if all((Path(folder) / name).is_file() and file_sha256(Path(folder) / name) == VOCABULARY[original]
           for name, original in names.items()):
        return vocab_size == GPT2S or not (Path(folder) / "added_tokens.json").exists()
    if any((Path(folder) / name).is_file() for name in VOCABULARY_FILES):
        return False
    if vocab_size not in (GPT2S, len(Bytes.tokens)):
        print(f"note: no tokenizer files for the vocabulary of {vocab_size:,}: it is taken for GPT-2's")
    return True
