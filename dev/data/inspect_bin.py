"""
What is in a .bin file? Its header in words, counts, checks, and the first tokens as text.

    python dev/data/inspect_bin.py data/gpt2_124M.bin data/tinyshakespeare/*.bin
    python dev/data/inspect_bin.py data/runs/first          # a run's checkpoints; of another folder its .bin and .npy

Knows token shards, evaluation sets, models, debug states, optimiser states and the tokenizer; data/README.md describes
the formats; and the tokens that import_tokens.py reads, nanoGPT's and NumPy's. Exit status 1 if any file is not what
its header says, or a checkpoint that is said to be complete is not.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import math
import os
import re
from pathlib import Path

import numpy as np

from dev.data.command_line import DATA, run
from dev.data.import_tokens import read_tokens
from dev.data.vocabulary import EOT, VOCAB_SIZE
from dev.run.arguments import Parser
from dev.run.checkpoints import checkpoint_files, complete_checkpoints
from dev.run.console import say, shown
from dev.run.files import (
    DEBUG_STATE_MAGIC,
    EVAL_MAGIC,
    HEADER_BYTES,
    MODEL_MAGIC,
    SHARD_MAGIC,
    STATE_MAGIC,
    TOKENIZER_MAGIC,
    file_sha256,
    open_file,
    read_header,
)
from dev.run.found import model_file
from dev.run.reading import reading
from dev.run.shard import of_others
from dev.run.text import Bytes


def read_tokenizer(path):
    """The bytes of every token, and where they end in the file."""
    with open_file(path) as f:
        count = int(read_header(f, path, TOKENIZER_MAGIC, (1, 2))[2])
        content = bytes(HEADER_BYTES) + f.read()
    tokens, position = [], HEADER_BYTES
    while len(tokens) < count and position < len(content):
        end = position + 1 + content[position]
        tokens.append(content[position + 1 : end])
        position = end
    return tokens, position


class Report:
    """Prints what is known about one file, and remembers whether a check failed."""

    def __init__(self, path, tokenizer):
        self.path, self.tokenizer, self.ok = path, tokenizer, True  # tokenizer: GPT-2's, the bytes of every token
        self.size = os.path.getsize(path)

    def line(self, name, value):
        say(f"  {name:<16} {value}")

    def check(self, condition, problem):
        if not condition:
            self.ok = False
            say(f"  PROBLEM: {problem}")
        return condition

    def check_size(self, expected):
        return self.check(self.size == expected, f"the file has {self.size:,} bytes, its header means {expected:,}")

    def map(self, dtype, start, count):
        """Some of the file as an array; as much as there is where the file is too short."""
        count = max(0, min(count, (self.size - start) // np.dtype(dtype).itemsize))
        return np.memmap(self.path, dtype, "r", start, (count,)) if count else np.zeros(0, dtype)

    def text(self, tokens):
        if not self.tokenizer:
            return str([int(t) for t in tokens])
        parts = [self.tokenizer[t] if t < len(self.tokenizer) else b"<%d?>" % t for t in tokens]
        return repr(b"".join(parts).decode("utf-8", "replace"))


def inspect_shard(r, header):
    count = int(header[2])
    r.line("tokens", f"{count:,}")
    r.check(header[1] == 1, f"version {header[1]}, known is 1")
    r.check_size(HEADER_BYTES + 2 * count)
    tokens, vocabulary = r.map("<u2", HEADER_BYTES, count), int(header[3]) or VOCAB_SIZE
    kind = {VOCAB_SIZE: "GPT-2's", len(Bytes.tokens): "bytes"}.get(vocabulary, "another one")
    r.line("vocabulary", f"{kind}, {vocabulary:,} tokens")
    if vocabulary != VOCAB_SIZE:
        r.tokenizer = Bytes.tokens if kind == "bytes" else None
    if r.check(len(tokens), "no tokens"):
        blocks = [tokens[i : i + 10**7] for i in range(0, len(tokens), 10**7)]
        largest = max(int(b.max()) for b in blocks)
        documents = sum(int((b == vocabulary - 1).sum()) for b in blocks)
        r.line("documents", f"{documents:,} (end-of-text tokens), {len(tokens) / max(documents, 1):,.0f} tokens each")
        r.line("largest token", largest)
        r.check(largest < vocabulary, f"token {largest} is not in the vocabulary of {vocabulary}")
        r.line("begins", r.text(tokens[:48]))
        r.line("ends", r.text(tokens[-16:]))


def inspect_eval(r, header):
    count, longest = int(header[2]), int(header[3])
    r.line("examples", f"{count:,}")
    r.line("longest", f"{longest:,} bytes")
    r.check(header[1] == 1, f"version {header[1]}, known is 1")
    words = r.map("<u2", HEADER_BYTES, (r.size - HEADER_BYTES) // 2).astype(int)
    position, sizes, labels, completions = 0, [], [], set()
    for i in range(count):
        example = words[position : position + (int(words[position + 1]) // 2 if position + 1 < len(words) else 0)]
        parts = split_example(example)
        start = HEADER_BYTES + 2 * position
        if not r.check(parts is not None and example[2] == i, f"example {i}, at byte {start}, is broken"):
            return
        if i == 0:
            r.line("first context", r.text(parts[0]))
            for j, part in enumerate(parts[1:]):
                r.line("right answer" if j == example[3] else "completion", r.text(part))
        sizes.append(2 * len(example))
        labels.append(int(example[3]))
        completions.add(int(example[4]))
        position += len(example)
    r.line("completions", " ".join(map(str, sorted(completions))))
    r.line("labels", "  ".join(f"{label}: {labels.count(label):,}" for label in sorted(set(labels))))
    r.check(sizes and max(sizes) == longest, f"the longest example has {max(sizes, default=0)} bytes, not {longest}")
    r.check_size(HEADER_BYTES + 2 * position)


def split_example(example):
    """[context, completion, …] of one example of an evaluation set; None where its counts contradict each other."""
    if len(example) < 6 or example[0] != 65535 or example[3] >= example[4]:
        return None
    parts, position = [], 5
    while position < len(example):
        parts.append(example[position + 1 : position + 1 + example[position]])
        position += 1 + int(example[position])
    return parts if position == len(example) and len(parts) == example[4] + 1 else None


def tensor_table(maxT, L, C, Vp):
    """The tensors of a model in the order of the file."""
    return {
        "wte": (Vp, C), "wpe": (maxT, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,),
    }  # fmt: skip


def inspect_model(r, header):
    version, maxT, V, L, NH, C, Vp = map(int, header[1:8])
    r.line("numbers", {3: "float32", 5: "bfloat16"}.get(version, f"version {version}"))
    for name, value in zip(("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded vocab"),
                           (maxT, V, L, NH, C, Vp), strict=True):
        r.line(name, f"{value:,}")
    r.check(version in (3, 5), f"version {version}, known are 3 (float32) and 5 (bfloat16)")
    if not r.check(min(maxT, V, L, NH, C, Vp) > 0 and Vp >= V and C % NH == 0, "the header contradicts itself"):
        return
    table = tensor_table(maxT, L, C, Vp)
    count = sum(map(math.prod, table.values()))
    r.line("parameters", f"{count:,}")
    width = 2 if version == 5 else 4
    if r.check_size(HEADER_BYTES + width * count):
        inspect_tensors(r, table, HEADER_BYTES, "<u2" if version == 5 else "<f4")
        padding = r.map("<u2" if version == 5 else "<f4", HEADER_BYTES + width * V * C, (Vp - V) * C)
        r.check(not padding.any(), "the padding of wte is not zero")


def inspect_tensors(r, table, start, dtype):
    """Root mean square and range of every tensor; bfloat16 comes as uint16, the upper half of a float32."""
    for name, shape in table.items():
        count = math.prod(shape)
        raw = r.map(dtype, start, count)
        start += count * raw.itemsize
        total, low, high = 0.0, np.inf, -np.inf
        for i in range(0, count, 10**7):
            block = raw[i : i + 10**7]
            block = (block.astype("<u4") << 16).view("<f4") if raw.itemsize == 2 else block
            if not np.isfinite(block).all():
                total = math.nan
                break
            total += float(np.square(block, dtype=np.float64).sum())
            low, high = min(low, float(block.min())), max(high, float(block.max()))
        sizes, rms = "x".join(map(str, shape)), np.sqrt(total / count)
        r.line(f"  {name}", f"{sizes:<18} rms {rms:.5f}, from {low:.4f} to {high:.4f}")
        r.check(np.isfinite(total), f"{name} has values that are not finite")


def inspect_debug(r, header):
    B, T = int(header[2]), int(header[3])
    r.line("batch", f"B={B}, T={T}")
    r.check(header[1] == 2, f"version {header[1]}, known is 2")
    if not r.check(0 < B and 0 < T and HEADER_BYTES + 8 * B * T <= r.size, "the header contradicts itself or the size"):
        return
    x, y = r.map("<i4", HEADER_BYTES, B * T), r.map("<i4", HEADER_BYTES + 4 * B * T, B * T)
    r.line("inputs", r.text(x[:48]))
    r.line("targets", r.text(y[:48]))
    r.line("largest token", int(max(x.max(), y.max())))
    r.check(min(x.min(), y.min()) >= 0, "there are negative tokens")
    r.check((r.size - HEADER_BYTES) % 4 == 0, f"{r.size:,} bytes are not a whole number of float32")
    # B·T·V logits, the loss, then the gradients; how many there are depends on a model that the header does not name
    if r.size > HEADER_BYTES + 4 * (2 * B * T + B * T * VOCAB_SIZE):
        loss = r.map("<f4", HEADER_BYTES + 4 * (2 * B * T + B * T * VOCAB_SIZE), 1)
        r.line("loss", f"{loss[0]:.6f}, if the vocabulary is GPT-2's")


def inspect_state(r, header):
    words = header.view("<u8")  # 64-bit values are at even words
    r.line("process", f"{header[3]} of {header[2]}")
    r.line("step", f"{header[10]:,}")
    r.line("master weights", "yes" if header[4] else "no")
    r.line("sampler", f"{words[10]}, at the last update {words[11]}")
    r.line("data", f"shard {words[15]}, sample {words[16]}, " + ("shuffled" if header[5] else "in order"))
    r.check(header[1] == 1, f"version {header[1]}, known is 1")
    r.check(0 <= header[3] < header[2], "the rank is not among the processes")
    # the number of parameters is not in the header: it is what the size leaves for m and v (and the master weights)
    arrays = 3 if header[4] else 2
    if not header[5]:
        r.line("parameters", f"{(r.size - HEADER_BYTES) // (4 * arrays):,}")
        r.check((r.size - HEADER_BYTES) % (4 * arrays) == 0,
                f"{r.size:,} bytes do not hold {arrays} equal arrays of float32")
    r.check(r.size > HEADER_BYTES, "there is nothing after the header")


def inspect_tokenizer(r, header):
    r.line("tokens", f"{header[2]:,}")
    if not r.check(header[1] in (1, 2), f"version {header[1]}, known are 1 and 2"):
        return
    eot = EOT if header[1] == 1 else int(header[3])
    tokens, end = read_tokenizer(r.path)
    r.check(len(tokens) == header[2], f"there are {len(tokens):,} tokens, the header means {header[2]:,}")
    r.check_size(end)
    r.line("end of text", f"{eot}: {tokens[eot] if 0 <= eot < len(tokens) else 'missing'}")
    r.line("longest", f"{max(map(len, tokens), default=0)} bytes")
    r.line("begins", shown(b" ".join(tokens[256:280]).decode("utf-8", "replace")))


def inspect_tokens(r, command):
    """Tokens that others have written; command: makes shards of them"""
    tokens = read_tokens(r.path)
    largest = int(tokens.max())
    r.line("tokens", f"{len(tokens):,} of {tokens.dtype}")
    r.line("largest token", largest)
    r.check(0 <= tokens.min() <= largest < 65536, "not all of them fit into 16 bits")
    if largest < 256:  # those of characters, by a table that only their maker has
        r.tokenizer = None
    r.line("begins", r.text(tokens[:48]))
    r.line("to train on it", command)


def inspect_run(folder, steps):
    """Print which checkpoints a run's folder holds, of the steps that its files name; whether those are in order."""
    say(f"{shown(folder)}: a run's folder, {len(steps)} checkpoint{'s' * (len(steps) > 1)}")
    complete, fine = complete_checkpoints(folder), True
    for step in steps:
        paths = checkpoint_files(folder, step)
        missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
        size = sum(path.stat().st_size for path in Path(folder).iterdir() if step_of(path.name) == step)
        say(f"  step {step:<11,} {size:,} bytes, {f'incomplete: no {missing[0]}' if missing else 'complete'}")
        if missing and step in complete:
            fine = False
            say(f"  PROBLEM: {missing[0]} is missing, and {os.path.basename(paths[0])} says that all is there")
    if fine and complete:
        say(f"  -e takes         {shown(model_file(str(folder)))}")
    say("  OK" if fine else "  NOT OK")
    return fine


def step_of(name):
    """The step of the checkpoint that a file belongs to by its name, None where it belongs to none"""
    found = re.fullmatch(r"(?:DONE_|model_|run_|state_)(\d{8})(?:_\d{5})?(?:\.bin|\.json)?", name)
    return int(found[1]) if found else None


KINDS = {
    SHARD_MAGIC: ("token shard", inspect_shard),
    EVAL_MAGIC: ("evaluation set", inspect_eval),
    MODEL_MAGIC: ("model", inspect_model),
    DEBUG_STATE_MAGIC: ("debug state", inspect_debug),
    STATE_MAGIC: ("optimiser state", inspect_state),
    TOKENIZER_MAGIC: ("tokenizer", inspect_tokenizer),
}


def inspect(path, tokenizer):
    """Print what is in the file; whether it is in order."""
    with open_file(path) as f:
        content = f.read(HEADER_BYTES)
        theirs, command = of_others(f, path)
    header = np.frombuffer(content if len(content) == HEADER_BYTES else bytes(HEADER_BYTES), "<i4")
    kind, function = KINDS.get(int(header[0]), (None, None))
    report = Report(path, tokenizer)
    named = f"{kind}, version {header[1]}" if kind else theirs or f"unknown, its first word is {header[0]}"
    say(f"{shown(path)}: {named}, {report.size:,} bytes")
    if not kind and "import_tokens" in command:
        function, header = inspect_tokens, command
    if not report.check(function, "no known kind of file" + (f"\n---> HINT: {command}" if command else "")):
        return False
    with reading(path), np.errstate(all="ignore"):  # of numbers that are none
        function(report, header)
    say("  " + ("OK" if report.ok else "NOT OK"))
    return report.ok


def inspect_folder(folder, tokenizer):
    """Print what is in a folder: the checkpoints of a run, or else of each .bin and .npy what is in it; whether all is
    in order. ValueError where there is nothing of it"""
    steps = sorted({step_of(path.name) for path in folder.iterdir()} - {None})
    if steps:
        return inspect_run(folder, steps)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".npy"))
    if not files:
        hint = "name a run's folder, or files"
        if (folder / "config.json").is_file():
            hint = f"it is a model of Hugging Face's, which -e {folder} takes"
        raise ValueError(f"{shown(folder)} has neither a run's checkpoints nor .bin or .npy files\n---> HINT: {hint}")
    return all([inspect(path, tokenizer) for path in files])


def main():
    parser = Parser(description="What is in a .bin file, or in a run's folder?")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sha256", action="store_true", help="print the files' sha256 too")
    parser.add_argument("--data_dir", type=Path, default=DATA, help="where gpt2_tokenizer.bin is (default: data/)")
    args = parser.parse_args()
    tokenizer_path = args.data_dir / "gpt2_tokenizer.bin"
    tokenizer = read_tokenizer(tokenizer_path)[0] if tokenizer_path.exists() else None
    if tokenizer is None and not all(path.is_dir() for path in args.files):
        say(f"tokens are shown as numbers, for lack of {tokenizer_path} (dev/data/tinyshakespeare.py makes it)")
    fine = True
    for path in args.files:
        fine &= (inspect_folder if path.is_dir() else inspect)(path, tokenizer)
        if args.sha256 and path.is_file():
            say(f"  sha256           {file_sha256(path)}")
    if not fine:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
