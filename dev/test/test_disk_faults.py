"""Disks that are full, folders that cannot be written."""
import errno
import io
import os

import pytest
from null_engine import NullEngine
from runs import Written, complete, contents

from dev.run import checkpoints, files, folder

resource = pytest.importorskip("resource", reason="Unix only")


class FullDisk(Written):
    """A file on a disk that is full after so many writes, of all files together"""

    def __init__(self, file, writes):
        super().__init__(file)
        self.writes = writes

    def write(self, data):
        if next(self.writes, None) is None:
            self.file.write(data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def fill_disk(patch, writes):
    """From now on the trainer's files are on a disk that is full after so many writes."""
    left = iter(range(writes))

    def open_file(path, mode="r"):
        return FullDisk(open(path, mode), left) if mode == "xb" else open(path, mode)
    for module in files, checkpoints:
        patch.setattr(module, "open", open_file, raising=False)


@pytest.mark.parametrize("room", range(7))
def test_full_disk(train, out, monkeypatch, room):
    """Writes: main.log; the model's header and weights; the state's header, m, v and seven arrays; the run."""
    train("-x 4 -n 2 -nk 1")
    before = contents(out)
    with monkeypatch.context() as patch:
        fill_disk(patch, 2 * room)
        printed = train("-x 6 -n 2 -nk 1 -y 1", status=1)
    assert "No space left on device" in printed and str(out) in printed
    after = contents(out)
    assert complete(out) == [4] and not list(out.glob("*.tmp"))
    assert {name: after[name] for name in before if name != "main.log"} == {
        name: content for name, content in before.items() if name != "main.log"}


def test_a_full_disk_is_made_room_on(train, out, tmp_path, monkeypatch):
    train(f"-x 6 -n 2 -nk 1 -o {tmp_path / 'whole'}")
    train("-x 4 -n 2 -nk 1")
    with monkeypatch.context() as patch:
        fill_disk(patch, 5)
        train("-x 6 -n 2 -nk 1 -y 1", status=1)
    train("-x 6 -n 2 -nk 1 -y 1")
    assert contents(out) == contents(tmp_path / "whole")


def test_full_disk_at_the_end_of_a_file(train, out, monkeypatch):
    """Some file systems find out no sooner than fsync."""
    train("-x 4 -n 2")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "No space left" in train("-x 6 -n 2 -y 1", status=1)
    assert complete(out) == [2, 4] and not list(out.glob("*.tmp"))


def test_a_limit_on_file_sizes(train, out):
    """The same from the operating system: a model fits, a state does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        assert "File too large" in train("-x 4 -n 2", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(contents(out)) == ["main.log", "model_00000002.bin"]
    assert "no checkpoint in" in train("-x 4 -n 2 -y 1") and complete(out) == [2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# a log that cannot be written

def at_steps(patch, **acts):
    """Have at_3=act call act() in the update of step 3."""
    update = NullEngine.update

    def acting(engine, step, *args, **more):
        acts.get(f"at_{step}", int)()
        update(engine, step, *args, **more)
    patch.setattr(NullEngine, "update", acting)


class LogOnFullDisk(io.FileIO):
    """A file that can have `room` bytes, as the system would have it: the last write that fits is cut short"""
    room = None

    def write(self, data):
        data = data[:max(0, self.room - self.seek(0, os.SEEK_END))]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [1000, 1003, 1020])
@pytest.mark.parametrize("again", [40, None])
def test_no_room_for_the_log(train, out, tmp_path, monkeypatch, room, again):
    """The run goes on. Of the line that finds no room a part may be there; where there is room again, all is."""
    train(f"-x 60 -n 60 -o {tmp_path / 'whole'}")
    whole = contents(tmp_path / "whole")
    monkeypatch.setattr(LogOnFullDisk, "room", room)
    at_steps(monkeypatch, **{f"at_{again}": lambda: monkeypatch.setattr(LogOnFullDisk, "room", 1 << 20)})
    monkeypatch.setattr(folder, "open", lambda path, mode="r", *more: LogOnFullDisk(path, mode) if mode == "ab" else
                        open(path, mode, *more), raising=False)
    printed = train("-x 60 -n 60")
    assert printed.count(f"cannot write {out / 'main.log'}: No space left on device: ") == 1
    assert contents(out) == whole | {"main.log": whole["main.log"][:None if again else room]}


def test_the_folder_is_away_for_a_while(train, out, tmp_path, monkeypatch):
    """as one of another machine may be, twice"""
    train(f"-x 20 -n 10 -o {tmp_path / 'whole'}")
    away = tmp_path / "away"
    at_steps(monkeypatch, at_2=lambda: out.rename(away), at_6=lambda: away.rename(out),
             at_12=lambda: out.rename(away), at_15=lambda: away.rename(out))
    printed = train("-x 20 -n 10")
    assert printed.count(f"cannot write {out / 'main.log'}: No such file or directory: ") == 2
    assert contents(out) == contents(tmp_path / "whole")


def test_checkpoints_without_a_log(train, out, monkeypatch):
    """What cannot be logged does not keep a checkpoint from being written."""
    def spoil():
        (out / "main.log").unlink()
        (out / "main.log").mkdir()
    at_steps(monkeypatch, at_2=spoil)
    assert "main.log: Is a directory: " in train("-x 8 -n 4")
    assert complete(out) == [4, 8]


# ---------------------------------------------------------------------------------------------------------------------
# folders

@pytest.mark.parametrize("resume", [0, 1])
def test_a_folder_that_cannot_be(train, tmp_path, resume):
    (tmp_path / "file").touch()
    assert "file/out" in train(f"-x 1 -n 1 -y {resume} -o {tmp_path}/file/out", status=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(train, out):
    out.mkdir(mode=0o555)
    assert str(out) in train("-x 1 -n 1", status=1)
