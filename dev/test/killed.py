"""
Runs of the trainer that are killed. test_resume.py starts this as a process of its own:

    python dev/test/killed.py null|cpu every|random FOLDER FLAG...

It imports and compiles once, then forks a child for every run, so that a kill costs a fraction of a second. The folders
are made in FOLDER. What the folder of a run that was never killed holds at its end, and what those of the others, is
printed as JSON: {"expected": {name: hash}, "found": [{name: hash}, ...], "kills": number}.
"""
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ |= {"NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}  # which a process may fork with

from null_engine import NullEngine
from runs import Written

import train_gpt2
from dev.run import checkpoints, files

# ---------------------------------------------------------------------------------------------------------------------
# a process that kills itself just before its k-th change to the file system, or in the middle of it


class Halves(Written):
    """A file whose every write is two, with a moment to die in between"""

    def __init__(self, file, moment):
        super().__init__(file)
        self.moment = moment

    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.moment()
        self.file.write(data[half:])


def die_at(k, folder):
    """Kill this process at the k-th moment from now."""
    left = k

    def moment():
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def audit(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate") and str(args[0]).startswith(folder):
            moment()

    def open_file(path, mode="r"):
        return open(path, mode) if mode in ("r", "rb") else Halves(open(path, mode), moment)
    sys.addaudithook(audit)
    os.fsync, files.open, checkpoints.open = lambda descriptor: moment(), open_file, open_file


def run(folder, flags, kill_at=None):
    """Start a run in a child; returns its process id"""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if kill_at is not None:
            die_at(kill_at, str(folder))
        status = train_gpt2.main([*flags, "-o", str(folder)])
    finally:
        os._exit(status)


def killed(child):
    """Wait for a run to end. Was it killed? Anything else but success is an error."""
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a run ended with status {status}")
    return status == signal.SIGKILL


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------------------------
# which runs are killed, and when

def kill_at_every_moment(folder, flags, duration):
    """A run for every moment. Every third is killed again when it is resumed, while it looks through old files."""
    rng, found, kills = random.Random(1), [], 0
    while killed(run(folder, flags, kill_at=len(found))):
        kills += 1
        if kills % 3 == 0:
            kills += killed(run(folder, [*flags, "-y", "1"], kill_at=rng.randrange(20)))
        assert not killed(run(folder, [*flags, "-y", "1"]))
        found.append(contents(folder))
        shutil.rmtree(folder)
    return found, kills


def kill_at_random(folder, flags, duration, least=24):
    """Runs that are killed again and again until they end by themselves: half of the times while a file is written."""
    rng, found, kills = random.Random(2), [], 0
    while kills < least:
        child = run(folder, [*flags, "-y", "1"])
        deadline = time.monotonic() + rng.uniform(0, duration)
        name = rng.choice(["model_*.tmp", "state_*.tmp", None, None])
        while time.monotonic() < deadline and not (name and list(folder.glob(name))):
            time.sleep(0)
        os.kill(child, signal.SIGKILL)
        if killed(child):
            kills += 1
        else:
            found.append(contents(folder))
            shutil.rmtree(folder)
    assert not killed(run(folder, [*flags, "-y", "1"]))
    return [*found, contents(folder)], kills


if __name__ == "__main__":
    engine, how, folder, *flags = sys.argv[1:]
    folder = Path(folder)
    folder.mkdir()
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while there are threads: Numba's sleep
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if engine == "null":
        train_gpt2.GPT2 = NullEngine
    else:
        train_gpt2.load_kernels(train_gpt2.run_kernels)
        train_gpt2.measure_peak = lambda panels: 1.0  # which takes longer than a run
    os.fsync = lambda descriptor: None  # it only matters when the machine dies
    start = time.monotonic()
    assert not killed(run(folder / "expected", flags))
    duration = time.monotonic() - start
    kill = {"every": kill_at_every_moment, "random": kill_at_random}[how]
    found, kills = kill(folder / "killed", flags, duration)
    os.dup2(stdout, 1)
    print(json.dumps({"expected": contents(folder / "expected"), "found": found, "kills": kills}))
