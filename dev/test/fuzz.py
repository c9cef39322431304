"""
Damaged and hostile files for every reader: valid small files of every format are mutated, and the program that reads
them is run on them in a forked process, with limits of time and memory. What falls is counted and grouped.

    python dev/test/fuzz.py --cases 100000 --seed 1          # about 100 cases a second and process
    python dev/test/fuzz.py --only safetensors --cases 1000  # one format; --case N shows one case

A case falls with a traceback, more than 20 s, more than 1 GB, no or more than one `error:` line, an error that does not
name the file, a control character on the terminal, a line that passes for ours, a file half-written, or another's file
touched. Exit status 1 if one does. Models compute nothing here (null_engine.py): it is reading that is tried.
"""
if __name__ == "__main__":  # modules come from the project and from this folder
    import os
    import sys
    sys.path.insert(0, os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0])

import argparse
import bz2
import contextlib
import copy
import gzip
import importlib.util
import io
import json
import lzma
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from flaky_server import answering
from fuzz_seeds import FORGED, seeds_of, tiny_model
from null_engine import NullEngine

import test_gpt2
import train_gpt2
from dev import generate, vislog
from dev.data import download, fineweb, hellaswag, inspect_bin, mmlu, text, tinystories
from dev.data.shards import ShardWriter
from dev.data.tokenising import HoldOut, tokenize
from dev.eval import convert_bin, export_gguf, export_hf, import_hf, multiple_choice
from dev.run.console import program

SECONDS, MEMORY, TOGETHER = 20, 1 << 30, 25  # of a case; cases of one process
# what errors name instead: an address, a result, a flag, a package, a step
OTHER_NAMES = "127.0.0.1", "mmlu_test.bin", "this model's limit is", "needs a package", "training has diverged"
STRANGERS = {"stranger.txt": b"mine", "thesis.tmp": b"mine too"}

# ---------------------------------------------------------------------------------------------------------------------
# what is done to a file

WORDS = [0, 1, -1, 2, 3, 127, 255, 256, 65535, 65536, 10**6, 2**24 - 1, 2**24, 10**9, 2**31 - 1, -2**31, 7]
DEEP = "[" * 100_000 + "]" * 100_000
VALUES = [None, True, False, 0, -1, 1, 3, 10**9, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308, "", "x", "7", FORGED,
          "\ud800", "../../x", "x" * 5000, [], {}, [[]], [1, 2], {"a": 1}, float("nan"), float("inf"), "@deep@",
          "@digits@"]


def mutate_bytes(rng, data):
    """One of many ways to damage bytes"""
    data = bytearray(data)
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    end = min(end, at + rng.choice((1, 4, 64, 5000)))
    way = rng.randrange(9)
    if way == 0:
        for _ in range(rng.choice((1, 2, 10))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:
        word = struct.pack("<i", rng.choice(WORDS))
        at = 4 * rng.randrange(rng.choice((3, 12, 64, len(data) // 4 + 1)))
        data[at:at + 4] = word
    elif way == 2:
        del data[rng.choice((at, 0, 4, 1023, 1024, len(data) - 1)):]
    elif way == 3:
        data += rng.choice((b"\0", b"x" * 4, bytes(1000), data[:2000]))
    elif way == 4:
        del data[at:end]
    elif way == 5:
        data[at:at] = data[at:end]
    elif way == 6:
        data[at:end] = bytes(end - at)
    elif way == 7:
        data[at:end] = rng.choice((b"\xff", b"\n", b"\"", b"[", b"\x1b", b"9")) * (end - at)
    else:
        data[at:end] = rng.randbytes(end - at)
    return bytes(data)


def mutate_json(rng, data):
    """One value of a JSON text, or one name, is another one; now and then bytes are"""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = list(places_of(value))
        if not places:
            break
        holder, key = rng.choice(places)
        way = rng.randrange(5)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice((FORGED, "x", "", str(key) * 2))] = holder.pop(key)
        elif way == 2 and isinstance(holder[key], int):
            holder[key] = holder[key] + rng.choice((-1, 1, 2, 10**9, -10**9, 2**40))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    if rng.random() < 0.03:
        value = rng.choice(VALUES)
    text = json.dumps(value).replace('"@deep@"', DEEP).replace('"@digits@"', "9" * 5000)
    return text.encode()


def places_of(value):
    """(holder, key) of everything inside a value of JSON"""
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)
                           if isinstance(value, list) else ()):
        yield value, key
        yield from places_of(child)


def mutate_lines(rng, data):
    """One line of JSON lines"""
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = mutate_json(rng, lines[i]) if rng.random() < 0.8 else mutate_bytes(rng, lines[i])
    return b"\n".join(lines) + b"\n"


def mutate_model(rng, data):
    """A .bin: its bytes, weights that are no numbers, or another header with the size that it implies"""
    way, data = rng.randrange(4), bytearray(data)
    if way == 0:
        at = 1024 + 4 * rng.randrange((len(data) - 1024) // 4)
        data[at:at + 4] = np.array(rng.choice((np.nan, np.inf, -np.inf)), "<f4").tobytes()
    elif way == 1:
        words = [int(x) for x in np.frombuffer(data[4:32], "<i4")]
        words[rng.randrange(7)] = rng.choice((1, 2, 3, 5, 16, 100, 128, 1000))
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return tiny_model(*words)
    return mutate_bytes(rng, data)


def mutate_safetensors(rng, data):
    """The JSON text with a length that fits, or bytes"""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.7:
        text = mutate_json(rng, data[8:8 + length])
        return len(text).to_bytes(8, "little") + text + data[8 + length:]
    return mutate_bytes(rng, data)


def packed(pack, unpack, inner):
    """Mutations of what is in a packed file, and of its own bytes"""
    def mutate(rng, data):
        return pack(inner(rng, unpack(data))) if rng.random() < 0.6 else mutate_bytes(rng, data)
    return mutate


def mutate_tar(inner, mode):
    def mutate(rng, data):
        if rng.random() < 0.3:
            return mutate_bytes(rng, data)
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode=mode) as new:
            for member in old:
                content = old.extractfile(member).read()
                if rng.random() < 0.5:
                    content = inner(rng, content)
                if rng.random() < 0.1:
                    member.name = rng.choice((f"data/test/{FORGED}.csv", "../../x.csv", f"a/{FORGED}.json", "/x.json"))
                if rng.random() < 0.05:
                    member.type, member.linkname = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "/etc/passwd"
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        return out.getvalue()
    return mutate


def mutate_zip(rng, data):
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr(rng.choice(("a.txt", f"{FORGED}.txt", "../../b.txt", "c.jsonl", "d.csv")), mutate_lines(
            rng, b'{"text": "a b c"}\n{"text": "d"}\n'))
    return out.getvalue()


def mutate_csv(rng, data):
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    rows = [line.split(b",") for line in data.splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice((b"", b'"', b'"a', b"x" * 200_000, FORGED.encode(), b"\xff", b"a,b",
                                               b"\0"))
    return b"\n".join(b",".join(row) for row in rows)


def mutate_http(rng, data):
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    for _ in range(rng.choice((1, 1, 2))):
        way = rng.randrange(4)
        if way == 0:
            lines[0] = b"HTTP/1.1 " + rng.choice((
                b"200 \x1b[31mOK", b"404 \x1b[2J\x85error: x", b"500 " + b"x" * 900, b"206 Partial", b"416 No",
                b"99999 x", b"-1", b"", b"301 Moved\r\nLocation: http://127.0.0.1:1/",
                b"429 \x9b31m\r\nRetry-After: 99999999999",
                b"503 a\r\nRetry-After: Mon, 99 Foo 2026", b"204 Nothing"))
        elif way == 1:
            lines.append(rng.choice((
                b"Content-Length: 99999999999999", b"Content-Length: -5", b"Content-Length: 1e3",
                b"Content-Encoding: gzip", b"Transfer-Encoding: chunked", b"Content-Type: text/html",
                b"Content-Range: bytes x/y",
                b"ETag: " + b"\xff" * 100, b"Content-Length: " + b"9" * 5000, b"Content-Encoding: x")))
        elif way == 2 and len(lines) > 1:
            del lines[rng.randrange(1, len(lines))]
        else:
            body = mutate_bytes(rng, body)
    whole = b"\r\n".join(lines) + b"\r\n\r\n" + body
    return mutate_bytes(rng, whole) if rng.random() < 0.2 else whole


# ---------------------------------------------------------------------------------------------------------------------
# who reads it: functions of a folder that holds the files of a seed, of which one is damaged

def command(main, *words):
    """A reader that is a program which takes its arguments from sys.argv"""
    def run(folder):
        sys.argv = ["program", *(word.format(folder) for word in words)]
        return program(main)
    return run


def trainer(flags):
    def run(folder):
        words = "-e {0}/model.bin -i {0}/shard.bin -j {0}/shard.bin -b 2 -t 8 -x 3 -v 2 -m 1 -s 2 -g 3 " + flags
        return train_gpt2.main(words.format(folder).split())
    return run


def evaluation(folder):
    sys.argv = ["x", "-e", f"{folder}/model.bin", "-i", f"{folder}/set.bin"]
    return program(multiple_choice.main, "HellaSwag", "x")


def picture(folder):
    return vislog.main([f"{folder}/main.log", "-o", f"{folder}/out.svg"])


def log(folder):
    return program(lambda: vislog.read_log(folder / "main.log") and None)


def tokenising_goes_on(folder):
    """What text.py does with a progress.json of its own job"""
    def main():
        writers = {split: ShardWriter(folder / "made/t", "t", split, 100) for split in ("train", "val")}
        pieces = (("", True, word) for word in ("one two three " * 30).split())
        tokenize(pieces, writers, "a job", "bytes", 1, deal=HoldOut(0.05, 50256))
    return program(main)


def fetched(folder):
    """Fetch a file from a server that answers with the bytes of a file"""
    with answering((folder / "answer.http").read_bytes()) as url:
        return program(lambda: download.download(f"{url}/answer.http", folder / "out.bin", timeout=1.0, retries=1)
                       and None)


TEXT = "--tokenizer bytes --workers 1 --name t --data_dir {0}/made".split()


def inspect(name):
    return command(inspect_bin.main, f"{{0}}/{name}", "--data_dir", "{0}")


def tokenise(name):
    return command(text.main, f"{{0}}/{name}", *TEXT)


MODEL = {
    "inspect_bin": inspect("model.bin"), "generate": lambda f: generate.main(["-e", f"{f}/model.bin", "-n", "3"]),
    "convert_bin": command(convert_bin.main, "-i", "{0}/model.bin", "-o", "{0}/out.bin", "-d", "bf16"),
    "export_hf": command(export_hf.main, "-i", "{0}/model.bin", "-o", "{0}/out"),
    "export_gguf": command(export_gguf.main, "-i", "{0}/model.bin", "-o", "{0}/out.gguf"),
    "hellaswag": evaluation, "train": trainer(""),
}
IMPORT = {"import_hf": command(import_hf.main, "-i", "{0}/hf", "-o", "{0}/out.bin"),
          "generate": lambda f: generate.main(["-e", f"{f}/hf", "-n", "3"])}
RESUME = {"resume": trainer("-o {0}/run -y 1 -x 4")}
DEBUG = {"test_gpt2": lambda f: test_gpt2.main([f"{f}/model.bin", f"{f}/s.bin"])}
OWN = {"generate": lambda f: generate.main(["-e", f"{f}/model.bin", "-n", "3", "-p", "ab"]),
       "export_hf": MODEL["export_hf"], "export_gguf": MODEL["export_gguf"]}
FINEWEB = ("-t classic -v 10B -n 1 -s 50 --workers 1 --base_url http://127.0.0.1:9 --tokenizer bytes "
           "--data_dir {0}").split()

PICTURES = {"vislog": picture} if importlib.util.find_spec("matplotlib") else {}

# format: (its file, how it is mutated, who reads it)
FORMATS = {
    "shard": ("shard.bin", mutate_bytes, {"train": trainer(""), "inspect_bin": inspect("shard.bin")}),
    "evaluation set": ("set.bin", mutate_bytes, {"hellaswag": evaluation, "inspect_bin": inspect("set.bin")}),
    "model": ("model.bin", mutate_model, MODEL),
    "tokenizer.bin": ("data/gpt2_tokenizer.bin", mutate_bytes, {"inspect_bin": inspect("data/gpt2_tokenizer.bin"),
                                                           "train": trainer(""), "generate": MODEL["generate"]}),
    "debug state": ("s.bin", mutate_bytes, DEBUG | {"inspect_bin": inspect("s.bin")}),
    "debug .json": ("s.json", mutate_json, DEBUG),
    "state": ("run/state_00000002_00000.bin", mutate_bytes, RESUME | {
        "inspect_bin": inspect("run/state_00000002_00000.bin")}),
    "run .json": ("run/run_00000002.json", mutate_json, RESUME),
    "run's model": ("run/model_00000002.bin", mutate_model, RESUME),
    "main.log": ("main.log", mutate_bytes, PICTURES | {"vislog's reader": log}),
    "run's main.log": ("run/main.log", mutate_bytes, RESUME),
    "config.json": ("hf/config.json", mutate_json, IMPORT),
    "safetensors": ("hf/model.safetensors", mutate_safetensors, IMPORT),
    "index.json": ("hf/model.safetensors.index.json", mutate_json, IMPORT),
    "tokenizer.json": ("model.tokenizer/tokenizer.json", mutate_json, OWN),
    "vocab.json": ("model.tokenizer/vocab.json", mutate_json, OWN),
    "merges.txt": ("model.tokenizer/merges.txt", mutate_bytes, OWN),
    "generation_config.json": ("model.tokenizer/generation_config.json", mutate_json, OWN),
    "tokenizer_config.json": ("model.tokenizer/tokenizer_config.json", mutate_json, OWN),
    "progress.json": ("made/t/t.progress.json", mutate_json, {"tokenize": tokenising_goes_on}),
    ".txt": ("a.txt", mutate_bytes, {"text": tokenise("a.txt")}),
    ".jsonl": ("a.jsonl", mutate_lines, {"text": tokenise("a.jsonl")}),
    ".json": ("a.json", mutate_json, {"text": tokenise("a.json")}),
    ".csv": ("a.csv", mutate_csv, {"text": tokenise("a.csv")}),
    ".parquet": ("a.parquet", mutate_bytes, {"text": tokenise("a.parquet")}),
    ".zip": ("a.zip", mutate_zip, {"text": tokenise("a.zip")}),
    ".gz": ("a.jsonl.gz", packed(gzip.compress, gzip.decompress, mutate_lines), {"text": tokenise("a.jsonl.gz")}),
    ".bz2": ("a.jsonl.bz2", packed(bz2.compress, bz2.decompress, mutate_lines), {"text": tokenise("a.jsonl.bz2")}),
    ".xz": ("a.jsonl.xz", packed(lzma.compress, lzma.decompress, mutate_lines), {"text": tokenise("a.jsonl.xz")}),
    ".zst": ("a.jsonl.zst", mutate_bytes, {"text": tokenise("a.jsonl.zst")}),
    "hellaswag .jsonl": ("hellaswag/hellaswag_val.jsonl", mutate_lines, {
        "hellaswag.py": command(hellaswag.main, "--tokenizer", "bytes", "--data_dir", "{0}")}),
    "mmlu .tar": ("mmlu/data.tar", mutate_tar(mutate_csv, "w"), {
        "mmlu.py": command(mmlu.main, "--tokenizer", "bytes", "--data_dir", "{0}")}),
    "tinystories .tar.gz": ("tinystories/TinyStories_all_data.tar.gz", mutate_tar(mutate_json, "w:gz"), {
        "tinystories.py": command(tinystories.main, "--tokenizer", "bytes", "--workers", "1", "--data_dir", "{0}")}),
    "fineweb listing": ("fineweb10B/parquet/files.json", mutate_json, {"fineweb.py": command(fineweb.main, *FINEWEB)}),
    "fineweb .parquet": ("fineweb10B/parquet/a.parquet", mutate_bytes, {
        "fineweb.py": command(fineweb.main, *FINEWEB)}),
    "HTTP answer": ("answer.http", mutate_http, {"download": fetched}),
}


# ---------------------------------------------------------------------------------------------------------------------
# a case

def case_of(seed, number, only):
    """(format, reader, its random numbers) of a case: formats take turns"""
    name = only[number % len(only)]
    rng = random.Random(f"{seed} {number}")
    readers = FORMATS[name][2]
    return name, sorted(readers)[number // len(only) % len(readers)], rng


def prepare(folder, name, rng):
    """Write a seed's files into a folder, with one of them damaged."""
    damaged, mutate, _ = FORMATS[name]
    for path, content in [*seeds_of(name).items(), *STRANGERS.items()]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(mutate(rng, content) if path == damaged else content)


def judge(folder, name, reader, status, out, err):
    """What is wrong with how a reader ended, in few words, or None"""
    errors = re.findall("^error:.*", err, re.M)
    if any(ord(c) < 32 and c not in "\n\t" or c in "\x7f\x85\x9b\u2028\u202e" for c in out + err):
        return "a control character is printed"
    if re.search("^(error|---> HINT): forged", err if "generating" in out or reader == "generate" else out + err, re.M):
        return "a forged line"  # but in a text of a model, in which anything may be
    if status not in (0, 1) or len(errors) != (status == 1 and not inspected(out)):
        return f"status {status} with {len(errors)} errors"
    if status and errors and len(errors[0]) < 10:
        return "an empty error"
    if "Warning:" in err:
        return "a warning of Python's: " + re.findall(".*Warning:.*", err)[0][-80:]
    if errors and not any(word in errors[0] for word in [folder.name, *Path(FORMATS[name][0]).parts, *OTHER_NAMES]):
        return "an error without the file's name: " + re.sub("[0-9]+", "N", errors[0])[:90]
    after = {path for path in folder.rglob("*") if path.is_file()}
    left = [path.name for path in after if path.suffix == ".tmp" and path.name not in STRANGERS]
    outputs = [path.name for path in after if path.name.startswith("out.") and status
               and path.suffix not in (".part", ".id")]  # which the next download goes on from
    outputs += ["out/"] * (status and (folder / "out").exists())
    if left or outputs:
        return f"left behind: {' '.join(left + outputs)}"
    if any((folder / path).read_bytes() != content for path, content in STRANGERS.items() if (folder / path).exists()) \
            or not all((folder / path).exists() for path in STRANGERS):
        return "another's file is touched"
    return None


def inspected(out):
    """Has a program that checks a file said what is wrong in its own words?"""
    return "PROBLEM:" in out or "overall okay: 0" in out


def run_case(folder, name, reader):
    """Run a reader on the files of a folder: (what is wrong or None, its output)"""
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = FORMATS[name][2][reader](folder)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                err.write(status + "\n")
                status = 1
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f for f in reversed(frames) if "/dev/" in f.filename and "/test/" not in f.filename
                          or f.filename.endswith("train_gpt2.py")), frames[-1])
            return (f"traceback: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}",
                    out.getvalue() + traceback.format_exc())
    os.chdir("/")
    printed = out.getvalue(), err.getvalue()
    return judge(folder, name, reader, status or 0, *printed), f"status {status}\n" + "".join(printed)


def limit_memory():
    """No more address space than now and twice what a case may use: an allocation beyond is a MemoryError."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def work(pipe, root, numbers, seed, only):
    """In a process of its own: run cases, and write a line for each as it begins and as it ends."""
    limit_memory()
    train_gpt2.GPT2 = NullEngine
    download.BACKOFF, os.fsync = 0, lambda descriptor: None  # some disks take long
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    for number in numbers:
        name, reader, rng = case_of(seed, number, only)
        folder = root / f"case{number}"
        folder.mkdir()
        prepare(folder, name, rng)
        before = peak()
        os.write(pipe, f"{json.dumps([number])}\n".encode())
        problem, _ = run_case(folder, name, reader)
        used = peak()
        if used > MEMORY and used > before:
            problem = problem or f"{used >> 20} MiB of memory"
        os.write(pipe, f"{json.dumps([number, problem])}\n".encode())
        shutil.rmtree(folder, ignore_errors=True)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class Worker:
    """A forked process that runs some cases"""

    def __init__(self, root, numbers, seed, only):
        self.numbers, self.begun, self.time, self.rest = list(numbers), None, time.monotonic(), b""
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                work(end, root, self.numbers, seed, only)
            finally:
                os._exit(0)
        os.close(end)

    def events(self):
        """[(number, problem or None)] of cases that have ended; None in the place of the list when all have"""
        if not select.select([self.pipe], [], [], 0)[0]:
            if time.monotonic() - self.time > SECONDS:
                os.killpg(self.pid, signal.SIGKILL)
                return self.end(f"more than {SECONDS} s")
            return []
        data = os.read(self.pipe, 1 << 16)
        if not data:
            return self.end("the process died")
        *lines, self.rest = (self.rest + data).split(b"\n")
        ended = []
        for number, *problem in map(json.loads, lines):
            self.begun, self.time = number if not problem else None, time.monotonic()
            if problem:
                self.numbers.remove(number)
                ended.append((number, problem[0]))
        return ended

    def end(self, problem):
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if not self.numbers:
            return None
        number = self.numbers.pop(0)
        return [(number, f"{problem} ({status})"), None]


def fuzz(cases, seed, only, processes, root):
    """Run so many cases: {(format, reader): how many}, {(format, reader, problem): their numbers}"""
    waiting = [range(start, min(cases, start + TOGETHER)) for start in range(0, cases, TOGETHER)][::-1]
    workers, done, fallen, start = [], Counter(), {}, time.monotonic()
    while waiting or workers:
        while waiting and len(workers) < processes:
            workers.append(Worker(root, waiting.pop(), seed, only))
        select.select([worker.pipe for worker in workers], [], [], 1)
        for worker in list(workers):
            events = worker.events()
            if events is None or events[-1:] == [None]:
                workers.remove(worker)
                if worker.numbers:
                    waiting.append(worker.numbers)
            for number, problem in filter(None, events or []):
                name, reader, _ = case_of(seed, number, only)
                done[name, reader] += 1
                if problem:
                    fallen.setdefault((name, reader, problem), []).append(number)
                    print(f"case {number}: {name}, {reader}: {problem}", flush=True)
                if done.total() % 1000 == 0:
                    bad = sum(map(len, fallen.values()))
                    print(f"{done.total():,} cases, {time.monotonic() - start:.0f} s, {bad:,} fallen", flush=True)
    return done, fallen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="formats, divided by commas: " + ", ".join(FORMATS))
    parser.add_argument("--case", type=int, help="show this case of the seed")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    only = args.only.split(",") if args.only else [
        name for name in FORMATS if "parquet" not in name and name not in (".zst", "fineweb listing")
        or importlib.util.find_spec("pyarrow")]
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        if args.case is not None:
            name, reader, rng = case_of(args.seed, args.case, only)
            train_gpt2.GPT2, download.BACKOFF = NullEngine, 0
            case = Path(folder) / f"case{args.case}"
            case.mkdir()
            prepare(case, name, rng)
            problem, printed = run_case(case, name, reader)
            print(f"{name}, {reader}: {problem}\n{printed}")
            return 1 if problem else 0
        done, fallen = fuzz(args.cases, args.seed, only, args.processes, Path(folder))
    formats = Counter()
    for (name, _), count in done.items():
        formats[name] += count
    for name, count in formats.items():
        readers = ", ".join(f"{reader} {n:,}" for (other, reader), n in sorted(done.items()) if other == name)
        bad = sum(len(numbers) for (other, *_), numbers in fallen.items() if other == name)
        print(f"{name:24} {count:8,} cases, {bad:6,} fallen   ({readers})")
    for (name, reader, problem), numbers in sorted(fallen.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):6,} x {name}, {reader}: {problem}   (case {numbers[0]})")
    print(f"{sum(done.values()):,} cases, {sum(map(len, fallen.values())):,} fallen")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
