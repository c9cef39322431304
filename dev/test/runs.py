"""Tiny runs of the trainer, and what a run leaves in its folder. The fixtures for them are in conftest.py."""
import itertools
import os

SHARDS = 300, 100, 10, 170  # tokens; the third is too short for a batch
SAMPLES = [(size - 1) // 16 for size in SHARDS]
N = 39808  # parameters of the tiny model


class Written:
    """A file of which others define the write()"""

    def __init__(self, file):
        self.file = file

    def writelines(self, parts):
        for part in parts:
            self.write(part)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def complete(folder):
    """The steps of the complete checkpoints: those whose files are all there"""
    steps = [int(path.name[5:]) for path in sorted(folder.glob("DONE_*"))]
    for step in steps:
        for name in f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"run_{step:08d}.json":
            assert (folder / name).stat().st_size
    return steps


def log(folder):
    return (folder / "main.log").read_text().splitlines()


def interrupt(patch, number, owner, name, call, times=1):
    """Send this process a signal when a function of the owner is called for the `call`th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args, **more):
        if next(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*args, **more)
    patch.setattr(owner, name, interrupted)
