"""dev/run/files.py: headers, and files that are complete or absent."""
import os

import numpy as np
import pytest

from dev.run import files
from dev.run.files import NewFile, new_header, read_header


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_header(tmp_path):
    (tmp_path / "x.bin").write_bytes(new_header(20240520, 1, 7, 2**31 - 1).tobytes() + b"data")
    words = np.frombuffer((tmp_path / "x.bin").read_bytes()[:1024], "<i4")
    assert words[:4].tolist() == [20240520, 1, 7, 2147483647] and not words[4:].any()
    with open(tmp_path / "x.bin", "rb") as file:
        assert (read_header(file, tmp_path / "x.bin", 20240520, (1,)) == words).all()
        assert file.read() == b"data"


def test_magic_numbers_are_llmcs():
    assert {name: value for name, value in vars(files).items() if name.endswith("_MAGIC")} == {
        "SHARD_MAGIC": 20240520, "EVAL_MAGIC": 20240522, "MODEL_MAGIC": 20240326, "STATE_MAGIC": 20240527,
        "DEBUG_STATE_MAGIC": 20240327, "TOKENIZER_MAGIC": 20240328}


def test_a_new_file_appears_when_it_is_complete(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with NewFile(tmp_path / "x") as file:
        file.write(b"new")
        file.flush()
        assert names(tmp_path) == ["x", "x.tmp"] and (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad input"), KeyboardInterrupt()], ids=repr)
def test_a_new_file_vanishes_after_an_error(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(type(error)), NewFile(tmp_path / "x") as file:
        file.write(b"new")
        raise error
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_new_file_vanishes_where_the_system_fails(tmp_path, monkeypatch, call):
    def fails(*arguments):
        if call == "open":  # made, and interrupted before its caller knows
            open(*arguments).close()
        raise KeyboardInterrupt
    monkeypatch.setattr(*((files, "open") if call == "open" else (os, call)), fails, raising=False)
    with pytest.raises(KeyboardInterrupt), NewFile(tmp_path / "x") as file:
        file.write(b"new")
    assert names(tmp_path) == []


def test_a_new_file_in_three_steps(tmp_path):
    for end in "finish", "discard":
        new = NewFile(tmp_path / end)
        new.open().write(b"new")
        getattr(new, end)()
    assert names(tmp_path) == ["finish"] and (tmp_path / "finish").read_bytes() == b"new"
