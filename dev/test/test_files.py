"""dev/run/files.py: headers, and files that are complete or absent."""
import os
import re
import stat

import numpy as np
import pytest

from dev.run import files
from dev.run.files import NewFile, new_header, read_header, remove_temporary, write_file


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
        assert re.fullmatch(r"x x\.[0-9a-f]{16}\.tmp", " ".join(names(tmp_path)))
        assert (tmp_path / "x").read_bytes() == b"old"
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


# ---------------------------------------------------------------------------------------------------------------------
# nothing of the user's is replaced by accident

def write_over(path):
    with NewFile(path) as file:
        file.write(b"new")


def test_a_link_of_the_users_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_bytes(b"old")
    (tmp_path / "chain").symlink_to("far/x")
    for link, end in ("link", "chain"), ("new", "far/y"):
        (tmp_path / link).symlink_to(end)
        write_over(tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / link).read_bytes() == b"new"
    assert names(tmp_path / "far") == ["x", "y"] and (tmp_path / "chain").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Unix only")
@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_plain_file_is_refused(tmp_path, kind, through_a_link):
    path = tmp_path / "x" if kind != "device" else os.devnull
    if kind != "device":
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    if through_a_link:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    before = names(tmp_path), stat.S_IFMT(os.stat(path).st_mode)
    for write in write_over, write_file:
        with pytest.raises(ValueError, match=f"{path} is a {kind}, expected the name of a file"):
            write(path)
    assert (names(tmp_path), stat.S_IFMT(os.stat(path).st_mode)) == before


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Not even one at the very name: it is an error, and what it points to stays."""
    (tmp_path / "theirs").write_bytes(b"precious")
    (tmp_path / "x.tmp").symlink_to("theirs")  # the name in earlier versions
    write_over(tmp_path / "x")
    assert (tmp_path / "x.tmp").is_symlink()
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: size * "00")
    (tmp_path / f"x.{16 * '0'}.tmp").symlink_to("theirs")
    with pytest.raises(FileExistsError):
        write_over(tmp_path / "x")
    assert (tmp_path / "theirs").read_bytes() == b"precious"


def test_temporary_names_cannot_be_foreseen(tmp_path):
    assert len({NewFile(tmp_path / "x").temporary for _ in range(100)}) == 100


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only the superuser makes others' links")
@pytest.mark.parametrize("mode, refused", [(0o1777, True), (0o777, False), (0o1755, False)])
def test_a_strangers_link_in_a_folder_for_all(tmp_path, mode, refused):
    (tmp_path / "theirs").write_bytes(b"precious")
    (tmp_path / "x").symlink_to("theirs")
    os.chown(tmp_path / "x", 12345, 12345, follow_symlinks=False)
    tmp_path.chmod(mode)
    if refused:
        with pytest.raises(ValueError, match="x is another user's link"):
            write_over(tmp_path / "x")
    else:
        write_over(tmp_path / "x")
    assert (tmp_path / "theirs").read_bytes() == (b"precious" if refused else b"new")


def test_only_our_own_leftovers_are_removed(tmp_path):
    ours = ["a_1.bin.tmp", "a_2.bin.0123456789abcdef.tmp"]
    others = ["thesis.tmp", "a_1.bin", "a_x.bin.tmp", "a_1.bin.0123.tmp", "a_1.bin.bak.tmp", "b_a_1.bin.tmp"]
    for name in ours + others:
        (tmp_path / name).touch()
    remove_temporary(tmp_path, r"a_\d\.bin")
    assert names(tmp_path) == sorted(others)
