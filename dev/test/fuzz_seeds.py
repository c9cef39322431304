"""Valid small files of every format, which fuzz.py mutates."""
import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from null_engine import NullEngine

import train_gpt2
from dev.data.tokenising import BATCH, PIECE
from dev.eval import export_hf
from dev.eval.convert_bin import Checkpoint
from dev.run.engine import size_of
from dev.run.files import (
    DEBUG_STATE_MAGIC,
    EVAL_MAGIC,
    MODEL_MAGIC,
    SHARD_MAGIC,
    TOKENIZER_MAGIC,
    new_header,
)
from dev.run.vocabulary import LETTERS

FORGED = "x\nerror: forged\n---> HINT: forged \x1b[31m\u202e\r"  # a name that would pass for lines of ours
SHAPE = 16, 300, 1, 2, 16, 384  # maxT, V, L, NH, C, Vp
TEXTS = ["Once upon a time.", "there was a mouse\n\nwho ate cheese", "Ω" * 40, "and so on " * 30]


def tiny_model(version, maxT, V, L, NH, C, Vp):
    """A .bin with this header and the size that it implies"""
    config = train_gpt2.GPT2Config(maxT, V, Vp, L, NH, C)
    count = size_of(train_gpt2.parameter_table(config))
    if count > 1 << 20:
        raise ValueError("not small")
    weights = np.random.default_rng(0).normal(0, 0.02, count).astype("<f4")
    weights[V * C:Vp * C] = 0
    data = weights if version == 3 else (weights.view("<u4") >> 16).astype("<u2")
    return new_header(MODEL_MAGIC, version, maxT, V, L, NH, C, Vp).tobytes() + data.tobytes()


def shard():
    tokens = np.random.default_rng(1).integers(0, 300, 400).astype("<u2")
    return new_header(SHARD_MAGIC, 1, 400).tobytes() + tokens.tobytes()


def evaluation_set(*examples):
    """examples: (context, completions, label). A size that does not fit into 16 bits is cut to them."""
    words, longest = [], 0
    for index, (context, completions, label) in enumerate(examples):
        example = [65535, 0, index, label, len(completions), len(context), *context]
        for completion in completions:
            example += [len(completion), *completion]
        longest = max(longest, 2 * len(example))
        example[1] = 2 * len(example) % 65536
        words += example
    return new_header(EVAL_MAGIC, 1, len(examples), longest).tobytes() + np.array(words, "<u2").tobytes()


def tokenizer():
    words = [bytes([b]) for b in range(256)] + [b"ab"] * 43 + [b"<|endoftext|>"]
    return new_header(TOKENIZER_MAGIC, 2, 300, 299).tobytes() + b"".join(bytes([len(w)]) + w for w in words)


def debug_state():
    rng, (maxT, V, L, NH, C, Vp) = np.random.default_rng(2), SHAPE
    size = size_of(train_gpt2.parameter_table(train_gpt2.GPT2Config(maxT, V, Vp, L, NH, C)))
    tokens = rng.integers(0, 300, 2 * 16).astype("<i4")
    return (new_header(DEBUG_STATE_MAGIC, 2, 2, 8).tobytes() + tokens.tobytes()
            + rng.normal(0, 1, 16 * V + 1 + size).astype("<f4").tobytes())


def debug_json():
    return json.dumps({"losses": [5.0, 4.0], "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
                       "weight_decay": 0.01}).encode()


def tokenizer_json():
    ids = {LETTERS[b]: b for b in range(256)} | {"ab": 256, "abc": 257}
    return json.dumps({"model": {"type": "BPE", "vocab": ids, "merges": ["a b", ["ab", "c"]]}, "normalizer": None,
                       "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                       "added_tokens": [{"content": "<|endoftext|>", "id": 258}]}).encode()


def archive(mode, members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def parquet():
    import pyarrow
    import pyarrow.parquet
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4, 5]}), out)
    return out.getvalue()


def zstandard(data):
    import pyarrow
    return pyarrow.compress(data, "zstd", asbytes=True)


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("a.txt", TEXTS[0] * 20)
        new.writestr("b.jsonl", json_lines())
    return out.getvalue()


def json_lines():
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def questions():
    return b"".join(b"What is %d?,a,b,c,d,%s\n" % (i, b"ABCD"[i:i + 1]) for i in range(4))


def http():
    return (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nETag: \"abc\"\r\nContent-Type: application/octet-stream\r\n"
            b"Connection: close\r\n\r\n" + bytes(range(250)) * 2)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_run():
    """The folder of a run of two steps"""
    engine, train_gpt2.GPT2 = train_gpt2.GPT2, NullEngine
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            for name, content in {"model.bin": tiny_model(3, *SHAPE), "shard.bin": shard()}.items():
                (Path(folder) / name).write_bytes(content)
            flags = "-e {0}/model.bin -i {0}/shard.bin -j {0}/shard.bin -b 2 -t 8 -x 2 -v 1 -s 0 -m 1 -o {0}/run"
            assert train_gpt2.main(flags.format(folder).split()) == 0
            return {f"run/{name}": content for name, content in files_of(Path(folder) / "run").items()}
    finally:
        train_gpt2.GPT2 = engine


def hugging_face(split):
    """The folder of a model, its tensors in one file or in one that an index names"""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder)
        (path / "model.bin").write_bytes(tiny_model(3, *SHAPE))
        export_hf.export(Checkpoint(path / "model.bin"), path / "hf", "fp32")
        (path / "model.bin").unlink()
        if split:
            whole, part = path / "hf/model.safetensors", "model-00001-of-00001.safetensors"
            header = whole.read_bytes()
            names = json.loads(header[8:8 + int.from_bytes(header[:8], "little")])
            whole.rename(path / "hf" / part)
            index = {"weight_map": {name: part for name in names if name != "__metadata__"}}
            (path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
        return files_of(path)


def progress():
    job = ["a job", "bytes", PIECE, BATCH, ["train", "val"]]
    return json.dumps({"job": job, "complete": False, "done": {"train": [1, 0, 0], "val": [0, 0, 0]},
                       "dealt": {"train": [5, 1, "val"], "val": [5, 1, None]}}).encode()


def made_progress():
    """text.py's folder after a run that has not gone on to its end: its own job is in the progress.json"""
    return {"made/t/t.progress.json": progress(), "a.txt": TEXTS[3].encode(),
            "made/t/t_train_000000.bin": shard()}


def vocabulary(*names):
    all_files = {
        "tokenizer.json": tokenizer_json(),
        "vocab.json": json.dumps(json.loads(tokenizer_json())["model"]["vocab"]).encode(),
        "merges.txt": b"#version: 0.2\na b\nab c\n", "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}',
        "generation_config.json": b'{"eos_token_id": 7, "bos_token_id": 7}'}
    return {f"model.tokenizer/{name}": all_files[name] for name in names}


def fineweb():
    data = parquet()
    listing = json.dumps([{"path": "sample/10BT/a.parquet", "size": len(data), "type": "file"}]).encode()
    return {"fineweb10B/parquet/files.json": listing, "fineweb10B/parquet/a.parquet": data}


OLD = "vocab.json", "merges.txt", "tokenizer_config.json"
FILES = {
    "debug": lambda: {"s.bin": debug_state(), "s.json": debug_json()},
    "tokenizer.bin": lambda: {"data/gpt2_tokenizer.bin": tokenizer()},
    "run": a_run,
    "evaluation": lambda: {"set.bin": evaluation_set(*(([1, 2, 3], [[4, 5], [6]], i % 2) for i in range(3)))},
    "main.log": lambda: {"main.log": b"s:0 tel:5.1234\ns:0 trl:5.0000 lr:0.000100 norm:1.25\n"
                                     b"s:1 trl:4.5000 lr:0.000100 norm:1.20\ns:1 eval:0.2500\n"},
    "config.json": lambda: hugging_face(False), "safetensors": lambda: hugging_face(False),
    "index.json": lambda: hugging_face(True),
    "tokenizer.json": lambda: vocabulary("tokenizer.json"),
    "vocab.json": lambda: vocabulary(*OLD), "merges.txt": lambda: vocabulary(*OLD),
    "generation_config.json": lambda: vocabulary("tokenizer.json", "generation_config.json"),
    "tokenizer_config.json": lambda: vocabulary(*OLD),
    "progress.json": made_progress,
    ".txt": lambda: {"a.txt": "\n\n".join(TEXTS).encode()}, ".jsonl": lambda: {"a.jsonl": json_lines()},
    ".json": lambda: {"a.json": json.dumps([{"text": text} for text in TEXTS]).encode()},
    ".csv": lambda: {"a.csv": b"n,text\n1,one\n2,\"two, three\"\n3,\n"}, ".parquet": lambda: {"a.parquet": parquet()},
    ".zip": lambda: {"a.zip": zipped()}, ".gz": lambda: {"a.jsonl.gz": gzip.compress(json_lines())},
    ".bz2": lambda: {"a.jsonl.bz2": bz2.compress(json_lines())},
    ".xz": lambda: {"a.jsonl.xz": lzma.compress(json_lines())},
    ".zst": lambda: {"a.jsonl.zst": zstandard(json_lines())},
    "hellaswag .jsonl": lambda: {"hellaswag/hellaswag_val.jsonl": b"".join(
        json.dumps({"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": i}).encode() + b"\n" for i in range(4))},
    "mmlu .tar": lambda: {"mmlu/data.tar": archive("w", {"data/test/a_test.csv": questions(),
                                                         "data/test/b_test.csv": questions()})},
    "tinystories .tar.gz": lambda: {"tinystories/TinyStories_all_data.tar.gz": archive("w:gz", {
        f"data{i}.json": json.dumps([{"story": text} for text in TEXTS]).encode() for i in range(2)})},
    "fineweb listing": fineweb, "fineweb .parquet": fineweb,
    "HTTP answer": lambda: {"answer.http": http()},
}


@functools.cache
def seeds_of(name):
    """{path: content} of what the readers of a format need"""
    group = {"debug state": "debug", "debug .json": "debug", "state": "run", "run .json": "run", "run's model": "run",
             "run's main.log": "run", "evaluation set": "evaluation", "model": "evaluation"}.get(name, name)
    model = name in ("shard", "model", "evaluation set", "tokenizer.bin", "tokenizer.json", "vocab.json", "merges.txt",
                     "generation_config.json", "tokenizer_config.json") or group in ("debug", "run")
    files = {"model.bin": tiny_model(3, *SHAPE), "shard.bin": shard()} if model else {}
    files |= FILES.get(group, dict)()
    if name in ("state", "run's model"):  # without checksums, by which every change would be refused before it is read
        path = "run/run_00000002.json"
        said = json.loads(files[path])
        files[path] = json.dumps({key: said[key] for key in said if key != "sums"}).encode()
    return files
