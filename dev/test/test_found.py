"""What exists is found: a run's folder, a folder of shards, what other programs have written."""
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from dev import generate
from dev.data import inspect_bin
from dev.eval import convert_bin, export_hf
from dev.run import files
from dev.run.console import program
from dev.run.data import DEFAULT, choose_data, find_shards, tokens_in
from dev.run.files import HEADER_BYTES
from dev.run.flags import parse_flags
from dev.run.found import model_file, shards_of
from train_gpt2 import DataLoader, build


@pytest.fixture
def folder(make_shard, tmp_path, rng):
    """A folder with a shard for training and one for validation; brackets are no pattern in a folder's name"""
    folder = tmp_path / "my[1]shards"
    folder.mkdir()
    for part in "train", "val":
        make_shard(folder / f"x_{part}_000000.bin", rng.integers(0, 300, 2000))
    return folder


def losses(text):
    return [line.partition(" (took")[0] for line in text.splitlines() if "loss" in line]


def test_folders_of_a_run_and_of_shards(train, folder, out, tmp_path):
    data = f"-i {folder} -j {folder} -x 4 -v 2"
    first = train(f"{data} -n 2")
    assert f"data: {folder}/*_train_" in first and (out / "model_00000002.bin").exists()
    named = train(f"-i {folder}/x_train_000000.bin -j {folder}/x_val_000000.bin -x 4 -v 2 -o {tmp_path}/b")
    assert losses(first) == losses(named) and len(losses(first)) > 5
    again = train(f"-e {out} {data} -o {tmp_path}/c")
    assert losses(again) == losses(train(f"-e {out}/model_00000004.bin {data} -o {tmp_path}/d")) != losses(first)


def test_validation_of_the_same_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = parse_flags(["-i", folder.name])
    choose_data(flags, "d6")
    assert [find_shards(flags.input_bin), find_shards(flags.input_val_bin)] == [
        [f"{folder.name}/x_{part}_000000.bin"] for part in ("train", "val")]


@pytest.mark.parametrize("name", ["valley", "retrain", "x_val_2", "my_train"])
@pytest.mark.parametrize("number", ["_000000", ""])
def test_train_and_val_in_a_folder_s_name(make_shard, tmp_path, name, number):
    for part in "train", "val":
        make_shard(tmp_path / f"{name}_{part}{number}.bin", [1, 2, 3])
        assert find_shards(shards_of(str(tmp_path), part)) == [str(tmp_path / f"{name}_{part}{number}.bin")]


def test_generate_from_a_run(really_train, folder, out, capfd):
    really_train(f"-i {folder} -j {folder} -x 1")
    assert generate.main(["-e", str(out), "-n", "5", "--past_end"]) == 0
    assert "5 tokens in" in capfd.readouterr().err


def test_converters_take_a_run_s_folder(train, out, tmp_path, monkeypatch):
    """and take its newest checkpoint, with the tokenizer that it has"""
    train("-x 4 -n 2 -v 0")
    newest = out / "model_00000004.bin"
    (out / "model_00000002.bin").write_bytes(b"older")
    (out / "model.tokenizer").mkdir()
    (out / "model.tokenizer/vocab.json").write_text("{}")
    for main, *flags in ((convert_bin.main, "-o", tmp_path / "new.bin", "-d", "fp32"),
                         (export_hf.main, "-o", tmp_path / "hf")):
        monkeypatch.setattr("sys.argv", ["x", "-i", str(out), *map(str, flags)])
        main()
    assert (tmp_path / "new.bin").read_bytes() == newest.read_bytes()
    assert (tmp_path / "new.tokenizer/vocab.json").exists() and (tmp_path / "hf/vocab.json").exists()
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "hf").iterdir()}


@pytest.mark.parametrize("name", ["d6", "no/such"])
def test_what_is_no_checkpoint_is_not_converted(name):
    with pytest.raises(FileNotFoundError, match=f"no such checkpoint: {name}\n---> HINT: name a .bin"):
        convert_bin.Checkpoint(name)


def test_pytorch_takes_a_run_s_folder(train, out):
    reference = pytest.importorskip("dev.train_gpt2_torch", reason="PyTorch is not installed")
    train("-x 2 -n 1")
    assert reference.build_model(str(out))[0] == "model_00000002"


@pytest.fixture
def inspect(capfd):
    """inspect(path): the exit status of dev/data/inspect_bin.py and what it prints"""
    def inspect(path):
        argv, sys.argv = sys.argv, ["inspect_bin.py", str(path)]
        try:
            status = program(inspect_bin.main)
        except SystemExit as end:
            status = end.code
        finally:
            sys.argv = argv
        return status, "".join(capfd.readouterr())
    return inspect


def test_inspecting_a_run_s_folder(train, out, inspect):
    train("-x 6 -n 2")
    (out / "DONE_00000002").unlink()
    status, said = inspect(out)
    assert status == 0 and "3 checkpoints" in said and f"-e takes         {out}/model_00000006.bin\n  OK\n" in said
    sizes = [sum(path.stat().st_size for path in out.glob(f"*_{step:08d}*")) for step in (2, 4, 6)]
    assert re.findall(r"step (\d)  +([\d,]+) bytes, (.*)", said) == [
        ("2", f"{sizes[0]:,}", "incomplete: no DONE_00000002"), ("4", f"{sizes[1]:,}", "complete"),
        ("6", f"{sizes[2]:,}", "complete")]
    (out / "state_00000004_00000.bin").unlink()
    status, said = inspect(out)
    assert status == 1 and "PROBLEM: state_00000004_00000.bin is missing" in said and said.endswith("  NOT OK\n")
    os.truncate(out / "model_00000006.bin", 10)
    (out / "DONE_00000004").unlink()
    status, said = inspect(out)
    assert status == 1 and f"error: {out}/model_00000006.bin is cut short" in said and "---> HINT: " in said


def test_inspecting_tokens_of_others(inspect, tmp_path, rng, make_shard):
    rng.integers(0, 50257, 3000).astype("<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "val.npy", rng.integers(0, 65, 500).astype(np.int32))
    make_shard(tmp_path / "shard.bin", [1, 2, 3])
    status, said = inspect(tmp_path)
    command = f"to train on it   python dev/data/import_tokens.py {tmp_path}\n"
    assert status == 0 and said.count("  OK\n") == 3 and said.count(command) == 2
    assert "train.bin: perhaps raw tokens, as nanoGPT's, 6,000 bytes" in said and "3,000 of uint16" in said
    assert "val.npy: an array of NumPy's" in said and "500 of int32" in said
    np.save(tmp_path / "val.npy", np.array([1, -1]))
    assert inspect(tmp_path / "val.npy")[0] == 1
    np.save(tmp_path / "val.npy", np.zeros((2, 2)))
    status, said = inspect(tmp_path / "val.npy")
    assert status == 1 and "error: " in said and "expected a list of integers" in said


@pytest.mark.parametrize("name, content, words", [
    ("x.txt", b"some words", "---> HINT: python dev/data/text.py "),
    ("none/x", b"", "---> HINT: name a run's folder, or files"), ("hf/config.json", b"{}", "hf takes\n")])
def test_inspecting_what_is_none_of_ours(inspect, tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    status, said = inspect(path if path.parent == tmp_path else path.parent)
    assert status == 1 and words in said


def test_a_damaged_header_is_no_tokens_of_others(make_shard, tmp_path):
    path = make_shard(tmp_path / "x.bin", [1, 2, 3], magic=7)
    with pytest.raises(ValueError, match="expected 20240520$"):
        tokens_in(path)


@pytest.mark.parametrize("content, words", [
    ({}, "a folder that a run's -o has named"), ({"config.json": b"{}"}, "no GPT-2 that train_gpt2.py could run"),
])
def test_folders_without_a_checkpoint(train, tmp_path, content, words):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_bytes(text)
    assert words in train(f"-e {folder} -x 1", status=1)


@pytest.fixture
def theirs(tiny, tmp_path):
    """The tiny model in a folder of Hugging Face's"""
    export_hf.export(convert_bin.Checkpoint(tiny), tmp_path / "their model", "fp32")
    return tmp_path / "their model"


def test_a_model_of_hugging_face_s_is_imported_in_passing(theirs, tiny, capsys):
    capsys.readouterr()
    path = theirs / "gpt2.bin"
    assert model_file(str(theirs)) == str(path) and path.read_bytes() == Path(tiny).read_bytes()
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"{theirs}: GPT2Config(") and f"wrote {path} (160,256 bytes" in err
    assert model_file(str(theirs)) == str(path) and capsys.readouterr() == ("", "")
    assert (build(str(theirs)).host("params").memory == build(tiny).host("params").memory).all()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_it_is_imported_anew_where_it_has_changed(theirs, name, capsys):
    """also where what came since is older"""
    model_file(str(theirs))
    capsys.readouterr()
    time.sleep(0.02)
    (theirs / "copy").write_bytes((theirs / name).read_bytes())
    os.utime(theirs / "copy", (1, 1))
    os.replace(theirs / "copy", theirs / name)
    model_file(str(theirs))
    assert "wrote " in capsys.readouterr().err


def test_a_model_that_cannot_be_imported_in_passing(theirs, monkeypatch):
    hint = re.escape(f"---> HINT: python -m dev.eval.import_hf -i '{theirs}' -o 'data/their model.bin', then -e 'data/")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"several processes .*\n{hint}"):
        patch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        model_file(str(theirs))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"nothing can be written .*\n{hint}"):
        patch.setattr(os, "access", lambda path, mode: False)
        model_file(str(theirs))
    (theirs / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors in"):
        model_file(str(theirs))
    assert not (theirs / "gpt2.bin").exists()


@pytest.mark.parametrize("name, save", [
    ("train.bin", lambda path, x: x.astype("<u2").tofile(path)), ("train_0001.npy", lambda path, x: np.save(path, x))])
def test_tokens_of_others(train, tmp_path, rng, name, save):
    """The error names the command that makes shards of them, and the shards are their tokens."""
    (tmp_path / "theirs").mkdir()
    theirs, tokens = tmp_path / "theirs" / name, rng.integers(0, 50257, 3000).astype(np.uint16)
    save(theirs, tokens)
    error = train(f"-i {theirs} -x 1", status=1)
    command = shlex.split(error.partition("python dev/data/import_tokens.py ")[2].splitlines()[0])
    assert command == [str(theirs.parent)]
    script = [sys.executable, ROOT / "dev/data/import_tokens.py", "--data_dir", tmp_path / "ours", "-s", "1000"]
    done = subprocess.run([*script, *command], capture_output=True, text=True)
    assert done.returncode == 0 and re.search("train with: -i .* -v 0$", done.stdout, re.M), done.stderr
    ours = sorted((tmp_path / "ours" / "theirs").iterdir())
    assert [tokens_in(path) for path in ours] == [1000] * 3
    assert (np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in ours]) == tokens).all()
    assert DataLoader(str(ours[0].parent / "*train*.bin"), 2, 16).num_tokens == 3000


@pytest.mark.parametrize("content, words", [
    (b"abc", "no file of uint16"), (np.full(9, 60000, "<u2").tobytes(), "the vocabulary has 50,257"),
    (np.int32([20240520, 1, 2]).tobytes(), "a shard already")])
def test_what_are_no_tokens(tmp_path, content, words):
    (tmp_path / "x.bin").write_bytes(content)
    done = subprocess.run([sys.executable, ROOT / "dev/data/import_tokens.py", tmp_path / "x.bin", "--data_dir",
                           tmp_path / "ours"], capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert not list((tmp_path / "ours").rglob("*.bin"))


def test_text_as_data(tmp_path):
    path = tmp_path / "x y.txt"
    path.write_text("Once upon a time, déjà vu. " * 50)
    with pytest.raises(ValueError, match=re.escape(f"it is text: python dev/data/text.py '{path}'")):
        tokens_in(path)


def test_data_of_the_project_from_another_folder(make_shard, tmp_path, monkeypatch):
    """as long as the current folder has no data/ of its own"""
    (tmp_path / "project/data/tinyshakespeare").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    shard = tmp_path / "project" / DEFAULT[0]
    make_shard(shard, [1, 2, 3])
    monkeypatch.setattr(files, "TOP", str(tmp_path / "project"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_shards(DEFAULT[0]) == [str(shard)]
    assert files.there("data/x") == str(tmp_path / "project/data/x") and files.there("x") == "x"
    with pytest.raises(FileNotFoundError, match=f"\n---> HINT: {shard} is there\n---> HINT: python dev/data/"):
        find_shards("data/other.bin")
    (tmp_path / "elsewhere/data").mkdir()
    assert files.there("data/x") == "data/x"


def test_what_was_imported_is_trained_on_as_printed(train, tmp_path, rng):
    """both files of a folder; tokens of characters are asked about"""
    (tmp_path / "valley").mkdir()
    for name, size in ("train.bin", 900), ("val.bin", 300):
        rng.integers(0, 65, size).astype("<u2").tofile(tmp_path / "valley" / name)
    done = subprocess.run([sys.executable, ROOT / "dev/data/import_tokens.py", tmp_path / "valley", "--data_dir",
                           tmp_path / "ours"], capture_output=True, text=True)
    assert done.returncode == 0 and "--vocab_size 65" in done.stdout, done.stderr
    said = train(f"{done.stdout.partition('train with: ')[2].strip()} -x 1 -v 1")
    assert "train dataset num_batches: 56\nval dataset num_batches: 18\n" in said, said


def test_an_empty_array(tmp_path):
    np.save(tmp_path / "x.npy", np.empty(0, np.uint16))
    done = subprocess.run([sys.executable, ROOT / "dev/data/import_tokens.py", tmp_path / "x.npy", "--data_dir",
                           tmp_path / "ours"], capture_output=True, text=True)
    assert done.returncode == 1 and "has no tokens" in done.stderr
