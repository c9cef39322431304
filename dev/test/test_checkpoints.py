"""Checkpoints of a model: what is written is read again, and an interrupted write leaves the old file."""
from pathlib import Path

import numpy as np
import pytest
from models import ODD, unsettled

from dev.run.checkpoints import write_model
from dev.run.files import write_file
from train_gpt2 import GPT2Config, build

HERE = Path(__file__).parent


def test_checkpoint_round_trip(tiny, tmp_path):
    model, path = build(tiny), tmp_path / "model.bin"
    assert model.config == GPT2Config(64, 300, 384, 2, 2, 32)
    assert model.host("params").memory.tobytes() == Path(tiny).read_bytes()[1024:]
    path.write_text("an older file")
    write_model(str(path), model)
    assert path.read_bytes() == Path(tiny).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]


def test_round_trip_of_another_shape(tmp_path):
    model, path = unsettled(ODD), str(tmp_path / "model.bin")
    write_model(path, model)
    copy = build(path)
    assert np.fromfile(path, np.int32, 8).tolist() == [20240326, 3, 9, 37, 3, 4, 20, 128]
    assert copy.config == ODD and copy.host("params").memory.tobytes() == model.host("params").memory.tobytes()


def test_bfloat16_checkpoint(tiny):
    bits = np.frombuffer((HERE / "gpt2_tiny_bf16.bin").read_bytes()[1024:], np.uint16)
    model = build(str(HERE / "gpt2_tiny_bf16.bin"))
    assert (model.host("params").memory.view(np.uint32) == bits.astype(np.uint32) << 16).all()
    full = build(tiny).host("params").memory
    assert (np.abs(model.host("params").memory - full) <= np.abs(full) / 256).all()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_text("the old file")
    with pytest.raises(TypeError):
        write_file(str(path), np.zeros(3), object())
    assert path.read_text() == "the old file" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        write_file(str(tmp_path / "missing" / "file.bin"), np.zeros(3))
