"""
What a name on the command line means: a run's folder is its newest checkpoint, a folder of shards those for training or
validation; and what a file is that others' programs wrote.
"""
import glob
import os
import shlex

from dev.run.checkpoints import newest_checkpoint
from dev.run.files import there


def model_file(name):
    """The checkpoint, or the descriptor, that -e means. ValueError for a folder without a checkpoint"""
    name = there(name)
    if not os.path.isdir(name):
        return name
    _, path = newest_checkpoint(name)
    if path is None:
        hint = "name a folder that a run's -o has named, or a checkpoint, .bin"
        if os.path.isfile(os.path.join(name, "config.json")):
            new = f"data/{os.path.basename(os.path.abspath(name))}.bin"
            hint = f"{shlex.join(['python', '-m', 'dev.eval.import_hf', '-i', name, '-o', new])}, then -e {new}"
        raise ValueError(f"{name} has no checkpoint of a run\n---> HINT: {hint}")
    return path


def shards_of(name, part):
    """The pattern of the shards that -i or -j means: of a folder those whose names end with `part`, train or val, and
    a number of six digits; NAME_train.bin where there are none. What else is in a name says nothing."""
    if not os.path.isdir(name):
        return name
    numbered = os.path.join(name, f"*_{part}_{'[0-9]' * 6}.bin")
    some = glob.glob(os.path.join(glob.escape(name), os.path.basename(numbered)))
    return numbered if some else os.path.join(name, f"*_{part}.bin")
