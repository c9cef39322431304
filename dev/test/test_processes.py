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
    assert "step 1/" in capfd.readouterr().out


def test_processes_take_turns_at_the_data(flags, monkeypatch):
    """All go through the same batches, for training and for validation: what a lone process reads, two divide."""
    def batches(processes, micro_batches):
        read = []

        class Reader(NullEngine):
            def forward(self, inputs, targets=None, train=True):
                read.append((train, inputs.tolist()))
                return super().forward(inputs, targets, train)
        monkeypatch.setattr(train_gpt2, "GPT2", Reader)
        given = parse_flags(flags("-x 3 -v 1 -m 4"))
        given.micro_batches = micro_batches
        train_gpt2.train(given, processes)
        return [x for train, x in read if train], [x for train, x in read if not train]
    (training, validation), (ours, ours_too) = batches(ALONE, 4), batches(Second(), 2)
    assert len(training) == 12 and ours == training[1::2]
    assert len(validation) == 16 and ours_too == validation[1::2]
