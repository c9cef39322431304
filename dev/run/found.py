"""
What a name on the command line means: a run's folder is its newest checkpoint, a folder of Hugging Face's the model in
it, a folder of shards those for training or validation.
"""
import glob
import os
from pathlib import Path

from dev.run.checkpoints import newest_checkpoint
from dev.run.files import there
from dev.run.hf import imported


def model_file(name):
    """The checkpoint, or the descriptor, that -e means. ValueError for a folder without a model of our kind"""
    name = there(name)
    if not os.path.isdir(name):
        return name
    _, path = newest_checkpoint(name)
    if path is None and os.path.isfile(os.path.join(name, "config.json")):
        path = imported(Path(name))
    if path is None:
        raise ValueError(f"{name} has no checkpoint of a run\n---> HINT: name a folder that a run's -o has named, a "
                         "model of Hugging Face's, or a checkpoint, .bin")
    return path


def shards_of(name, part):
    """The pattern of the shards that -i or -j means: of a folder those whose names end with `part`, train or val, and
    a number of six digits; NAME_train.bin where there are none. What else is in a name says nothing."""
    if not os.path.isdir(name):
        return name
    numbered = os.path.join(name, f"*_{part}_{'[0-9]' * 6}.bin")
    some = glob.glob(os.path.join(glob.escape(name), os.path.basename(numbered)))
    return numbered if some else os.path.join(name, f"*_{part}.bin")
