"""Several processes, seen from one of them: alone, what calls return; else, who speaks."""
import numpy as np
import pytest
from null_engine import NullEngine

import train_gpt2
from dev.run.flags import parse_flags
from dev.run.processes import ALONE, Processes


def test_alone():
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (ALONE.rank, ALONE.size, ALONE.local_rank, ALONE.local_size, ALONE.zero_stage) == (0, 1, 0, 1, 0)
    assert ALONE.sum(2.5) == 2.5 and ALONE.any(1) is True and ALONE.any([]) is False
    piece, = ALONE.pieces(tensor)
    assert np.shares_memory(piece, tensor) and piece.shape == tensor.shape
    for call in ALONE.reduce, ALONE.gather:
        call([tensor])
    ALONE.wait()
    assert tensor.ravel().tolist() == [0, 1, 2, 3, 4, 5]
    with ALONE.first():
        pass
    with pytest.raises(SystemExit, match="3"):
        ALONE.abort(3)


class Second(Processes):
    """The second of two processes, of which the first computes the same"""
    rank, size, local_rank, local_size = 1, 2, 1, 2

    def sum(self, value):
        return 2 * value


def test_only_the_first_process_speaks(flags, monkeypatch, capfd):
    monkeypatch.setattr(train_gpt2, "GPT2", NullEngine)
    given = parse_flags(flags("-x 2 -v 1 -s 1 -g 3"))
    train_gpt2.train(given, Second())
    assert capfd.readouterr() == ("", "")
    train_gpt2.train(given)
    assert "step 1: " in capfd.readouterr().out


def test_processes_take_turns_at_the_data(flags, monkeypatch):
    """Each has its part of every batch, for training and for validation."""
    loaders = []

    class Loader(train_gpt2.DataLoader):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            loaders.append(self)
    monkeypatch.setattr(train_gpt2, "GPT2", NullEngine)
    monkeypatch.setattr(train_gpt2, "DataLoader", Loader)
    train_gpt2.train(parse_flags(flags("-x 1")), Second())
    assert [(loader.rank, loader.processes) for loader in loaders] == [(1, 2), (1, 2)]
