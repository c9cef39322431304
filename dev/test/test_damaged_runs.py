"""Checkpoints of a run that are damaged, or that belong to another model or to other data."""
import itertools
import json
import shutil
import struct
import zlib

import pytest
from null_engine import NullEngine
from runs import SHARDS, N, contents

import train_gpt2
from dev.run.checkpoints import write_model


@pytest.fixture
def refused(train, out):
    """refused(flags, *words): resuming must end with an error that has the words, and leave every file as it was."""
    def refused(flags, *words):
        before = contents(out)
        printed = train(f"-x 9 -n 2 -y 1 {flags}", status=1)
        for word in words:
            assert word in printed
        assert contents(out) == before and "step 4/" not in printed
    return refused


def damage(path, size=None, **words):
    """Cut a file to a size (or so many bytes from its end, or longer), or put 32-bit words at offsets "at_..."."""
    content = bytearray(path.read_bytes())
    for at, word in words.items():
        struct.pack_into("<I", content, int(at[3:]) if at[3] != "_" else len(content) - int(at[4:]), word)
    content = content[:size] + bytes(max(0, (size or 0) - len(content)))
    path.write_bytes(content)


def forget_sums(folder):
    """Take the checksums out of a folder's run_*.json, as those of old have none."""
    for path in folder.glob("run_*.json"):
        said = json.loads(path.read_text())
        del said["sums"]
        path.write_text(json.dumps(said))


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("name, size", [
    *itertools.product(["model_00000004.bin"], [0, 1000, 1024, 50_000, -1]),
    *itertools.product(["state_00000004_00000.bin"],
                       [0, 1000, 1024, 100_000, 200_000, 1024 + 8 * N, -2521, -2520, -100, -4, -1]),
    *itertools.product(["run_00000004.json"], [0, 1, 30, -1]),
    ("model_00000004.bin", 1025 + 4 * N), ("state_00000004_00000.bin", 400_000),
])
def test_truncated_checkpoints(train, refused, out, name, size, sums):
    train("-x 4 -n 2")
    if not sums:
        forget_sums(out)
    damage(out / name, size)
    refused("", name)


@pytest.mark.parametrize("name", ["model_00000004.bin", "state_00000004_00000.bin"])
def test_done_without_its_files(train, refused, out, name):
    train("-x 4 -n 2")
    (out / name).unlink()
    refused("", name)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("words", [
    {"at_0": 20240326}, {"at_4": 2}, {"at_8": 0}, {"at_16": 1}, {"at_20": 0}, {"at_40": 5}, {"at_120": 4},
    {"at_124": 1}, {"at__2512": 0}, {"at__2508": 1}, {"at__2508": 700}, {"at__2508": 2**31}, {"at__2524": 1000},
    {"at__2524": 2**32 - 1}, {"at_80": 0, "at_84": 0}, {"at_128": 100}, {"at_132": 1}, {"at_128": 2**32 - 1},
    *({f"at_{1024 + 8 * N + at}": count} for at, count in ((0, 0), (0, 3), (0, 5), (0, 2**32 - 1), (4, 1), (4, 2**31))),
])
def test_damaged_states(train, refused, out, words, sums):
    """Also a sampler's state of 0, at 80, samples beyond the shard, at 128, and the number of shards, after the
    moments: without sums they are seen, too."""
    train("-x 4 -n 2")
    if not sums:
        forget_sums(out)
    damage(out / "state_00000004_00000.bin", **words)
    refused("", "state_00000004_00000.bin", "DONE_00000004: then -y 1 goes on from step 2")


# ---------------------------------------------------------------------------------------------------------------------
# checksums

@pytest.mark.parametrize("engine", ["train", "really_train"])
@pytest.mark.parametrize("name, at", [
    *itertools.product(["model_00000004.bin"], [8, 900, 1024, 1024 + 4 * N - 1]),
    *itertools.product(["state_00000004_00000.bin"], [600, 1024, 1024 + 4 * N, 1024 + 8 * N - 1, -1, -600])])
def test_a_bit_is_flipped(request, engine, refused, out, name, at):
    """in weights, moments, the order of batches: nothing else would notice. The checkpoint before it is sound."""
    train = request.getfixturevalue(engine)
    train("-x 4 -n 2")
    data = bytearray((out / name).read_bytes())
    data[at] ^= 1
    (out / name).write_bytes(data)
    words = [] if at == 8 else ["damaged, or changed since it was written"]  # the longest sequence
    refused("", f"error: {out / name}", f"remove {out / 'DONE_00000004'}: then -y 1 goes on from step 2", *words)
    (out / "DONE_00000004").unlink()
    assert ", step 2 of 9" in train("-x 9 -n 2 -y 1")


def test_sums_are_those_of_the_files(train, out):
    train("-x 4 -n 2 -v 2")
    sums = json.loads((out / "run_00000004.json").read_text())["sums"]
    names = "state_00000004_00000.bin", "model_00000004.bin"
    assert sums == {name: zlib.crc32((out / name).read_bytes()) for name in names}


@pytest.mark.parametrize("sums", ["3", "[]", '{"model_00000004.bin": "7"}', '{"model_00000004.bin": -1}',
                                  '{"state_00000004_00000.bin": 1e999}', '{"model_00000004.bin": 99999999999}'])
def test_sums_that_are_none(train, refused, out, sums):
    train("-x 4 -n 2")
    forget_sums(out)
    path = out / "run_00000004.json"
    path.write_text(path.read_text()[:-1] + f', "sums": {sums}}}')
    refused("", "_00000004")


def test_checkpoints_of_old(train, out, tmp_path):
    """have no sums, and are read"""
    train(f"-x 9 -n 2 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2")
    forget_sums(out)
    train("-x 9 -n 2 -y 1")
    assert {**contents(out), "run_00000002.json": 0, "run_00000004.json": 0} == {
        **contents(tmp_path / "whole"), "run_00000002.json": 0, "run_00000004.json": 0}


# ---------------------------------------------------------------------------------------------------------------------
# other models, other data


@pytest.mark.parametrize("text", [
    "[]", "{}", "null", "7", '"tokens_per_batch"', '{"tokens_per_batch": 16}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": 3}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [["a"], []]}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[1e999], []]}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[1e300], []]}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[], []], "model": "\\ud800"}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[1' + "0" * 400 + "], []]}",
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[], []], "coins": 0}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[], []], "zero_stage": "1"}',
    '{"tokens_per_batch": 0, "shard_tokens": [300, 100, 10, 170], "windows": [[], []]}',
    '{"tokens_per_batch": -16, "shard_tokens": [300, 100, 10, 170], "windows": [[], []]}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[], []], "offset": -8}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10, 170], "windows": [[], []], "offset": 16}',
    '{"tokens_per_batch": 16, "shard_tokens": [], "shards": [], "windows": [[], []], "offset": "8"}',
    '{"tokens_per_batch": 16, "shard_tokens": [300, 100, 10], "shards": ["shard_0.bin"], "windows": [[], []]}',
    "[" * 100_000 + "]" * 100_000, '{"x": ' * 500 + "1" + "}" * 500,
])
def test_damaged_run_file(train, refused, out, text):
    train("-x 4 -n 2")
    (out / "run_00000004.json").write_text(text)
    refused("", "run_00000004.json")


def test_without_our_own_file(train, out, tmp_path):
    train(f"-x 9 -n 2 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2")
    (out / "run_00000004.json").unlink()
    train("-x 9 -n 2 -y 1")
    for name in "model_00000009.bin", "state_00000009_00000.bin", "main.log":
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("overfit", [0, 1])
@pytest.mark.parametrize("shape", [(64, 300, 384, 1, 2, 32), (64, 300, 384, 3, 2, 32)])
def test_state_of_another_model(train, refused, out, tmp_path, overfit, shape):
    maxT, V, Vp, L, NH, C = shape
    config = train_gpt2.GPT2Config(maxT, V, Vp, L, NH, C)
    write_model(str(tmp_path / "other.bin"), NullEngine(config, train_gpt2.parameter_table(config)))
    train(f"-x 4 -n 2 -a {overfit}")
    shutil.copy(tmp_path / "other.bin", out / "model_00000004.bin")
    refused(f"-a {overfit}", "model_00000004.bin: damaged, or changed", "HINT")
    forget_sums(out)
    refused(f"-a {overfit}", "state_00000004_00000.bin", "HINT")


@pytest.mark.parametrize("change", ["-b 4", "-t 4", "-b 1", "-t 9", "-a 1"])
def test_batches_of_another_size(train, refused, out, change):
    """go on, see test_resume.py, where it is known of which size they were"""
    train("-x 4 -n 2")
    if change in ("-t 9", "-a 1"):
        refused(change, "HINT")
    (out / "run_00000004.json").unlink()
    refused(change, "HINT")


@pytest.mark.parametrize("change", ["one before", "one less", "longer", "shorter"])
@pytest.mark.parametrize("overfit", [0, 1])
def test_other_shards(train, refused, shards, make_shard, tmp_path, change, overfit):
    data = f"-a 1 -j {shards}" if overfit else ""
    train(f"-x 4 -n 2 {data}")
    if change == "one before":
        make_shard(tmp_path / "shard_.bin", range(100))
    elif change == "one less":
        (tmp_path / "shard_2.bin").unlink()
    else:
        for i, size in enumerate(SHARDS):
            make_shard(tmp_path / f"shard_{i}.bin", range(size + 32 if change == "longer" else max(0, size - 32)))
    refused(data, "shard", "HINT")


def test_the_same_shards_in_another_place(train, flags, out, tmp_path):
    train(f"-x 9 -n 2 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2")
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("shard_*"):
        shutil.copy(path, tmp_path / "moved")
    train(f"-x 9 -n 2 -y 1 -i {tmp_path}/moved/s*.bin")
    assert contents(out) == contents(tmp_path / "whole")
